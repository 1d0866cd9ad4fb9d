"""Databases for tests: fresh ones, copied from a template, and sessions that leave nothing behind."""

import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.orm import Session


class Databases:
    """Databases on one server. *worker* goes into their names, to tell whose one is that was left behind."""

    def __init__(self, server: str, worker: str) -> None:
        self._server = make_url(server)
        self._worker = "".join(letter for letter in worker.lower() if letter.isalnum())[:20]

    @contextmanager
    def fresh(self, like: str | None = None) -> Generator[str]:
        """The URL of a new database for the block; *like* is the URL of another one, to be copied (50 ms), which nobody
        may be connected to.
        """
        name = f"sqla_river_{self._worker}_{secrets.token_hex(6)}"
        template = f' TEMPLATE "{make_url(like).database}"' if like else ""
        self._run(f'CREATE DATABASE "{name}"{template}')
        try:
            yield self._server.set(database=name).render_as_string(hide_password=False)
        finally:
            self._run(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @contextmanager
    def template(self, migrate: Callable[[Engine], object]) -> Generator[str]:
        """The URL of a new database that *migrate* has put its tables in."""
        with self.fresh() as url:
            engine = create_engine(url)
            try:
                migrate(engine)
            finally:
                engine.dispose()
            yield url

    def _run(self, sql: str) -> None:
        admin = create_engine(self._server, isolation_level="AUTOCOMMIT")
        try:
            with admin.connect() as connection:
                connection.execute(text(sql))
        finally:
            admin.dispose()


@contextmanager
def rolled_back(engine: Engine) -> Generator[Session]:
    """A Session whose commits are savepoints, inside one transaction that is rolled back when the block ends: what a
    test does, committing as it likes, is gone afterwards. Runners and other connections see nothing of it.
    """
    with engine.connect() as connection:
        outer = connection.begin()
        try:
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                yield session
        finally:
            outer.rollback()
