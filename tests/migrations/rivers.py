"""River's own tables, as its tool leaves them at versions 5, 6 and 7: the same catalog, told in our words."""

from typing import Final

from sqlalchemy import Connection, text

_STATES: Final = ("available", "cancelled", "completed", "discarded", "pending", "retryable", "running", "scheduled")
_ENDED: Final = "('cancelled', 'completed', 'discarded')"
_BITS: Final = " ".join(f"WHEN '{state}' THEN get_bit(bitmask, {7 - number})" for number, state in enumerate(_STATES))


def _length(column: str, function: str = "char_length") -> str:
    return f"CHECK ({function}({column}) > 0 AND {function}({column}) < 128)"


def _of_5(s: str) -> list[str]:
    return [
        # Version 5 builds this table anew beside the one of version 1, whose primary key has the name still.
        (
            f"CREATE TABLE {s}river_migration (line text NOT NULL, version bigint NOT NULL, "
            f"created_at timestamptz NOT NULL DEFAULT now(), CONSTRAINT line_length {_length('line')}, "
            "CONSTRAINT version_gte_1 CHECK (version >= 1), "
            "CONSTRAINT river_migration_pkey1 PRIMARY KEY (line, version))"
        ),
        f"CREATE TYPE {s}river_job_state AS ENUM ({', '.join(map(repr, _STATES))})",
        (
            f"CREATE TABLE {s}river_job (id bigserial PRIMARY KEY, "
            f"state {s}river_job_state NOT NULL DEFAULT 'available', "
            "attempt smallint NOT NULL DEFAULT 0, max_attempts smallint NOT NULL, attempted_at timestamptz, "
            "created_at timestamptz NOT NULL DEFAULT now(), finalized_at timestamptz, "
            "scheduled_at timestamptz NOT NULL DEFAULT now(), priority smallint NOT NULL DEFAULT 1, "
            "args jsonb NOT NULL, "
            "attempted_by text[], errors jsonb[], kind text NOT NULL, metadata jsonb NOT NULL DEFAULT '{}', "
            "queue text NOT NULL DEFAULT 'default', tags varchar(255)[] NOT NULL DEFAULT '{}', unique_key bytea, "
            f"CONSTRAINT finalized_or_finalized_at_null CHECK ((finalized_at IS NULL AND state NOT IN {_ENDED}) "
            f"OR (finalized_at IS NOT NULL AND state IN {_ENDED})), "
            "CONSTRAINT max_attempts_is_positive CHECK (max_attempts > 0), "
            "CONSTRAINT priority_in_range CHECK (priority >= 1 AND priority <= 4), "
            f"CONSTRAINT queue_length {_length('queue')}, CONSTRAINT kind_length {_length('kind')})"
        ),
        f"CREATE INDEX river_job_kind ON {s}river_job (kind)",
        (
            f"CREATE INDEX river_job_state_and_finalized_at_index ON {s}river_job (state, finalized_at) "
            "WHERE finalized_at IS NOT NULL"
        ),
        f"CREATE INDEX river_job_prioritized_fetching_index ON {s}river_job (state, queue, priority, scheduled_at, id)",
        f"CREATE INDEX river_job_args_index ON {s}river_job USING gin (args)",
        f"CREATE INDEX river_job_metadata_index ON {s}river_job USING gin (metadata)",
        (
            f"CREATE UNIQUE INDEX river_job_kind_unique_key_idx ON {s}river_job (kind, unique_key) "
            "WHERE unique_key IS NOT NULL"
        ),
        (
            f"CREATE UNLOGGED TABLE {s}river_leader (elected_at timestamptz NOT NULL, expires_at timestamptz NOT NULL, "
            "leader_id text NOT NULL, name text PRIMARY KEY DEFAULT 'default', "
            f"CONSTRAINT name_length CHECK (name = 'default'), CONSTRAINT leader_id_length {_length('leader_id')})"
        ),
        (
            f"CREATE TABLE {s}river_queue (name text PRIMARY KEY, created_at timestamptz NOT NULL DEFAULT now(), "
            "metadata jsonb NOT NULL DEFAULT '{}', paused_at timestamptz, updated_at timestamptz NOT NULL)"
        ),
        f"CREATE UNLOGGED TABLE {s}river_client (id text PRIMARY KEY, metadata jsonb NOT NULL DEFAULT '{{}}')",
        (
            f"CREATE UNLOGGED TABLE {s}river_client_queue ("
            f"river_client_id text NOT NULL REFERENCES {s}river_client (id) ON DELETE CASCADE, name text NOT NULL, "
            "PRIMARY KEY (river_client_id, name))"
        ),
    ]


def _of_6(s: str) -> list[str]:
    return [
        (
            f"CREATE FUNCTION {s}river_job_state_in_bitmask(bitmask bit(8), state {s}river_job_state) RETURNS boolean "
            f"LANGUAGE sql IMMUTABLE AS $$ SELECT CASE state {_BITS} ELSE 0 END = 1 $$"
        ),
        f"ALTER TABLE {s}river_job ADD COLUMN unique_states bit(8)",
        (
            f"CREATE UNIQUE INDEX river_job_unique_idx ON {s}river_job (unique_key) WHERE unique_key IS NOT NULL "
            f"AND unique_states IS NOT NULL AND {s}river_job_state_in_bitmask(unique_states, state)"
        ),
        f"DROP INDEX {s}river_job_kind_unique_key_idx",
    ]


def _of_7(s: str) -> list[str]:
    return [
        (
            f"CREATE TABLE {s}river_notification (id bigserial PRIMARY KEY, "
            "created_at timestamptz NOT NULL DEFAULT now(), "
            f"payload text NOT NULL, topic text NOT NULL, CONSTRAINT topic_length {_length('topic', 'length')})"
        ),
        f"CREATE INDEX river_notification_created_at_idx ON {s}river_notification (created_at)",
        f"CREATE INDEX river_notification_topic_id_idx ON {s}river_notification (topic, id)",
        f"DROP TABLE {s}river_client_queue, {s}river_client",
        f"ALTER TABLE {s}river_job ALTER COLUMN max_attempts SET DEFAULT 25",
        f"ALTER TABLE {s}river_queue ALTER COLUMN updated_at SET DEFAULT CURRENT_TIMESTAMP",
    ]


def install_river(connection: Connection, version: int, schema: str | None = None) -> None:
    """Make the tables that River's own tool leaves at *version*, 5 to 7, with its rows in ``river_migration``."""
    s = f'"{schema}".' if schema else ""
    if schema:
        connection.execute(text(f'CREATE SCHEMA "{schema}"'))
    for number, statements in ((5, _of_5(s)), (6, _of_6(s)), (7, _of_7(s))):
        if number <= version:
            for statement in statements:
                connection.exec_driver_sql(statement)
    rows = text(f"INSERT INTO {s}river_migration (line, version) SELECT 'main', v FROM generate_series(1, :v) v")
    connection.execute(rows, {"v": version})


def install_old_river(connection: Connection) -> None:
    """River's tables before its version 5: no lines, no unique keys."""
    connection.execute(text("CREATE TABLE river_migration (id bigserial PRIMARY KEY, version bigint NOT NULL)"))
    connection.execute(text("INSERT INTO river_migration (version) VALUES (1), (2), (3), (4)"))
    connection.execute(text("CREATE TABLE river_job (id bigserial PRIMARY KEY, kind text NOT NULL)"))
