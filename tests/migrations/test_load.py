"""Migrations while others migrate, and while others work."""

import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import sqla_river_alembic
from sqla_river import Job, JobContext, Runner, Workers, create_all, ddl
from sqla_river.check import check_schema
from sqla_river.schema import migrate
from tests.jobs import Ping
from tests.migrations.catalogs import catalog
from tests.migrations.projects import Project, connected, engine_of, environment
from tests.migrations.rivers import install_river

ENV = """
from alembic import context
from sqlalchemy import create_engine, pool
import sqla_river_alembic
engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
with engine.connect() as connection, {lock}:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
LOCK = "sqla_river_alembic.lock(connection)"
NO_LOCK = "__import__('contextlib').nullcontext()"


def upgrade_together(project: Project, count: int) -> list[int]:
    ini = project.folder / "alembic.ini"
    ini.write_text(ini.read_text() + "sqlalchemy.url = " + project.url.replace("%", "%%") + "\n")
    env = environment(project.folder)
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    processes = [
        subprocess.Popen(command, cwd=project.folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        return [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def jobs_before(connection: Connection) -> None:
    install_river(connection, 5)
    connection.execute(
        text("INSERT INTO river_job (kind, args, max_attempts) SELECT 'k', '{}', 3 FROM generate_series(1, 500)")
    )


def whole(project: Project, url: str) -> None:
    theirs = (*ddl.RIVER_INDEXES, "river_migration_pkey", "alembic_version")
    with connected(project.url) as connection, connected(url) as expected:
        assert check_schema(connection, None) == []
        assert catalog(connection, but=theirs) == catalog(expected, but=theirs)
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["r2"]


@pytest.mark.parametrize("concurrently", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_of_twenty_processes_one_upgrades_and_all_succeed(
    tmp_path: Path, empty_url: str, url: str, concurrently: bool
) -> None:
    project = Project(tmp_path, empty_url, ENV.format(lock=LOCK))
    with connected(empty_url) as connection:
        jobs_before(connection)
    project.migration(f"op.river_upgrade(version=1, concurrently={concurrently})")
    project.migration("op.execute('SELECT 1')")

    assert upgrade_together(project, 20) == [0] * 20
    whole(project, url)


def test_without_the_lock_somebody_succeeds_and_nothing_is_half_done(tmp_path: Path, empty_url: str, url: str) -> None:
    project = Project(tmp_path, empty_url, ENV.format(lock=NO_LOCK))
    with connected(empty_url) as connection:
        jobs_before(connection)
    project.migration("op.river_upgrade(version=1, concurrently=True)")
    project.migration("op.execute('SELECT 1')")

    assert 0 in upgrade_together(project, 4)
    whole(project, url)


# ---- the lock -------------------------------------------------------------------------------------------------------


def test_the_lock_leaves_no_transaction_and_ends_with_its_block(engine: Engine) -> None:
    with engine.connect() as connection, engine.connect() as other:
        with sqla_river_alembic.lock(connection):
            assert not connection.in_transaction()
            assert not other.exec_driver_sql(ddl.TRY_LOCK).scalar_one()
        assert other.exec_driver_sql(ddl.TRY_LOCK).scalar_one()


def test_the_lock_keeps_create_all_waiting(engine: Engine) -> None:
    done = threading.Event()

    def install() -> None:
        create_all(engine)
        done.set()

    with engine.connect() as connection:
        held = sqla_river_alembic.lock(connection)
        thread = threading.Thread(target=install)
        thread.start()
        assert not done.wait(0.3)
        held.release()
        assert done.wait(30)
    thread.join()


def test_the_lock_ends_with_its_connection(engine: Engine) -> None:
    alone = create_engine(engine.url, poolclass=NullPool)
    with alone.connect() as connection:
        sqla_river_alembic.lock(connection)

    assert create_all(engine) == ddl.LATEST


def test_the_lock_within_a_transaction_leaves_it_open(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("CREATE TEMPORARY TABLE mine (id int)"))
        with sqla_river_alembic.lock(connection):
            assert connection.in_transaction()
        connection.rollback()


def test_the_lock_is_nothing_on_other_databases() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, sqla_river_alembic.lock(connection):
        pass
    engine.dispose()


def test_the_lock_wants_a_plain_connection() -> None:
    with pytest.raises(TypeError, match="run_sync"):
        sqla_river_alembic.lock(object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# ---- under load -----------------------------------------------------------------------------------------------------


class Load:
    """Clients that put jobs in, fetch them and complete them, and wait for no lock for a second."""

    STATEMENTS = (
        "INSERT INTO river_job (kind, args, max_attempts) VALUES ('k', '{}', 3)",
        (
            "UPDATE river_job SET state = 'running', attempt = 1 WHERE id = "
            "(SELECT id FROM river_job WHERE state = 'available' AND kind = 'k' LIMIT 1 FOR UPDATE SKIP LOCKED)"
        ),
        (
            "UPDATE river_job SET state = 'completed', finalized_at = now() WHERE id = "
            "(SELECT max(id) FROM river_job WHERE kind = 'k')"
        ),
    )

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.count = 0
        self.errors: list[Exception] = []
        self.stopped = threading.Event()

    def work(self) -> None:
        try:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("SET lock_timeout = '1s'")  # an error, where a busy machine is none
                while not self.stopped.is_set():
                    for statement in self.STATEMENTS:
                        connection.exec_driver_sql(statement)
                        self.count += 1
        except Exception as error:  # noqa: BLE001
            self.errors.append(error)

    def hold(self) -> None:
        """Transactions of a quarter of a second that have written: handlers at work."""
        with self.engine.connect() as connection:
            while not self.stopped.is_set():
                connection.exec_driver_sql("INSERT INTO river_job (kind, args, max_attempts) VALUES ('h', '{}', 3)")
                self.stopped.wait(0.25)
                connection.commit()


@contextmanager
def load(engine: Engine) -> Generator[Load]:
    working = Load(engine)
    threads = [threading.Thread(target=target) for target in (working.work, working.work, working.hold)]
    for thread in threads:
        thread.start()
    try:
        yield working
    finally:
        working.stopped.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("by", ["alembic", pytest.param("migrate", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [120_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", [5, pytest.param(7, marks=pytest.mark.slow)])
def test_a_big_table_is_upgraded_without_anybody_waiting_for_a_second(
    tmp_path: Path, empty_url: str, by: str, rows: int, version: int
) -> None:
    with connected(empty_url) as connection:
        install_river(connection, version)
        for index in ddl.RIVER_INDEXES:
            connection.exec_driver_sql(f"DROP INDEX {index}")
        connection.execute(
            text(
                "INSERT INTO river_job (kind, args, max_attempts, state, finalized_at) "
                "SELECT 'k', '{}', 3, CASE WHEN n % 10 = 0 THEN 'available' ELSE 'completed' END::river_job_state, "
                "CASE WHEN n % 10 <> 0 THEN now() END FROM generate_series(1, :n) n"
            ),
            {"n": rows},
        )
    project = Project(tmp_path, empty_url)
    project.migration("op.river_upgrade(version=1)")
    with engine_of(empty_url) as engine, load(engine) as working:
        if by == "alembic":
            project.upgrade()
        else:
            migrate(engine)
        with engine.connect() as connection:
            assert check_schema(connection, None) == []

    assert working.errors == []
    assert working.count > 10


@pytest.mark.parametrize("rows", [120_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_runners_go_on_while_a_later_version_arrives(
    tmp_path: Path, url: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(url) as connection:
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        query = "INSERT INTO river_job (kind, args, state, finalized_at) SELECT 'k', '{}', 'completed', now()"
        connection.execute(text(f"{query} FROM generate_series(1, :n)"), {"n": rows})
    new = ddl.Version(
        upgrade=("CREATE TABLE IF NOT EXISTS {s}river_new (id bigint)",),
        downgrade=("DROP TABLE IF EXISTS {s}river_new",),
        indexes={"river_job_new_idx": "(kind, id)"},
        labels=("paused",),
    )
    project = Project(tmp_path, url)
    project.migration("op.river_upgrade(version=2, from_version=1)", "op.river_downgrade(version=1, from_version=2)")
    workers, done = Workers(), threading.Event()

    @workers.register(Ping)
    def ping(job: JobContext[Ping]) -> None:
        if job.args.n == 2:
            done.set()

    with engine_of(url) as engine, Runner(engine, workers, queues={"default": 5}), load(engine) as working:
        with monkeypatch.context() as patch:
            patch.setitem(ddl.VERSIONS, 2, new)
            patch.setattr(ddl, "LATEST", 2)
            project.upgrade()
            project.downgrade()
        with Session(engine) as session, session.begin():
            session.add(Job(Ping(2)))
        assert done.wait(30)

    assert working.errors == []


def test_a_change_that_cannot_get_its_lock_gives_up_with_the_reason(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else waits meanwhile: it asks for the lock for a quarter of a second at a time."""
    from sqla_river.ddl import script
    from sqla_river.errors import SchemaError

    def hastily(condition: str, change: str) -> str:
        return script.patiently(condition, change).replace("1..240", "1..2")

    monkeypatch.setattr("sqla_river.ddl.plan.patiently", hastily)
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0)
    with connected(empty_url) as connection:
        jobs_before(connection)
    with engine_of(empty_url) as engine, engine.connect() as holder:
        holder.exec_driver_sql("UPDATE river_job SET attempt = 0 WHERE id = 1")
        with pytest.raises(SchemaError, match="holds its lock on a table for over a minute"):
            migrate(engine)
        holder.rollback()

        assert migrate(engine).version == 1  # and can be run again


