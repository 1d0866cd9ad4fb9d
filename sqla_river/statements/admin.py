"""What operators do to jobs."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    not_,
    null,
    select,
    update,
)

from sqla_river.statements.words import (
    AVAILABLE,
    CANCEL_ASKED,
    METADATA,
    MOMENT,
    NOW,
    RUNNING,
    array_of,
    holds_key,
    job,
    literal,
    notification,
    state,
    w,
    would_take_key,
)

_asked_at: Final[ColumnElement[Any]] = literal("""to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')""")
_state: Final = cast(w.c.state, Text)
_unfinished: Final = w.c.finalized_at.is_(None)
_idle: Final = _state != RUNNING
_mark: Final[ColumnElement[Any]] = literal("'cancel_attempted_at'")
_nobody: Final[ColumnElement[Any]] = literal("NULL::bigint")

Change = Callable[[CTE], Any]
"""Makes the UPDATE or DELETE of what is fit among the jobs of a CTE."""


def _chosen(fit: ColumnElement[bool], *, many: bool, takes: ColumnElement[bool] | None = None) -> CTE:
    """The jobs of p_ids, locked in id order; of one, whether it is fit for the change; of many, those that are.

    One job is waited for, and its lock brings the row as whoever had it left it: a state tested in WHERE would be that
    of before. Many skip what is locked, and do not lock what they leave.
    """
    keyed = () if takes is None else (w.c.unique_key, takes.label("takes"))
    found = select(w.c.id, _state.label("state"), fit.label("fit"), *keyed)
    found = found.where(w.c.id == func.any(array_of("p_ids", BigInteger)), *((fit,) if many else ()))
    return found.order_by(w.c.id).with_for_update(skip_locked=many, of=w).cte("chosen")


def _judged(chosen: CTE) -> CTE:
    """Who holds the unique key that a job would take: another job, or one of the same batch that comes first."""
    holder = job.alias("holder")
    there = (
        select(holder.c.id)
        .where(holds_key(holder, chosen.c.unique_key), holder.c.id != chosen.c.id)
        .correlate(chosen)
        .limit(literal("1"))
        .scalar_subquery()
    )
    first = func.first_value(chosen.c.id).over(
        partition_by=[chosen.c.unique_key, chosen.c.takes, chosen.c.fit], order_by=chosen.c.id
    )
    taken = func.coalesce(there, func.nullif(first, chosen.c.id))
    return select(chosen.c.id, chosen.c.state, chosen.c.fit, case((chosen.c.takes, taken)).label("holder")).cte(
        "judged"
    )


def _changed(change: Change, chosen: CTE, *more: Any) -> Any:
    """Change what is fit, and tell of each chosen job: its state before and now, whether it was changed, and who stood
    in the way. What is fit is so under our lock: that is the state tested again.
    """
    changed = change(chosen).returning(job.c.id, job.c.queue, cast(job.c.state, Text).label("state")).cte("changed")
    return select(
        chosen.c.id,
        chosen.c.state,
        (chosen.c.holder if "holder" in chosen.c else _nobody).label("holder"),
        changed.c.id.is_not(None).label("done"),
        changed.c.queue,
        changed.c.state.label("now"),
        *(each(changed) for each in more),
    ).select_from(chosen.outerjoin(changed, changed.c.id == chosen.c.id))


def _updated(**values: Any) -> Change:
    def change(chosen: CTE) -> Any:
        free = (chosen.c.holder.is_(None),) if "holder" in chosen.c else ()
        return update(job).where(job.c.id == chosen.c.id, chosen.c.fit, *free).values(**values)

    return change


def _told(changed: CTE) -> ColumnElement[Any]:
    """How many runners were told, on River's control channel, to cancel a job; selected, or PostgreSQL would never call
    pg_notify.
    """
    payload: ColumnElement[Any] = (
        literal("""'{"action": "cancel", "job_id": '""")
        + cast(changed.c.id, Text)
        + literal("""', "queue": '""")
        + cast(func.to_json(changed.c.queue), Text)
        + literal("'}'")
    )
    told = select(notification("river_control", payload).label("said")).where(changed.c.state == RUNNING).cte("told")
    return select(func.count(told.c.said)).scalar_subquery().label("told")


