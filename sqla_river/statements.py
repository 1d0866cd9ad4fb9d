"""Every statement of the library, named.

Each is built once over the schema-less tables and runs under a ``schema_translate_map`` (``store.py``). States are literals: bound
as $1, PostgreSQL takes a generic plan that cannot use a partial index (15.18: Seq Scan + Sort instead of an Index Scan). Bind
parameters start with ``p_``. Times are now(), the database's clock; durations are bound as intervals.
"""

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    DateTime,
    Double,
    Insert,
    Integer,
    Interval,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    extract,
    func,
    insert,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, array
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.tables import river_duty, river_job, river_queue, river_runner

KEPT_ERRORS: Final = 25
KEPT_TOKENS: Final = 100

NOW: Final = func.now()
_moment: Final = DateTime(timezone=True)


def _array(name: str, item: Any) -> ColumnElement[Any]:
    return bindparam(name, type_=ARRAY(item))


def _state(name: str) -> ColumnElement[Any]:
    return literal_column(f"'{name}'")


AVAILABLE: Final = _state("available")
RUNNING: Final = _state("running")

job: Final = river_job
_ctid: Final[ColumnElement[Any]] = literal_column("river_job.ctid")
# On `state` itself the planner may walk a partial index instead of the primary key or the ctids: 115 ms against 10 ms for 1,000 jobs.
_state_text: Final = cast(job.c.state, Text)
_last_token: Final[ColumnElement[Any]] = literal_column("river_job.attempted_by[cardinality(river_job.attempted_by)]")

# Caller: store.now, once per transaction that enqueues for a given time.
SELECT_NOW: Final = select(NOW)

_announced: Final = func.unnest(_array("p_queues", Text)).table_valued(column("queue", Text)).render_derived(name="q")


def _notification(topic: str, payload: ColumnElement[Any]) -> ColumnElement[Any]:
    """pg_notify on River's channel ``<schema>.<topic>``; a schema of None is the connection's current one."""
    schema = func.coalesce(bindparam("p_schema", type_=Text), func.current_schema())
    return func.pg_notify(schema + literal_column(f"'.{topic}'"), payload)


def _queue_payload(queue: ColumnElement[Any]) -> ColumnElement[Any]:
    return literal_column("""'{"queue": '""") + cast(func.to_json(queue), Text) + literal_column("'}'")


# Caller: notify.py, once per transaction and set of new queues. Commits that NOTIFY take turns, server-wide (PreCommit_Notify in
# PostgreSQL's async.c): per transaction and queue, never per row.
NOTIFY_QUEUES: Final = select(_notification("river_insert", _queue_payload(_announced.c.queue))).select_from(_announced)

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
        column("scheduled_at", _moment),
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


# Caller: bulk.py, once per block. One JSON parameter instead of twelve arrays: 80 k rows/s against 36 k, for the same rows.
INSERT_JOBS: Final = _insert_given()
# The same, under ids that RESERVE_IDS gave.
INSERT_NUMBERED_JOBS: Final = _insert_given("id")

# Caller: bulk.py, once per block whose ids are asked for. In order; a rollback leaves gaps.
RESERVE_IDS: Final = select(func.nextval(func.pg_get_serial_sequence(bindparam("p_table", type_=Text), literal_column("'id'")))).select_from(
    func.generate_series(literal_column("1"), bindparam("p_count", type_=Integer))
)


def _appended(name: str, kept: int, item: ColumnElement[Any]) -> ColumnElement[Any]:
    """The array column *name* with *item* behind it, its last *kept* items; a nested array, which would raise, begins anew."""
    whole = job.c[name]
    tail: ColumnElement[Any] = literal_column(f"river_job.{name}[greatest(cardinality(river_job.{name}) - {kept - 2}, 1):]")
    return case((func.array_ndims(whole) > literal_column("1"), array([item])), else_=func.array_append(tail, item))


# ---- fetch ----------------------------------------------------------------------------------------------------------------------

