"""Putting jobs in, and saying so."""

import json
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    Insert,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    and_,
    bindparam,
    cast,
    column,
    extract,
    func,
    insert,
    select,
)
from sqlalchemy.dialects.postgresql import BIT, JSONB
from sqlalchemy.dialects.postgresql import insert as pg_insert
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from sqla_river.statements.words import (
    MOMENT,
    NOW,
    array_of,
    holds_key,
    in_bitmask,
    job,
    literal,
    notification,
    queue_payload,
)

# Caller: store.transaction_now, once per transaction that enqueues for a given time. And how many seconds ago that was.
SELECT_NOW: Final = select(NOW.label("now"), cast(extract("epoch", func.clock_timestamp() - NOW), Double).label("age"))

_announced: Final = func.unnest(array_of("p_queues", Text)).table_valued(column("queue", Text)).render_derived(name="q")

# Caller: notify.py, once per transaction and set of new queues. Commits that NOTIFY take turns, server-wide
# (PreCommit_Notify in PostgreSQL's async.c): per transaction and queue, never per row.
NOTIFY_QUEUES: Final = select(notification("river_insert", queue_payload(_announced.c.queue))).select_from(_announced)


class announcing(FunctionElement[int]):  # noqa: N801 - reads as the function that it is
    """*value*, for a column of somebody else's INSERT, which by that says as well that there is a job in *queue*.

    Caller: models.py, for the first job of a queue in a transaction: a flush costs no further round trip. A construct
    of its own, because to put it together of Core's takes longer than the round trip.
    """

    type = SmallInteger()
    inherit_cache = True

    def __init__(self, value: int, schema: str | None, queue: str) -> None:
        said = json.dumps({"queue": queue})
        super().__init__(*(bindparam(None, each, type_=Text, unique=True) for each in (str(value), schema, said)))


@compiles(announcing)
def _compile_announcing(element: announcing, compiler: SQLCompiler, **options: Any) -> str:
    value, schema, said = (f"CAST({compiler.process(each, **options)} AS TEXT)" for each in element.clauses)
    channel = f"coalesce({schema}, current_schema()) || '.river_insert'"
    return f"(SELECT CAST({value} AS SMALLINT) FROM pg_notify({channel}, {said}))"  # noqa: S608 - of bind parameters


_made: Final = (
    insert(job)
    .values(
        {
            name: bindparam(f"p_{job.c[name].name}", type_=job.c[name].type)
            for name in ("kind", "args", "queue", "priority", "max_attempts", "tags", "metadata_", "state")
        }
        | {"scheduled_at": func.coalesce(bindparam("p_scheduled_at", type_=MOMENT), NOW)}
    )
    .returning(job)
    .cte("made")
)
_said: Final = (
    select(notification("river_insert", queue_payload(_made.c.queue)).label("said"))
    .where(bindparam("p_said", type_=Boolean))
    .cte("said")
)

# Caller: insert.py for a Core connection: the job, what an ORM flush would load, and, where p_said, the notification,
# in one round trip. That is selected, or PostgreSQL would never call it.
INSERT_JOB: Final = select(*_made.c, select(func.count(_said.c.said)).scalar_subquery().label("said"))

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

# Caller: bulk.py, once per block, for other drivers, and for clients that do not speak UTF-8. One JSON parameter
# instead of twelve arrays: 80 k rows/s against 36 k.
INSERT_JOBS: Final = _insert_given()
# The same, under ids that RESERVE_IDS gave.
INSERT_NUMBERED_JOBS: Final = _insert_given("id")

_unique: Final = (
    func.json_to_recordset(cast(bindparam("p_rows", type_=Text), JSON))
    .table_valued(
        column("kind", Text),
        column("args", JSONB),
        column("queue", Text),
        column("priority", SmallInteger),
        column("max_attempts", SmallInteger),
        column("tags", ARRAY(Text)),
        column("metadata", JSONB),
        column("state", Text),
        column("scheduled_at", MOMENT),
        column("unique_key", Text),
        column("unique_states", Text),
        column("number", Integer),
    )
    .render_derived(name="given", with_types=True)
)
_values: Final[dict[str, ColumnElement[Any]]] = {
    "kind": _unique.c.kind,
    "args": _unique.c.args,
    "queue": _unique.c.queue,
    "priority": _unique.c.priority,
    "max_attempts": _unique.c.max_attempts,
    "tags": _unique.c.tags,
    "metadata_": _unique.c.metadata,
    "state": cast(_unique.c.state, job.c.state.type),
    "scheduled_at": func.coalesce(_unique.c.scheduled_at, NOW),
    "unique_key": func.decode(_unique.c.unique_key, literal("'hex'")),
    "unique_states": cast(_unique.c.unique_states, BIT(8)),
}

# Caller: bulk.py, once per block with unique rows. Index: river_job_unique_idx, whose predicate it names. It waits
# while another open transaction holds one of the keys, which it takes in order: two of these statements cannot
# deadlock, two transactions of several can. DO NOTHING leaves the row that holds the key alone (River's DO UPDATE locks
# and rewrites it). The second of a key in one block, by their numbers, is a duplicate too.
INSERT_UNIQUE_JOBS: Final = (
    pg_insert(job)
    .from_select(
        list(_values),
        select(*_values.values()).select_from(_unique).order_by(_unique.c.unique_key, _unique.c.number),
        include_defaults=False,
    )
    .on_conflict_do_nothing(
        index_elements=[job.c.unique_key],
        index_where=and_(
            job.c.unique_key.is_not(None),
            job.c.unique_states.is_not(None),
            in_bitmask(job.c.unique_states, job.c.state),
        ),
    )
    .returning(job.c.id, job.c.unique_key)
)

_holder: Final = job.alias("holder")

# Caller: insert.py, when a unique job was a duplicate: of what. Index: river_job_unique_idx.
SELECT_HOLDER: Final = (
    select(_holder.c.id)
    .where(holds_key(_holder, bindparam("p_key", type_=LargeBinary)))
    .order_by(_holder.c.id.desc())
    .limit(literal("1"))
)

# Caller: bulk.py, once per block whose ids are asked for. In order; a rollback leaves gaps.
RESERVE_IDS: Final = select(
    func.nextval(func.pg_get_serial_sequence(bindparam("p_table", type_=Text), literal("'id'")))
).select_from(func.generate_series(literal("1"), bindparam("p_count", type_=Integer)))
