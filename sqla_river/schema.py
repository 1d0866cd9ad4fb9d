"""The door for DDL: `create_all` and `migrate`, for those who do not use Alembic."""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from sqla_river import ddl, store
from sqla_river.errors import AsyncSessionError, InvalidOptionError, SchemaError, SessionError
from sqla_river.options import MAX_SCHEMA, check_schema

TURN: Final = 0.05
"""Seconds between two looks at the lock."""
PATIENCE: Final = 60
"""Seconds to wait for it within a transaction of the caller's."""


@dataclass(frozen=True)
class Migration:
    """What `migrate` found, and what it did."""

    schema: str | None
    found: int
    """The version before; 0 where there was nothing."""
    version: int
    statements: tuple[str, ...]
    """What was run; empty where nothing was to be done."""


def create_all(bind: Engine | Connection, schema: str | None = None) -> int:
    """Create the tables, or bring them to this library's version; safe to call again, and from many processes at once.

    On an Engine it commits, and does what `migrate` does. On a Connection it is part of the caller's transaction: an
    index that a big table lacks is then built under a lock that keeps writers out. Whoever comes second waits for the
    first (an advisory lock). Async: ``await connection.run_sync(create_all)``.

    Args:
        bind: an Engine or Connection of PostgreSQL.
        schema: where the tables go; it is created where it is missing. None is the search_path's first.

    Returns:
        The version found before: 0 where there was nothing, `ddl.LATEST` where nothing was to be done.

    Raises:
        SchemaError: the tables belong to a newer version of the library, or to a River older than its version 5.
        WrongDatabaseError: not PostgreSQL.
        SessionError: *bind* is neither an Engine nor a Connection.
        InvalidOptionError: a schema that River's channels cannot carry.
    """
    _check_bind(bind)
    if isinstance(bind, Engine):
        return migrate(bind, schema).found
    schema = check_schema(store.real_schema(bind, schema))
    _wait(bind, ddl.TRY_LOCK)
    found = _looked(bind, schema)
    plan = ddl.plan_upgrade(found, big=False)
    if plan.before:
        raise SchemaError(
            "this upgrade adds a value to an enum, which has to be committed before it is used; "
            "give create_all the Engine instead of a Connection"
        )
    _run(bind, plan.inside)
    return found.version


def migrate(engine: Engine, schema: str | None = None) -> Migration:
    """Bring the tables to this library's version, and repair what is missing or wrong with their indexes.

    Runners may work meanwhile. On a table of over 100,000 rows indexes are built concurrently, and nothing waits for a
    lock that others wait behind. Killed half-way it can be run again. Commits.

    Raises:
        SchemaError: as `create_all`; or a transaction kept its lock on the table for over a minute.
    """
    _check_bind(engine)
    # READ COMMITTED, whatever the engine's level: who waited for the lock has to see what the first has done.
    engine = engine.execution_options(isolation_level="READ COMMITTED")
    with engine.connect() as connection:
        schema = check_schema(store.real_schema(connection, schema))
        connection.rollback()
        _wait(connection, ddl.TRY_LOCK)
        found = _looked(connection, schema)
        plan = _planned(connection, found)
        if plan.before:
            connection.rollback()
            plan = _migrate_in_use(connection, schema)
        else:
            _run(connection, plan.inside)
            connection.commit()
        return Migration(found.schema, found.version, ddl.LATEST, (*plan.before, *plan.inside))


def _migrate_in_use(connection: Connection, schema: str | None) -> ddl.Plan:
    with _locked(connection):
        before = _planned(connection, _looked(connection, schema)).before
        connection.rollback()
        _run(connection.execution_options(isolation_level="AUTOCOMMIT"), before)
        connection.rollback()
        connection.execution_options(isolation_level="READ COMMITTED")
        inside = ddl.plan_upgrade(_looked(connection, schema), big=True).inside
        _run(connection, inside)
        connection.commit()
        return ddl.Plan(before, inside)


def look(connection: Connection, schema: str | None) -> ddl.Look:
    """What the catalog says of our tables in *schema*; None is the search_path's first. Two round trips."""
    return ddl.look(_asking(connection), schema)


def installed_version(connection: Connection, schema: str | None) -> int:
    """The version of our tables in *schema*; 0 where there are none. None is the search_path's first."""
    return look(connection, store.real_schema(connection, schema)).version


def _check_bind(bind: Any) -> None:
    if not isinstance(bind, Engine | Connection):
        if type(bind).__module__.startswith("sqlalchemy.ext.asyncio"):
            raise AsyncSessionError(
                f"create_all is for a plain Engine or Connection, got {type(bind).__name__}; "
                "write 'await connection.run_sync(create_all)'"
            )
        raise SessionError(f"create_all needs an Engine or a Connection, got {type(bind).__name__}")
    store.check_postgresql(bind.dialect.name, bind.dialect.driver)


def _looked(connection: Connection, schema: str | None) -> ddl.Look:
    """What is there, unless it is not for us to touch."""
    found = look(connection, schema)
    if found.schema is not None and len(found.schema.encode()) > MAX_SCHEMA:
        raise InvalidOptionError(
            "schema",
            f"schema must have at most {MAX_SCHEMA} bytes (it is part of a NOTIFY channel), got {found.schema!r}",
        )
    if found.version > ddl.LATEST:
        raise SchemaError(
            f"the tables are of version {found.version}, this sqla_river knows up to {ddl.LATEST}; "
            "upgrade the library before it touches them"
        )
    if 0 < found.river < ddl.OLDEST_RIVER:
        raise SchemaError(
            f"River's tables are older than its version {ddl.OLDEST_RIVER}, and sqla_river takes over "
            f"{ddl.OLDEST_RIVER} to {ddl.RIVER_VERSIONS[-1]}; run 'river migrate-up' first"
        )
    return found


def _planned(connection: Connection, found: ddl.Look) -> ddl.Plan:
    return ddl.plan_upgrade(found, big=ddl.is_big(_asking(connection), found))


def _asking(connection: Connection) -> ddl.Ask:
    def ask(query: str, parameters: Mapping[str, Any]) -> str | None:
        answer: str | None = connection.execute(text(query), parameters).scalar_one()
        return answer

    return ask


def _run(connection: Connection, statements: Sequence[str]) -> None:
    try:
        for statement in statements:
            connection.exec_driver_sql(statement)
    except DBAPIError as error:
        reason = ddl.refusal(str(error.orig))
        if reason is None:
            raise
        raise SchemaError(reason) from error


def _wait(connection: Connection, lock: str) -> None:
    """Take the lock of installers.

    It asks until it is given, in a transaction of its own each time: a concurrent build of an index waits for every
    transaction that it saw a snapshot of, also for one that waits for the builder.
    """
    apart = not connection.in_transaction()
    until = time.monotonic() + PATIENCE
    while not connection.exec_driver_sql(lock).scalar_one():
        if apart:
            connection.rollback()
        elif time.monotonic() > until:
            raise SchemaError(
                f"somebody else has been migrating this database for over {PATIENCE} s, and may wait for this "
                "transaction; roll it back and try again"
            )
        time.sleep(TURN)


@contextmanager
def _locked(connection: Connection) -> Generator[None]:
    _wait(connection, ddl.TRY_LOCK_SESSION)
    try:
        yield
    finally:
        if not connection.invalidated:
            connection.rollback()
            connection.exec_driver_sql(ddl.UNLOCK_SESSION)
            connection.commit()
