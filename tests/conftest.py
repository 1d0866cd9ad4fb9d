"""One PostgreSQL for the whole run, a fresh database for each test that asks for one."""

import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, create_engine, make_url, text

from sqla_river import logs
from sqla_river.embedded import EmbeddedPostgres
from sqla_river.schema import create_all
from tests.database import catalog, emptied_tables, end_others, name_exists

_numbers = itertools.count()


# What a shell runs in the background ignores SIGINT, and what nohup runs SIGHUP; and so would every program that a test
# starts. A handler is not inherited, and this run goes on as before.
def _ignore(_number: int, _frame: object) -> None: ...


for _ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_ignored) is signal.SIG_IGN:
        signal.signal(_ignored, _ignore)

# What a crowded machine takes is no law; and what lands is judged by examples that are the same each time, while a
# developer's runs look for new ones. All of them, deeper: `--hypothesis-profile deep -n 2 tests/unit`.
NO_CLOCK: Final[dict[str, Any]] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("without a clock", **NO_CLOCK, derandomize="CI" in os.environ)
settings.register_profile("deep", **NO_CLOCK, max_examples=20_000, derandomize=False)
settings.load_profile("without a clock")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=10, help="how many processes the tests marked crash kill; 10 in CI")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    rounds: Any = request.config.getoption("--rounds")
    return int(rounds)


@pytest.fixture(autouse=True)
def talkative() -> None:
    """What an earlier test logged is no repeat in this one."""
    logs._said.clear()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a server: TEST_DATABASE_URL, else one that is started here and thrown away."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    # For two-phase sessions; and no vacuum or analyze comes in between: plans, buffers and locks are the test's own.
    settings = {"max_prepared_transactions": "10", "autovacuum": "off"}
    with EmbeddedPostgres(settings=settings) as postgres:
        yield postgres.url()


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with our tables, to be copied: 50 ms instead of a migration per test."""
    name = f"river_template_{os.getpid()}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(make_url(server).set(database=name))
    create_all(engine)
    engine.dispose()
    yield name
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture(scope="session")
def clean(server: str, template: str) -> Iterator[list[str]]:
    """Databases as the template that tests before have given back."""
    yield (names := list[str]())
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for name in names:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def url(server: str, template: str, clean: list[str]) -> Iterator[str]:
    """The URL of a database of the test's own, with our tables in it, and nothing in them.

    It is used again, if the test has left the catalog as it was: 20 ms against 200.
    """
    name = clean.pop() if clean else f"river_{os.getpid()}_{next(_numbers)}"
    mine = make_url(server).set(database=name)
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        if not name_exists(connection, name):
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    before = catalog(mine)
    yield mine.render_as_string(hide_password=False)
    with admin.connect() as connection:
        end_others(connection, name)
        if before == catalog(mine) and emptied_tables(mine):
            clean.append(name)
        else:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def empty_url(server: str) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    yield from _database(server, "")


def _database(server: str, like: str) -> Iterator[str]:
    name = f"river_{os.getpid()}_{next(_numbers)}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} {like}"))
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine(url)
    yield engine
    engine.dispose()
