"""What each version changes: frozen history, as data.

River's part is River's schema of line ``main``, version 7, exactly: columns, types, checks, enum, function and the
unique index that its ON CONFLICT names. Ours to choose are the other indexes (lean and partial: River's two GIN
indexes serve no query of ours and halve the write throughput) and the tables that River has not.

A version is frozen once it is released. Every statement may run twice. None holds a ``%``: a driver would read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

LINE: Final = "sqla_river"
ADOPTED: Final = "sqla_river.adopted"
"""The line of ``river_migration`` that says River's own tool made the tables; its version is the one found then."""
RIVER_LINE: Final = "main"
RIVER_VERSIONS: Final = (1, 2, 3, 4, 5, 6, 7)
OLDEST_RIVER: Final = 5
"""River's oldest version that is taken over."""

# Serialises whoever installs or upgrades, per database.
LOCK_KEY: Final = 0x7269766572
BIG: Final = 100_000
"""Rows of river_job from which on indexes are built concurrently."""

TABLES: Final = (
    "river_job",
    "river_queue",
    "river_leader",
    "river_migration",
    "river_notification",
    "river_runner",
    "river_duty",
    "river_suspect",
    "river_counter",
    "river_history",
)
RIVER_RETIRED: Final = ("river_client", "river_client_queue")
"""Tables of River's versions 5 and 6, which it never used and dropped in 7. So do we, if they are empty."""
LABELS: Final = ("available", "cancelled", "completed", "discarded", "pending", "retryable", "running", "scheduled")

INDEXES: Final = {
    "river_job_fetch_idx": "(queue, priority, scheduled_at, id) WHERE state = 'available'",
    "river_job_due_idx": "(scheduled_at, id) WHERE state IN ('retryable', 'scheduled')",
    "river_job_finalized_idx": "(state, finalized_at, id) WHERE finalized_at IS NOT NULL",
    "river_job_running_idx": "(id) WHERE state = 'running'",
    "river_job_pending_idx": "(queue, id) WHERE state = 'pending'",
}
"""Our indexes of river_job: fetch, due (schedule), finalized (prune), running (rescue), pending (counts)."""

ARBITER: Final = "river_job_unique_idx"
"""The unique index that ON CONFLICT names, in Go too."""
_ARBITER: Final = (
    "(unique_key) WHERE unique_key IS NOT NULL AND unique_states IS NOT NULL "
    "AND {s}river_job_state_in_bitmask(unique_states, state)"
)

RIVER_INDEXES: Final = {
    "river_job_kind": "(kind)",
    "river_job_prioritized_fetching_index": "(state, queue, priority, scheduled_at, id)",
    "river_job_state_and_finalized_at_index": "(state, finalized_at) WHERE finalized_at IS NOT NULL",
    "river_job_args_index": "USING gin (args)",
    "river_job_metadata_index": "USING gin (metadata)",
}
"""River's other indexes of river_job, for a busy Go fleet or UI: left where they are, and made only if asked for."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """What one version changes. Every statement is safe to run twice; ``{s}`` stands for the schema's prefix."""

    upgrade: tuple[str, ...]
    """Run together, in one transaction, for an instant. They use no label that this version adds."""
    downgrade: tuple[str, ...]
    indexes: Mapping[str, str] = field(default_factory=dict[str, str])
    """New indexes of river_job, by name: columns and predicate."""
    obsolete: tuple[str, ...] = ()
    """Indexes of river_job that go."""
    changes: tuple[tuple[str, str], ...] = ()
    """Changes of tables that are in use: (where this holds, run this)."""
    labels: tuple[str, ...] = ()
    """New labels of the enum, committed before anything uses them: PostgreSQL refuses those of the same transaction."""
    prepare: tuple[str, ...] = ()
    """What `changes` and `indexes` need."""


def block(*lines: str) -> str:
    return "\n".join(("DO $river$ BEGIN", *(f"    {line}" for line in lines), "END $river$"))


_HAS_JOBS: Final = "to_regclass('{s}river_job') IS NOT NULL"
_HAS_QUEUES: Final = "to_regclass('{s}river_queue') IS NOT NULL"


def _has_column(table: str, column: str, more: str = "") -> str:
    return (
        f"(SELECT FROM pg_attribute WHERE attrelid = to_regclass('{{s}}{table}') "
        f"AND attname = '{column}' AND NOT attisdropped{more})"
    )


# Any message of ours that a program should show as it is starts with these words.
REFUSED: Final = "sqla_river: "

_GUARD: Final = block(
    f"IF {_HAS_JOBS} AND NOT EXISTS {_has_column('river_job', 'unique_key')} THEN",
    f"    RAISE EXCEPTION '{REFUSED}the tables are of a River older than its version {OLDEST_RIVER}; "
    "run ''river migrate-up'' first' USING ERRCODE = 'object_not_in_prerequisite_state';",
    "END IF;",
)

