"""The verbs for tests, awaited: for an AsyncSession. Async transactional handlers get one too, in a savepoint of the
same transaction; plain ones run on the event loop's own thread.
"""

import asyncio
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from sqlalchemy import inspect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session

from sqla_river.args import JobArgs
from sqla_river.errors import SessionError
from sqla_river.models import Job, JobMixin
from sqla_river.options import OptionWords
from sqla_river.river import River
from sqla_river.rows import JobRow
from sqla_river.runner import Runner
from sqla_river.testing import inline, looking
from sqla_river.testing.inline import Inline
from sqla_river.testing.looking import Wanted
from sqla_river.testing.worked import Worked
from sqla_river.workers import Workers

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

A = TypeVar("A", bound=JobArgs)
J = TypeVar("J", bound=JobMixin)


@overload
async def assert_enqueued(
    session: "AsyncSession", args: A | type[A], wanted: Wanted = ..., /, *, river: River[J], **fields: Any
) -> J: ...
@overload
async def assert_enqueued(
    session: "AsyncSession", args: A | type[A], wanted: Wanted = ..., /, *, river: None = None, **fields: Any
) -> Job: ...
async def assert_enqueued(
    session: "AsyncSession", args: Any, wanted: Wanted = looking.ANYTHING, /, **fields: Any
) -> Any:
    """`sqla_river.testing.assert_enqueued`, awaited."""
    __tracebackhide__ = True
    verb: Any = looking.assert_enqueued
    return await _checked(session).run_sync(lambda plain: verb(plain, args, wanted, **fields))


async def refute_enqueued(
    session: "AsyncSession", args: A | type[A], wanted: Wanted = looking.ANYTHING, /, **fields: Any
) -> None:
    """`sqla_river.testing.refute_enqueued`, awaited."""
    __tracebackhide__ = True
    await _checked(session).run_sync(lambda plain: looking.refute_enqueued(plain, args, wanted, **fields))


async def drain(
    session: "AsyncSession",
    workers: Workers | Runner,
    *,
    now: datetime | timedelta | None = None,
    river: River[Any] | None = None,
    limit: int = 1_000,
) -> list[Worked]:
    """`sqla_river.testing.drain`, awaited. The session's objects are refreshed at the end."""
    stations = Inline(workers, river, now)
    await _checked(session).run_sync(stations.begin)
    worked: list[Worked] = []
    while (row := await session.run_sync(lambda plain: stations.next(plain, awaiting=True))) is not None:
        inline.check_limit(limit, worked)
        worked.append(await _work(session, stations, row))
    await session.run_sync(_refresh)
    return worked


async def work_one(
    workers: Workers | Runner,
    args: JobArgs,
    *,
    session: "AsyncSession | None" = None,
    attempt: int = 1,
    river: River[Any] | None = None,
    **options: Unpack[OptionWords],
) -> Worked:
    """`sqla_river.testing.work_one`, awaited."""
    stations = Inline(workers, river, None)
    stations.worker_of(args, session=session is not None)
    inserted = stations.row_of(args, options, attempt)
    if session is None:
        row = inline.loose_row(inserted, attempt)
        executor = stations.executor
        result = inline.told(
            await asyncio.create_task(executor.execute_async(row))
            if executor.is_async(row.kind)
            else executor.execute(row)
        )
        return stations.told(result, result.transition.state)
    await _checked(session).run_sync(stations.begin)
    row = await session.run_sync(stations.put, args, inserted, attempt)
    worked = await _work(session, stations, row)
    await session.run_sync(_refresh)
    return worked


async def _work(session: "AsyncSession", stations: Inline, row: JobRow) -> Worked:
    if stations.executor.is_async(row.kind):
        where: dict[str, Any] = {"mapper": inspect(stations.job_class)}
        stations.scope.async_connection = await session.connection(bind_arguments=where)
        result = await asyncio.create_task(stations.executor.execute_async(row))
    else:
        result = await session.run_sync(lambda _: stations.executor.execute(row))
    return await session.run_sync(stations.complete, inline.told(result))


def _refresh(session: Session) -> None:
    """What handlers changed is read anew, and now: an expired attribute could not be read without await."""
    session.flush()
    for each in list(session):
        try:
            session.refresh(each)
        except InvalidRequestError:  # its row is gone
            session.expunge(each)


def _checked(session: Any) -> "AsyncSession":
    if not hasattr(session, "run_sync"):
        raise SessionError(
            f"expected an AsyncSession, got {type(session).__name__}; plain ones take the verbs of "
            "sqla_river.testing, without await"
        )
    checked: AsyncSession = session
    return checked
