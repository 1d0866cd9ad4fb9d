"""The pytest plugin. It is loaded in every run of pytest where sqla_river is installed: so nothing but pytest is
imported here, all else when a fixture is used; and its newer names stand in quotes.
"""

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine
    from sqlalchemy.orm import Session

    from sqla_river.embedded import EmbeddedPostgres
    from sqla_river.testing.databases import Databases

ABOUT = "URL of a PostgreSQL server for the tests, which may create databases there; without it they start their own"


def pytest_addoption(parser: "pytest.Parser") -> None:
    parser.getgroup("sqla_river").addoption("--river-url", metavar="URL", help=ABOUT)
    parser.addini("river_url", f"{ABOUT} (the environment's SQLA_RIVER_TEST_URL comes after this)", default="")


@pytest.fixture(scope="session")
def embedded_postgres() -> "Iterator[EmbeddedPostgres]":
    """A PostgreSQL server in a temporary folder, removed at the end; about a second, once per process."""
    from sqla_river.embedded import EmbeddedPostgres

    with EmbeddedPostgres() as postgres:
        yield postgres


@pytest.fixture(scope="session")
def river_server(request: "pytest.FixtureRequest") -> str:
    """The URL of the server: option, ini, environment, else `embedded_postgres`."""
    import os

    config = request.config
    given = config.getoption("--river-url") or config.getini("river_url") or os.environ.get("SQLA_RIVER_TEST_URL")
    if given:
        from sqla_river.urls import parse_url

        return parse_url(str(given)).render_as_string(hide_password=False)
    postgres: EmbeddedPostgres = request.getfixturevalue("embedded_postgres")
    return postgres.url()


@pytest.fixture(scope="session")
def river_migrate() -> "Callable[[Engine], object]":
    """What puts tables into a new database: `create_all`. Override it to have your own tables too."""
    from sqla_river.schema import create_all

    return create_all


@pytest.fixture(scope="session")
def river_databases(river_server: str) -> "Databases":
    """Makes databases on the server, named by the worker of pytest-xdist."""
    import os

    from sqla_river.testing.databases import Databases

    return Databases(river_server, os.environ.get("PYTEST_XDIST_WORKER", "main"))


@pytest.fixture(scope="session")
def river_template(river_databases: "Databases", river_migrate: "Callable[[Engine], object]") -> "Iterator[str]":
    """The URL of a database with the tables, to be copied; nobody connects to it."""
    with river_databases.template(river_migrate) as url:
        yield url


@pytest.fixture(scope="session")
def river_url(river_databases: "Databases", river_template: str) -> "Iterator[str]":
    """The URL of a database with the tables, one for each worker of pytest-xdist; dropped at the end."""
    with river_databases.fresh(river_template) as url:
        yield url


@pytest.fixture(scope="session")
def river_engine(river_url: str) -> "Iterator[Engine]":
    """An Engine on `river_url`."""
    from sqlalchemy import create_engine

    engine = create_engine(river_url)
    yield engine
    engine.dispose()


@pytest.fixture
def river_session(river_engine: "Engine") -> "Iterator[Session]":
    """A Session that may commit; all of it is rolled back after the test. See `rolled_back`."""
    from sqla_river.testing.databases import rolled_back

    with rolled_back(river_engine) as session:
        yield session


@pytest.fixture
def river_database(river_databases: "Databases", river_template: str) -> "Iterator[str]":
    """The URL of a database of the test's own, with the tables: for a Runner, or whatever must really commit. 50 ms."""
    with river_databases.fresh(river_template) as url:
        yield url
