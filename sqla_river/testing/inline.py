"""Jobs worked here and now, in the caller's own transaction: each step as a runner takes it, one job at a time, at a
time that the test chooses.
"""

import asyncio
import inspect
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

from sqlalchemy import Connection
from sqlalchemy.orm import Session, scoped_session

from sqla_river import store
from sqla_river.args import JobArgs
from sqla_river.complete import settle_parameters
from sqla_river.context import JobContext
from sqla_river.errors import ConfigError, RunnerError
from sqla_river.execute import Executor
from sqla_river.judge import Judge
from sqla_river.models import Job, declared_schema
from sqla_river.options import OptionWords, check_when, json_text, said_in
from sqla_river.outcomes import Cancel, Snooze
from sqla_river.river import River
from sqla_river.rows import InsertRow, JobRow, Result
from sqla_river.runner import Runner
from sqla_river.session import AnySession, check_bind, connect
from sqla_river.settle import Scope, Unit
from sqla_river.statements import (
    FETCH_JOB_AT,
    SCHEDULE_DUE_AT,
    SELECT_CLOCK,
    SELECT_NEXT_JOB,
    SETTLE_JOB_AT,
    SETTLE_JOBS_AT,
)
from sqla_river.states import JobState
from sqla_river.testing.sessions import plain_session
from sqla_river.testing.worked import Worked
from sqla_river.workers import Worker, Workers

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

T = TypeVar("T")


class _InlineUnit(Unit):
    """A transactional attempt in a savepoint of the caller's transaction."""

    now: datetime

    def write(self, given: dict[str, Any]) -> str | None:
        given = {**given, "p_now": self.now}
        return cast("str | None", store.execute(self.connection, self._schema, SETTLE_JOB_AT, given).scalar())


class _InlineScope(Scope):
    """Gives transactional handlers the caller's connection."""

    connection: Connection
    async_connection: "AsyncConnection"
    now: datetime

    @contextmanager
    def open(self, row: JobRow) -> Generator[Unit]:
        scoped = self._scoped
        registry = scoped.registry if scoped is not None else None
        theirs = registry() if registry is not None and registry.has() else None
        try:
            with self.within(self._unit(self.connection, row)) as unit:
                yield unit
        finally:
            if registry is not None and theirs is not None:
                registry.set(theirs)

    @asynccontextmanager
    async def open_async(self, row: JobRow) -> AsyncGenerator[Unit]:
        unit = await self.async_connection.run_sync(self._unit, row)
        async with self.within_async(self.async_connection, unit):
            yield unit

    def _unit(self, connection: Connection, row: JobRow) -> Unit:
        schema = store.real_schema(connection, declared_schema(self._job_class))
        unit = _InlineUnit(connection, connection.begin_nested(), row, schema)
        unit.now = self.now
        return unit


class _Witness:
    """Middleware that remembers what the last handler was given, and what it returned."""

    job: JobContext[Any] | None = None
    returned: object = None

    def work(self, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any], /) -> Any:
        self.job = job
        self.returned = returned = call_next(job)
        return self._awaited(returned) if inspect.isawaitable(returned) else returned

    async def _awaited(self, outcome: Awaitable[Any]) -> Any:
        self.returned = await outcome
        return self.returned


