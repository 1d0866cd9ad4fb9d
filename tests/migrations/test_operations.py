"""`op.river_upgrade` and `op.river_downgrade`, as migrations use them."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

import sqla_river_alembic
from sqla_river import create_all, ddl
from tests.migrations.catalogs import catalog
from tests.migrations.projects import Project, connected, engine_of, environment, run

NewProject = Callable[..., Project]
UP = "op.river_upgrade(version=1, from_version=0{})"
DOWN = "op.river_downgrade(version=0, from_version=1{})"
IN_RIVER = ", schema='river'"


def operations(connection: Connection) -> Operations:
    """Operations on *connection*, in a transaction of the caller's."""
    return Operations(MigrationContext.configure(connection))


def names(connection: Connection, schema: str = "public") -> set[str]:
    found = text("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace(:s) AND relkind = 'r'")
    return set(connection.execute(found, {"s": schema}).scalars())


@pytest.fixture
def many_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table with a row in it counts as big."""
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0)


# ---- the same tables, whatever made them ----------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [None, "river"])
def test_upgrade_head_makes_what_create_all_makes(project: Project, url: str, schema: str | None) -> None:
    project.migration(UP.format(IN_RIVER if schema else ""), DOWN.format(IN_RIVER if schema else ""))
    project.upgrade()

    with connected(url) as expected, connected(project.url) as real:
        assert catalog(real, schema or "public", but=("alembic_version",)) == catalog(expected)


@pytest.mark.parametrize("schema", [None, "river"])
def test_the_script_makes_what_create_all_makes(project: Project, url: str, schema: str | None) -> None:
    project.migration(UP.format(IN_RIVER if schema else ""), DOWN.format(IN_RIVER if schema else ""))
    script = project.sql()

    with connected(project.url) as real, connected(url) as expected:
        for statement in _split(script):
            real.exec_driver_sql(statement)
        assert catalog(real, schema or "public", but=("alembic_version",)) == catalog(expected)


@pytest.mark.parametrize("schema", [None, "river"])
def test_the_downgrade_script_takes_all_of_it_away(project: Project, schema: str | None) -> None:
    project.migration(UP.format(IN_RIVER if schema else ""), DOWN.format(IN_RIVER if schema else ""))
    project.upgrade()
    script = project.sql("head:base", down=True)

    with connected(project.url) as connection:
        for statement in _split(script):
            connection.exec_driver_sql(statement)
        assert not any(catalog(connection, schema or "public", but=("alembic_version",)).values())


def _split(script: str) -> list[str]:
    """The statements of a script, without the BEGIN and COMMIT around them."""
    parts = re.split(r"(\$river\$.*?\$river\$)", script, flags=re.DOTALL)
    pieces = [part if number % 2 else part.replace(";\n", "\0") for number, part in enumerate(parts)]
    statements = (statement.strip() for statement in "".join(pieces).split("\0"))
    return [each for each in statements if each and each not in ("BEGIN", "COMMIT")]


def test_the_script_runs_in_psql_as_it_is(project: Project) -> None:
    psql = _psql()
    project.migration(UP.format(IN_RIVER), DOWN.format(IN_RIVER))
    script = project.sql()
    assert "CONCURRENTLY" not in script

    with engine_of(project.url) as engine:
        host = str(engine.url.query["host"])
        database = str(engine.url.database)
    run(
        *(psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-h", host, "-p", "5432", "-U", "postgres", "-d", database),
        folder=project.folder,
        env=environment(project.folder),
        text=script,
    )
    with connected(project.url) as connection:
        assert set(ddl.TABLES) == names(connection, "river")


def _psql() -> str:
    import shutil

    from sqla_river.embedded import find_binaries

    psql = shutil.which("psql", path=str(find_binaries())) or shutil.which("psql")
    if psql is None:
        pytest.skip("no psql")
    return psql


def test_plain_functions_do_the_same_as_the_operations(project: Project, url: str) -> None:
    project.migration(
        "sqla_river_alembic.upgrade(op, version=1)", "sqla_river_alembic.downgrade(op, version=0, from_version=1)"
    )
    project.upgrade()
    with connected(url) as expected, connected(project.url) as real:
        assert catalog(real, but=("alembic_version",)) == catalog(expected)

    project.downgrade()
    with connected(project.url) as real:
        assert not any(catalog(real, but=("alembic_version",)).values())


def test_an_async_environment_works(project: Project, url: str) -> None:
    project.migration(UP.format(""), DOWN.format(""))
    env = (project.folder / "migrations" / "env.py").read_text()
    sync_part = "    engine = create_engine(config"
    (project.folder / "migrations" / "env.py").write_text(
        env[: env.index(sync_part)]
        + """
    import asyncio
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqla_river_alembic import lock
    def migrate(connection):
        with lock(connection):
            context.configure(connection=connection, **settings)
            with context.begin_transaction():
                context.run_migrations()
    async def main():
        engine = create_async_engine(config.get_main_option("sqlalchemy.url"), poolclass=pool.NullPool)
        async with engine.connect() as connection:
            await connection.run_sync(migrate)
        await engine.dispose()
    asyncio.run(main())
