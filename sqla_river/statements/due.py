"""Making available what is due."""

from typing import Final

from sqlalchemy import Double, Text, and_, bindparam, cast, extract, func, or_, select, update

from sqla_river.statements.words import (
    MOMENT,
    NOW,
    discarded_if,
    holds_key,
    job,
    literal,
    notification,
    queue_payload,
    state,
    w,
    would_take_key,
)

_holder: Final = job.alias("holder")
_due: Final = (
    select(w.c.id, w.c.unique_key, would_take_key(w).label("takes"))
    .where(w.c.state.in_([state("retryable"), state("scheduled")]), w.c.scheduled_at <= NOW)
    .order_by(w.c.scheduled_at, w.c.id)
    .limit(literal("1000"))
    .with_for_update(skip_locked=True, of=w)
    .cte("due")
)
_judged: Final = select(
    _due.c.id,
    and_(
        _due.c.takes,
        or_(
            select(_holder.c.id)
            .where(holds_key(_holder, _due.c.unique_key), _holder.c.id != _due.c.id)
            .correlate(_due)
            .exists(),
            func.row_number().over(partition_by=_due.c.unique_key, order_by=_due.c.id) > literal("1"),
        ),
    ).label("taken"),
).cte("judged")
_moved: Final = (
    update(job)
    .where(job.c.id == _judged.c.id)
    .values(**discarded_if(func.coalesce(_judged.c.taken, literal("false"))))
    .returning(job.c.queue)
    .cte("moved")
)
_queues_moved: Final = select(_moved.c.queue, func.count().label("jobs")).group_by(_moved.c.queue).cte("queues_moved")

# Caller: fetch, when its timer fires. Indexes: river_job_due_idx, river_job_unique_idx for rows with a key. Locks:
# up to 1,000 rows, none waited for. A job whose unique key was taken by another is discarded with that reason (River's
# rule). It wakes the other runners in the same statement; the notification is selected, or PostgreSQL would never call
# it.
SCHEDULE_DUE: Final = select(
    _queues_moved.c.queue, _queues_moved.c.jobs, notification("river_insert", queue_payload(_queues_moved.c.queue))
)

_recently: Final = NOW - literal("interval '1 day'")  # arithmetic on -infinity, or on a time BC, would raise

# Caller: fetch, after each schedule, at each poll, and when woken. Index: river_job_due_idx, its first live entry.
# The second value is where a bounded look may begin: dead entries before it are not walked (200,000 of them made an
# unbounded one read 3,438 buffers). Its 10 s leave room for transactions that commit after the time of their job.
SELECT_NEXT_DUE: Final = (
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
    )
    .order_by(job.c.scheduled_at, job.c.id)
    .limit(literal("1"))
)
