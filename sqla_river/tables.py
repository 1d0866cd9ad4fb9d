"""The tables as SQLAlchemy sees them: a description for statements and mappings. The DDL itself stands in ``ddl``."""

import sys
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Enum,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    TypeDecorator,
    func,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, BIT, JSONB
from sqlalchemy.schema import conv

from sqla_river.states import JobState, mask_of, states_of


class StateMask(TypeDecorator[frozenset[JobState]]):
    """River's bit(8) set of states as ``frozenset[JobState]``.

    SQLAlchemy 2.0 reads bit(8) as str, 2.1 as a subclass of it; asyncpg under 2.0 binds only its own BitString.
    """

    impl = BIT(8)
    cache_ok = True

    def process_bind_param(self, value: frozenset[JobState] | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        mask = mask_of(value)
        if dialect.driver == "asyncpg" and not hasattr(postgresql, "BitString"):
            return sys.modules["asyncpg"].BitString(mask)
        return mask

    def process_result_value(self, value: Any, dialect: Dialect) -> frozenset[JobState] | None:  # noqa: ARG002
        if value is None:
            return None
        return states_of(value if isinstance(value, str) else value.as_string().replace(" ", ""))


def state_type(schema: str | None) -> Enum:
    """A fresh type for each table: an Enum that is shared, or copied by a mixin, loses its schema."""
    return Enum(JobState, name="river_job_state", schema=schema, values_callable=_labels)


def _labels(states: type[JobState]) -> list[str]:
    return [state.value for state in states]


def job_table(metadata: MetaData, schema: str | None = None) -> Table:
    """``river_job`` in *metadata*; the one that is there already, if it is.

    Every name goes through conv(), so that a naming convention of the user's MetaData leaves River's names alone.
    """
    schema = schema or metadata.schema
    known = metadata.tables.get(f"{schema}.river_job" if schema else "river_job")
    if known is not None:
        return known
    moment = DateTime(timezone=True)
    return Table(
        "river_job",
        metadata,
        Column("id", BigInteger, autoincrement=True, nullable=False),
        Column("state", state_type(schema), nullable=False, server_default=text("'available'")),
        Column("attempt", SmallInteger, nullable=False, server_default=text("0")),
        Column("max_attempts", SmallInteger, nullable=False, server_default=text("25")),
        Column("attempted_at", moment),
        Column("created_at", moment, nullable=False, server_default=func.now()),
        Column("finalized_at", moment),
        Column("scheduled_at", moment, nullable=False, server_default=func.now()),
        Column("priority", SmallInteger, nullable=False, server_default=text("1")),
        Column("args", JSONB(none_as_null=True), nullable=False),
        Column("attempted_by", ARRAY(Text)),
        Column("errors", ARRAY(JSONB(none_as_null=True))),
        Column("kind", Text, nullable=False),
        Column(
            "metadata", JSONB(none_as_null=True), key="metadata_", nullable=False, server_default=text("'{}'::jsonb")
        ),
        Column("queue", Text, nullable=False, server_default=text("'default'")),
        Column("tags", ARRAY(String(255)), nullable=False, server_default=text("'{}'::character varying[]")),
        Column("unique_key", LargeBinary),
        Column("unique_states", StateMask),
        PrimaryKeyConstraint("id", name=conv("river_job_pkey")),
        CheckConstraint(
            "(finalized_at IS NULL AND state NOT IN ('cancelled', 'completed', 'discarded')) OR "
            "(finalized_at IS NOT NULL AND state IN ('cancelled', 'completed', 'discarded'))",
            name=conv("finalized_or_finalized_at_null"),
        ),
        CheckConstraint("char_length(kind) > 0 AND char_length(kind) < 128", name=conv("kind_length")),
        CheckConstraint("max_attempts > 0", name=conv("max_attempts_is_positive")),
        CheckConstraint("priority >= 1 AND priority <= 4", name=conv("priority_in_range")),
        CheckConstraint("char_length(queue) > 0 AND char_length(queue) < 128", name=conv("queue_length")),
        Index(
            conv("river_job_unique_idx"),
            "unique_key",
            unique=True,
            postgresql_where=text(
                "unique_key IS NOT NULL AND unique_states IS NOT NULL "
                "AND river_job_state_in_bitmask(unique_states, state)"
            ),
        ),
        schema=schema,
    )


RIVER: Final = MetaData()
"""Our own MetaData: no schema of its own; `statements.py` is built over it, and the shipped Job maps it."""

river_job: Final = job_table(RIVER)

_moment: Final = DateTime(timezone=True)

river_queue: Final = Table(
    "river_queue",
    RIVER,
    Column("name", Text, primary_key=True),
    Column("created_at", _moment, nullable=False, server_default=func.now()),
    Column("metadata", JSONB, key="metadata_", nullable=False, server_default=text("'{}'::jsonb")),
    Column("paused_at", _moment),
    Column("updated_at", _moment, nullable=False, server_default=func.now()),
)

river_migration: Final = Table(
    "river_migration",
    RIVER,
    Column("line", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", _moment, nullable=False, server_default=func.now()),
)

river_runner: Final = Table(
    "river_runner",
    RIVER,
    Column("id", Text, primary_key=True),
    Column("started_at", _moment, nullable=False, server_default=func.now()),
    Column("heartbeat_at", _moment, nullable=False, server_default=func.now()),
    Column("queues", ARRAY(Text), nullable=False),
    Column("slots", ARRAY(Integer), nullable=False),
    Column("free", ARRAY(Text), nullable=False),
    Column("version", Text, nullable=False),
    Column("lease", Interval, nullable=False),
    Column("alone", BigInteger),
)

river_leader: Final = Table(
    "river_leader", RIVER, Column("name", Text, primary_key=True), Column("expires_at", _moment, nullable=False)
)
"""River's; only looked at."""

river_duty: Final = Table(
    "river_duty",
    RIVER,
    Column("name", Text, primary_key=True),
    Column("due_at", _moment, nullable=False, server_default=func.now()),
    Column("done_at", _moment),
)

river_suspect: Final = Table(
    "river_suspect",
    RIVER,
    Column("job_id", BigInteger, primary_key=True, autoincrement=False),
    Column("deaths", Integer, nullable=False),
    Column("alone", Integer, nullable=False),
)

river_counter: Final = Table(
    "river_counter",
    RIVER,
    Column("runner", Text, primary_key=True),
    Column("minute", _moment, primary_key=True),
    Column("queue", Text, primary_key=True),
    Column("state", Text, primary_key=True),
    Column("jobs", BigInteger, nullable=False),
    Column("batch", BigInteger, nullable=False),
)
"""What each runner finished in the last minutes: rows of its own, so that no two runners ever meet at one."""

river_history: Final = Table(
    "river_history",
    RIVER,
    Column("minute", _moment, primary_key=True),
    Column("queue", Text, primary_key=True),
    Column("state", Text, primary_key=True),
    Column("jobs", BigInteger, nullable=False),
)
"""The same folded, of all runners together: by minute, and under ``-infinity`` of all time."""