"""
    )
    project.upgrade()

    with connected(url) as expected, connected(project.url) as real:
        assert catalog(real, but=("alembic_version",)) == catalog(expected)
    project.check()
    project.downgrade()
    with connected(project.url) as connection:
        assert names(connection) == {"alembic_version"}


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_other_drivers_work(url: str, empty_url: str, driver: str) -> None:
    def migrate(connection: Connection) -> None:
        sqla_river_alembic.upgrade(operations(connection), version=1)

    theirs = empty_url.replace("+psycopg:", f"+{driver}:")
    if driver == "asyncpg":

        async def main() -> None:
            engine = create_async_engine(theirs, poolclass=NullPool)
            async with engine.begin() as connection:
                await connection.run_sync(migrate)
            await engine.dispose()

        asyncio.run(main())
    else:
        with connected(theirs) as connection:
            migrate(connection)

    with connected(url) as expected, connected(empty_url) as real:
        assert catalog(real) == catalog(expected)


def test_a_translate_map_moves_the_tables(project: Project) -> None:
    with connected(project.url) as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    project.options = {"schema_translate_map": {None: "tenant"}}
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()

    with connected(project.url) as connection:
        assert names(connection, "tenant") >= set(ddl.TABLES)


@pytest.mark.parametrize("per_migration", [False, True])
def test_it_goes_with_migrations_of_the_users_own(project: Project, per_migration: bool) -> None:
    project.settings["transaction_per_migration"] = per_migration
    project.migration("op.execute('CREATE TABLE first (id int)')", "op.execute('DROP TABLE first')")
    project.migration(UP.format(""), DOWN.format(""))
    project.migration(
        "op.execute('CREATE TABLE orders (job_id bigint REFERENCES river_job)')", "op.execute('DROP TABLE orders')"
    )
    project.upgrade()
    with connected(project.url) as connection:
        assert names(connection) == {"alembic_version", "first", "orders", *ddl.TABLES}

    project.downgrade()
    with connected(project.url) as connection:
        assert names(connection) == {"alembic_version"}


def test_a_migration_that_fails_later_leaves_nothing_behind(project: Project) -> None:
    project.migration(UP.format(""), DOWN.format(""))
    project.migration("op.execute('SELECT 1/0')")
    with pytest.raises(Exception, match="division by zero"):
        project.upgrade()

    with connected(project.url) as connection:
        assert names(connection) == set()


def test_what_is_there_already_is_left_alone(project: Project) -> None:
    with connected(project.url) as connection:
        create_all(connection)
        connection.execute(text("INSERT INTO river_job (kind, args) VALUES ('k', '{}')"))
        before = catalog(connection)
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()

    with connected(project.url) as connection:
        assert catalog(connection, but=("alembic_version",)) == before
        assert connection.execute(text("SELECT count(*) FROM river_job")).scalar_one() == 1


def test_rivers_own_indexes_are_made_where_they_are_asked_for(project: Project) -> None:
    project.migration(UP.format(", river_indexes=True"), DOWN.format(""))
    project.upgrade()

    with connected(project.url) as connection:
        found = connection.execute(text("SELECT indexname FROM pg_indexes WHERE tablename = 'river_job'"))
        assert set(found.scalars()) >= set(ddl.RIVER_INDEXES)
    assert all(name in project.sql() for name in ddl.RIVER_INDEXES)
    project.check()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"version": 2}, r"needs version 2 of the river tables, and the sqla_river that is installed knows 0 to 1"),
        ({"version": 1, "from_version": 1}, "river_upgrade goes up"),
        ({"version": 1, "from_version": -1}, "needs version 1"),
        ({"version": 1, "schema": "a-b"}, "schema must be a plain identifier"),
        ({"version": 1, "schema": "s" * 47}, "at most 46 bytes"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(empty_url: str, call: dict[str, Any], reason: str) -> None:
    with connected(empty_url) as connection, pytest.raises(CommandError, match=reason):
        sqla_river_alembic.upgrade(operations(connection), **call)


def test_a_downgrade_has_to_go_down(empty_url: str) -> None:
    with connected(empty_url) as connection, pytest.raises(CommandError, match="river_downgrade goes down"):
        sqla_river_alembic.downgrade(operations(connection), version=1, from_version=1)


def test_other_databases_are_refused() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(CommandError, match="need PostgreSQL, this is sqlite"):
        sqla_river_alembic.upgrade(operations(connection), version=1)
    engine.dispose()


def test_tables_newer_than_the_library_are_refused(url: str) -> None:
    with connected(url) as connection:
        connection.execute(text("INSERT INTO river_migration (line, version) VALUES ('sqla_river', 99)"))
        with pytest.raises(CommandError, match="of version 99, and the sqla_river that is installed knows up to 1"):
            sqla_river_alembic.upgrade(operations(connection), version=1)
        with pytest.raises(CommandError, match="of version 99"):
            sqla_river_alembic.downgrade(operations(connection), from_version=1)


@pytest.mark.parametrize("state", ["available", "running", "completed", "scheduled"])
def test_a_downgrade_that_would_lose_jobs_is_refused_and_changes_nothing(project: Project, state: str) -> None:
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()
    with connected(project.url) as connection:
        row = "INSERT INTO river_job (kind, state, args, finalized_at) VALUES ('k', :s, '{}', :f)"
        connection.execute(text(row), {"s": state, "f": "now" if state == "completed" else None})
        before = catalog(connection)
    with pytest.raises(CommandError, match=r"there are jobs.*; empty river_job"):
        project.downgrade()

    with connected(project.url) as connection:
        assert catalog(connection) == before
        connection.execute(text("DELETE FROM river_job"))
    project.downgrade()
    with connected(project.url) as connection:
        assert names(connection) == {"alembic_version"}


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO river_queue (name, paused_at) VALUES ('q', now())",
        "INSERT INTO river_migration (line, version) VALUES ('workflow', 1)",
    ],
    ids=["a paused queue", "tables of River Pro"],
)
def test_a_downgrade_that_would_lose_more_is_refused_too(project: Project, statement: str) -> None:
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()
    with connected(project.url) as connection:
        connection.execute(text(statement))

    with pytest.raises(CommandError, match="version 0 drops the tables"):
        project.downgrade()


def test_a_downgrade_does_not_wait_behind_work_for_long(project: Project) -> None:
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()
    with connected(project.url) as connection:
        connection.execute(text("LOCK TABLE river_job IN ROW EXCLUSIVE MODE"))
        with pytest.raises(Exception, match="lock timeout"):
            project.downgrade()


# ---- big tables -----------------------------------------------------------------------------------------------------


def test_on_a_big_table_indexes_are_built_concurrently(
    project: Project, url: str, many_jobs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    real: Any = Connection.exec_driver_sql

    def heard(self: Connection, sql: str, *rest: Any, **more: Any) -> Any:
        said.append(sql)
        return real(self, sql, *rest, **more)

    monkeypatch.setattr(Connection, "exec_driver_sql", heard)
    with connected(project.url) as connection:
        _lacking_two(connection)
    project.migration("op.execute('CREATE TABLE mine (id int)')")
    project.migration(UP.format(""), DOWN.format(""))
    said.clear()
    project.upgrade()

    built = [sql for sql in said if "INDEX CONCURRENTLY" in sql]
    assert [sql.partition(" ON ")[0].rpartition(" ")[2] for sql in built if sql.startswith("CREATE")] == [
        "river_job_fetch_idx",
        "river_job_due_idx",
    ]
    with connected(url) as expected, connected(project.url) as now:
        assert catalog(now, but=("alembic_version", "mine")) == catalog(expected)


def _lacking_two(connection: Connection) -> None:
    """River's tables with a job, and all but two of our indexes: one was never made, one is of another shape."""
    create_all(connection)
    connection.execute(text("INSERT INTO river_job (kind, args) VALUES ('k', '{}')"))
    connection.execute(text("DELETE FROM river_migration WHERE line = 'sqla_river'"))
    connection.execute(text("DROP TABLE river_runner, river_duty, river_suspect, river_counter, river_history"))
    connection.execute(text("DROP INDEX river_job_fetch_idx, river_job_due_idx"))
    connection.execute(text("CREATE INDEX river_job_due_idx ON river_job (scheduled_at) WHERE state = 'scheduled'"))


