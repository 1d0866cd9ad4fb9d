"""The rows of runners and queues."""

from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Integer,
    Interval,
    Text,
    bindparam,
    column,
    delete,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.words import (
    AVAILABLE,
    CANCEL_ASKED,
    CTID,
    LAST_TOKEN,
    MOMENT,
    NOW,
    RUNNING,
    STATE_TEXT,
    SUSPICIOUS,
    array_of,
    job,
    literal,
    w,
)
from sqla_river.tables import river_leader, river_queue, river_runner, river_suspect

_id: Final = bindparam("p_id", type_=Text)
_mine: Final = func.starts_with(LAST_TOKEN, _id + literal("'/'"))
_values: Final = {
    "id": _id,
    "queues": array_of("p_queues", Text),
    "slots": array_of("p_slots", Integer),
    "free": array_of("p_free", Text),
    "version": bindparam("p_version", type_=Text),
    "lease": bindparam("p_lease", type_=Interval),
}

# Caller: heartbeat.py, every 5 s. One row of its own; started_at stays. It says what the database's clock shows.
UPSERT_RUNNER: Final = (
    pg_insert(river_runner)
    .values(**_values)
    .on_conflict_do_update(
        index_elements=["id"],
        set_={"heartbeat_at": NOW, **{name: _values[name] for name in ("queues", "slots", "free", "lease")}},
    )
    .returning(NOW)
)

# Caller: heartbeat.py, after a clean stop. Kept while a running job names the runner: its lease is what frees that job.
# Index: river_job_running_idx.
DELETE_RUNNER: Final = delete(river_runner).where(
    river_runner.c.id == _id, ~select(job.c.id).where(job.c.state == RUNNING, _mine).exists()
)

_held: Final = (
    select(river_queue.c.name)
    .where(river_queue.c.name == func.any(array_of("p_queues", Text)))
    .order_by(river_queue.c.name)
    .with_for_update(skip_locked=True)
    .cte("held")
)
_touched: Final = update(river_queue).where(river_queue.c.name == _held.c.name).values(updated_at=NOW).cte("touched")
_names: Final = func.unnest(array_of("p_queues", Text)).table_valued(column("name", Text)).render_derived(name="names")

# Caller: heartbeat.py, at start, for added queues, and every 10 min: River's clients hide or delete a queue that nobody
# touched for 24 h. Locks: the rows, in name order; none waited for: an operator's open transaction that has paused a
# queue must not hold up a heartbeat. One that paused it before it had a row inserts the same key, which is waited for;
# the bound holds for this statement, and from its first row on: PostgreSQL reads it when a wait begins.
UPSERT_QUEUES: Final = (
    pg_insert(river_queue)
    .from_select(
        ["name"],
        select(_names.c.name)
        .where(
            ~select(river_queue.c.name).where(river_queue.c.name == _names.c.name).exists(),
            func.set_config(literal("'lock_timeout'"), literal("'100ms'"), literal("true")).is_not(None),
        )
        .order_by(_names.c.name),
        include_defaults=False,
    )
    .on_conflict_do_nothing()
    .add_cte(_touched)
)

# A scalar, so that no plan can be made of it but one look at the primary key for each of the few.
_state_of_suspect: Final = select(STATE_TEXT).where(job.c.id == river_suspect.c.job_id).correlate(river_suspect)

_here: Final = (
    select(
        job.c.id,
        LAST_TOKEN.label("token"),
        CANCEL_ASKED.label("asked"),
        # Ahead of the clock: it was set back since.
        or_(job.c.attempted_at <= bindparam("p_before", type_=MOMENT), job.c.attempted_at > NOW).label("old"),
    )
    .where(job.c.state == RUNNING, _mine)
    .cte("here")
)


def _of_those(column: ColumnElement[Any], condition: ColumnElement[bool]) -> Any:
    return func.array(select(column).where(condition).order_by(_here.c.id).scalar_subquery())


# Caller: heartbeat.py, every 5 s. The runner's rank among those that live; whether there are suspects, and jobs that
# may run soon whose runner died; which of its running jobs somebody asked to cancel (for runners that do not LISTEN);
# its place, a number that all runners draw lots with; and id and token of what runs under its name since p_before, its
# last beat, or longer: short jobs cost it nothing. Index: river_job_pkey, river_job_running_idx.
SELECT_FLEET: Final = select(
    select(func.count())
    .select_from(river_runner)
    .where(river_runner.c.heartbeat_at > NOW - river_runner.c.lease, river_runner.c.id < _id)
    .scalar_subquery()
    .label("rank"),
    select(river_suspect.c.job_id).where(river_suspect.c.deaths >= SUSPICIOUS).exists().label("suspects"),
    select(river_suspect.c.job_id)
    .where(_state_of_suspect.scalar_subquery().in_([AVAILABLE, RUNNING]))
    .exists()
    .label("deaths"),
    _of_those(_here.c.id, _here.c.asked).label("cancelled"),
    func.hashtext(_id).label("place"),
    _of_those(_here.c.id, _here.c.old).label("ids"),
    _of_those(_here.c.token, _here.c.old).label("tokens"),
)

_free: Final = func.unnest(river_runner.c.free).table_valued(column("queue", Text)).render_derived(name="free")

# Caller: heartbeat.py, every 5 s. The places of the live runners that have a free slot, by queue. It reads the whole of
# river_runner, which has a row per runner.
SELECT_PEERS: Final = (
    select(_free.c.queue, func.array_agg(func.hashtext(river_runner.c.id)).label("places"))
    .select_from(river_runner.join(_free, true()))
    .where(
        river_runner.c.heartbeat_at > NOW - river_runner.c.lease,
        _free.c.queue == func.any(array_of("p_queues", Text)),
    )
    .group_by(_free.c.queue)
)

# Caller: heartbeat.py, after a gap in its own beats: those of the runner's jobs that are still its own. Index:
# river_job_running_idx.
SELECT_OWN: Final = select(job.c.id).where(
    job.c.state == RUNNING, LAST_TOKEN.op("=")(func.any(array_of("p_tokens", Text)))
)

_long: Final[Any] = (
    select(literal("w.ctid"))
    .select_from(w)
    .where(
        w.c.state == RUNNING,
        func.starts_with(literal("w.attempted_by[cardinality(w.attempted_by)]"), _id + literal("'/'")),
        w.c.attempted_at < NOW - literal("interval '30 minutes'"),
        select(literal("1")).select_from(river_leader).where(river_leader.c.expires_at > NOW).exists(),
    )
    .order_by(w.c.id)
    .with_for_update(skip_locked=True, of=w)
)

# Caller: heartbeat.py, every ten minutes. River's rescuer goes by attempted_at alone and would discard a kind that it
# does not know after an hour: while a Go client leads, the time of long jobs is kept fresh. Index:
# river_job_running_idx. Locks: in id order, none waited for.
REFRESH_LONG: Final = (
    update(job)
    .where(CTID.op("=")(func.any(func.array(_long.scalar_subquery()))), STATE_TEXT == RUNNING)
    .values(attempted_at=NOW)
)

# Caller: health.py. The row of every runner, the oldest first.
SELECT_RUNNERS: Final = select(
    river_runner.c.id,
    river_runner.c.queues,
    river_runner.c.slots,
    river_runner.c.version,
    river_runner.c.lease,
    (func.clock_timestamp() - river_runner.c.heartbeat_at).label("silent"),
    (func.clock_timestamp() - river_runner.c.started_at).label("age"),
).order_by(river_runner.c.started_at, river_runner.c.id)
