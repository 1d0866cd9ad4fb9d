"""The verbs, awaited: for AsyncSession, async_scoped_session and AsyncConnection."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from sqla_river import river, wait
from sqla_river.admin import Changed
from sqla_river.choice import Filter
from sqla_river.errors import SessionError
from sqla_river.models import Job

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_scoped_session

    AnyAsyncSession: TypeAlias = AsyncSession | async_scoped_session[Any] | AsyncConnection

P = ParamSpec("P")
T = TypeVar("T")


def awaited(
    verb: Callable[Concatenate[Any, P], T],
) -> "Callable[Concatenate[AnyAsyncSession, P], Coroutine[Any, Any, T]]":
    """*verb* as a coroutine function: it runs with the plain session inside, in the greenlet that lets its I/O be
    awaited.
    """

    async def call(session: "AnyAsyncSession", /, *given: P.args, **options: P.kwargs) -> T:
        inner: Any = session if hasattr(session, "run_sync") else getattr(session, "registry", lambda: session)()
        if not hasattr(inner, "run_sync"):
            raise SessionError(
                f"expected an AsyncSession or AsyncConnection, got {type(session).__name__}; "
                "plain ones take the verbs of sqla_river, without await"
            )

        def call_plain(plain: Any) -> T:
            return verb(plain, *given, **options)

        result: T = await inner.run_sync(call_plain)
        return result

    call.__name__ = call.__qualname__ = getattr(verb, "__name__", "verb")
    call.__doc__ = f"`River.{call.__name__}`, awaited."
    return call


enqueue = awaited(river.enqueue)
enqueue_many = awaited(river.enqueue_many)
pause = awaited(river.pause)
resume = awaited(river.resume)
list_queues = awaited(river.list_queues)
update_queue = awaited(river.update_queue)
queue_stats = awaited(river.queue_stats)
stats_history = awaited(river.stats_history)


class _OnJobs(Protocol):
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: int) -> Job: ...
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: Filter) -> Changed: ...


class _Reschedule(Protocol):
    @overload
    async def __call__(
        self, session: "AnyAsyncSession", /, which: int, *, scheduled_at: datetime | timedelta
    ) -> Job: ...
    @overload
    async def __call__(
        self, session: "AnyAsyncSession", /, which: Filter, *, scheduled_at: datetime | timedelta
    ) -> Changed: ...


class _ChangePriority(Protocol):
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: int, *, priority: int) -> Job: ...
    @overload
    async def __call__(self, session: "AnyAsyncSession", /, which: Filter, *, priority: int) -> Changed: ...


def _awaited(verb: Any) -> Any:
    """What an overloaded verb becomes when awaited, mypy cannot derive."""
    return awaited(verb)


cancel: _OnJobs = _awaited(river.cancel)
retry: _OnJobs = _awaited(river.retry)
delete: _OnJobs = _awaited(river.delete)
reschedule: _Reschedule = _awaited(river.reschedule)
change_priority: _ChangePriority = _awaited(river.change_priority)
list_jobs = awaited(river.list_jobs)


async def wait_for(
    session: "AnyAsyncSession | AsyncEngine",
    job_id: int,
    *,
    timeout: timedelta | None = None,  # noqa: ASYNC109 - the same face as the plain verb
) -> Job:
    """`River.wait_for`, awaited; the event loop goes on meanwhile."""
    from sqlalchemy.ext.asyncio import AsyncEngine

    engine = (
        session
        if isinstance(session, AsyncEngine)
        else AsyncEngine(await awaited(wait.engine_of)(session, job_id, Job))
    )
    finished = asyncio.Event()
    loop = asyncio.get_running_loop()
    with wait.Look(job_id, timeout, partial(loop.call_soon_threadsafe, finished.set)) as look:
        while True:
            async with engine.connect() as connection:
                job = await connection.run_sync(look.look, Job)
            if job is not None:
                return job
            pause = look.pause()
            with suppress(TimeoutError):
                await asyncio.wait_for(finished.wait(), pause)
            finished.clear()