def test_killed_half_way_it_can_be_run_again(empty_url: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0)
    with connected(empty_url) as connection:
        jobs_before(connection)
    real: Any = Connection.exec_driver_sql
    with engine_of(empty_url) as engine, engine.connect() as connection:
        plan = ddl.plan_upgrade(_look(connection), big=True)
    for stop in range(len(plan.before) + len(plan.inside)):
        left = [stop]

        def killed(self: Connection, sql: str, *rest: Any, left: list[int] = left, **more: Any) -> Any:
            if sql in plan.before or sql in plan.inside:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
            return real(self, sql, *rest, **more)

        with monkeypatch.context() as patch, engine_of(empty_url) as engine:
            patch.setattr(Connection, "exec_driver_sql", killed)
            with pytest.raises(KeyboardInterrupt):
                migrate(engine)
            if stop > 8:
                break
    with engine_of(empty_url) as engine:
        migrate(engine)

    theirs = (*ddl.RIVER_INDEXES, "river_migration_pkey")
    with connected(empty_url) as connection, connected(url) as expected:
        assert catalog(connection, but=theirs) == catalog(expected, but=theirs)
        assert connection.execute(text("SELECT count(*) FROM river_job")).scalar_one() == 500


def _look(connection: Connection) -> ddl.Look:
    from sqla_river.schema import look

    return look(connection, None)
