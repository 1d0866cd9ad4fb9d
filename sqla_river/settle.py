"""Transactional work: the handler's writes and the job's completion commit together, fenced.

The handler's Session is bound to a connection whose transaction belongs to the runner. Its commit() flushes and
commits nothing by itself; its rollback() ends the transaction, and with it the attempt. The completion is the last
statement before COMMIT. Ending the transaction through the driver itself (a raw COMMIT) is out of reach, and not
supported.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, Transaction, inspect
from sqlalchemy.exc import DBAPIError, UnboundExecutionError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river import store
from sqla_river.errors import ConfigError, ForeignBindError, TransactionOver
from sqla_river.logs import Log, first_line, of_job
from sqla_river.models import JobMixin, declared_schema
from sqla_river.rows import JobRow
from sqla_river.statements import SELECT_OUTCOME, SETTLE_JOB
from sqla_river.states import JobState, Transition

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

log: Final = Log(__name__)

RESOLVE_FOR: Final = 10.0
"""Seconds to ask what became of a COMMIT whose reply was lost; after that the fence sorts it out when a failure is
written.
"""
_NONE_FREE: Final = (PoolTimeoutError, DBAPIError, OSError)
"""What connecting raises where the pool or the server has no connection left, or the server is away; OSError is that of
drivers which raise it as it is.
"""
_PAUSES: Final = (0.1, 0.2, 0.5, 1.0)
"""Seconds between two tries to connect; the last goes on."""
_FOLLOWS_OTHERS: Final = {"READ COMMITTED", "READ UNCOMMITTED", "AUTOCOMMIT"}
_KEY: Final = "sqla_river.unit"
_classes: WeakKeyDictionary[type[Session], type[Session]] = WeakKeyDictionary()
_lock: Final = threading.Lock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could work in no Session
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class LostJobError(Exception):
    """The job is no longer this runner's: everything the handler wrote is rolled back, and the outcome is stale."""


class CommitUnknownError(Exception):
    """The reply to the COMMIT was lost."""


class NeverBegunError(Exception):
    """The runner stops, and no connection was to be had for the job."""


class Unit:
    """One transactional attempt: a session, its connection, and the transaction that the runner owns."""

    def __init__(self, connection: Connection, root: Transaction, row: JobRow, schema: str | None) -> None:
        self.connection = connection
        self.root = root
        self._row = row
        self._schema = schema
        self.session: Any = None
        self.kept: Callable[[], bool] = lambda: True
        """Whether the user's scoped_session still leads to the session."""
        level = getattr(connection.connection, "isolation_level", None)  # None is the server's own
        name = str(getattr(level, "name", level) or connection.default_isolation_level)
        self.follows = name.upper().replace("_", " ") in _FOLLOWS_OTHERS
        """Whether the job's row may be written to by others meanwhile: in a transaction that keeps its first snapshot,
        the completion would fail.
        """

    def settle(self, session: Session, transition: Transition) -> JobState:
        """Flush *session*, write *transition* under the fence, and commit all of it; the state that the job came to.

        Raises:
            TransactionOver: the handler ended the transaction by itself.
            LostJobError: the fence does not hold any more.
            CommitUnknownError: the connection broke during the COMMIT.
        """
        if not self.root.is_active:
            raise TransactionOver(
                "the handler ended the transaction of its job; raise an error to roll back, "
                "or use session.begin_nested() for a part"
            )
        if not self.kept():
            raise TransactionOver(
                "the handler removed the session of its job from the scoped_session; leave that to the runner"
            )
        session.commit()  # flushes, and runs the session's own events; the transaction is not its to commit
        given = {
            "p_id": self._row.id,
            "p_token": self._row.token,
            "p_state": transition.state.value,
            "p_back": transition.attempt_back,
            "p_delay": transition.delay,
            "p_error": store.error_json(transition),
            "p_metadata": transition.metadata,
            "p_snoozed": int(transition.snoozed),
        }
        state = self.write(given)
        if state is None:
            raise LostJobError
        try:
            self.root.commit()
        except DBAPIError as error:
            if error.connection_invalidated or self.connection.invalidated:
                raise CommitUnknownError from error
            raise
        return JobState(state)

    def write(self, given: dict[str, Any]) -> str | None:
        """Write the transition of `settle`; the state that the job came to, None where the fence does not hold."""
        return cast("str | None", store.execute(self.connection, self._schema, SETTLE_JOB, given).scalar())