def test_on_a_big_table_in_a_transaction_of_the_users_it_says_what_to_do(empty_url: str, many_jobs: None) -> None:
    with connected(empty_url) as connection:
        _lacking_two(connection)
    with connected(empty_url) as connection:
        connection.execute(text("SELECT 1"))
        with pytest.raises(CommandError, match="Run 'sqla-river migrate' before"):
            sqla_river_alembic.upgrade(operations(connection), version=1)
        sqla_river_alembic.upgrade(operations(connection), version=1, concurrently=False)


def test_a_script_builds_concurrently_if_told_to(project: Project) -> None:
    project.migration(UP.format(", concurrently=True"), DOWN.format(""))
    script = project.sql()

    before, _, after = script.rpartition("CREATE INDEX CONCURRENTLY")
    assert before.rindex("COMMIT;") > before.rindex("BEGIN;")
    assert after.index("BEGIN;") < after.index("pg_advisory_xact_lock")


def test_an_index_that_is_invalid_is_built_anew(url: str) -> None:
    with connected(url) as connection:
        connection.execute(
            text("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'river_job_fetch_idx'::regclass")
        )
    with engine_of(url) as engine:
        assert create_all(engine) == 1

    with connected(url) as connection:
        valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'river_job_fetch_idx'::regclass"
        assert connection.execute(text(valid)).scalar_one()


