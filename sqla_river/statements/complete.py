"""Writing results, under the fence."""

from collections.abc import Mapping
from typing import Any, Final
from typing import cast as typed

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    Interval,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    func,
    or_,
    select,
    true,
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
    last_token,
    literal,
    packed_ids,
    packed_tokens,
    state,
    w,
)

_done: Final = (
    func.unnest(packed_ids("p_ids"), packed_tokens("p_tokens"))
    .table_valued(column("id", BigInteger), column("token", Text))
    .render_derived(name="done")
)


def _held_by(given: Any, *columns: ColumnElement[Any]) -> Any:
    """The rows of *given* whose fence holds, locked: *columns*, and the ctid and id of each.

    By LATERAL, so that no plan can be made of it but one look at the primary key for each: joined, a plan that was
    made while the table was empty walked the whole of it for each batch, until the next ANALYZE.
    """
    held = (
        select(literal("w.ctid").label("at"), w.c.id)
        .select_from(w)
        .where(w.c.id == given.c.id, fence(w, given.c.token))
        .with_for_update(skip_locked=True, of=w)
        .correlate(given)
        .lateral("held")
    )
    return select(*columns, held.c.at, held.c.id).select_from(given.join(held, true()))


def _is_one_of(held: Any) -> ColumnElement[bool]:
    """The row is one of *held*, read by a Tid Scan in any plan: no index serves ``id + 0``, where a plan that was made
    while the table was empty walked the whole of river_job_pkey.
    """
    found = CTID.op("=")(func.any(func.array(select(held.c.at).scalar_subquery())))
    return and_(found, job.c.id + literal("0") == held.c.id)


_ids: Final = select(packed_ids("p_ids")).scalar_subquery()
_firsts: Final = select(array_of("p_firsts", BigInteger)).scalar_subquery()
_tokens: Final = select(array_of("p_tokens", Text)).scalar_subquery()
_token: Final[ColumnElement[Any]] = _tokens[func.width_bucket(job.c.id, _firsts)]
# Nobody has it locked: the last to lock it was the fetch that also wrote it.
_unlocked: Final = literal("(river_job.xmax = '0' OR river_job.xmax = river_job.xmin)")

# Caller: complete.py, the fast path: jobs that just completed. p_ids are sorted; p_tokens are those of all ids from
# each of p_firsts on. All that is asked of a row stands in the UPDATE itself, which asks again where a row has changed
# since its snapshot, and none is locked before it is written: a quarter less than SETTLE_JOBS costs. The parameters are
# subqueries so that they are read once, not for each row. Index: river_job_pkey. Locks: in the order of the ids; a row
# that somebody has locked, or had, is left out, and only one that is locked in the moment between is waited for. It
# returns how many: to return which costs 0.5 us a job, and SETTLE_JOBS tells.
COMPLETE_JOBS: Final = (
    update(job)
    .where(
        job.c.id == func.any(cast(_ids, ARRAY(BigInteger))),
        STATE_TEXT == RUNNING,
        _token == LAST_TOKEN,
        _unlocked,
    )
    .values(state=state("completed"), finalized_at=NOW)
)

