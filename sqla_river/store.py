"""The door for statements: which schema they mean, and the connections that a runner keeps for itself."""

import json
import math
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Any, Final, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import ColumnElement, Connection, Engine, Executable, RootTransaction, Transaction, false, func, select
from sqlalchemy.exc import DBAPIError

from sqla_river import statements
from sqla_river.errors import WrongDatabaseError
from sqla_river.states import Transition

T = TypeVar("T")
_ALONE: Final = nullcontext()
_ELSEWHERE: Final = {"25006", "57P01", "57P02", "57P03"}
"""Errors that another connection may not meet: that of a standby, where a failover led us for a moment (read-only), and
those of a server that stops or starts.
"""

_now: WeakKeyDictionary[Transaction, tuple[datetime, float]] = WeakKeyDictionary()


class Rows(Protocol):
    """What a statement brought. SQLAlchemy 2.0 and 2.1 type their rows in ways that cannot be written down for both."""

    @property
    def rowcount(self) -> int: ...
    def all(self) -> Sequence[Any]: ...
    def first(self) -> Any: ...
    def one(self) -> Any: ...
    def one_or_none(self) -> Any: ...
    def scalar(self) -> Any: ...
    def scalar_one(self) -> Any: ...
    def scalars(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


def real_schema(connection: Connection, declared: str | None) -> str | None:
    """The schema that our tables stand in, on *connection*: the declared one, through the translate map that the user
    set, if any.

    Resolved here because SQLAlchemy's statement cache cannot tell one map with a None key from another map without it.
    """
    theirs: Mapping[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    return theirs.get(declared, declared)


def map_options(schema: str | None) -> dict[str, Any]:
    """Execution options that place our schema-less tables in *schema*; with None an empty map, which switches the
    user's map off.
    """
    return {"schema_translate_map": {} if schema is None else {None: schema}}


def execute(
    connection: Connection,
    schema: str | None,
    statement: Executable,
    parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> Rows:
    """Run one of our statements on *connection*, its tables in the real schema *schema*. One round trip."""
    return cast("Rows", connection.execute(statement, parameters, execution_options=map_options(schema)))


def bound_locks(connection: Connection, seconds: float) -> None:
    """Let statements of the open transaction wait for locks no longer than that."""
    connection.execute(select(func.set_config("lock_timeout", f"{int(seconds * 1000)}ms", True)))


def check_postgresql(dialect_name: str, driver: str) -> None:
    """Raise `WrongDatabaseError` unless the dialect is PostgreSQL's."""
    if dialect_name != "postgresql":
        raise WrongDatabaseError(
            f"sqla_river needs postgresql+psycopg, this session is bound to '{dialect_name}+{driver}'",
        )


def transaction_now(connection: Connection) -> Any:
    """The database's now(): the start of the transaction. One round trip, once per transaction; each time under
    AUTOCOMMIT.
    """
    root = connection.get_transaction()
    if root is None:
        connection.execute(select(1))  # SQLAlchemy begins with the first statement
        root = connection.get_transaction()
    assert isinstance(root, RootTransaction)
    if is_autocommit(connection):  # what SQLAlchemy calls a transaction may last for days
        return connection.execute(statements.SELECT_NOW).scalars().one()
    known = _now.get(root)
    if known is None:
        row: Any = connection.execute(statements.SELECT_NOW).one()
        known = _now[root] = row.now, time.monotonic() - row.age
    return known[0]


def local_time(root: Transaction, at: datetime) -> float:
    """When *at* comes, on this machine's monotonic clock, by what `transaction_now` read in *root*; in the past if it
    did not.
    """
    known = _now.get(root)
    return -math.inf if known is None else known[1] + (at - known[0]).total_seconds()


def is_autocommit(connection: Connection) -> bool:
    """Whether each statement is a transaction of its own, whatever SQLAlchemy calls one."""
    return bool(getattr(connection.connection, "autocommit", False))


def error_json(transition: Transition) -> str | None:
    """The error of *transition* as it is sent: River's shape but for ``at``, which the database adds."""
    error = transition.error
    return None if error is None else json.dumps({"attempt": error.attempt, "error": error.error, "trace": error.trace})


STATEMENT_TIMEOUT_SECONDS: Final = 30
LOCK_TIMEOUT: Final = "5s"


def twin(engine: Engine) -> Engine:
    """An engine like *engine*, with its creator and its connect events, and a pool of its own.

    A runner that had to wait for a connection until its handlers give one back would lose its lease.
    """
    # What goes wrong on it is logged, and must show no parameters.
    like = Engine(engine.pool.recreate(), engine.dialect, engine.url, hide_parameters=True)
    options = dict(engine.get_execution_options())
    return like.execution_options(**options) if options else like


_renewed: Final[WeakSet[Engine]] = WeakSet()


def renew_in_forked_children(engine: Engine) -> None:
    """See that a forked child gets a new pool for *engine*: its connections are the parent's, and two processes that
    talk on one socket read each other's answers. It closes nothing, as SQLAlchemy advises for forks.
    """
    _renewed.add(engine)


def _renew() -> None:
    for engine in list(_renewed):
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def _ask_for_binary(raw: Any) -> None:
    """Have the cursors of *raw*, a connection of psycopg's, ask for results in binary: 0.15 us less for a fetched row.

    Those of a class of the user's own are left alone: some can only do text.
    """
    from psycopg import Cursor  # which whoever only enqueues by another driver need not have
    from psycopg.pq import Format

    def cursor(*args: Any, **words: Any) -> Any:
        made: Cursor[Any] = Cursor(*args, **words)
        made.format = Format.BINARY
        return made

    if raw.cursor_factory is Cursor:
        raw.cursor_factory = cursor


class OwnConnection:
    """One connection that a runner keeps, detached from the pool of *engine* (a `twin`).

    Autocommit, READ COMMITTED, UTC, named in ``application_name``, with bounds on statements and locks; through a
    pooler in the transaction of each statement, for what is set there for longer is set for everybody. After an error
    that may have broken it, it is closed, and the next `get` opens a new one. Let alone, a detached Connection
    reconnects *from the pool* and loses its autocommit: its writes would never commit.

    Args:
        engine: where to connect.
        declared_schema: that of the tables; None is the connection's own.
        name: in ``application_name``.
        settings: of the server, for this connection.
        binary: whether results come in binary, for many rows of plain types.
        prepare: whether the server keeps the statements; never where the engine says no, or through a pooler.
    """

    def __init__(
        self,
        engine: Engine,
        declared_schema: str | None,
        name: str,
        settings: Mapping[str, str] | None = None,
        *,
        binary: bool = False,
        prepare: bool = True,
    ) -> None:
        self._engine = engine
        self._binary = binary
        self._prepare = prepare
        self._declared = declared_schema
        self._settings = {
            "application_name": name[:63],
            "TimeZone": "UTC",
            "lock_timeout": LOCK_TIMEOUT,
            "statement_timeout": f"{STATEMENT_TIMEOUT_SECONDS}s",
            "default_transaction_isolation": "read committed",
            "jit": "off",
            **(settings or {}),
        }
        self._connection: Connection | None = None
        self._raw: Any = None
        self.schema: str | None = None
        self.pooled = False
        """Whether a pooler stands in between: the process that answers is not the one that the driver was told of."""

    def get(self) -> Connection:
        """The open connection; opened now if there is none.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away; nothing is left open.
        """
        if self._connection is None:
            self._connection = connection = self._engine.connect()
            try:
                self._raw = connection.connection.dbapi_connection
                may_prepare = getattr(self._raw, "prepare_threshold", None) is not None  # else no, or another driver
                if may_prepare:
                    self._raw.prepare_threshold = None  # until it is known who answers
                if self._binary:
                    _ask_for_binary(self._raw)
                connection.execution_options(isolation_level="AUTOCOMMIT")
                connection.detach()
                told = getattr(getattr(self._raw, "info", None), "backend_pid", None)
                answers = func.pg_backend_pid()
                pooled = answers != told if told is not None else false()
                self.pooled = connection.execute(select(pooled, *self._set(local=pooled))).scalar_one()
                # Through a transaction pooler, a client meets what others prepared by the same names (PgBouncer 1.18:
                # "_pg3_0 already exists", "supplies 3 parameters, but requires 4"). Whether the pooler is one of
                # sessions, or tells statements apart, does not show here.
                if self.pooled:
                    from psycopg import IsolationLevel  # whoever only enqueues may have another driver

                    self._raw.isolation_level = IsolationLevel.READ_COMMITTED
                elif may_prepare and self._prepare:
                    self._raw.prepare_threshold = 0  # all that runs here runs again
                self.schema = real_schema(connection, self._declared)
            except BaseException:
                self.close()
                raise
        return self._connection

    def _set(self, *, local: Any) -> list[ColumnElement[str]]:
        return [func.set_config(key, value, local) for key, value in self._settings.items()]

    @contextmanager
    def _bounded(self, connection: Connection) -> Generator[None]:
        with self._raw.transaction():
            connection.execute(select(*self._set(local=True)))
            yield

    @property
    def is_open(self) -> bool:
        """Whether it is open; after an error, whether that left it whole."""
        return self._connection is not None

    @property
    def raw(self) -> Any:
        """The driver's connection, for what Core has no form of; opened now if need be."""
        self.get()
        return self._raw

    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Rows:
        """Run one of our statements, in one round trip, through a pooler in four. An error that broke the connection
        closes it, and the next call opens another.
        """
        connection = self.get()
        try:
            with self._bounded(connection) if self.pooled else _ALONE:
                return execute(connection, self.schema, statement, parameters)
        except BaseException as error:
            if (
                not isinstance(error, DBAPIError)
                or error.connection_invalidated
                or connection.invalidated
                or getattr(error.orig, "sqlstate", None) in _ELSEWHERE
            ):
                self.close()
            raise

    def fetch(self, statement: Executable, parameters: Mapping[str, Any]) -> list[Any]:
        """Run one of our statements that returns rows of plain types: they come as the driver's tuples, in a third of
        the time of SQLAlchemy's rows.
        """
        result: Any = self.execute(statement, parameters)
        rows: list[Any] = result.cursor.fetchall()
        result.close()
        return rows

    def close(self) -> None:
        """Close it, broken or not."""
        connection, self._connection = self._connection, None
        raw, self._raw = self._raw, None
        if raw is not None:
            raw.close()
        if connection is not None:
            # The driver's connection is closed already; this only makes SQLAlchemy forget it, without a last word to
            # the server.
            connection.invalidate()
            connection.close()