_running: Final = job.c.state == RUNNING
_cancel: Final = _updated(
    state=case((_running, job.c.state), else_=cast(state("cancelled"), job.c.state.type)),
    finalized_at=case((~_running, NOW)),
    metadata_=METADATA.op("||")(func.jsonb_build_object(_mark, _asked_at)),
)

# Caller: admin.py. Index: river_job_pkey. Locks: the job's row, waited for. What does not run is cancelled at once;
# what runs is marked, and its runner told.
CANCEL_JOB: Final = _changed(_cancel, _chosen(_unfinished, many=False), _told)
# The same, for many. Locks: in id order, none waited for.
CANCEL_JOBS: Final = _changed(_cancel, _chosen(_unfinished, many=True), _told)

_ready: Final = and_(w.c.state == AVAILABLE, w.c.scheduled_at <= NOW, not_(w.c.metadata_.bool_op("?")(_mark)))
_to_retry: Final = and_(_idle, not_(_ready))
# One attempt is left at least: River's rule, and for a limit that somebody lowered. The mark of a cancel goes, or an
# error would cancel the job again (River keeps it).
_retry: Final = _updated(
    state=cast(AVAILABLE, job.c.state.type),
    max_attempts=func.greatest(job.c.max_attempts, func.least(job.c.attempt + literal("1"), literal("32767"))),
    finalized_at=null(),
    scheduled_at=NOW,
    metadata_=case((CANCEL_ASKED, METADATA.op("-")(_mark)), else_=job.c.metadata_),
)
_takes: Final = would_take_key(w)

# Caller: admin.py. Indexes: river_job_pkey, river_job_unique_idx for a job with a key. Locks: the job's row, waited
# for; and its unique key, while another open transaction is about to take it. Source of the rules: River JobRetry.
RETRY_JOB: Final = _changed(_retry, _judged(_chosen(_to_retry, many=False, takes=_takes)))
# The same, for many. Locks: in id order, none waited for but a unique key.
RETRY_JOBS: Final = _changed(_retry, _judged(_chosen(_to_retry, many=True, takes=_takes)))


def _delete(chosen: CTE) -> Any:
    return delete(job).where(job.c.id == chosen.c.id, chosen.c.fit)


# Caller: admin.py. Index: river_job_pkey. Locks: the job's row, waited for.
DELETE_JOB: Final = _changed(_delete, _chosen(_idle, many=False))
# The same, for many. Locks: in id order, none waited for.
DELETE_JOBS: Final = _changed(_delete, _chosen(_idle, many=True))

_waiting: Final = and_(_unfinished, _idle)
_at: Final = bindparam("p_scheduled_at", type_=MOMENT)
_due: Final[ColumnElement[bool]] = bindparam("p_due", type_=Boolean)
# What waits for somebody (pending) or for another attempt (retryable) goes on to do so, unless the latter is due.
_reschedule: Final = _updated(
    state=cast(
        case(
            (job.c.state == state("pending"), state("pending")),
            (_due, AVAILABLE),
            (job.c.state == state("retryable"), state("retryable")),
            else_=state("scheduled"),
        ),
        job.c.state.type,
    ),
    scheduled_at=_at,
)
_takes_due: Final = and_(_due, w.c.state != state("pending"), would_take_key(w))

# Caller: admin.py. Indexes: river_job_pkey, river_job_unique_idx. Locks: as RETRY_JOB.
RESCHEDULE_JOB: Final = _changed(_reschedule, _judged(_chosen(_waiting, many=False, takes=_takes_due)))
# The same, for many. Locks: in id order, none waited for but a unique key.
RESCHEDULE_JOBS: Final = _changed(_reschedule, _judged(_chosen(_waiting, many=True, takes=_takes_due)))

_change_priority: Final = _updated(priority=bindparam("p_priority", type_=SmallInteger))

# Caller: admin.py. Index: river_job_pkey. Locks: the job's row, waited for.
CHANGE_PRIORITY_OF_JOB: Final = _changed(_change_priority, _chosen(_unfinished, many=False))
# The same, for many. Locks: in id order, none waited for.
CHANGE_PRIORITY_OF_JOBS: Final = _changed(_change_priority, _chosen(_unfinished, many=True))

# Caller: admin.py, for ids that were left; wait.py. Index: river_job_pkey.
SELECT_STATES: Final = select(
    job.c.id, cast(job.c.state, Text).label("state"), job.c.finalized_at.is_not(None).label("finished")
).where(job.c.id == func.any(array_of("p_ids", BigInteger)))