_given: Final = (
    func.unnest(
        packed_ids("p_ids"),
        packed_tokens("p_tokens"),
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
_results: Final = (_given.c.state, _given.c.back, _given.c.delay, _given.c.error, _given.c.metadata, _given.c.snoozed)
_locked: Final = _held_by(_given, *_results).cte("locked")


def _settled(given: Mapping[str, ColumnElement[Any]]) -> dict[str, Any]:
    """What becomes of a running job. Errors keep River's shape, `at` is the start of the attempt; the last 25 stay.

    Source of the rules: River JobSetStateIfRunningMany.
    """
    # A cancel asked while the job ran wins over everything but an end: however short the delay, the job never runs
    # again.
    unfinished = given["state"].in_([AVAILABLE, state("scheduled"), state("retryable")])
    to = case((and_(CANCEL_ASKED, unfinished), state("cancelled")), else_=given["state"])
    finalized = to.in_([state("cancelled"), state("completed"), state("discarded")])
    back = func.greatest(job.c.attempt - given["back"], literal("0"))
    error = func.jsonb_build_object(literal("'at'"), STARTED_AT).op("||")(cast(given["error"], JSONB))
    counted: ColumnElement[Any] = literal(
        "jsonb_build_object('snoozes', CASE WHEN jsonb_typeof(river_job.metadata->'snoozes') = 'number' "
        "THEN (river_job.metadata->>'snoozes')::numeric ELSE 0 END + 1)"
    )
    snoozes = case((given["snoozed"] > literal("0"), counted), else_=literal("'{}'::jsonb"))
    staged = cast(func.coalesce(given["metadata"], literal("'{}'")), JSONB)
    return {
        "state": cast(to, job.c.state.type),
        "finalized_at": case((finalized, NOW)),
        "attempt": case((to == given["state"], back), else_=job.c.attempt),
        "scheduled_at": case(
            (or_(given["delay"].is_(None), finalized), job.c.scheduled_at), else_=NOW + given["delay"]
        ),
        "errors": case((given["error"].is_not(None), appended("errors", KEPT_ERRORS, error)), else_=job.c.errors),
        "metadata_": METADATA.op("||")(snoozes).op("||")(staged),
    }


# Caller: complete.py for every other result, and for jobs that completed where not all of a batch could be written.
# Index: river_job_pkey, then a Tid Scan. Locks: in the order of p_ids, which are sorted; none waited for: a row that
# somebody's open transaction holds is left out, and tried again in a batch of its own.
SETTLE_JOBS: Final = (
    update(job)
    .where(_is_one_of(_locked), STATE_TEXT == RUNNING)
    .values(**_settled(typed("dict[str, ColumnElement[Any]]", dict(_locked.c.items()))))
    .returning(job.c.id, cast(job.c.state, Text))
)

_one: Final[dict[str, ColumnElement[Any]]] = {
    "state": bindparam("p_state", type_=Text),
    "back": bindparam("p_back", type_=Integer),
    "delay": cast(bindparam("p_delay", type_=Interval), Interval),
    "error": bindparam("p_error", type_=Text),
    "metadata": bindparam("p_metadata", type_=Text),
    "snoozed": bindparam("p_snoozed", type_=Integer),
}
_held: Final = and_(job.c.id == bindparam("p_id", type_=BigInteger), fence(job, bindparam("p_token", type_=Text)))

# Caller: settle.py, as the last statement of a transactional job, on the handler's own connection. Index:
# river_job_pkey. Locks: one row, waited for.
SETTLE_JOB: Final = update(job).where(_held).values(**_settled(_one)).returning(cast(job.c.state, Text))

# Caller: settle.py, when the reply to the COMMIT of a transactional job was lost. It waits for a server that is still
# committing: a plain read would say running. Index: river_job_pkey. Locks: one row, waited for.
SELECT_OUTCOME: Final = (
    select(STATE_TEXT)
    .where(job.c.id == bindparam("p_id", type_=BigInteger), bindparam("p_token", type_=Text) == LAST_TOKEN)
    .with_for_update()
)

_noted: Final = (
    func.unnest(array_of("p_ids", BigInteger), array_of("p_tokens", Text), array_of("p_notes", Text))
    .table_valued(column("id", BigInteger), column("token", Text), column("note", Text))
    .render_derived(name="noted")
)
_noting: Final = _held_by(_noted, _noted.c.note).cte("noting")

# Caller: complete.py, at most once a second, for the jobs that reported progress. Index and locks as SETTLE_JOBS.
NOTE_PROGRESS: Final = (
    update(job)
    .where(_is_one_of(_noting), STATE_TEXT == RUNNING)
    .values(
        metadata_=METADATA.op("||")(
            func.jsonb_build_object(literal("'sqla_river:progress'"), cast(_noting.c.note, JSONB))
        ),
    )
)

# By LATERAL as above; OFFSET 0 keeps it one.
_read: Final[Any] = (
    select(w.c.id, cast(w.c.state, Text).label("state"))
    .where(w.c.id == _done.c.id, last_token(w) == _done.c.token)
    .offset(literal("0"))
    .correlate(_done)
    .lateral("read")
)

# Caller: complete.py, for results that may not have been written. Running: locked by somebody. Another state under our
# token: written, now or by an earlier try whose reply was lost. Not found: stale. Index: river_job_pkey. No locks.
SELECT_HELD: Final = select(_read.c.id, _read.c.state).select_from(_done.join(_read, true()))