class Inline:
    """The stations of a runner, without threads, for one session (or none)."""

    def __init__(self, workers: Workers | Runner, river: River[Any] | None, now: datetime | timedelta | None) -> None:
        runner = workers if isinstance(workers, Runner) else None
        self.workers = workers.workers if isinstance(workers, Runner) else workers
        self.river: River[Any] = river or (runner.river if runner is not None else River.of(Job))
        self.job_class: type[Any] = self.river.job_class
        self._wanted = None if now is None else check_when("now", now)
        self._owner = f"test:{secrets.token_hex(8)}"
        self._fetched = 0
        self._witness = _Witness()
        orders = runner._orders if runner is not None else None
        nowhere: Any = None  # no engine: the scope is handed the caller's connection
        sessions = orders.sessions if orders is not None else None
        self.scope = _InlineScope(nowhere, self.job_class, sessions, None, lambda: False)
        self.executor = Executor(
            self.workers,
            self.river.settings.codec,
            Judge(self.workers, retry=orders.retry, on_error=orders.on_error)
            if orders is not None
            else Judge(self.workers),
            timeout=None,
            watch=lambda _job, _seconds: None,
            scope=self.scope,
            middleware=(self._witness, *(orders.middleware if orders is not None else ())),
        )

    # ---- in the caller's transaction --------------------------------------------------

    def begin(self, session: Session | Connection) -> None:
        """Set the clock."""
        check_bind(session, self.job_class)
        wanted = self._wanted
        if not isinstance(wanted, datetime):
            clock: datetime = self._execute(session, SELECT_CLOCK, {}).scalar_one()
            wanted = clock + (wanted or timedelta(0))
        self.scope.now = wanted

    def next(self, session: Session | Connection, *, awaiting: bool) -> JobRow | None:
        """Fetch the job that a runner would start next; None if nothing is due."""
        now = {"p_now": self.scope.now}
        self._execute(session, SCHEDULE_DUE_AT, {**now, "p_schema": self._schema(session)}).all()
        found = self._execute(session, SELECT_NEXT_JOB, {**now, "p_kinds": self.workers.kinds}).one_or_none()
        if found is None:
            return None
        self.check(self.workers.get(found.kind), awaiting=awaiting)
        return self.fetch(session, found.id, found.queue)

    def fetch(self, session: Session | Connection, job_id: int, queue: str) -> JobRow:
        """Mark the available job *job_id* running."""
        self._fetched += 1
        token = f"{self._owner}/{self._fetched}"
        asked = {
            "p_queues": [queue],
            "p_slots": [1],
            "p_kinds": self.workers.kinds,
            "p_id": job_id,
            "p_now": self.scope.now,
            "p_token": token,
        }
        fetched = self._execute(session, FETCH_JOB_AT, asked).one_or_none()
        if fetched is None:
            raise ConfigError(f"job {job_id} cannot be fetched: its queue {queue!r} is paused; resume it")
        self.scope.connection = connect(session, self.job_class)
        return JobRow._make((*fetched, token))

    def complete(self, session: Session | Connection, result: Result) -> Worked:
        """Write what came of a job, if it is not written already."""
        state = result.settled
        if state is None:
            given = settle_parameters([(result.job.id, result.job.token, result.transition)])
            with connect(session, self.job_class).begin_nested():
                rows = self._execute(session, SETTLE_JOBS_AT, {**given, "p_now": self.scope.now}).all()
            state = JobState(rows[0].state) if rows else None
        return self.told(result, state)

    def put(self, session: Session, args: JobArgs, row: InsertRow, attempt: int) -> JobRow:
        """Put *args* in, and fetch it at once, whatever its time and its unique key."""
        job = self.job_class(args, _row=row._replace(when=None, pending=False, unique_at=None, unique_states=None))
        job.attempt = attempt - 1
        session.add(job)
        session.flush()
        return self.fetch(session, job.id, row.queue)

    def _execute(self, session: Session | Connection, statement: Any, given: dict[str, Any]) -> store.Rows:
        return store.execute(connect(session, self.job_class), self._schema(session), statement, given)

    def _schema(self, session: Session | Connection) -> str | None:
        return store.real_schema(connect(session, self.job_class), declared_schema(self.job_class))

    # ---- anywhere ---------------------------------------------------------------------

    def check(self, worker: Worker | None, *, awaiting: bool) -> None:
        """Raise where *worker* cannot work here."""
        if worker is not None and worker.transactional and worker.is_async and not awaiting:
            raise ConfigError(
                f"kind {worker.kind!r} is worked with an AsyncSession; use the verbs of sqla_river.testing.asyncio, "
                "with an AsyncSession"
            )

    def worker_of(self, args: JobArgs, *, session: bool) -> Worker:
        """The worker of *args*; raises `ConfigError` if there is none, or it needs a session."""
        worker = self.workers.get(args.kind)
        if worker is None:
            known = ", ".join(map(repr, self.workers.kinds)) or "none"
            raise ConfigError(f"kind {args.kind!r} has no worker here; known kinds: {known}")
        if worker.transactional and not session:
            raise ConfigError(f"kind {args.kind!r} is worked in a transaction; pass session=")
        return worker

    def row_of(self, args: JobArgs, options: OptionWords, attempt: int) -> InsertRow:
        """*args*, encoded as `River.enqueue` would."""
        row = self.river.settings.one(args, said_in(options))
        if not 1 <= attempt <= row.max_attempts:
            raise ConfigError(f"attempt must be 1..{row.max_attempts}, the job's max_attempts, got {attempt}")
        return row

    def told(self, result: Result, state: JobState | None) -> Worked:
        """What came of *result*, whose job went to *state*."""
        job, returned = self._witness.job, self._witness.returned
        if job is None or job.row is not result.job:
            return Worked(result.job, state, result.error, None, result.transition.delay)
        said = returned if result.error is None else result.error
        wish = said if isinstance(said, Snooze | Cancel) else None
        return Worked(result.job, state, result.error, wish, result.transition.delay, job)

    def execute(self, row: JobRow) -> Result:
        """One attempt at *row*, whose handler may be ``async``."""
        if self.executor.is_async(row.kind):
            return told(run(lambda: self.executor.execute_async(row)))
        return told(self.executor.execute(row))