WORK_COLUMNS: Final = (
    job.c.id,
    job.c.queue,
    job.c.kind,
    job.c.attempt,
    job.c.max_attempts,
    job.c.priority,
    cast(job.c.args, Text),
    cast(job.c.metadata_, Text),
)
"""What a slot needs, args and metadata as raw text: 8 columns cost 2.1 us a row, all 18 cost 5.7."""

_asked: Final = (
    func.unnest(_array("p_queues", Text), _array("p_slots", Integer))
    .table_valued(column("queue", Text), column("slots", Integer))
    .render_derived(name="q")
)
_w: Final = job.alias("w")
_found: Final = (
    select(literal_column("w.ctid").label("ctid"))
    .select_from(_w)
    .where(
        _w.c.state == AVAILABLE,
        _w.c.queue == _asked.c.queue,
        _w.c.scheduled_at <= NOW,
        _w.c.kind == func.any(_array("p_kinds", Text)),
    )
    .order_by(_w.c.priority, _w.c.scheduled_at, _w.c.id)
    .limit(_asked.c.slots)
    .with_for_update(skip_locked=True, of=_w)
    .correlate(_asked)
    .lateral("j")
)
_open: Final = (
    select(_found.c.ctid)
    .select_from(_asked.outerjoin(river_queue, river_queue.c.name == _asked.c.queue).join(_found, true()))
    .where(river_queue.c.paused_at.is_(None))
)

# Caller: fetch.py, once per wake-up, for all queues of a runner. Index: river_job_fetch_idx, one scan per queue; a Tid Scan outside
# (River's CTE joins by id: 1.5 to 1.7 times the cost). Locks: up to the sum of p_slots rows, none waited for. It decodes nothing and
# cannot overflow. Fewer rows than asked does not mean that a queue is empty: a row may change between snapshot and lock.
FETCH_AVAILABLE: Final = (
    update(job)
    .where(_ctid == func.any(func.array(_open.scalar_subquery())), _state_text == AVAILABLE)
    .values(
        state=RUNNING,
        attempt=literal_column("least(river_job.attempt::int + 1, 32767)"),
        attempted_at=NOW,
        attempted_by=_appended("attempted_by", KEPT_TOKENS, bindparam("p_token", type_=Text)),
    )
    .returning(*WORK_COLUMNS)
)

# Caller: fetch.py, while the reply to a fetch is lost. Index: river_job_running_idx. No locks: the jobs are the runner's own.
SELECT_LOST: Final = select(*WORK_COLUMNS, _last_token).where(job.c.state == RUNNING, _last_token == func.any(_array("p_tokens", Text)))

# ---- complete -------------------------------------------------------------------------------------------------------------------

_done: Final = (
    func.unnest(_array("p_ids", BigInteger), _array("p_tokens", Text))
    .table_valued(column("id", BigInteger), column("token", Text))
    .render_derived(name="done")
)


def _fence(of: Any, token: ColumnElement[Any]) -> ColumnElement[bool]:
    """The job is running, and its last fetch is ours. `attempt` is no part of it: a snooze gives it back."""
    last = literal_column(f"{of.name}.attempted_by[cardinality({of.name}.attempted_by)]")
    return and_(cast(of.c.state, Text) == RUNNING, last == token)


_mine: Final = (
    select(literal_column("w.ctid"))
    .select_from(_done.join(_w, _w.c.id == _done.c.id))
    .where(_fence(_w, _done.c.token))
    .order_by(_w.c.id)
    .with_for_update(skip_locked=True, of=_w)
)

# Caller: complete.py, the fast path: jobs that just completed. Index: river_job_pkey, then a Tid Scan. Locks: in id order, none
# waited for: a row that somebody's open transaction holds is left out and tried again in a batch of its own.
COMPLETE_JOBS: Final = (
    update(job)
    .where(_ctid == func.any(func.array(_mine.scalar_subquery())), _state_text == RUNNING)
    .values(state=_state("completed"), finalized_at=NOW)
    .returning(job.c.id)
)

