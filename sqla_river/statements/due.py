"""Making available what is due."""

from typing import Any, Final

from sqlalchemy import ColumnElement, Double, Text, bindparam, cast, extract, func, select, true, update

from sqla_river.statements.words import (
    MOMENT,
    NOW,
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
_IN_ORDER: Final = (w.c.scheduled_at, w.c.id)


def schedule_due(
    now: ColumnElement[Any] = NOW,
    *conditions: ColumnElement[bool],
    order: tuple[ColumnElement[Any], ...] = _IN_ORDER,
    limit: ColumnElement[Any] = _MOST,
) -> Any:
    """The statement for what is due at *now*."""
    due = (
        select(w.c.id, w.c.unique_key, would_take_key(w).label("takes"))
        .where(w.c.state.in_([state("retryable"), state("scheduled")]), w.c.scheduled_at <= now, *conditions)
        .order_by(*order)
        .limit(limit)
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
    return select(
        queues_moved.c.queue, queues_moved.c.jobs, notification("river_insert", queue_payload(queues_moved.c.queue))
    )


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

# Caller: fetch, where that failed: the rows that wait for no key. Index: river_job_due_idx. Locks: up to 1,000 rows,
# none waited for.
SCHEDULE_KEYLESS: Final = schedule_due(NOW, would_take_key(w).is_not(true()))

# Caller: fetch, after it: one of the others, and each time another one, or a key that is not to be had would stand
# before those that are. Index: river_job_due_idx. Locks: one row, and 100 ms for its key.
SCHEDULE_ONE: Final = schedule_due(NOW, _briefly, would_take_key(w), order=(func.random(),), limit=literal("1"))

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