_MIGRATION: Final = """CREATE TABLE IF NOT EXISTS {s}river_migration (
    line text NOT NULL,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT river_migration_pkey PRIMARY KEY (line, version),
    CONSTRAINT line_length CHECK (char_length(line) > 0 AND char_length(line) < 128),
    CONSTRAINT version_gte_1 CHECK (version >= 1)
)"""

_ADOPT: Final = block(
    f"IF {_HAS_JOBS} AND NOT EXISTS (SELECT FROM {{s}}river_migration WHERE line = '{LINE}') THEN",
    "    INSERT INTO {s}river_migration (line, version)",
    f"        SELECT '{ADOPTED}', coalesce(max(version), {OLDEST_RIVER}) FROM {{s}}river_migration",
    f"        WHERE line = '{RIVER_LINE}'",
    "        ON CONFLICT DO NOTHING;",
    "    IF to_regclass('{s}river_client') IS NOT NULL THEN  -- never used by River, and dropped by its version 7",
    "        IF NOT EXISTS (SELECT FROM {s}river_client) THEN",
    "            DROP TABLE IF EXISTS {s}river_client_queue, {s}river_client;",
    "        END IF;",
    "    END IF;",
    "END IF;",
)

_FUNCTION: Final = """CREATE OR REPLACE FUNCTION {s}river_job_state_in_bitmask(bitmask bit(8), state {s}river_job_state)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $river$
    SELECT CASE state
        WHEN 'available' THEN get_bit(bitmask, 7)
        WHEN 'cancelled' THEN get_bit(bitmask, 6)
        WHEN 'completed' THEN get_bit(bitmask, 5)
        WHEN 'discarded' THEN get_bit(bitmask, 4)
        WHEN 'pending' THEN get_bit(bitmask, 3)
        WHEN 'retryable' THEN get_bit(bitmask, 2)
        WHEN 'running' THEN get_bit(bitmask, 1)
        WHEN 'scheduled' THEN get_bit(bitmask, 0)
        ELSE 0
    END = 1;
$river$"""

_RIVER_7: Final = (
    _GUARD,
    _MIGRATION,
    _ADOPT,
    """CREATE TABLE IF NOT EXISTS {s}river_job (
    id bigserial CONSTRAINT river_job_pkey PRIMARY KEY,
    state {s}river_job_state NOT NULL DEFAULT 'available',
    attempt smallint NOT NULL DEFAULT 0,
    max_attempts smallint NOT NULL DEFAULT 25,
    attempted_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    finalized_at timestamptz,
    scheduled_at timestamptz NOT NULL DEFAULT now(),
    priority smallint NOT NULL DEFAULT 1,
    args jsonb NOT NULL,
    attempted_by text[],
    errors jsonb[],
    kind text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{{}}',
    queue text NOT NULL DEFAULT 'default',
    tags varchar(255)[] NOT NULL DEFAULT '{{}}',
    unique_key bytea,
    unique_states bit(8),
    CONSTRAINT finalized_or_finalized_at_null CHECK (
        (finalized_at IS NULL AND state NOT IN ('cancelled', 'completed', 'discarded'))
        OR (finalized_at IS NOT NULL AND state IN ('cancelled', 'completed', 'discarded'))),
    CONSTRAINT kind_length CHECK (char_length(kind) > 0 AND char_length(kind) < 128),
    CONSTRAINT max_attempts_is_positive CHECK (max_attempts > 0),
    CONSTRAINT priority_in_range CHECK (priority >= 1 AND priority <= 4),
    CONSTRAINT queue_length CHECK (char_length(queue) > 0 AND char_length(queue) < 128)
)""",
    _FUNCTION,
    """CREATE UNLOGGED TABLE IF NOT EXISTS {s}river_leader (
    elected_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    leader_id text NOT NULL,
    name text CONSTRAINT river_leader_pkey PRIMARY KEY DEFAULT 'default',
    CONSTRAINT name_length CHECK (name = 'default'),
    CONSTRAINT leader_id_length CHECK (char_length(leader_id) > 0 AND char_length(leader_id) < 128)
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_queue (
    name text CONSTRAINT river_queue_pkey PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    metadata jsonb NOT NULL DEFAULT '{{}}',
    paused_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_notification (
    id bigserial CONSTRAINT river_notification_pkey PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload text NOT NULL,
    topic text NOT NULL,
    CONSTRAINT topic_length CHECK (length(topic) > 0 AND length(topic) < 128)
)""",
    "CREATE INDEX IF NOT EXISTS river_notification_created_at_idx ON {s}river_notification (created_at)",
    "CREATE INDEX IF NOT EXISTS river_notification_topic_id_idx ON {s}river_notification (topic, id)",
    (
        "INSERT INTO {s}river_migration (line, version) SELECT 'main', v FROM generate_series(1, 7) v "
        "ON CONFLICT DO NOTHING"
    ),
)

