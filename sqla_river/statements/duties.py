"""The statements of the duties: claiming them, freeing the jobs of dead runners, and taking away what is over."""

from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Delete,
    Double,
    Interval,
    Text,
    and_,
    bindparam,
    case,
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

from sqla_river.statements.words import (
    AVAILABLE,
    CANCEL_ASKED,
    CTID,
    KEPT_ERRORS,
    LET_GO,
    METADATA,
    MOMENT,
    NOW,
    RUNNING,
    STARTED_AT,
    STATE_TEXT,
    SUSPICIOUS,
    appended,
    array_of,
    holds_key,
    job,
    literal,
    notification,
    state,
    w,
    would_take_key,
)
from sqla_river.tables import river_duty, river_queue, river_runner, river_suspect

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
# that is due further ahead than it can be was postponed before the database's clock was set back.
CLAIM_DUTY: Final = (
    update(river_duty)
    .where(
        river_duty.c.name == _name,
        or_(
            river_duty.c.due_at <= NOW,
            river_duty.c.due_at > NOW + func.greatest(_every, literal("interval '5 minutes'")),
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

# ---- rescue ----------------------------------------------------------------------------------------------------------

OUR_ID: Final[ColumnElement[Any]] = literal("'^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$'")
"""The shape of a runner's id: what stands before the slash of a token. Go's clients name themselves otherwise."""
GO_PATIENCE: Final[ColumnElement[Any]] = literal("interval '1 hour'")
"""After which River rescues a job of a client that has no lease."""
DEATHS_ALONE: Final[ColumnElement[Any]] = literal("3")
"""Deaths of its runner while it ran alone there, at which a job is discarded."""

_owner: Final = func.split_part(literal("w.attempted_by[cardinality(w.attempted_by)]"), literal("'/'"), literal("1"))
_is_ours: Final = func.coalesce(_owner, literal("''")).op("~")(OUR_ID)

# Caller: duties/rescue.py, before RESCUE_STUCK. An owner of our shape without a row (lost with a failover, or deleted
# by hand) gets one that is fresh now, and the ordinary rule does the rest. Index: river_job_running_idx.
INSERT_LOST_RUNNERS: Final = (
    pg_insert(river_runner)
    .from_select(
        ["id", "version"],
        select(_owner, literal("'lost'"))
        .select_from(w)
        .where(
            w.c.state == RUNNING,
            _is_ours,
            ~select(river_runner.c.id).where(river_runner.c.id == _owner).correlate(w).exists(),
        )
        .distinct()
        .order_by(_owner),
        include_defaults=False,
    )
    .on_conflict_do_nothing()
)

# Caller: duties/rescue.py, before RESCUE_STUCK. A heartbeat from the future was written before the database's clock was
# set back: without this the runner, should it be dead, would live until then.
RESET_AHEAD: Final = (
    update(river_runner).where(river_runner.c.heartbeat_at > NOW + river_runner.c.lease).values(heartbeat_at=NOW)
)

_entitled: Final = bindparam("p_until", type_=MOMENT) >= NOW
_dead: Final = (
    select(river_runner.c.id, river_runner.c.alone)
    .where(river_runner.c.heartbeat_at < NOW - river_runner.c.lease, _entitled)
    .order_by(river_runner.c.id)
    .with_for_update(skip_locked=True)
    .cte("dead")
)
_silent: Final = func.coalesce(w.c.attempted_at, w.c.created_at) < NOW - GO_PATIENCE
_stuck: Final = (
    select(w.c.id, w.c.unique_key, would_take_key(w).label("takes"), _dead.c.id.label("owner"), _dead.c.alone)
    .select_from(w.outerjoin(_dead, _dead.c.id == _owner))
    .where(w.c.state == RUNNING, or_(_dead.c.id.is_not(None), and_(~_is_ours, _silent)), _entitled)
    .order_by(w.c.id)
    .limit(literal("1000"))
    .with_for_update(skip_locked=True, of=w)
    .cte("stuck")
)
_counted: Final = (
    pg_insert(river_suspect)
    .from_select(
        ["job_id", "deaths", "alone"],
        select(
            _stuck.c.id,
            literal("1"),
            case((_stuck.c.alone == _stuck.c.id, literal("1")), else_=literal("0")),
        )
        .where(_stuck.c.owner.is_not(None))
        .order_by(_stuck.c.id),
        include_defaults=False,
    )
    .on_conflict_do_update(
        index_elements=["job_id"],
        set_={
            "deaths": river_suspect.c.deaths + literal("1"),
            "alone": river_suspect.c.alone + literal("excluded.alone"),
        },
    )
    .returning(river_suspect.c.job_id, river_suspect.c.deaths, river_suspect.c.alone)
    .cte("counted")
)
_holder: Final = job.alias("holder")
_sentence: Final = (
    select(
        _stuck.c.id,
        _stuck.c.owner,
        _counted.c.deaths,
        _counted.c.alone,
        and_(
            _stuck.c.takes,
            or_(
                select(_holder.c.id)
                .where(holds_key(_holder, _stuck.c.unique_key), _holder.c.id != _stuck.c.id)
                .correlate(_stuck)
                .exists(),
                func.row_number().over(partition_by=_stuck.c.unique_key, order_by=_stuck.c.id) > literal("1"),
            ),
        ).label("taken"),
    )
    .select_from(_stuck.outerjoin(_counted, _counted.c.job_id == _stuck.c.id))
    .cte("sentence")
)
_taken: Final = func.coalesce(_sentence.c.taken, literal("false"))
_poison: Final = func.coalesce(_sentence.c.alone, literal("0")) >= DEATHS_ALONE
_suspect: Final = func.coalesce(_sentence.c.deaths, literal("0")) >= SUSPICIOUS
_rescued_to: Final = case(
    (CANCEL_ASKED, state("cancelled")),
    (or_(_poison, _taken, job.c.attempt >= job.c.max_attempts), state("discarded")),
    else_=AVAILABLE,
)
_why: Final = case(
    (
        _poison,
        literal("'rescued: its runner died ' || sentence.alone || ' times while this job ran alone in it; discarded'"),
    ),
    (_taken, literal("'rescued: another job holds its unique key by now; discarded'")),
    (_sentence.c.owner.is_(None), literal("'rescued: no word of it for an hour'")),
    else_=literal("'rescued: the lease of runner ' || sentence.owner || ' ran out'"),
)
_rescues: Final[ColumnElement[Any]] = literal(
    "jsonb_build_object('river:rescue_count', "
    "CASE WHEN jsonb_typeof(river_job.metadata->'river:rescue_count') = 'number' "
    "THEN (river_job.metadata->>'river:rescue_count')::numeric ELSE 0 END + 1)"
)
_error: Final = func.jsonb_build_object(
    literal("'at'"),
    STARTED_AT,
    literal("'attempt'"),
    job.c.attempt,
    literal("'error'"),
    _why,
    literal("'trace'"),
    literal("''"),
)
_rescued: Final = (
    update(job)
    .where(job.c.id == _sentence.c.id, STATE_TEXT == RUNNING)
    .values(
        state=cast(_rescued_to, job.c.state.type),
        finalized_at=case((_rescued_to != AVAILABLE, NOW)),
        scheduled_at=case((_rescued_to == AVAILABLE, NOW), else_=job.c.scheduled_at),
        errors=appended("errors", KEPT_ERRORS, _error),
        metadata_=METADATA.op("||")(_rescues),
        unique_states=case((_taken, LET_GO), else_=job.c.unique_states),
    )
    .returning(
        job.c.id,
        job.c.queue,
        job.c.kind,
        STATE_TEXT.label("state"),
        _suspect.label("suspect"),
        _sentence.c.owner.is_not(None).label("ours"),
    )
    .cte("rescued")
)
_told: Final = (
    select(
        notification(
            "river_insert",
            literal("""'{"queue": '""")
            + cast(func.to_json(_rescued.c.queue), Text)
            + case(
                (func.bool_or(_rescued.c.suspect), literal("""', "suspects": true}'""")),
                else_=literal("""', "deaths": true}'"""),
            ),
        ).label("said")
    )
    .where(_rescued.c.state == AVAILABLE)
    .group_by(_rescued.c.queue)
    .cte("told")
)

# Caller: duties/rescue.py, every 5 s by one runner of the fleet, again while it finds 1,000. Indexes:
# river_runner_pkey, river_job_running_idx. Locks: the rows of dead runners, then jobs in id order; none waited for. The
# runner's row is locked, so an owner that comes back while its jobs are being freed renews its row after that, and then
# reads that they are lost. One statement: state, owner and lease hold for the very rows that change (a read followed by
# a write resurrects jobs that complete in between). A rescued attempt counts, and is noted as an error in River's
# shape. `told` is selected, or PostgreSQL would never call it.
RESCUE_STUCK: Final = select(
    _rescued.c.id,
    _rescued.c.queue,
    _rescued.c.kind,
    _rescued.c.state,
    _rescued.c.suspect,
    _rescued.c.ours,
    select(func.count(_told.c.said)).scalar_subquery(),
)

_s: Final = river_suspect.alias("s")
_cleared: Final[Any] = (
    select(literal("s.ctid"))
    .select_from(_s)
    .where(~select(w.c.id).where(w.c.id == _s.c.job_id, w.c.finalized_at.is_(None)).correlate(_s).exists())
    .with_for_update(skip_locked=True, of=_s)
)

# Caller: duties/rescue.py, after it. What has finished is no suspect any more. Index: river_job_pkey. Locks: none
# waited for.
DELETE_CLEARED: Final = delete(river_suspect).where(
    literal("river_suspect.ctid") == func.any(func.array(_cleared.scalar_subquery()))
)

# ---- prune, clean ----------------------------------------------------------------------------------------------------


def _prune(name: str) -> Delete:
    age = cast(bindparam("p_age"), Interval)
    only, others = bindparam("p_queue", type_=Text), array_of("p_others", Text)
    over: Any = (
        select(literal("w.ctid"))
        .select_from(w)
        .where(
            w.c.state == state(name),
            w.c.finalized_at < NOW - age,
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


# Caller: duties/prune.py, 1,000 rows at a time. Index: river_job_finalized_idx. Locks: the rows it deletes, none waited
# for. State and horizon are tested again in the outer WHERE: a row that somebody retries between the read and the
# delete stays.
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
    ~select(w.c.id).where(w.c.state == RUNNING, _owner == river_runner.c.id).correlate(river_runner).exists(),
)
