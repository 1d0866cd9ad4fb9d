"""The tables as they are made, as the Tables describe them, and as River has them."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, MetaData, Table, create_engine, inspect, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from sqla_river import Job, create_all, ddl
from sqla_river.errors import AsyncSessionError, InvalidOptionError, SchemaError, SessionError, WrongDatabaseError
from sqla_river.states import JobState
from sqla_river.tables import RIVER, job_table

OUR_TABLES = {"river_counter", "river_duty", "river_history", "river_runner", "river_suspect"}
RIVER_TABLES = {"river_job", "river_leader", "river_migration", "river_notification", "river_queue"}

# river-contract.md section 1.1: River's main line, version 7.
RIVER_JOB = {
    "id": ("bigint", True, "nextval('river_job_id_seq'::regclass)"),
    "state": ("river_job_state", True, "'available'::river_job_state"),
    "attempt": ("smallint", True, "0"),
    "max_attempts": ("smallint", True, "25"),
    "attempted_at": ("timestamp with time zone", False, None),
    "created_at": ("timestamp with time zone", True, "now()"),
    "finalized_at": ("timestamp with time zone", False, None),
    "scheduled_at": ("timestamp with time zone", True, "now()"),
    "priority": ("smallint", True, "1"),
    "args": ("jsonb", True, None),
    "attempted_by": ("text[]", False, None),
    "errors": ("jsonb[]", False, None),
    "kind": ("text", True, None),
    "metadata": ("jsonb", True, "'{}'::jsonb"),
    "queue": ("text", True, "'default'::text"),
    "tags": ("character varying(255)[]", True, "'{}'::character varying[]"),
    "unique_key": ("bytea", False, None),
    "unique_states": ("bit(8)", False, None),
}
RIVER_LEADER = {
    "elected_at": ("timestamp with time zone", True, None),
    "expires_at": ("timestamp with time zone", True, None),
    "leader_id": ("text", True, None),
    "name": ("text", True, "'default'::text"),
}
RIVER_QUEUE = {
    "name": ("text", True, None),
    "created_at": ("timestamp with time zone", True, "now()"),
    "metadata": ("jsonb", True, "'{}'::jsonb"),
    "paused_at": ("timestamp with time zone", False, None),
    "updated_at": ("timestamp with time zone", True, "CURRENT_TIMESTAMP"),
}
RIVER_MIGRATION = {
    "line": ("text", True, None),
    "version": ("bigint", True, None),
    "created_at": ("timestamp with time zone", True, "now()"),
}
RIVER_NOTIFICATION = {
    "id": ("bigint", True, "nextval('river_notification_id_seq'::regclass)"),
    "created_at": ("timestamp with time zone", True, "now()"),
    "payload": ("text", True, None),
    "topic": ("text", True, None),
}
FINISHED = "ARRAY['cancelled'::river_job_state, 'completed'::river_job_state, 'discarded'::river_job_state]"
JOB_CHECKS = {
    "finalized_or_finalized_at_null": (
        f"CHECK ((((finalized_at IS NULL) AND (state <> ALL ({FINISHED}))) OR "
        f"((finalized_at IS NOT NULL) AND (state = ANY ({FINISHED})))))"
    ),
    "kind_length": "CHECK (((char_length(kind) > 0) AND (char_length(kind) < 128)))",
    "max_attempts_is_positive": "CHECK ((max_attempts > 0))",
    "priority_in_range": "CHECK (((priority >= 1) AND (priority <= 4)))",
    "queue_length": "CHECK (((char_length(queue) > 0) AND (char_length(queue) < 128)))",
    "river_job_pkey": "PRIMARY KEY (id)",
}
UNIQUE_INDEX = (
    "CREATE UNIQUE INDEX river_job_unique_idx ON public.river_job USING btree (unique_key) "
    "WHERE ((unique_key IS NOT NULL) AND (unique_states IS NOT NULL) "
    "AND river_job_state_in_bitmask(unique_states, state))"
)
JOB_INDEXES = {
    "river_job_pkey": "CREATE UNIQUE INDEX river_job_pkey ON public.river_job USING btree (id)",
    "river_job_unique_idx": UNIQUE_INDEX,
    "river_job_fetch_idx": (
        "CREATE INDEX river_job_fetch_idx ON public.river_job USING btree (queue, priority, scheduled_at, id) "
        "WHERE (state = 'available'::river_job_state)"
    ),
    "river_job_due_idx": (
        "CREATE INDEX river_job_due_idx ON public.river_job USING btree (scheduled_at, id) "
        "WHERE (state = ANY (ARRAY['retryable'::river_job_state, 'scheduled'::river_job_state]))"
    ),
    "river_job_finalized_idx": (
        "CREATE INDEX river_job_finalized_idx ON public.river_job USING btree (state, finalized_at, id) "
        "WHERE (finalized_at IS NOT NULL)"
    ),
    "river_job_running_idx": (
        "CREATE INDEX river_job_running_idx ON public.river_job USING btree (id) "
        "WHERE (state = 'running'::river_job_state)"
    ),
    "river_job_pending_idx": (
        "CREATE INDEX river_job_pending_idx ON public.river_job USING btree (queue, id) "
        "WHERE (state = 'pending'::river_job_state)"
    ),
}


def columns(connection: Connection, table: str) -> dict[str, tuple[str, bool, str | None]]:
    """Type, NOT NULL and default of each column, by the catalog."""
    rows = connection.execute(
        text(
            "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid) "
            "FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum "
            "WHERE a.attrelid = to_regclass(:t) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"
        ),
        {"t": table},
    )
    return {name: (type_, needed, default) for name, type_, needed, default in rows}


def constraints(connection: Connection, table: str) -> dict[str, str]:
    rows = connection.execute(
        text(
            "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
            "WHERE conrelid = to_regclass(:t) AND contype IN ('c', 'p', 'u', 'f')"
        ),
        {"t": table},
    )
    return {name: definition for name, definition in rows}  # noqa: C416 - typed


def indexes(connection: Connection, table: str) -> dict[str, str]:
    rows = connection.execute(text("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = :t"), {"t": table})
    return {name: definition for name, definition in rows}  # noqa: C416 - typed


def names(engine: Engine, schema: str | None = None) -> set[str]:
    return set(inspect(engine).get_table_names(schema))


def test_rivers_tables_are_rivers_version_seven(engine: Engine) -> None:
    with engine.connect() as connection:
        assert columns(connection, "river_job") == RIVER_JOB
        assert columns(connection, "river_leader") == RIVER_LEADER
        assert columns(connection, "river_queue") == RIVER_QUEUE
        assert columns(connection, "river_migration") == RIVER_MIGRATION
        assert columns(connection, "river_notification") == RIVER_NOTIFICATION


def test_rivers_constraints_are_rivers(engine: Engine) -> None:
    with engine.connect() as connection:
        assert constraints(connection, "river_job") == JOB_CHECKS
        assert constraints(connection, "river_leader") == {
            "river_leader_pkey": "PRIMARY KEY (name)",
            "name_length": "CHECK ((name = 'default'::text))",
            "leader_id_length": "CHECK (((char_length(leader_id) > 0) AND (char_length(leader_id) < 128)))",
        }
        assert constraints(connection, "river_queue") == {"river_queue_pkey": "PRIMARY KEY (name)"}
        assert constraints(connection, "river_migration") == {
            "river_migration_pkey": "PRIMARY KEY (line, version)",
            "line_length": "CHECK (((char_length(line) > 0) AND (char_length(line) < 128)))",
            "version_gte_1": "CHECK ((version >= 1))",
        }
        assert constraints(connection, "river_notification") == {
            "river_notification_pkey": "PRIMARY KEY (id)",
            "topic_length": "CHECK (((length(topic) > 0) AND (length(topic) < 128)))",
        }


def test_the_indexes_of_river_job_are_the_lean_ones_and_rivers_arbiter(engine: Engine) -> None:
    with engine.connect() as connection:
        assert indexes(connection, "river_job") == JOB_INDEXES
        assert set(indexes(connection, "river_notification")) == {
            "river_notification_pkey",
            "river_notification_created_at_idx",
            "river_notification_topic_id_idx",
        }


def test_the_enum_has_rivers_labels_in_rivers_order(engine: Engine) -> None:
    with engine.connect() as connection:
        labels = connection.execute(text("SELECT unnest(enum_range(NULL::river_job_state))::text")).scalars().all()

    assert labels == [state.value for state in JobState]


def test_the_mask_function_reads_rivers_bits(engine: Engine) -> None:
    with engine.connect() as connection:
        found = connection.execute(
            text(
                "SELECT s::text, string_agg(bit::text, ',') FROM unnest(enum_range(NULL::river_job_state)) s, "
                "generate_series(0, 7) bit "
                "WHERE river_job_state_in_bitmask(set_bit(B'00000000', 7 - bit, 1), s) GROUP BY s"
            )
        )

        assert {state: bit for state, bit in found} == {  # noqa: C416
            "available": "0",
            "cancelled": "1",
            "completed": "2",
            "discarded": "3",
            "pending": "4",
            "retryable": "5",
            "running": "6",
            "scheduled": "7",
        }
        volatility = "SELECT provolatile FROM pg_proc WHERE proname = 'river_job_state_in_bitmask'"
        assert connection.execute(text(volatility)).scalar_one() == "i"


def test_a_unique_key_holds_only_while_its_mask_says_so(engine: Engine) -> None:
    insert = text(
        "INSERT INTO river_job (kind, args, unique_key, unique_states, state, finalized_at) "
        "VALUES ('k', '{}', 'a', B'11110101', CAST(:s AS river_job_state), :f)"
    )
    with engine.begin() as connection:
        for _ in range(2):
            connection.execute(insert, {"s": "cancelled", "f": "now"})
        connection.execute(insert, {"s": "available", "f": None})
        with pytest.raises(Exception, match="river_job_unique_idx"), connection.begin_nested():
            connection.execute(insert, {"s": "scheduled", "f": None})


def test_rivers_own_tools_see_a_current_schema(engine: Engine) -> None:
    with engine.connect() as connection:
        found = connection.execute(text("SELECT line, version FROM river_migration ORDER BY line, version"))

        assert [(line, version) for line, version in found] == [("main", version) for version in range(1, 8)] + [
            ("sqla_river", ddl.LATEST)
        ]
        logged = connection.execute(
            text("SELECT relname, relpersistence::text FROM pg_class WHERE relkind = 'r' AND relname ~ '^river'")
        )
        assert {name for name, how in logged if how == "u"} == {"river_leader"}


def _described(connection: Connection, table: Table) -> dict[str, tuple[str, bool, bool]]:
    dialect = connection.dialect
    spelled = {"BIGINT": "bigint", "TIMESTAMP WITH TIME ZONE": "timestamp with time zone", "BIT(8)": "bit(8)"}

    def type_of(column: Any) -> str:
        name: str = column.type.compile(dialect=dialect)
        name = spelled.get(name, name.lower()).replace("varchar", "character varying")
        return name.rpartition(".")[2]

    return {
        column.name: (
            type_of(column),
            not column.nullable,
            column.server_default is not None or column.autoincrement is True,
        )
        for column in table.columns
    }


@pytest.mark.parametrize("name", sorted(name for name, table in RIVER.tables.items() if table.schema is None))
def test_each_table_that_statements_use_is_in_the_catalog_as_described(engine: Engine, name: str) -> None:
    with engine.connect() as connection:
        catalog = columns(connection, name)
        described = _described(connection, RIVER.tables[name])
        keys = inspect(connection).get_pk_constraint(name)["constrained_columns"]

    assert {column: said[:2] for column, said in described.items()}.items() <= {
        column: real[:2] for column, real in catalog.items()
    }.items()
    assert [column.name for column in RIVER.tables[name].primary_key] == keys


def test_mapping_table_ddl_and_catalog_agree_on_river_job(engine: Engine) -> None:
    table = job_table(MetaData())
    mapped = Job.__mapper__
    with engine.connect() as connection:
        catalog = columns(connection, "river_job")
        reflected = inspect(connection).get_indexes("river_job")
        described = _described(connection, table)
    described_indexes = {str(index.name): index for index in table.indexes}
    unique = next(index for index in reflected if index["name"] == "river_job_unique_idx")

    assert described == {
        name: (type_, needed, default is not None) for name, (type_, needed, default) in catalog.items()
    }
    assert list(described) == list(catalog)
    assert {constraint.name for constraint in table.constraints} == set(JOB_CHECKS)
    assert set(described_indexes) == {"river_job_unique_idx"}
    assert [column.name for column in described_indexes["river_job_unique_idx"].columns] == unique["column_names"]
    assert {prop.columns[0].name: prop.key for prop in mapped.column_attrs} == {
        **{name: name for name in catalog},
        "metadata": "metadata_",
    }
    assert list(mapped.local_table.c["state"].type.enums) == [state.value for state in JobState]  # type: ignore[attr-defined]


def test_a_metadata_create_all_of_the_users_adds_nothing_to_ours(engine: Engine) -> None:
    metadata = MetaData()
    job_table(metadata)
    metadata.create_all(engine)

    with engine.connect() as connection:
        assert indexes(connection, "river_job") == JOB_INDEXES


def test_create_all_says_what_it_found_and_does_nothing_the_second_time(empty_url: str) -> None:
    engine = create_engine(empty_url)

    assert [create_all(engine), create_all(engine), create_all(engine)] == [0, ddl.LATEST, ddl.LATEST]
    assert names(engine) == RIVER_TABLES | OUR_TABLES
    engine.dispose()


@pytest.mark.parametrize("schema", [None, "jobs"])
@pytest.mark.parametrize("level", [None, "REPEATABLE READ", "AUTOCOMMIT"])
def test_many_may_create_at_once(empty_url: str, schema: str | None, level: Any) -> None:
    engine = create_engine(empty_url, **({"isolation_level": level} if level else {}))
    barrier = threading.Barrier(4)

    def install(_: int) -> int:
        barrier.wait()
        return create_all(engine, schema)

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(install, range(4)))

    assert found == [0, ddl.LATEST, ddl.LATEST, ddl.LATEST]
    engine.dispose()


def test_two_processes_may_create_at_once(empty_url: str) -> None:
    program = f"""