_given_results: Final = (
    func.unnest(
        _array("p_ids", BigInteger),
        _array("p_tokens", Text),
        _array("p_states", Text),
        _array("p_backs", Integer),
        _array("p_delays", Interval),
        _array("p_errors", Text),
        _array("p_metadata", Text),
        _array("p_snoozed", Integer),
    )
    .table_valued(
        column("id", BigInteger),
        column("token", Text),
        column("state", Text),
        column("back", Integer),
        column("delay", Interval),
        column("error", Text),
        column("metadata", Text),
        column("snoozed", Integer),
    )
    .render_derived(name="given")
)
_locked: Final = (
    select(_given_results)
    .select_from(_given_results.join(_w, _w.c.id == _given_results.c.id))
    .where(_fence(_w, _given_results.c.token))
    .order_by(_w.c.id)
    .with_for_update(skip_locked=True, of=_w)
    .cte("locked")
)
# A cancel asked while the job ran wins over everything but an end: however short the delay, the job never runs again.
_wished: Final = case(
    (
        and_(
            job.c.metadata_.op("?")(literal_column("'cancel_attempted_at'")),
            _locked.c.state.in_([AVAILABLE, _state("scheduled"), _state("retryable")]),
        ),
        _state("cancelled"),
    ),
    else_=_locked.c.state,
)
_finalized: Final = _wished.in_([_state("cancelled"), _state("completed"), _state("discarded")])
_started_at: Final[ColumnElement[Any]] = literal_column(
    """to_char(river_job.attempted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
)
_snoozes: Final[ColumnElement[Any]] = literal_column(
    "CASE WHEN locked.snoozed > 0 THEN jsonb_build_object('snoozes', "
    "CASE WHEN jsonb_typeof(river_job.metadata->'snoozes') = 'number' THEN (river_job.metadata->>'snoozes')::numeric ELSE 0 END + 1) "
    "ELSE '{}'::jsonb END"
)

# Caller: complete.py for every other result, and for a transactional job. Index and locks as COMPLETE_JOBS. Errors keep River's
# shape, `at` is the start of the attempt; the last 25 stay. Source of the rules: River JobSetStateIfRunningMany.
SETTLE_JOBS: Final = (
    update(job)
    .where(job.c.id == _locked.c.id, _state_text == RUNNING)
    .values(
        state=cast(_wished, job.c.state.type),
        finalized_at=case((_finalized, NOW)),
        attempt=func.greatest(job.c.attempt - _locked.c.back, literal_column("0")),
        scheduled_at=case(
            (or_(_locked.c.delay.is_(None), _finalized), job.c.scheduled_at),
            else_=NOW + _locked.c.delay,
        ),
        errors=case(
            (
                _locked.c.error.is_not(None),
                _appended(
                    "errors",
                    KEPT_ERRORS,
                    func.jsonb_build_object(literal_column("'at'"), _started_at).op("||")(cast(_locked.c.error, JSONB)),
                ),
            ),
            else_=job.c.errors,
        ),
        metadata_=job.c.metadata_.op("||")(_snoozes).op("||")(cast(func.coalesce(_locked.c.metadata, literal_column("'{}'")), JSONB)),
    )
    .returning(job.c.id, cast(job.c.state, Text))
)

# Caller: complete.py, for ids that did not come back. Running: locked by somebody. Another state under our token: written by an earlier
# try whose reply was lost. Not found: stale.
SELECT_HELD: Final = (
    select(job.c.id, _state_text.label("state"))
    .select_from(_done.join(job, job.c.id == _done.c.id))
    .where(_last_token == _done.c.token)
)

# ---- due ------------------------------------------------------------------------------------------------------------------------

_unready: Final = job.c.state.in_([_state("retryable"), _state("scheduled")])
_due: Final = (
    select(job.c.id)
    .where(_unready, job.c.scheduled_at <= NOW)
    .order_by(job.c.scheduled_at, job.c.id)
    .limit(literal_column("1000"))
    .with_for_update(skip_locked=True)
    .cte("due")
)
_moved: Final = update(job).where(job.c.id == _due.c.id).values(state=AVAILABLE).returning(job.c.queue).cte("moved")
_queues_moved: Final = select(_moved.c.queue, func.count().label("jobs")).group_by(_moved.c.queue).cte("queues_moved")

# Caller: fetch.py, when its timer fires. Index: river_job_due_idx. Locks: up to 1,000 rows, none waited for. It wakes the other
# runners in the same statement; the notification is selected, or PostgreSQL would never call it.
SCHEDULE_DUE: Final = select(
    _queues_moved.c.queue, _queues_moved.c.jobs, _notification("river_insert", _queue_payload(_queues_moved.c.queue))
)

# Caller: fetch.py, after each schedule, at each poll, and when woken. Index: river_job_due_idx, its first live entry. The second value
# is where a bounded look may begin: dead entries before it are not walked (200,000 of them made an unbounded one read 3,438 buffers).
# Its 10 s leave room for transactions that commit after the time of their job.
SELECT_NEXT_DUE: Final = (
    select(
        extract("epoch", job.c.scheduled_at - func.clock_timestamp()).cast(Double),
        cast(func.least(job.c.scheduled_at, NOW) - literal_column("interval '10 seconds'"), Text),
    )
    .where(
        _unready,
        job.c.scheduled_at >= cast(func.coalesce(bindparam("p_since", type_=Text), literal_column("'-infinity'")), _moment),
        job.c.scheduled_at < literal_column("'infinity'"),
    )
    .order_by(job.c.scheduled_at, job.c.id)
    .limit(literal_column("1"))
)

# ---- runner, queues -------------------------------------------------------------------------------------------------------------

_runner_values: Final = {
    "id": bindparam("p_id", type_=Text),
    "queues": _array("p_queues", Text),
    "slots": _array("p_slots", Integer),
    "version": bindparam("p_version", type_=Text),
}

# Caller: heartbeat.py, every 5 s. One row of its own; started_at stays.
UPSERT_RUNNER: Final = (
    pg_insert(river_runner)
    .values(**_runner_values)
    .on_conflict_do_update(
        index_elements=["id"],
        set_={"heartbeat_at": NOW, "queues": _runner_values["queues"], "slots": _runner_values["slots"]},
    )
)

# Caller: heartbeat.py, after a clean stop. Kept while a running job names the runner: its lease is what frees that job.
DELETE_RUNNER: Final = delete(river_runner).where(
    river_runner.c.id == bindparam("p_id", type_=Text),
    ~select(job.c.id)
    .where(
        job.c.state == RUNNING,
        func.starts_with(_last_token, bindparam("p_id", type_=Text) + literal_column("'/'")),
    )
    .exists(),
)

_queue_names: Final = func.unnest(_array("p_queues", Text)).table_valued(column("name", Text)).render_derived(name="names")

# Caller: heartbeat.py, at start and every 10 min: River's clients hide or delete a queue that nobody touched for 24 h. In name order.
UPSERT_QUEUES: Final = (
    pg_insert(river_queue)
    .from_select(["name"], select(_queue_names.c.name).order_by(_queue_names.c.name), include_defaults=False)
    .on_conflict_do_update(index_elements=["name"], set_={"updated_at": NOW})
)

CLAIM_DUTY: Final = (
    update(river_duty)
    .where(river_duty.c.name == bindparam("p_name", type_=Text), river_duty.c.due_at <= NOW)
    .values(due_at=NOW + bindparam("p_every", type_=Interval))
    .returning(river_duty.c.name)
)

# ---- looking --------------------------------------------------------------------------------------------------------------------

# Caller: stats.py.
COUNT_STATES: Final = (
    select(job.c.queue, cast(job.c.state, Text).label("state"), func.count().label("jobs"))
    .group_by(job.c.queue, job.c.state)
    .order_by(job.c.queue, job.c.state)
)
