"""Writing results, under the fence."""

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Interval,
    Text,
    and_,
    case,
    cast,
    column,
    func,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from sqla_river.statements.words import (
    AVAILABLE,
    CANCEL_ASKED,
    CTID,
    KEPT_ERRORS,
    LAST_TOKEN,
    METADATA,
    NOW,
    RUNNING,
    STARTED_AT,
    STATE_TEXT,
    appended,
    array_of,
    fence,
    job,
    state,
    w,
)

_done: Final = (
    func.unnest(array_of("p_ids", BigInteger), array_of("p_tokens", Text))
    .table_valued(column("id", BigInteger), column("token", Text))
    .render_derived(name="done")
)
_mine: Final = (
    select(literal_column("w.ctid"))
    .select_from(_done.join(w, w.c.id == _done.c.id))
    .where(fence(w, _done.c.token))
    .order_by(w.c.id)
    .with_for_update(skip_locked=True, of=w)
)

# Caller: complete.py, the fast path: jobs that just completed. Index: river_job_pkey, then a Tid Scan. Locks: in id order, none waited
# for: a row that somebody's open transaction holds is left out and tried again in a batch of its own.
COMPLETE_JOBS: Final = (
    update(job)
    .where(CTID == func.any(func.array(_mine.scalar_subquery())), STATE_TEXT == RUNNING)
    .values(state=state("completed"), finalized_at=NOW)
    .returning(job.c.id)
)

_given: Final = (
    func.unnest(
        array_of("p_ids", BigInteger),
        array_of("p_tokens", Text),
        array_of("p_states", Text),
        array_of("p_backs", Integer),
        array_of("p_delays", Interval),
        array_of("p_errors", Text),
        array_of("p_metadata", Text),
        array_of("p_snoozed", Integer),
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
    select(_given)
    .select_from(_given.join(w, w.c.id == _given.c.id))
    .where(fence(w, _given.c.token))
    .order_by(w.c.id)
    .with_for_update(skip_locked=True, of=w)
    .cte("locked")
)
# A cancel asked while the job ran wins over everything but an end: however short the delay, the job never runs again.
_wished: Final = case(
    (
        and_(CANCEL_ASKED, _locked.c.state.in_([AVAILABLE, state("scheduled"), state("retryable")])),
        state("cancelled"),
    ),
    else_=_locked.c.state,
)
_finalized: Final = _wished.in_([state("cancelled"), state("completed"), state("discarded")])
_snoozes: Final[ColumnElement[Any]] = literal_column(
    "CASE WHEN locked.snoozed > 0 THEN jsonb_build_object('snoozes', "
    "CASE WHEN jsonb_typeof(river_job.metadata->'snoozes') = 'number' "
    "THEN (river_job.metadata->>'snoozes')::numeric ELSE 0 END + 1) ELSE '{}'::jsonb END"
)
_staged: Final = cast(func.coalesce(_locked.c.metadata, literal_column("'{}'")), JSONB)
_error: Final = func.jsonb_build_object(literal_column("'at'"), STARTED_AT).op("||")(cast(_locked.c.error, JSONB))

# Caller: complete.py for every other result, and for a transactional job. Index and locks as COMPLETE_JOBS. Errors keep River's shape, `at`
# is the start of the attempt; the last 25 stay. Source of the rules: River JobSetStateIfRunningMany.
SETTLE_JOBS: Final = (
    update(job)
    .where(job.c.id == _locked.c.id, STATE_TEXT == RUNNING)
    .values(
        state=cast(_wished, job.c.state.type),
        finalized_at=case((_finalized, NOW)),
        attempt=case(
            (_wished == _locked.c.state, func.greatest(job.c.attempt - _locked.c.back, literal_column("0"))),
            else_=job.c.attempt,
        ),
        scheduled_at=case(
            (or_(_locked.c.delay.is_(None), _finalized), job.c.scheduled_at), else_=NOW + _locked.c.delay
        ),
        errors=case((_locked.c.error.is_not(None), appended("errors", KEPT_ERRORS, _error)), else_=job.c.errors),
        metadata_=METADATA.op("||")(_snoozes).op("||")(_staged),
    )
    .returning(job.c.id, cast(job.c.state, Text))
)

# Caller: complete.py, for ids that did not come back. Running: locked by somebody. Another state under our token: written by an earlier try
# whose reply was lost. Not found: stale.
SELECT_HELD: Final = (
    select(job.c.id, STATE_TEXT.label("state"))
    .select_from(_done.join(job, job.c.id == _done.c.id))
    .where(LAST_TOKEN == _done.c.token)
)