import sys
from sqlalchemy import create_engine
from sqla_river import create_all
engine = create_engine({empty_url!r})
print("ready", flush=True)
sys.stdin.readline()
print(create_all(engine, "jobs"))
"""
    installers = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for installer in installers:
        assert installer.stdout is not None
        assert installer.stdout.readline() == "ready\n"
    for installer in installers:
        assert installer.stdin is not None
        installer.stdin.write("go\n")
        installer.stdin.flush()

    assert sorted(installer.communicate(timeout=30)[0] for installer in installers) == ["0\n", f"{ddl.LATEST}\n"]


def test_a_named_schema_is_created_and_holds_everything(empty_url: str) -> None:
    engine = create_engine(empty_url)

    assert create_all(engine, "jobs") == 0
    assert create_all(engine, "jobs") == ddl.LATEST
    assert names(engine, "jobs") == RIVER_TABLES | OUR_TABLES
    assert names(engine) == set()
    with engine.connect() as connection:
        where = "SELECT DISTINCT n.nspname FROM {} JOIN pg_namespace n ON n.oid = {} WHERE {} ~ '^river_job'"
        assert connection.execute(text(where.format("pg_type", "typnamespace", "typname"))).scalars().all() == ["jobs"]
        assert connection.execute(text(where.format("pg_proc", "pronamespace", "proname"))).scalars().all() == ["jobs"]
    engine.dispose()


def test_two_schemas_stand_side_by_side(empty_url: str) -> None:
    engine = create_engine(empty_url)
    create_all(engine, "one")

    assert create_all(engine, "two") == 0
    assert create_all(engine) == 0
    assert names(engine, "one") == names(engine, "two") == names(engine)
    engine.dispose()


def test_without_a_name_the_tables_go_to_the_first_schema_of_the_search_path(empty_url: str) -> None:
    """Tables further down the path are somebody else's."""
    engine = create_engine(empty_url)
    create_all(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
        connection.execute(text("SET LOCAL search_path TO tenant, public"))

        assert create_all(connection) == 0
        assert create_all(connection) == ddl.LATEST

    assert names(engine, "tenant") == names(engine)
    engine.dispose()


@pytest.mark.parametrize("theirs", [{None: "mapped"}, {"jobs": "mapped"}])
def test_a_translate_map_of_the_users_is_respected(empty_url: str, theirs: dict[str | None, str | None]) -> None:
    engine = create_engine(empty_url)
    create_all(engine.execution_options(schema_translate_map=theirs), next(iter(theirs)))

    assert names(engine, "mapped") == RIVER_TABLES | OUR_TABLES
    assert names(engine) == set()
    engine.dispose()


def test_on_a_connection_it_is_part_of_the_callers_transaction(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        create_all(connection, "jobs")
        assert connection.in_transaction()
        connection.rollback()

    assert not inspect(engine).has_schema("jobs")
    with engine.connect() as connection:
        create_all(connection, "jobs")
        connection.commit()
    assert names(engine, "jobs") == RIVER_TABLES | OUR_TABLES
    engine.dispose()


def test_a_newer_version_is_refused_and_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_migration (line, version) VALUES ('sqla_river', 99)"))

    with pytest.raises(SchemaError, match=r"version 99, this sqla_river knows up to 1; upgrade the library"):
        create_all(engine)


def test_rivers_own_tables_are_taken_over_with_their_jobs(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE river_counter, river_duty, river_history, river_runner, river_suspect"))
        for name in set(JOB_INDEXES) - {"river_job_pkey", "river_job_unique_idx"}:
            connection.execute(text(f"DROP INDEX {name}"))
        connection.execute(text("DELETE FROM river_migration WHERE line <> 'main'"))
        connection.execute(text("INSERT INTO river_job (kind, args) VALUES ('go', '{}')"))

    assert create_all(engine) == 0
    assert names(engine) == RIVER_TABLES | OUR_TABLES
    with engine.connect() as connection:
        assert connection.execute(text("SELECT kind FROM river_job")).scalars().all() == ["go"]
        assert indexes(connection, "river_job") == JOB_INDEXES


@pytest.mark.parametrize(
    "table",
    [
        "CREATE TABLE river_migration AS SELECT 'main'::text AS line, 4::bigint AS version",
        "CREATE TABLE river_migration AS SELECT 1::bigint AS id, 4::bigint AS version",
    ],
    ids=["with lines", "before lines"],
)
def test_a_river_that_is_too_old_is_refused_before_anything_changes(empty_url: str, table: str) -> None:
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text(table))

    with pytest.raises(SchemaError, match="river migrate-up"):
        create_all(engine)
    assert names(engine) == {"river_migration"}
    engine.dispose()


@pytest.mark.parametrize("schema", ["", "no-dashes", 'quo"te', "s" * 47, "ümlaut", "a.b"])
def test_a_schema_that_rivers_channels_cannot_carry_is_refused(empty_url: str, schema: str) -> None:
    engine = create_engine(empty_url)

    with pytest.raises(InvalidOptionError, match="schema must be"):
        create_all(engine, schema)
    engine.dispose()


def test_a_search_path_that_rivers_channels_cannot_carry_is_refused(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {'s' * 47}"))
        connection.execute(text(f"SET LOCAL search_path TO {'s' * 47}"))

        with pytest.raises(InvalidOptionError, match="at most 46 bytes"):
            create_all(connection)
    engine.dispose()


def test_a_search_path_that_leads_nowhere_is_postgresqls_error(empty_url: str) -> None:
    engine = create_engine(empty_url)
    with engine.connect() as connection:
        connection.execute(text("SET search_path TO nowhere"))

        with pytest.raises(ProgrammingError, match="no schema has been selected"):
            create_all(connection)
    engine.dispose()


def test_other_databases_and_other_objects_are_refused() -> None:
    sqlite = create_engine("sqlite://")
    with pytest.raises(WrongDatabaseError, match="postgresql"):
        create_all(sqlite)
    with pytest.raises(AsyncSessionError, match="run_sync"):
        create_all(create_async_engine("postgresql+psycopg://"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with Session(sqlite) as session, pytest.raises(SessionError, match="got Session"):
        create_all(session)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    sqlite.dispose()
