"""What a runner does, at a time that a test chooses: for jobs that are worked inside of the test's own transaction."""

from typing import Any, Final, TypeVar, cast

from sqlalchemy import BigInteger, ColumnElement, Executable, Text, bindparam, func, select
from sqlalchemy.sql import functions, visitors

from sqla_river.statements.complete import SETTLE_JOB, SETTLE_JOBS
from sqla_river.statements.due import schedule_due
from sqla_river.statements.fetch import first_free, take
from sqla_river.statements.words import AVAILABLE, MOMENT, array_of, literal, w
from sqla_river.tables import river_queue

S = TypeVar("S", bound=Executable)

_at: Final = bindparam("p_now", type_=MOMENT)


def at_clock(statement: S) -> S:
    """*statement* with ``p_now`` in place of now(). It does not reach into a CTE that an UPDATE names."""

    def replaced(element: Any, **_: Any) -> Any:
        return _at if isinstance(element, functions.now) else None

    return cast("S", visitors.replacement_traverse(cast("Any", statement), {}, replaced))


# Caller: testing/inline.py, once for each drain: now() would be the start of the test's transaction.
SELECT_CLOCK: Final = select(func.clock_timestamp())

# Caller: testing/inline.py. The same as SCHEDULE_DUE.
SCHEDULE_DUE_AT: Final = schedule_due(_at)

# Caller: testing/inline.py, for the next job to work, over all queues. Index: river_job_fetch_idx, where the planner
# likes; a test has few rows. Locks: one row.
SELECT_NEXT_JOB: Final = (
    select(w.c.id, w.c.queue, w.c.kind)
    .select_from(w.outerjoin(river_queue, river_queue.c.name == w.c.queue))
    .where(
        w.c.state == AVAILABLE,
        w.c.scheduled_at <= _at,
        w.c.kind == func.any(array_of("p_kinds", Text)),
        river_queue.c.paused_at.is_(None),
    )
    .order_by(w.c.priority, w.c.scheduled_at, w.c.id)
    .limit(literal("1"))
    .with_for_update(skip_locked=True, of=w)
)

_this_one: Final[ColumnElement[bool]] = w.c.id == bindparam("p_id", type_=BigInteger)

# Caller: testing/inline.py. The same as FETCH_AVAILABLE, of one job; which may be a suspect: it runs alone anyway.
FETCH_JOB_AT: Final = at_clock(take(first_free(_this_one)))

# Caller: testing/inline.py. The same as SETTLE_JOBS and SETTLE_JOB.
SETTLE_JOBS_AT: Final = at_clock(SETTLE_JOBS)
# The same.
SETTLE_JOB_AT: Final = at_clock(SETTLE_JOB)
