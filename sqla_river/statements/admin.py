"""What operators do to jobs."""

from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Text, case, cast, func, select, update

from sqla_river.statements.words import METADATA, NOW, RUNNING, array_of, job, literal, notification, state, w

_asked_at: Final[ColumnElement[Any]] = literal("""to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')""")


def _cancel(skip_locked: bool) -> Any:
    unfinished = (
        select(w.c.id)
        .where(w.c.id == func.any(array_of("p_ids", BigInteger)), w.c.finalized_at.is_(None))
        .order_by(w.c.id)
        .with_for_update(skip_locked=skip_locked, of=w)
        .cte("unfinished")
    )
    running = job.c.state == RUNNING
    changed = (
        update(job)
        .where(job.c.id == unfinished.c.id, job.c.finalized_at.is_(None))
        .values(
            state=case((running, job.c.state), else_=cast(state("cancelled"), job.c.state.type)),
            finalized_at=case((~running, NOW)),
            metadata_=METADATA.op("||")(func.jsonb_build_object(literal("'cancel_attempted_at'"), _asked_at)),
        )
        .returning(job.c.id, job.c.queue, cast(job.c.state, Text).label("state"))
        .cte("changed")
    )
    payload: ColumnElement[Any] = (
        literal("""'{"action": "cancel", "job_id": '""")
        + cast(changed.c.id, Text)
        + literal("""', "queue": '""")
        + cast(func.to_json(changed.c.queue), Text)
        + literal("'}'")
    )
    told = select(notification("river_control", payload).label("said")).where(changed.c.state == RUNNING).cte("told")
    return select(changed.c.id, changed.c.state, select(func.count(told.c.said)).scalar_subquery().label("told"))


# Caller: admin.py. Index: river_job_pkey. Locks: in id order; waited for with one job, skipped with many. What does not
# run is cancelled at once; what runs is marked, and its runner told on River's control channel.
CANCEL_JOB: Final = _cancel(skip_locked=False)
# The same, for many.
CANCEL_JOBS: Final = _cancel(skip_locked=True)

# Caller: admin.py, for ids that were left; wait.py. Index: river_job_pkey.
SELECT_STATES: Final = select(
    job.c.id, cast(job.c.state, Text).label("state"), job.c.finalized_at.is_not(None).label("finished")
).where(job.c.id == func.any(array_of("p_ids", BigInteger)))
