"""Making available what is due."""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Text,
    and_,
    bindparam,
    cast,
    extract,
    func,
    select,
    update,
)

from sqla_river.statements.words import (
    MOMENT,
    NOW,
    array_of,
    cannot_take_key,
    discarded_if,
    job,
    literal,
    notification,
    queue_payload,
    state,
    w,
    would_take_key,
)

_MOST: Final[ColumnElement[Any]] = literal("1000")
_takes: Final = would_take_key(w).label("takes")


def _is_due(now: ColumnElement[Any]) -> ColumnElement[bool]:
    return and_(w.c.state.in_([state("retryable"), state("scheduled")]), w.c.scheduled_at <= now)


def schedule_due(now: ColumnElement[Any] = NOW, *conditions: ColumnElement[bool], told: bool = True) -> Any:
    """The statement for what is due at *now*; whether it is *told* to other runners."""
    due = (
        select(w.c.id, w.c.unique_key, _takes)
        .where(_is_due(now), *conditions)
        .order_by(w.c.scheduled_at, w.c.id)
        .limit(_MOST)
        .with_for_update(skip_locked=True, of=w)
        .cte("due")
    )
    judged = select(due.c.id, cannot_take_key(due).label("taken")).cte("judged")
    moved = (
        update(job)
        .where(job.c.id == judged.c.id)
        .values(**discarded_if(func.coalesce(judged.c.taken, literal("false"))))
        .returning(job.c.queue)
        .cte("moved")
    )
    queues_moved = select(moved.c.queue, func.count().label("jobs")).group_by(moved.c.queue).cte("queues_moved")
    said = (notification("river_insert", queue_payload(queues_moved.c.queue)),) if told else ()
    return select(queues_moved.c.queue, queues_moved.c.jobs, *said)


# Evaluated once, before the first row is read; it ends with the transaction.
_briefly: Final[ColumnElement[bool]] = (
    select(func.set_config(literal("'lock_timeout'"), literal("'100ms'"), literal("true")))
    .scalar_subquery()
    .is_not(None)
)

# Caller: fetch, when its timer fires. Indexes: river_job_due_idx, river_job_unique_idx for rows with a key. Locks:
# up to 1,000 rows, none waited for; a key that an open transaction is about to take for 100 ms, and then all of it
# fails, for nothing is fetched meanwhile. A job whose unique key was taken by another is discarded with that reason
# (River's rule). It wakes the other runners in the same statement; the notification is selected, or PostgreSQL would
# never call it.
SCHEDULE_DUE: Final = schedule_due(NOW, _briefly)

# Caller: fetch, where that failed: which they are, and which of them wait for a key; but for those that were refused a
# moment ago. The latest first: where many old ones are refused again and again, what has just come due is not behind
# them. Index: river_job_due_idx. Locks: up to 1,000 rows, none waited for, so that it names none that others hold.
SELECT_DUE: Final = (
    select(w.c.id, _takes)
    .where(_is_due(NOW), w.c.id != func.all(array_of("p_refused", BigInteger)))
    .order_by(w.c.scheduled_at.desc(), w.c.id.desc())
    .limit(_MOST)
    .with_for_update(skip_locked=True, of=w)
)

# Caller: fetch, after it, for parts of what it named. The same as SCHEDULE_DUE, and nobody is told: where the server's
# queue of notifications is full, what notifies fails. Index: river_job_pkey.
SCHEDULE_DUE_AMONG: Final = schedule_due(NOW, _briefly, w.c.id == func.any(array_of("p_ids", BigInteger)), told=False)

_recently: Final = NOW - literal("interval '1 day'")  # arithmetic on -infinity, or on a time BC, would raise


def _next_due(*conditions: ColumnElement[bool]) -> Any:
    return (
        select(
            cast(extract("epoch", func.greatest(job.c.scheduled_at, _recently) - func.clock_timestamp()), Double),
            cast(
                func.greatest(func.least(job.c.scheduled_at, NOW), _recently) - literal("interval '10 seconds'"),
                Text,
            ),
        )
        .where(
            job.c.state.in_([state("retryable"), state("scheduled")]),
            job.c.scheduled_at >= cast(func.coalesce(bindparam("p_since", type_=Text), literal("'-infinity'")), MOMENT),
            job.c.scheduled_at < literal("'infinity'"),
            *conditions,
        )
        .order_by(job.c.scheduled_at, job.c.id)
        .limit(literal("1"))
    )


# Caller: fetch, after each schedule, at each poll, and when woken. Index: river_job_due_idx, its first live entry.
# The second value is where a bounded look may begin: dead entries before it are not walked (200,000 of them made an
# unbounded one read 3,438 buffers). Its 10 s leave room for transactions that commit after the time of their job.
SELECT_NEXT_DUE: Final = _next_due()

# Caller: fetch, where what is due is not to be had: what comes due after it. Index: river_job_due_idx.
SELECT_LATER_DUE: Final = _next_due(job.c.scheduled_at > NOW)
