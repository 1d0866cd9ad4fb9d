"""The statements of the duties: claiming them, and taking away what is over."""

from typing import Any, Final

from sqlalchemy import (
    Delete,
    Double,
    Interval,
    Text,
    and_,
    bindparam,
    cast,
    column,
    delete,
    extract,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.rescue import OWNER
from sqla_river.statements.words import CTID, NOW, RUNNING, STATE_TEXT, array_of, job, literal, state, w
from sqla_river.tables import river_duty, river_queue, river_runner

# ---- claiming --------------------------------------------------------------------------------------------------------

_name: Final = bindparam("p_name", type_=Text)
_every: Final = bindparam("p_every", type_=Interval)
_names: Final = func.unnest(array_of("p_names", Text)).table_valued(column("name", Text)).render_derived(name="names")

# Caller: duties, once per start. A duty's row is made by whoever first knows the duty.
INSERT_DUTIES: Final = (
    pg_insert(river_duty)
    .from_select(["name"], select(_names.c.name).order_by(_names.c.name), include_defaults=False)
    .on_conflict_do_nothing()
)

# Caller: duties, when the soonest is due. Seconds until each is due, and since its last success.
SELECT_DUTIES: Final = select(
    river_duty.c.name,
    cast(extract("epoch", river_duty.c.due_at - func.clock_timestamp()), Double).label("due_in"),
    cast(extract("epoch", func.clock_timestamp() - river_duty.c.done_at), Double).label("done_ago"),
)

# Caller: duties. Whoever changes the row does the duty; nobody is elected, and two who do it at once do no harm. One
# that is due further ahead than p_far, the furthest that anybody puts this duty off, was put off before the database's
# clock was set back.
CLAIM_DUTY: Final = (
    update(river_duty)
    .where(
        river_duty.c.name == _name,
        or_(
            river_duty.c.due_at <= NOW,
            river_duty.c.due_at > NOW + bindparam("p_far", type_=Interval),
        ),
    )
    .values(due_at=NOW + _every)
    .returning(river_duty.c.name)
)
# Caller: duties, when a duty is done, or failed.
FINISH_DUTY: Final = update(river_duty).where(river_duty.c.name == _name).values(done_at=NOW)
# The same.
POSTPONE_DUTY: Final = (
    update(river_duty).where(river_duty.c.name == _name).values(due_at=NOW + bindparam("p_after", type_=Interval))
)

# ---- prune, clean ----------------------------------------------------------------------------------------------------


def _prune(name: str) -> Delete:
    age = cast(bindparam("p_age"), Interval)
    since = func.coalesce(NOW - (age + bindparam("p_back", type_=Interval)), literal("'-infinity'"))
    only, others = bindparam("p_queue", type_=Text), array_of("p_others", Text)
    over: Any = (
        select(literal("w.ctid"))
        .select_from(w)
        .where(
            w.c.state == state(name),
            w.c.finalized_at < NOW - age,
            w.c.finalized_at >= since,
            or_(w.c.queue == only, and_(only.is_(None), w.c.queue != func.all(others))),
        )
        .order_by(w.c.finalized_at, w.c.id)
        .limit(literal("1000"))
        .with_for_update(skip_locked=True, of=w)
    )
    return delete(job).where(
        CTID.op("=")(func.any(func.array(over.scalar_subquery()))),
        state(name) == STATE_TEXT,
        job.c.finalized_at < NOW - age,
    )


# Caller: duties/prune.py, 1,000 rows at a time, of those that came over their time within p_back, or ever. Index:
# river_job_finalized_idx, of which it reads what all queues have there. Locks: the rows it deletes, none waited for.
# State and horizon are tested again in the outer WHERE: a row that somebody retries between the read and the delete
# stays.
PRUNE_COMPLETED: Final = _prune("completed")
# The same.
PRUNE_CANCELLED: Final = _prune("cancelled")
# The same.
PRUNE_DISCARDED: Final = _prune("discarded")

_q: Final = river_queue.alias("q")
_untouched: Final[Any] = (
    select(literal("q.ctid"))
    .select_from(_q)
    .where(_q.c.updated_at < NOW - literal("interval '24 hours'"), _q.c.paused_at.is_(None))
    .with_for_update(skip_locked=True, of=_q)
)

# Caller: duties/prune.py. A queue that nobody touched for 24 h goes, as in River; one that is paused never does, or the
# pause were forgotten. Locks: the rows it deletes, none waited for, for runners touch theirs in name order; the lock
# holds what was read.
DELETE_UNTOUCHED_QUEUES: Final = delete(river_queue).where(
    literal("river_queue.ctid") == func.any(func.array(_untouched.scalar_subquery()))
)

# Caller: duties/prune.py. A runner's row goes ten leases after its last word, and only when no running job names it.
# Index: river_job_running_idx.
DELETE_GONE_RUNNERS: Final = delete(river_runner).where(
    river_runner.c.heartbeat_at < NOW - literal("10 * river_runner.lease"),
    ~select(w.c.id).where(w.c.state == RUNNING, river_runner.c.id == OWNER).correlate(river_runner).exists(),
)
