"""Putting jobs in, and saying so."""

from typing import Final

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Insert,
    Integer,
    SmallInteger,
    Text,
    bindparam,
    cast,
    column,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB

from sqla_river.statements.words import MOMENT, NOW, array_of, job, literal, notification, queue_payload

# Caller: store.transaction_now, once per transaction that enqueues for a given time.
SELECT_NOW: Final = select(NOW)

_announced: Final = func.unnest(array_of("p_queues", Text)).table_valued(column("queue", Text)).render_derived(name="q")

# Caller: notify.py, once per transaction and set of new queues. Commits that NOTIFY take turns, server-wide
# (PreCommit_Notify in PostgreSQL's async.c): per transaction and queue, never per row.
NOTIFY_QUEUES: Final = select(notification("river_insert", queue_payload(_announced.c.queue))).select_from(_announced)

# Caller: insert.py for a Core connection. RETURNING brings what an ORM flush would load.
INSERT_JOB: Final = insert(job).returning(job)

_given: Final = (
    func.json_to_recordset(cast(bindparam("p_rows", type_=Text), JSON))
    .table_valued(
        column("id", BigInteger),
        column("kind", Text),
        column("args", JSONB),
        column("queue", Text),
        column("priority", SmallInteger),
        column("max_attempts", SmallInteger),
        column("tags", ARRAY(Text)),
        column("metadata", JSONB),
        column("state", Text),
        column("scheduled_at", MOMENT),
    )
    .render_derived(name="given", with_types=True)
)


def _insert_given(*ids: str) -> Insert:
    given = {
        "kind": _given.c.kind,
        "args": _given.c.args,
        "queue": _given.c.queue,
        "priority": _given.c.priority,
        "max_attempts": _given.c.max_attempts,
        "tags": _given.c.tags,
        "metadata_": _given.c.metadata,
        "state": cast(_given.c.state, job.c.state.type),
        "scheduled_at": func.coalesce(_given.c.scheduled_at, NOW),
        **{name: _given.c[name] for name in ids},
    }
    return insert(job).from_select(list(given), select(*given.values()).select_from(_given), include_defaults=False)


# Caller: bulk.py, once per block, through the driver: COPY has no Core form. What follows args (and the id, where it
# was asked for); a block with times has scheduled_at behind it. COPY returns no ids: RESERVE_IDS does.
COPY_COLUMNS: Final = tuple(
    each.name
    for each in (
        job.c.kind,
        job.c.queue,
        job.c.priority,
        job.c.max_attempts,
        job.c.tags,
        job.c.metadata_,
        job.c.state,
    )
)

# Caller: bulk.py, once per block, for other drivers. One JSON parameter instead of twelve arrays: 80 k rows/s against
# 36 k.
INSERT_JOBS: Final = _insert_given()
# The same, under ids that RESERVE_IDS gave.
INSERT_NUMBERED_JOBS: Final = _insert_given("id")

# Caller: bulk.py, once per block whose ids are asked for. In order; a rollback leaves gaps.
RESERVE_IDS: Final = select(
    func.nextval(func.pg_get_serial_sequence(bindparam("p_table", type_=Text), literal("'id'")))
).select_from(func.generate_series(literal("1"), bindparam("p_count", type_=Integer)))
