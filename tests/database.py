"""What tests that talk to the database share."""

import itertools
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, create_engine, event, inspect, make_url, text

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


def emptied(url: str) -> Iterator[Engine]:
    """An engine; afterwards the jobs are gone, their ids begin anew, and tables of the test's own are dropped."""
    engine = create_engine(url)
    yield engine
    with engine.begin() as connection:
        for name in inspect(connection).get_table_names():
            if not name.startswith("river_"):
                connection.execute(text(f"DROP TABLE {name} CASCADE"))
        connection.execute(text("TRUNCATE river_job RESTART IDENTITY CASCADE"))
    engine.dispose()


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
