"""What tests that talk to the database share."""

import itertools
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ProgrammingError

from sqla_river import ddl

_numbers = itertools.count()


def shared_database(server: str, template: str) -> Iterator[str]:
    """The URL of one database for the tests of a module, which `emptied` puts right between them: 4 ms against 200."""
    name = f"river_shared_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


def emptied(url: str, *tables: str) -> Iterator[Engine]:
    """An engine; afterwards the jobs are gone, their ids begin anew, and tables of the test's own are dropped; the
    *tables* are empty too.
    """
    engine = create_engine(url)
    yield engine
    with engine.begin() as connection:
        for name in inspect(connection).get_table_names():
            if not name.startswith("river_"):
                connection.execute(text(f"DROP TABLE {name} CASCADE"))
        connection.execute(text(f"TRUNCATE {', '.join(['river_job', *tables])} RESTART IDENTITY CASCADE"))
    engine.dispose()


_CATALOG = """
    SELECT array_agg(line ORDER BY line) FROM (
        SELECT format('%s %s %s %s', oid, relname, relnamespace, reloptions) FROM pg_class WHERE oid >= 16384
        UNION ALL SELECT format('%s %s %s', attrelid, attname, atttypid) FROM pg_attribute WHERE attrelid >= 16384
        UNION ALL SELECT format('%s %s', oid, conname) FROM pg_constraint WHERE oid >= 16384
        UNION ALL SELECT format('%s %s', oid, proname) FROM pg_proc WHERE oid >= 16384
        UNION ALL SELECT format('%s %s', oid, typname) FROM pg_type WHERE oid >= 16384
        UNION ALL SELECT format('%s %s', oid, nspname) FROM pg_namespace WHERE oid >= 16384
        UNION ALL SELECT format('%s %s', oid, tgname) FROM pg_trigger
        UNION ALL SELECT format('%s %s %s', indexrelid, indisvalid, indisready) FROM pg_index WHERE indexrelid >= 16384
        UNION ALL SELECT format('%s %s', line, version) FROM river_migration
        UNION ALL SELECT format('%s %s %s', setdatabase, setrole, setconfig) FROM pg_db_role_setting
    ) lines (line)
"""


def catalog(url: URL) -> object:
    """What a database is made of, but for the rows in its tables."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        try:
            return connection.execute(text(_CATALOG)).scalar_one()
        except ProgrammingError:  # the test has dropped our tables
            return None


def name_exists(connection: Connection, name: str) -> bool:
    """Whether there is a database of that name."""
    return bool(connection.execute(text("SELECT 1 FROM pg_database WHERE datname = :name"), {"name": name}).scalar())


def end_others(connection: Connection, name: str) -> None:
    """End whatever is connected to the database *name*."""
    kill = text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name")
    connection.execute(kill, {"name": name})


def emptied_tables(url: URL) -> bool:
    """Make our tables as empty as they were; False if somebody has left a prepared transaction."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        prepared = text("SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()")
        if connection.execute(prepared).scalar():
            return False
        tables = ", ".join(name for name in ddl.TABLES if name != "river_migration")
        connection.execute(text(f"TRUNCATE {tables} RESTART IDENTITY CASCADE"))
    return True


@contextmanager
def statements_of(engine: Engine) -> Generator[list[str]]:
    """The SQL that runs on *engine* inside the block, savepoints and two-phase words included."""
    seen: list[str] = []

    def before(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    def savepoint(_conn: Any, name: str) -> None:
        seen.append(f"SAVEPOINT {name}")

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "savepoint", savepoint)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", before)
        event.remove(engine, "savepoint", savepoint)
