"""A database that River's own tool has migrated becomes ours, and stays River's."""

import json
from typing import Any

import pytest
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from sqla_river import Job, create_all, ddl
from sqla_river.check import check_schema
from sqla_river.errors import SchemaError
from sqla_river.schema import migrate
from tests.jobs import Ping
from tests.migrations.catalogs import catalog
from tests.migrations.projects import Project, connected, engine_of
from tests.migrations.rivers import install_old_river, install_river
from tests.migrations.test_autogenerate import body

THEIRS = (*ddl.RIVER_INDEXES, "river_migration_pkey", "alembic_version")
UP = "op.river_upgrade(version=1, from_version=0{})"
DOWN = "op.river_downgrade(version=0, from_version=1{})"


def fill(connection: Connection, schema: str | None = None) -> None:
    """A job in every state, a unique one, a paused queue."""
    s = ddl.qualifier(schema)
    for number, state in enumerate(
        connection.execute(text(f"SELECT unnest(enum_range(NULL::{s}river_job_state))::text")).scalars().all()
    ):
        ended = "now()" if state in ("cancelled", "completed", "discarded") else "NULL"
        connection.execute(
            text(
                f"INSERT INTO {s}river_job (kind, args, max_attempts, state, finalized_at, unique_key) "
                f"VALUES ('k', CAST(:a AS jsonb), 3, CAST(:s AS {s}river_job_state), {ended}, CAST(:u AS bytea))"
            ),
            {"a": json.dumps({"n": number}), "s": state, "u": b"key" if number == 0 else None},
        )
    connection.execute(text(f"INSERT INTO {s}river_queue (name, paused_at, updated_at) VALUES ('q', now(), now())"))
    connection.execute(text(f"INSERT INTO {s}river_migration (line, version) VALUES ('workflow', 2)"))


def rows(connection: Connection, schema: str | None = None) -> list[Any]:
    """All that River has stored."""
    s = ddl.qualifier(schema)
    queries = (
        f"SELECT to_jsonb(j) - 'unique_states' FROM {s}river_job j ORDER BY id",
        f"SELECT to_jsonb(q) FROM {s}river_queue q",
        (
            f"SELECT line, version, created_at FROM {s}river_migration "
            "WHERE (line, version) NOT IN (('main', 6), ('main', 7)) AND line !~ '^sqla_river' ORDER BY line, version"
        ),
    )
    return [tuple(row) for query in queries for row in connection.execute(text(query))]


@pytest.mark.parametrize("schema", [None, "river"])
@pytest.mark.parametrize("version", [5, 6, 7])
def test_rivers_tables_become_ours_and_nothing_is_lost(
    project: Project, url: str, version: int, schema: str | None
) -> None:
    with connected(project.url) as connection:
        install_river(connection, version, schema)
        fill(connection, schema)
        before = rows(connection, schema)
    project.settings["sqla_river"] = {"schema": schema}
    said = f", schema={schema!r}" if schema else ""
    assert body(project.revision(), "upgrade") == [UP.format(said)]
    project.upgrade()

    with connected(url) as expected, connected(project.url) as real:
        assert catalog(real, schema or "public", but=THEIRS) == catalog(expected, but=THEIRS)
        assert rows(real, schema) == before
        assert check_schema(real, schema) == []
        versions = real.execute(
            text(f"SELECT version FROM {ddl.qualifier(schema)}river_migration WHERE line = 'main' ORDER BY 1")
        )
        assert versions.scalars().all() == [1, 2, 3, 4, 5, 6, 7]
    project.check()


@pytest.mark.parametrize("version", [5, 6, 7])
def test_going_back_keeps_rivers_tables_and_their_rows(project: Project, empty_url: str, version: int) -> None:
    with connected(project.url) as connection:
        install_river(connection, version)
        fill(connection)
        before = rows(connection)
    project.migration(UP.format(""), DOWN.format(""))
    project.upgrade()
    project.downgrade()

    with connected(project.url) as connection:
        assert rows(connection) == before
        returned = catalog(connection, but=("alembic_version",))
        lines = connection.execute(text("SELECT DISTINCT line FROM river_migration ORDER BY 1"))
        assert lines.scalars().all() == ["main", "workflow"]
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
        install_river(connection, 7)
        assert returned == catalog(connection)


@pytest.mark.parametrize("version", [5, 6, 7])
@pytest.mark.parametrize("big", [False, True])
def test_migrate_adopts_too_in_both_ways(
    url: str, empty_url: str, version: int, big: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0 if big else 100)
    with connected(empty_url) as connection:
        install_river(connection, version)
        fill(connection)
        before = rows(connection)
    with engine_of(empty_url) as engine:
        done = migrate(engine)
        assert (done.found, done.version) == (0, ddl.LATEST)
        assert any("CONCURRENTLY" in statement for statement in done.statements) == big
        assert migrate(engine).statements == ()

    with connected(url) as expected, connected(empty_url) as real:
        assert catalog(real, but=THEIRS) == catalog(expected, but=THEIRS)
        assert rows(real) == before


def test_an_adopted_database_works_jobs(empty_url: str) -> None:
    with connected(empty_url) as connection:
        install_river(connection, 5)
    with engine_of(empty_url) as engine:
        create_all(engine)
        with Session(engine) as session, session.begin():
            session.add(Job(Ping()))
        with Session(engine) as session:
            assert session.query(Job).one().max_attempts == 25


def test_tables_without_river_migration_are_adopted_as_well(empty_url: str, url: str) -> None:
    """Some run River's statements by a tool of their own, without its first."""
    with connected(empty_url) as connection:
        install_river(connection, 6)
        connection.execute(text("DROP TABLE river_migration"))
    with engine_of(empty_url) as engine:
        create_all(engine)

    with connected(url) as expected, connected(empty_url) as real:
        assert catalog(real, but=THEIRS) == catalog(expected, but=THEIRS)


def test_a_table_of_the_users_by_the_name_of_one_of_rivers_stays(project: Project) -> None:
    with connected(project.url) as connection:
        connection.execute(text("CREATE TABLE river_client (id int)"))
    with engine_of(project.url) as engine:
        create_all(engine)

    with connected(project.url) as connection:
        assert connection.execute(text("SELECT to_regclass('river_client') IS NOT NULL")).scalar_one()


def test_an_older_river_is_refused_before_anything_changes(project: Project) -> None:
    with connected(project.url) as connection:
        install_old_river(connection)
        before = catalog(connection)
    project.migration(UP.format(""))
    with pytest.raises(CommandError, match=r"older than its version 5.*river migrate-up"):
        project.upgrade()
    with engine_of(project.url) as engine, pytest.raises(SchemaError, match="older than its version 5"):
        create_all(engine)
    script = project.sql()

    with connected(project.url) as connection:
        assert catalog(connection) == before
    guard = next(statement for statement in script.split(";\n\n") if "RAISE EXCEPTION" in statement)
    with pytest.raises(Exception, match="sqla_river: the tables are of a River"), connected(project.url) as connection:
        connection.exec_driver_sql(guard)