class Scope:
    """Opens a `Unit` for each transactional job of a runner.

    Args:
        engine: the runner's; handlers have its pool.
        job_class: the mapping, for the schema, and to find the bind of a session.
        sessions: the user's sessionmaker or scoped_session (async_sessionmaker for async handlers); None for plain
            Sessions.
        async_engine: for async handlers.
        stopped: whether to give up waiting for a connection.
    """

    def __init__(
        self,
        engine: Engine,
        job_class: type[JobMixin],
        sessions: Any,
        async_engine: "AsyncEngine | None",
        stopped: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._job_class = job_class
        self._sessions: Any = sessions
        self._async_engine = async_engine
        self._stopped = stopped
        self.unknown: type[BaseException] = CommitUnknownError
        self.no_failure: tuple[type[BaseException], ...] = (LostJobError, NeverBegunError)
        self._maker, self._scoped, self._async_maker = _makers(sessions)

    def check(self) -> None:
        """Raise `ConfigError` where the user's sessions lead somewhere else than the runner's engines."""
        if self._maker is not None:
            with self._maker() as session:
                self._check(session, self._engine)
        if self._async_maker is not None and self._async_engine is not None:
            self._check(self._async_maker().sync_session, self._async_engine.sync_engine)

    def _check(self, session: Session, engine: Engine) -> None:
        try:
            bind = session.get_bind(mapper=inspect(self._job_class))
        except (UnboundExecutionError, RuntimeError):
            return  # bound to nothing, or Flask's outside of an app: the handler's own session tells
        if bind.engine.pool is not engine.pool:
            raise ConfigError(
                f"sessions= leads to {bind.engine.url!r} for {self._job_class.__name__}, the runner works on "
                f"{engine.url!r}; give both the same engine"
            )

    @contextmanager
    def open(self, row: JobRow) -> Generator[Unit]:
        """A unit for *row*. What is not settled when the block ends is rolled back."""
        connection = self._wait_for_connection()
        try:
            with self.within(self._unit(connection, row)) as unit:
                yield unit
        finally:
            connection.close()

    @contextmanager
    def within(self, unit: Unit) -> Generator[Unit]:
        """*unit* with a session of the user's making, for as long as the block runs."""
        scoped = self._scoped
        unit.session = session = _make(self._maker, unit)
        if scoped is not None:
            scoped.registry.set(session)
            unit.kept = lambda: scoped.registry.has() and scoped.registry() is session
        try:
            yield unit
        finally:
            if scoped is not None:
                scoped.remove()
            session.close()
            if unit.root.is_active:
                unit.root.rollback()

    @asynccontextmanager
    async def open_async(self, row: JobRow) -> AsyncGenerator[Unit]:
        """The same with an AsyncSession."""
        connection = await self._wait_for_async_connection()
        try:
            async with self.within_async(connection, await connection.run_sync(self._unit, row)) as unit:
                yield unit
        finally:
            await connection.close()

    @asynccontextmanager
    async def within_async(self, connection: "AsyncConnection", unit: Unit) -> AsyncGenerator[Unit]:
        """`within`, for a unit on *connection*."""
        from sqlalchemy.ext.asyncio import AsyncSession

        maker = self._async_maker
        options: dict[str, Any] = {"expire_on_commit": False, **(maker.kw if maker is not None else {})}
        base: type[Any] = maker.class_ if maker is not None else AsyncSession
        sync_base = options.pop("sync_session_class", base.sync_session_class)
        unit.session = session = base(
            bind=connection, sync_session_class=_job_session(sync_base), **_options(options, unit)
        )
        try:
            yield unit
        finally:
            await session.close()
            if unit.root.is_active:
                await connection.run_sync(lambda _: unit.root.rollback())

    def resolve(self, row: JobRow) -> JobState | None:
        """What became of *row* when the reply to its COMMIT was lost; None if it was not committed, or that cannot be
        had in 10 s.

        A server that is still committing holds the row's lock, and FOR UPDATE waits for it: a plain read would say
        running.
        """
        until = time.monotonic() + RESOLVE_FOR
        while True:
            try:
                with self._engine.begin() as connection:
                    store.bound_locks(connection, RESOLVE_FOR)
                    schema = store.real_schema(connection, declared_schema(self._job_class))
                    state = store.execute(
                        connection, schema, SELECT_OUTCOME, {"p_id": row.id, "p_token": row.token}
                    ).scalar()
                return None if state is None or state == JobState.RUNNING else JobState(state)
            except Exception as error:  # noqa: BLE001 - the database may be on its way back
                if time.monotonic() > until or self._stopped():
                    return None
                log.info("asking again what became of job %d: %s", row.id, first_line(error), **of_job(row))
                time.sleep(0.2)

    def _wait_for_connection(self) -> Connection:
        """A connection of the user's pool; while none is to be had the job waits rather than fails."""
        for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
            try:
                return self._engine.connect()
            except _NONE_FREE as error:
                self._none_free(error)
            time.sleep(pause)
        raise AssertionError

    async def _wait_for_async_connection(self) -> "AsyncConnection":
        assert self._async_engine is not None
        pool = self._async_engine.sync_engine.pool
        for pause in chain(_PAUSES, repeat(_PAUSES[-1])):
            try:
                return await self._async_engine.connect()
            except _NONE_FREE as error:
                self._none_free(error)
            await asyncio.sleep(pause)
            if self._async_engine.sync_engine.pool is not pool:  # `parted`: the next one belongs to another loop
                raise NeverBegunError
        raise AssertionError

    def _none_free(self, error: Exception) -> None:
        if self._stopped():
            raise NeverBegunError from error
        log.warning("a transactional job waits for a connection: %s", first_line(error))

    def _unit(self, connection: Connection, row: JobRow) -> Unit:
        if getattr(
            connection.connection, "autocommit", False
        ):  # an engine of AUTOCOMMIT would store each write at once
            connection.execution_options(isolation_level="READ COMMITTED")
        schema = store.real_schema(connection, declared_schema(self._job_class))
        return Unit(connection, connection.begin(), row, schema)


def parted(engine: "AsyncEngine") -> Callable[[], Coroutine[Any, Any, object]]:
    """Give *engine* a new pool; what closes the connections of the one before, on the event loop that they belong to.

    Its own dispose() closes first: for as long as that takes, and for good where it is cut short, others would meet
    those connections on their own loop.
    """
    from sqlalchemy.util import greenlet_spawn

    pool = engine.sync_engine.pool
    engine.sync_engine.dispose(close=False)
    return partial(greenlet_spawn, pool.dispose)


def _options(given: dict[str, Any], unit: Unit) -> dict[str, Any]:
    """The user's session options, but for those that would take the transaction out of the runner's hands."""
    kept = {
        name: value
        for name, value in given.items()
        if name not in {"bind", "twophase", "join_transaction_mode", "info"}
    }
    return {**kept, "join_transaction_mode": "rollback_only", "info": {**(given.get("info") or {}), _KEY: unit}}


def _makers(sessions: Any) -> tuple[Any, Any, Any]:
    """The sessionmaker, the scoped_session and the async_sessionmaker that *sessions* is, as far as it is one."""
    given: object = sessions  # whatever it is: what it makes is of no concern here
    if given is None:
        return None, None, None
    if isinstance(given, sessionmaker):
        return sessions, None, None
    if isinstance(given, scoped_session):
        return sessions.session_factory, sessions, None
    if isinstance(given, _async_sessionmaker()):
        return None, None, sessions
    raise ConfigError(
        f"sessions= takes a sessionmaker, a scoped_session or an async_sessionmaker, got {type(sessions).__name__}"
    )


def _async_sessionmaker() -> Any:
    try:
        from sqlalchemy.ext.asyncio import async_sessionmaker
    except ImportError:  # without greenlet there are no async sessions
        return ()
    return async_sessionmaker


def _make(maker: Any, unit: Unit) -> Session:
    base: type[Session] = maker.class_ if maker is not None else Session
    options = dict(maker.kw) if maker is not None else {}
    return _job_session(base)(bind=unit.connection, **_options(options, unit))


def _job_session(base: type[Session]) -> type[Session]:
    """*base*, whose binds lead to the unit's own connection, and nowhere else; made once per class."""
    with _lock:
        known = _classes.get(base)
        if known is None:
            known = _classes[base] = type(f"Job{base.__name__}", (base,), {"get_bind": _bind_of(base)})
        return known


def _bind_of(base: type[Session]) -> Callable[..., Any]:
    def get_bind(self: Session, *given: Any, **options: Any) -> Any:
        unit: Unit = self.info[_KEY]
        bind = base.get_bind(self, *given, **options)
        if bind is not unit.connection and bind.engine.pool is not unit.connection.engine.pool:
            raise ForeignBindError(
                f"this transactional job works on {unit.connection.engine.url!r}, and its handler reached for "
                f"{bind.engine.url!r}, which could not commit with it; open a session of your own for that"
            )
        if not unit.root.is_active:
            raise TransactionOver(
                "the handler ended the transaction of its job and went on; what follows would not commit with the job"
            )
        return unit.connection

    return get_bind
