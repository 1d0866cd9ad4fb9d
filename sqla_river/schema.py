"""The door for DDL: `create_all` for those who do not use Alembic."""

from sqlalchemy import Connection, Engine, func, select

from sqla_river import ddl, store
from sqla_river.errors import SchemaError
from sqla_river.options import check_schema
from sqla_river.tables import river_migration


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
        SchemaError: the tables belong to a newer version of the library.
        WrongDatabaseError: not PostgreSQL.
        InvalidOptionError: a schema that River's channels cannot carry.
    """
    if isinstance(bind, Engine):
        with bind.begin() as connection:
            return create_all(connection, schema)
    store.check_postgresql(bind.dialect.name, bind.dialect.driver)
    schema = check_schema(store.real_schema(bind, schema))
    bind.execute(select(func.pg_advisory_xact_lock(ddl.LOCK_KEY)))
    found = installed_version(bind, schema)
    if found > ddl.LATEST:
        raise SchemaError(
            f"the tables are of version {found}, this sqla_river knows up to {ddl.LATEST}; upgrade the library before it touches them"
        )
    if schema is not None and not bind.dialect.has_schema(bind, schema):
        bind.exec_driver_sql(f"CREATE SCHEMA {ddl.qualifier(schema)[:-1]}")
    for statement in ddl.upgrade(schema, since=found):
        bind.exec_driver_sql(statement)
    return found


def installed_version(connection: Connection, schema: str | None) -> int:
    """The version of our tables in *schema*; 0 where there are none."""
    name = f"{ddl.qualifier(schema)}river_migration"
    if connection.execute(select(func.to_regclass(name))).scalar_one() is None:
        return 0
    version = select(func.coalesce(func.max(river_migration.c.version), 0)).where(river_migration.c.line == ddl.LINE)
    return int(store.execute(connection, schema, version).scalar_one())
