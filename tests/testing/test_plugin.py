"""The pytest plugin, in runs of pytest of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

pytest_plugins = ["pytester"]

SUITE = """
    from typing import ClassVar

    import attrs
    import pytest
    from sqlalchemy import create_engine, select
    from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

    from sqla_river import Job, Runner, Workers, create_all, enqueue, wait_for
    from sqla_river.testing import assert_enqueued, drain, refute_enqueued


    class Base(DeclarativeBase):
        pass


    class Mine(Base):
        __tablename__ = "mine"
        id: Mapped[int] = mapped_column(primary_key=True)


    @attrs.frozen
    class Ring:
        kind: ClassVar[str] = "ring"
        times: int = 1


    workers = Workers()
    rung = []
    workers.register(Ring)(lambda job: rung.append(job.args.times))


    @pytest.fixture(scope="session")
    def river_migrate():
        def migrate(engine):
            create_all(engine)
            Base.metadata.create_all(engine)

        return migrate


    @pytest.mark.parametrize("times", range(6))
    def test_each_sees_only_its_own(river_session, river_url, times, worker_id):
        assert worker_id.replace("master", "main") in river_url
        river_session.add(Mine(id=1))
        enqueue(river_session, Ring(times))
        river_session.commit()

        assert_enqueued(river_session, Ring, times=times, count=1)
        assert [each.args.times for each in drain(river_session, workers)] == [times]


    @pytest.mark.parametrize("n", range(2))
    def test_a_runner_in_a_database_of_its_own(river_database, n):
        engine = create_engine(river_database)
        with Session(engine) as session, session.begin():
            assert session.scalars(select(Job)).all() == []
            session.add(Mine(id=1))
            job = enqueue(session, Ring(100))
            session.flush()
            job_id = job.id
        with Runner(engine, workers, queues={"default": 1}):
            assert wait_for(engine, job_id).state == "completed"
        engine.dispose()


    def test_failing(river_session):
        enqueue(river_session, Ring(1))
        assert_enqueued(river_session, Ring, times=2)
"""


@pytest.fixture
def pytester(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "SQLA_RIVER_TEST_URL"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def databases(server: str) -> list[str]:
    engine = create_engine(server)
    with engine.connect() as connection:
        found = connection.execute(text("SELECT datname FROM pg_database WHERE datname LIKE 'sqla_river_%'")).scalars()
        names = list(found)
    engine.dispose()
    return names


def run(pytester: pytest.Pytester, *options: str) -> Any:
    return pytester.runpytest_subprocess("-p", "no:cacheprovider", *options, timeout=120)


def test_workers_of_xdist_have_a_database_each_on_the_given_server(
    pytester: pytest.Pytester, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(SUITE)
    monkeypatch.setenv("SQLA_RIVER_TEST_URL", server)

    done = run(pytester, "-n", "2")

    done.assert_outcomes(passed=8, failed=1)
    done.stdout.fnmatch_lines(["E * AssertionError: no job of kind 'ring' with times=2"])
    done.stdout.no_fnmatch_line("*looking.py:*")  # the trace ends in the test
    assert databases(server) == []


def test_without_a_server_it_starts_one_and_the_option_beats_ini_and_environment(
    pytester: pytest.Pytester, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(
        """
        def test_own(embedded_postgres, river_server, river_session):
            assert river_server == embedded_postgres.url()
            assert str(embedded_postgres.data_directory.parent) in river_session.connection().engine.url.query["host"]
        """
    )
    run(pytester).assert_outcomes(passed=1)

    monkeypatch.setenv("SQLA_RIVER_TEST_URL", "postgresql+psycopg://nowhere.invalid/env")
    pytester.makeini("[pytest]\nriver_url = postgresql+psycopg://nowhere.invalid/ini")
    pytester.makepyfile(
        """
        import os

        def test_which(river_server):
            assert river_server.endswith(os.environ["WANTED"])
        """
    )
    monkeypatch.setenv("WANTED", "/ini")
    run(pytester).assert_outcomes(passed=1)
    monkeypatch.setenv("WANTED", "/option")
    run(pytester, "--river-url", "postgresql+psycopg://nowhere.invalid/option").assert_outcomes(passed=1)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_a_url_may_be_of_any_scheme_of_postgresql(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setenv("SQLA_RIVER_TEST_URL", f"{scheme}://me:it%40@nowhere.invalid/db")
    pytester.makepyfile(
        """
        def test_which(river_server):
            assert river_server == "postgresql+psycopg://me:it%40@nowhere.invalid/db"
        """
    )

    run(pytester).assert_outcomes(passed=1)


def test_a_run_that_has_nothing_to_do_with_it_pays_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports nothing but itself, breaks with no warning, and does not mind a server that is not there."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # of others, which import what they like
    monkeypatch.setenv("SQLA_RIVER_TEST_URL", "postgresql+psycopg://nowhere.invalid/x")
    pytester.makepyfile(
        """
        import sys

        def test_unrelated(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("sqla_river")
            ours = {name for name in sys.modules if name.startswith("sqla_river")}
            assert ours == {"sqla_river", "sqla_river.testing", "sqla_river.testing.plugin"}
            heavy = {"sqlalchemy", "psycopg", "attr", "cattrs", "msgspec", "pydantic", "asyncio"}
            assert not heavy & set(sys.modules), heavy & set(sys.modules)
        """
    )

    run(pytester, "-W", "error", "-p", "sqla_river", "--strict-config", "--strict-markers").assert_outcomes(passed=1)


def test_fixtures_and_options_are_documented_and_bear_our_name(pytester: pytest.Pytester) -> None:
    shown = run(pytester, "--fixtures", "-p", "no:xdist").stdout.str()
    ours = shown.split("fixtures defined from sqla_river.testing.plugin")[1].split("fixtures defined from")[0]
    names = [line.split()[0] for line in ours.splitlines() if " -- " in line]

    assert sorted(names) == [
        "embedded_postgres",
        "river_database",
        "river_databases",
        "river_engine",
        "river_migrate",
        "river_server",
        "river_session",
        "river_template",
        "river_url",
    ]
    assert "no docstring available" not in ours


def test_unittest_needs_no_plugin(tmp_path: Path, url: str) -> None:
    (tmp_path / "test_plain.py").write_text(
        f"""
import unittest
from typing import ClassVar

import attrs
from sqlalchemy import create_engine

from sqla_river import Workers, enqueue
from sqla_river.testing import assert_enqueued, drain, rolled_back


@attrs.frozen
class Ring:
    kind: ClassVar[str] = "ring"


class Tests(unittest.TestCase):
    def test_ring(self):
        workers = Workers()
        workers.register(Ring)(lambda job: None)
        engine = create_engine({url!r})
        self.addCleanup(engine.dispose)
        session = self.enterContext(rolled_back(engine))
        enqueue(session, Ring())
        assert_enqueued(session, Ring)
        self.assertEqual([each.state for each in drain(session, workers)], ["completed"])
        with self.assertRaises(AssertionError):
            assert_enqueued(session, Ring, state="available")
        import sys
        self.assertNotIn("pytest", sys.modules)
"""
    )

    done = subprocess.run(
        [sys.executable, "-m", "unittest", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
