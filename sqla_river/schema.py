"""The door for DDL: `create_all` for those who do not use Alembic."""

from typing import Any

from sqlalchemy import Connection, Engine

from sqla_river import ddl, store
from sqla_river.errors import AsyncSessionError, InvalidOptionError, SchemaError, SessionError
from sqla_river.options import MAX_SCHEMA, check_schema
from sqla_river.statements import LOCK_SCHEMA, SELECT_CURRENT_SCHEMA, SELECT_HAS_VERSIONS, SELECT_VERSIONS


def create_all(bind: Engine | Connection, schema: str | None = None) -> int:
    """Create the tables, or bring them to this library's version; safe to call again, and from many processes at once.

    On an Engine it commits; on a Connection it is part of the caller's transaction. Whoever comes second waits for the first
    (an advisory lock of the transaction). Async: ``await connection.run_sync(create_all)``.

    Args:
        bind: an Engine or Connection of PostgreSQL.
        schema: where the tables go; it is created where it is missing. None is the search_path's first.

    Returns:
        The version found before: 0 where there was nothing, `ddl.LATEST` where nothing was to be done.

    Raises:
        SchemaError: the tables belong to a newer version of the library, or to a River older than its version 7.
        WrongDatabaseError: not PostgreSQL.
        SessionError: *bind* is neither an Engine nor a Connection.
        InvalidOptionError: a schema that River's channels cannot carry.
    """
    _check_bind(bind)
    if isinstance(bind, Engine):
        # READ COMMITTED, whatever the engine's level: who waited for the lock has to see what the first has done.
        with bind.execution_options(isolation_level="READ COMMITTED").begin() as connection:
            return create_all(connection, schema)
    schema = check_schema(store.real_schema(bind, schema))
    store.execute(bind, None, LOCK_SCHEMA, {"p_key": ddl.LOCK_KEY})
    versions = installed_versions(bind, schema)
    found = versions.get(ddl.LINE, 0)
    if found > ddl.LATEST:
        raise SchemaError(
            f"the tables are of version {found}, this sqla_river knows up to {ddl.LATEST}; "
            "upgrade the library before it touches them"
        )
    rivers = versions.get(ddl.RIVER_LINE, 0)
    if 0 < rivers < ddl.RIVER_VERSIONS[-1]:
        raise SchemaError(
            f"River's tables are of its version {rivers}, sqla_river needs {ddl.RIVER_VERSIONS[-1]}; "
            "run 'river migrate-up' first"
        )
    if schema is not None and not bind.dialect.has_schema(bind, schema):
        bind.exec_driver_sql(f"CREATE SCHEMA {ddl.qualifier(schema)[:-1]}")
    for statement in ddl.upgrade(schema, since=found):
        bind.exec_driver_sql(statement)
    return found


def _check_bind(bind: Any) -> None:
    if not isinstance(bind, Engine | Connection):
        if type(bind).__module__.startswith("sqlalchemy.ext.asyncio"):
            raise AsyncSessionError(
                f"create_all is for a plain Engine or Connection, got {type(bind).__name__}; "
                "write 'await connection.run_sync(create_all)'"
            )
        raise SessionError(f"create_all needs an Engine or a Connection, got {type(bind).__name__}")
    store.check_postgresql(bind.dialect.name, bind.dialect.driver)


def installed_version(connection: Connection, schema: str | None) -> int:
    """The version of our tables in *schema*; 0 where there are none. None is the search_path's first."""
    return installed_versions(connection, schema).get(ddl.LINE, 0)


def installed_versions(connection: Connection, schema: str | None) -> dict[str, int]:
    """The version of each line of tables in *schema*; empty where there are none. None is the search_path's first."""
    home = schema or store.execute(connection, None, SELECT_CURRENT_SCHEMA).scalar_one()
    if home is not None and len(home.encode()) > MAX_SCHEMA:
        raise InvalidOptionError("schema", f"schema must have at most {MAX_SCHEMA} bytes (it is part of a NOTIFY channel), got {home!r}")
    if not store.execute(connection, None, SELECT_HAS_VERSIONS, {"p_schema": home}).scalar_one():
        return {}
    return dict(store.execute(connection, schema, SELECT_VERSIONS).tuples().all())
