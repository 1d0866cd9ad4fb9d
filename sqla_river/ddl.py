"""The tables, as versioned data.

River's part is River's schema of line ``main``, version 7, exactly: columns, types, checks, enum, function and the unique index
that its ON CONFLICT names. Ours to choose are the other indexes (lean and partial: River's two GIN indexes serve no query of
ours and halve the write throughput) and the tables ``river_runner``, ``river_duty`` and ``river_suspect``.

A version is frozen once it is released. Nothing here imports SQLAlchemy: Alembic loads this module in every project.
"""

from typing import Final

LINE: Final = "sqla_river"
LATEST: Final = 1
RIVER_LINE: Final = "main"
RIVER_VERSIONS: Final = (1, 2, 3, 4, 5, 6, 7)

# Serialises whoever installs or upgrades, per database; an xact lock, so a killed migration leaves nothing behind.
LOCK_KEY: Final = 0x7269766572

# The enum and function are made in a DO block or by OR REPLACE, so that the whole can run twice.
_RIVER_7: Final = (
    """DO $river$ BEGIN
    CREATE TYPE {s}river_job_state AS ENUM
        ('available', 'cancelled', 'completed', 'discarded', 'pending', 'retryable', 'running', 'scheduled');
EXCEPTION WHEN duplicate_object THEN NULL;
END $river$""",
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
    """CREATE OR REPLACE FUNCTION {s}river_job_state_in_bitmask(bitmask bit(8), state {s}river_job_state)
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
$river$""",
    """CREATE UNIQUE INDEX IF NOT EXISTS river_job_unique_idx ON {s}river_job (unique_key)
    WHERE unique_key IS NOT NULL AND unique_states IS NOT NULL AND {s}river_job_state_in_bitmask(unique_states, state)""",
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
    """CREATE TABLE IF NOT EXISTS {s}river_migration (
    line text NOT NULL,
    version bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT river_migration_pkey PRIMARY KEY (line, version),
    CONSTRAINT line_length CHECK (char_length(line) > 0 AND char_length(line) < 128),
    CONSTRAINT version_gte_1 CHECK (version >= 1)
)""",
    """CREATE TABLE IF NOT EXISTS {s}river_notification (
    id bigserial CONSTRAINT river_notification_pkey PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload text NOT NULL,
    topic text NOT NULL,
    CONSTRAINT topic_length CHECK (char_length(topic) > 0 AND char_length(topic) < 128)
)""",
    "CREATE INDEX IF NOT EXISTS river_notification_created_at_idx ON {s}river_notification (created_at)",
    "CREATE INDEX IF NOT EXISTS river_notification_topic_id_idx ON {s}river_notification (topic, id)",
    "INSERT INTO {s}river_migration (line, version) SELECT 'main', v FROM generate_series(1, 7) v ON CONFLICT DO NOTHING",
)

INDEXES: Final = {
    "river_job_fetch_idx": "(queue, priority, scheduled_at, id) WHERE state = 'available'",
    "river_job_due_idx": "(scheduled_at, id) WHERE state IN ('retryable', 'scheduled')",
    "river_job_finalized_idx": "(state, finalized_at, id) WHERE finalized_at IS NOT NULL",
    "river_job_running_idx": "(id) WHERE state = 'running'",
    "river_job_pending_idx": "(queue, id) WHERE state = 'pending'",
}
"""Our indexes of river_job: fetch, due (schedule), finalized (prune), running (rescue), pending (counts)."""

_OURS_1: Final = (
    *(f"CREATE INDEX IF NOT EXISTS {name} ON {{s}}river_job {columns}" for name, columns in INDEXES.items()),
    # Dead 'available' entries at the head of the fetch index are paid for by every fetch. 50,000 jobs worked ten at a time:
    # 5,680/s with default thresholds, 6,350/s with these (two runs each: suggestive). No fillfactor: `state` is indexed, no
    # update can be HOT, and fillfactor 50 made the cycle slower (41 us per job against 36).
    "ALTER TABLE {s}river_job SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000, "
    "autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.02)",
    """CREATE TABLE IF NOT EXISTS {s}river_runner (
    id text CONSTRAINT river_runner_pkey PRIMARY KEY,
    started_at timestamptz NOT NULL DEFAULT now(),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    queues text[] NOT NULL DEFAULT '{{}}',
    slots integer[] NOT NULL DEFAULT '{{}}',
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
    "INSERT INTO {s}river_migration (line, version) VALUES ('sqla_river', 1) ON CONFLICT DO NOTHING",
)

_DROP_1: Final = (
    "DROP TABLE IF EXISTS {s}river_suspect, {s}river_duty, {s}river_runner, {s}river_notification, {s}river_migration, "
    "{s}river_queue, {s}river_leader, {s}river_job",
    "DROP FUNCTION IF EXISTS {s}river_job_state_in_bitmask(bit, {s}river_job_state)",
    "DROP TYPE IF EXISTS {s}river_job_state",
)

UPGRADES: Final = {1: (*_RIVER_7, *_OURS_1)}
DOWNGRADES: Final = {1: _DROP_1}


def qualifier(schema: str | None) -> str:
    """The quoted prefix of a name in *schema*; empty where the search_path decides."""
    return "" if schema is None else '"{}".'.format(schema.replace('"', '""'))


def upgrade(schema: str | None = None, *, since: int = 0, to: int = LATEST) -> tuple[str, ...]:
    """The statements that bring *schema* from version *since* to version *to*; safe in one transaction, and safe to run twice."""
    versions = range(since + 1, to + 1)
    return tuple(statement.format(s=qualifier(schema)) for version in versions for statement in UPGRADES[version])


def downgrade(schema: str | None = None, *, since: int = LATEST, to: int = 0) -> tuple[str, ...]:
    """The statements that bring *schema* back from version *since* to version *to*."""
    versions = range(since, to, -1)
    return tuple(statement.format(s=qualifier(schema)) for version in versions for statement in DOWNGRADES[version])