def told(result: Result | None) -> Result:
    """*result*, which an executor without an audience always makes."""
    assert result is not None
    return result


def run(begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end, also where an event loop runs in this thread already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(begin())
    with ThreadPoolExecutor(1) as other:
        return other.submit(lambda: asyncio.run(begin())).result()


def loose_row(row: InsertRow, attempt: int) -> JobRow:
    """*row* as a fetch would bring it, without a database."""
    metadata = json_text("metadata", dict(row.metadata))
    args = row.args.decode()
    return JobRow(row.priority, 0, 1, row.queue, row.kind, attempt, row.max_attempts, args, metadata, None, "test/1")


def check_limit(limit: int, worked: list[Worked]) -> None:
    if len(worked) >= limit:
        raise RunnerError(
            f"{limit} attempts were made, and more jobs are due; the last one was {worked[-1:]}; does a handler "
            "enqueue its own kind, or snooze for no time? else pass a higher limit="
        )


def _expire(session: Session | Connection) -> None:
    """What handlers changed is read anew."""
    if isinstance(session, Session):
        session.flush()
        session.expire_all()


def drain(
    session: AnySession,
    workers: Workers | Runner,
    *,
    now: datetime | timedelta | None = None,
    river: River[Any] | None = None,
    limit: int = 1_000,
) -> list[Worked]:
    """Work all jobs that are due, here and now, one after the other, in the caller's transaction.

    They run in the order of priority, ``scheduled_at`` and id, over all queues that are not paused, those that handlers
    enqueue meanwhile included. Each is fetched, decoded, executed and completed as a runner does it. A transactional
    handler gets a Session of its own in a savepoint of the caller's transaction. Nothing is committed; the session's
    objects are expired. Timeouts are not watched. Four round trips for each job.

    Args:
        session: Session, scoped_session or Connection.
        workers: the handlers; jobs of other kinds stay. A Runner (which need not run) brings its retry policy,
            middleware, error handler, sessions and River too.
        now: the time that it is meanwhile: jobs for later stay, and so does a retry or snooze that is due later. A
            timedelta counts from the database's clock, None is that clock. What handlers enqueue counts from the
            transaction's now() all the same.
        river: the `River` whose jobs are worked; the one of the shipped `Job` unless said otherwise.
        limit: the attempts after which something must be wrong.

    Returns:
        What came of each attempt, in their order. A handler's exception is there, as ``error``, and not raised.

    Raises:
        ConfigError: an async transactional handler, which needs ``sqla_river.testing.asyncio``.
        RunnerError: more than *limit* attempts.
    """
    plain = plain_session(session, "drain")
    inline = Inline(workers, river, now)
    inline.begin(plain)
    worked: list[Worked] = []
    while (row := inline.next(plain, awaiting=False)) is not None:
        check_limit(limit, worked)
        worked.append(inline.complete(plain, inline.execute(row)))
        _expire(plain)
    return worked


def work_one(
    workers: Workers | Runner,
    args: JobArgs,
    *,
    session: Session | scoped_session[Any] | None = None,
    attempt: int = 1,
    river: River[Any] | None = None,
    **options: Unpack[OptionWords],
) -> Worked:
    """Work one job at once, encoding and decoding included; its time and unique key are passed over.

    Without a session there is no database: the job's id is 1. With one, the job is put in, fetched, executed and
    completed in the session's transaction, as `drain` does it.

    Args:
        workers: the handlers; or a Runner, as for `drain`.
        args: an instance of an args class.
        session: needed by transactional handlers.
        attempt: which attempt this is.
        river: as for `drain`.
        options: as for `River.enqueue`.

    Raises:
        ConfigError: no worker for that kind, or one that needs a session; an attempt beyond ``max_attempts``.
        EncodeError, InvalidOptionError: as `River.enqueue`.
    """
    inline = Inline(workers, river, None)
    worker = inline.worker_of(args, session=session is not None)
    inserted = inline.row_of(args, options, attempt)
    if session is None:
        result = inline.execute(loose_row(inserted, attempt))
        return inline.told(result, result.transition.state)
    inline.check(worker, awaiting=False)
    plain = plain_session(session, "work_one")
    if not isinstance(plain, Session):
        raise ConfigError("work_one takes a Session; write Session(connection)")
    inline.begin(plain)
    worked = inline.complete(plain, inline.execute(inline.put(plain, args, inserted, attempt)))
    _expire(plain)
    return worked