_DROP_1: Final = (
    f"""DO $river$
DECLARE patience text := current_setting('lock_timeout');
BEGIN
    IF {_HAS_JOBS} THEN
        PERFORM set_config('lock_timeout', '1s', true);
        LOCK TABLE {{s}}river_job IN ACCESS EXCLUSIVE MODE;
        PERFORM set_config('lock_timeout', patience, true);
        IF EXISTS (SELECT FROM {{s}}river_migration WHERE line = '{ADOPTED}') THEN
            DROP TABLE IF EXISTS {{s}}river_history, {{s}}river_counter, {{s}}river_suspect, {{s}}river_duty,
                {{s}}river_runner;
            DROP INDEX IF EXISTS {", ".join(f"{{s}}{name}" for name in INDEXES)};
            ALTER TABLE {{s}}river_job RESET (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold,
                autovacuum_vacuum_cost_delay, autovacuum_analyze_scale_factor);
            DELETE FROM {{s}}river_migration WHERE line IN ('{LINE}', '{ADOPTED}');
            RETURN;
        END IF;
        IF EXISTS (SELECT FROM {{s}}river_job) OR EXISTS (SELECT FROM {{s}}river_queue WHERE paused_at IS NOT NULL)
            OR EXISTS (SELECT FROM {{s}}river_migration WHERE line NOT IN ('{LINE}', '{RIVER_LINE}')) THEN
            RAISE EXCEPTION '{REFUSED}version 0 drops the tables, and there are jobs, a paused queue or lines '
                'of River Pro; empty river_job, resume the queues, or leave the tables where they are'
                USING ERRCODE = 'object_not_in_prerequisite_state';
        END IF;
    END IF;
    DROP TABLE IF EXISTS {{s}}river_history, {{s}}river_counter, {{s}}river_suspect, {{s}}river_duty, {{s}}river_runner,
        {{s}}river_notification, {{s}}river_migration, {{s}}river_queue, {{s}}river_leader, {{s}}river_job;
    DROP FUNCTION IF EXISTS {{s}}river_job_state_in_bitmask;
    DROP TYPE IF EXISTS {{s}}river_job_state;
END $river$""",
)

_OURS_1: Final = (
    # Dead 'available' entries at the head of the fetch index are paid for by every fetch. 50,000 jobs worked ten at a
    # time: 5,680/s with default thresholds, 6,350/s with these (two runs each: suggestive). No fillfactor: `state` is
    # indexed, no update can be HOT, and fillfactor 50 made the cycle slower (41 us per job against 36).
    (
        "ALTER TABLE {s}river_job SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000, "
        "autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.02)"
    ),
    """CREATE TABLE IF NOT EXISTS {s}river_runner (
    id text CONSTRAINT river_runner_pkey PRIMARY KEY,
    started_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    queues text[] NOT NULL DEFAULT '{{}}',
    slots integer[] NOT NULL DEFAULT '{{}}',
    free text[] NOT NULL DEFAULT '{{}}',
    version text NOT NULL DEFAULT '',
    lease interval NOT NULL DEFAULT '30 seconds',
    alone bigint,
    CONSTRAINT river_runner_id_length CHECK (char_length(id) > 0 AND char_length(id) < 128)
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_duty (
    name text CONSTRAINT river_duty_pkey PRIMARY KEY,
    due_at timestamptz NOT NULL DEFAULT now(),
    done_at timestamptz
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_suspect (
    job_id bigint CONSTRAINT river_suspect_pkey PRIMARY KEY,
    deaths integer NOT NULL DEFAULT 0,
    alone integer NOT NULL DEFAULT 0
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_counter (
    runner text NOT NULL,
    minute timestamptz NOT NULL,
    queue text NOT NULL,
    state text NOT NULL,
    jobs bigint NOT NULL,
    batch bigint NOT NULL DEFAULT 0,
    CONSTRAINT river_counter_pkey PRIMARY KEY (runner, minute, queue, state)
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_history (
    minute timestamptz NOT NULL,
    queue text NOT NULL,
    state text NOT NULL,
    jobs bigint NOT NULL,
    CONSTRAINT river_history_pkey PRIMARY KEY (minute, queue, state)
)""",
)

VERSIONS: Final = {
    1: Version(
        upgrade=(*_RIVER_7, *_OURS_1),
        downgrade=_DROP_1,
        prepare=(_GUARD, _FUNCTION),
        changes=(
            (
                f"NOT EXISTS {_has_column('river_job', 'unique_states')}",
                "ALTER TABLE {s}river_job ADD COLUMN unique_states bit(8)",
            ),
            (
                f"NOT EXISTS {_has_column('river_job', 'max_attempts', ' AND atthasdef')}",
                "ALTER TABLE {s}river_job ALTER COLUMN max_attempts SET DEFAULT 25",
            ),
            (
                f"{_HAS_QUEUES} AND NOT EXISTS {_has_column('river_queue', 'updated_at', ' AND atthasdef')}",
                "ALTER TABLE {s}river_queue ALTER COLUMN updated_at SET DEFAULT CURRENT_TIMESTAMP",
            ),
        ),
        indexes={ARBITER: _ARBITER, **INDEXES},
        obsolete=("river_job_kind_unique_key_idx",),
    ),
}
