"""What the catalog has to say before anybody works jobs; and which versions go together."""

import pytest
from sqlalchemy import Engine, text

from sqla_river import create_all, ddl
from sqla_river.check import Problem, check_schema, require_schema
from sqla_river.errors import SchemaError
from sqla_river.schema import migrate
from tests.database import statements_of
from tests.migrations.projects import connected, engine_of
from tests.migrations.rivers import install_river


def problems(engine: Engine, schema: str | None = None) -> list[Problem]:
    with engine.connect() as connection:
        return check_schema(connection, schema)


def damage(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


@pytest.mark.parametrize("schema", [None, "river"])
def test_a_sound_schema_has_no_problems_and_costs_two_round_trips(empty_url: str, schema: str | None) -> None:
    with engine_of(empty_url) as engine:
        create_all(engine, schema)
        with statements_of(engine) as seen:
            assert problems(engine, schema) == []
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("statement", "fact", "cure", "fatal"),
    [
        ("DROP TABLE river_job CASCADE", "table river_job is missing in schema 'public'", "alembic upgrade head", True),
        ("DROP TABLE river_queue", "table river_queue is missing", "sqla-river migrate", True),
        ("DROP TABLE river_runner", "table river_runner is missing", "sqla-river migrate", True),
        ("DROP TABLE river_notification", "table river_notification is missing", "sqla-river migrate", False),
        (
            "ALTER TABLE river_job DROP COLUMN attempted_by",
            "column river_job.attempted_by is missing",
            'ALTER TABLE "public".river_job ADD COLUMN attempted_by text[]',
            True,
        ),
        (
            "ALTER TABLE river_job ALTER COLUMN priority TYPE integer",
            "column river_job.priority is integer in schema 'public', and has to be smallint",
            "ALTER TABLE",
            True,
        ),
        ("DROP INDEX river_job_unique_idx", "index river_job_unique_idx of river_job is missing", "migrate", True),
        ("DROP INDEX river_job_fetch_idx", "index river_job_fetch_idx of river_job is missing", "migrate", False),
        (
            (
                "DROP INDEX river_job_fetch_idx; CREATE INDEX river_job_fetch_idx ON river_job "
                "(queue, priority, scheduled_at, id) WHERE state = 'running'"
            ),
            "index river_job_fetch_idx of river_job in schema 'public' is not as it should be: CREATE INDEX",
            "migrate",
            False,
        ),
        (
            "DROP INDEX river_job_unique_idx; CREATE UNIQUE INDEX river_job_unique_idx ON river_job (unique_key)",
            "index river_job_unique_idx of river_job in schema 'public' is not as it should be",
            "migrate",
            True,
        ),
        (
            (
                "DROP INDEX river_job_fetch_idx; CREATE INDEX river_job_fetch_idx ON river_job "
                "(queue, scheduled_at, priority, id) WHERE state = 'available'"
            ),
            "index river_job_fetch_idx of river_job in schema 'public' is not as it should be",
            "migrate",
            False,
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'river_job_due_idx'::regclass",
            "index river_job_due_idx of river_job is invalid",
            "migrate",
            False,
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'river_job_unique_idx'::regclass",
            "index river_job_unique_idx of river_job is invalid",
            "migrate",
            True,
        ),
        (
            (
                "CREATE INDEX river_job_kind_ccnew ON river_job (kind);"
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'river_job_kind_ccnew'::regclass"
            ),
            "index river_job_kind_ccnew of river_job is invalid",
            'DROP INDEX CONCURRENTLY "public".river_job_kind_ccnew',
            False,
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_cure(engine: Engine, statement: str, fact: str, cure: str, fatal: bool) -> None:
    damage(engine, *statement.split(";"))
    found = problems(engine)

    assert len(found) == 1, found
    assert fact in found[0].what
    assert cure in found[0].cure
    assert found[0].fatal == fatal


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE river_queue",
        "DROP TABLE river_runner, river_duty",
        "DROP INDEX river_job_unique_idx",
        "DROP INDEX river_job_fetch_idx, river_job_due_idx",
        "DROP INDEX river_job_fetch_idx; CREATE INDEX river_job_fetch_idx ON river_job (queue)",
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'river_job_unique_idx'::regclass",
        "DROP INDEX river_job_unique_idx; DROP FUNCTION river_job_state_in_bitmask",
    ],
)
@pytest.mark.parametrize("big", [False, True])
def test_what_migrate_is_said_to_cure_it_cures(
    engine: Engine, statement: str, big: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_river.ddl.catalog.BIG", 0 if big else 100)
    damage(engine, "INSERT INTO river_job (kind, args) VALUES ('k', '{}')", *statement.split(";"))
    assert problems(engine)
    assert migrate(engine).statements

    assert problems(engine) == []
    assert migrate(engine).statements == ()


def test_a_label_or_the_function_that_is_missing_is_fatal(engine: Engine) -> None:
    damage(engine, "ALTER TYPE river_job_state RENAME VALUE 'pending' TO 'waiting'")
    damage(engine, "DROP INDEX river_job_unique_idx", "DROP FUNCTION river_job_state_in_bitmask")
    found = problems(engine)

    assert any("river_job_state has no 'pending'" in each.what and each.fatal for each in found)
    assert any("function river_job_state_in_bitmask is missing" in each.what and each.fatal for each in found)


def test_the_fatal_is_raised_and_the_rest_is_logged(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    damage(engine, "DROP INDEX river_job_fetch_idx")
    with engine.connect() as connection:
        require_schema(connection, None)
    assert "river_job_fetch_idx of river_job is missing" in caplog.text

    damage(engine, "DROP TABLE river_suspect", "DROP TABLE river_queue")
    with engine.connect() as connection, pytest.raises(SchemaError) as raised:
        require_schema(connection, None)
    assert [line.split()[1] for line in str(raised.value).splitlines()] == ["river_queue", "river_suspect"]


def test_extra_columns_indexes_and_tables_are_nobodys_problem(engine: Engine) -> None:
    damage(
        engine,
        "ALTER TABLE river_job ADD COLUMN theirs int",
        "CREATE INDEX theirs ON river_job (kind)",
        "CREATE TABLE river_theirs (id int)",
    )

    assert problems(engine) == []


def test_a_search_path_that_leads_nowhere_is_told(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(text("SET search_path TO nowhere"))

        assert "search_path, which leads nowhere" in check_schema(connection, None)[0].what


# ---- README: which library works on which version of the tables -----------------------------------------------------


def test_the_library_does_not_work_on_no_tables(empty_url: str) -> None:
    with engine_of(empty_url) as engine:
        [problem] = problems(engine)
        assert problem.fatal
        assert str(problem) == (
            "table river_job is missing in schema 'public'; run 'alembic upgrade head' with the river migration "
            "included, or 'sqla-river migrate'"
        )


@pytest.mark.parametrize("version", [5, 6, 7])
def test_the_library_does_not_work_on_rivers_tables_alone(empty_url: str, version: int) -> None:
    with connected(empty_url) as connection:
        install_river(connection, version)
    with engine_of(empty_url) as engine:
        [problem] = problems(engine)
        assert problem.fatal
        assert f"are River's own, of its version {version}" in problem.what


def test_the_library_works_on_its_own_version(engine: Engine) -> None:
    assert problems(engine) == []


def test_the_library_works_on_the_next_version_and_says_so(engine: Engine) -> None:
    """A deploy migrates first: the old runners go on."""
    damage(engine, f"INSERT INTO river_migration (line, version) VALUES ('sqla_river', {ddl.LATEST + 1})")
    [problem] = problems(engine)

    assert not problem.fatal
    assert "are of version 2, newer than the 1 of this sqla_river; upgrade sqla_river" in str(problem)


def test_the_library_does_not_work_on_the_version_after_that(engine: Engine) -> None:
    damage(engine, f"INSERT INTO river_migration (line, version) VALUES ('sqla_river', {ddl.LATEST + 2})")
    [problem] = problems(engine)

    assert problem.fatal
    assert "are of version 3, too new for the 1 of this sqla_river; upgrade sqla_river" in str(problem)


def test_the_library_does_not_work_on_an_older_version(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddl, "LATEST", 2)
    [problem] = problems(engine)

    assert problem.fatal
    assert "are of version 1, older than the 2 of this sqla_river; run 'alembic upgrade head'" in str(problem)