# ---- versions to come -----------------------------------------------------------------------------------------------


@pytest.fixture
def version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second version, with everything that a version may have."""
    monkeypatch.setitem(
        ddl.VERSIONS,
        2,
        ddl.Version(
            upgrade=("CREATE TABLE IF NOT EXISTS {s}river_new (id bigint)",),
            downgrade=("DROP TABLE IF EXISTS {s}river_new",),
            indexes={"river_job_new_idx": "(kind) WHERE state = 'available'"},
            labels=("paused",),
        ),
    )
    monkeypatch.setitem(
        ddl.VERSIONS,
        3,
        ddl.Version(
            upgrade=("CREATE TABLE IF NOT EXISTS {s}river_newer (state {s}river_job_state DEFAULT 'paused')",),
            downgrade=("DROP TABLE IF EXISTS {s}river_newer",),
        ),
    )
    monkeypatch.setattr(ddl, "LATEST", 3)


def test_no_version_uses_a_label_that_it_adds(version_2: None) -> None:
    """PostgreSQL refuses a label that the same transaction has added."""
    for version in ddl.VERSIONS.values():
        for statement in (*version.upgrade, *version.indexes.values(), *(change for _, change in version.changes)):
            assert not any(f"'{label}'" in statement for label in version.labels)


@pytest.mark.parametrize("jobs", [0, 1])
@pytest.mark.parametrize("steps", [[(0, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]])
def test_versions_to_come_arrive_by_any_steps(
    project: Project, version_2: None, steps: list[tuple[int, int]], jobs: int, request: pytest.FixtureRequest
) -> None:
    if jobs:
        request.getfixturevalue("many_jobs")
    for since, to in steps:
        project.migration(
            f"op.river_upgrade(version={to}, from_version={since})",
            f"op.river_downgrade(version={since}, from_version={to})",
        )
    if jobs and steps[0] == (0, 1):
        project.upgrade("r1")
        with connected(project.url) as connection:
            connection.execute(text("INSERT INTO river_job (kind, args) VALUES ('k', '{}')"))
    project.upgrade()
    with connected(project.url) as connection:
        upgraded = catalog(connection, but=("alembic_version",))
        assert {"river_new", "river_newer"} <= names(connection)
        versions = connection.execute(text("SELECT version FROM river_migration WHERE line = 'sqla_river' ORDER BY 1"))
        assert versions.scalars().all() == [1, 2, 3]
        connection.execute(text("CREATE SCHEMA other"))
    with engine_of(project.url) as engine:
        create_all(engine, "other")
    with connected(project.url) as connection:
        assert catalog(connection, "other") == upgraded
        connection.execute(text("DELETE FROM river_job"))

    project.downgrade()
    with connected(project.url) as connection:
        assert names(connection) == {"alembic_version"}


def test_a_database_ahead_of_its_migrations_is_left_alone(project: Project, version_2: None) -> None:
    with engine_of(project.url) as engine:
        create_all(engine)
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()

    with connected(project.url) as connection:
        assert "river_newer" in names(connection)


def test_a_database_behind_its_migrations_is_an_error(project: Project, version_2: None) -> None:
    project.migration("op.river_upgrade(version=3, from_version=2)")

    with pytest.raises(CommandError, match="from version 2 to 3, and schema 'public' has none"):
        project.upgrade()
