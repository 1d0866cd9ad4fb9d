"""The statements of rescue: the jobs of dead runners are freed, and those that a living one lost sight of."""

from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Select,
    Text,
    all_,
    and_,
    bindparam,
    case,
    cast,
    column,
    delete,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.words import (
    AVAILABLE,
    CANCEL_ASKED,
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
    cannot_take_key,
    fence,
    job,
    literal,
    notification,
    state,
    w,
    would_take_key,
)
from sqla_river.tables import river_runner, river_suspect

OUR_ID: Final[ColumnElement[Any]] = literal("'^[A-Za-z0-9_-]{1,60}:[0-9]+:[0-9a-f]{16}$'")
"""The shape of a runner's id: what stands before the slash of a token. Go's clients name themselves otherwise."""
GO_PATIENCE: Final[ColumnElement[Any]] = literal("interval '1 hour'")
"""After which River rescues a job of a client that has no lease."""
DEATHS_ALONE: Final[ColumnElement[Any]] = literal("3")
"""Deaths of its runner while it ran alone there, at which a job is discarded."""

OWNER: Final = func.split_part(literal("w.attempted_by[cardinality(w.attempted_by)]"), literal("'/'"), literal("1"))
_is_ours: Final = func.coalesce(OWNER, literal("''")).op("~")(OUR_ID)
_not_refused: Final = w.c.id != all_(bindparam("p_refused", [], type_=ARRAY(BigInteger)))

# Caller: duties/rescue.py, before RESCUE_STUCK. An owner of our shape without a row (lost with a failover, or deleted
# by hand) gets one that is fresh now, and the ordinary rule does the rest. Index: river_job_running_idx. The CASE keeps
# the planner from reading more of a refused row, which may be damaged, than its id.
INSERT_LOST_RUNNERS: Final = (
    pg_insert(river_runner)
    .from_select(
        ["id", "version"],
        select(OWNER, literal("'lost'"))
        .select_from(w)
        .where(
            w.c.state == RUNNING,
            case((_not_refused, _is_ours)),
            ~select(river_runner.c.id).where(river_runner.c.id == OWNER).correlate(w).exists(),
        )
        .distinct()
        .order_by(OWNER),
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
_tell: Final = bindparam("p_tell", True, type_=Boolean)


def _stuck(which: ColumnElement[bool]) -> CTE:
    """Those of *which* that run, and whose owner is dead."""
    return (
        select(w.c.id, w.c.unique_key, would_take_key(w).label("takes"), _dead.c.id.label("owner"), _dead.c.alone)
        .select_from(w.outerjoin(_dead, _dead.c.id == OWNER))
        .where(w.c.state == RUNNING, or_(_dead.c.id.is_not(None), and_(~_is_ours, _silent)), _entitled, which)
        .order_by(w.c.id)
        .limit(literal("1000"))
        .with_for_update(skip_locked=True, of=w)
        .cte("stuck")
    )


_rescues: Final[ColumnElement[Any]] = literal(
    "jsonb_build_object('river:rescue_count', "
    "CASE WHEN jsonb_typeof(river_job.metadata->'river:rescue_count') = 'number' "
    "THEN (river_job.metadata->>'river:rescue_count')::numeric ELSE 0 END + 1)"
)


def _rescue(stuck: CTE, why: ColumnElement[Any], ours: Callable[[CTE], ColumnElement[Any]]) -> Select[Any]:
    """Free the jobs of *stuck*, which are locked: a death is counted where a runner is named that died of it.

    A rescued attempt counts, and is noted as an error in River's shape. `told` is selected, or PostgreSQL would never
    call it. Without `p_tell` nobody is notified: with a full queue of notifications every commit that notifies fails.
    """
    counted = (
        pg_insert(river_suspect)
        .from_select(
            ["job_id", "deaths", "alone"],
            select(
                stuck.c.id,
                literal("1"),
                case((stuck.c.alone == stuck.c.id, literal("1")), else_=literal("0")),
            )
            .where(stuck.c.owner.is_not(None))
            .order_by(stuck.c.id),
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
    sentence = (
        select(
            stuck.c.id,
            stuck.c.owner,
            counted.c.deaths,
            counted.c.alone,
            cannot_take_key(stuck).label("taken"),
        )
        .select_from(stuck.outerjoin(counted, counted.c.job_id == stuck.c.id))
        .cte("sentence")
    )
    taken = func.coalesce(sentence.c.taken, literal("false"))
    poison = func.coalesce(sentence.c.alone, literal("0")) >= DEATHS_ALONE
    suspect = func.coalesce(sentence.c.deaths, literal("0")) >= SUSPICIOUS
    to = case(
        (CANCEL_ASKED, state("cancelled")),
        (or_(poison, taken, job.c.attempt >= job.c.max_attempts), state("discarded")),
        else_=AVAILABLE,
    )
    said = case(
        (
            poison,
            literal(
                "'rescued: its runner died ' || sentence.alone || ' times while this job ran alone in it; discarded'"
            ),
        ),
        (taken, literal("'rescued: another job holds its unique key by now; discarded'")),
        (sentence.c.owner.is_(None), why),
        else_=literal("'rescued: the lease of runner ' || sentence.owner || ' ran out'"),
    )
    error = func.jsonb_build_object(
        literal("'at'"),
        STARTED_AT,
        literal("'attempt'"),
        job.c.attempt,
        literal("'error'"),
        said,
        literal("'trace'"),
        literal("''"),
    )
    rescued = (
        update(job)
        .where(job.c.id == sentence.c.id, STATE_TEXT == RUNNING)
        .values(
            state=cast(to, job.c.state.type),
            finalized_at=case((to != AVAILABLE, NOW)),
            scheduled_at=case((to == AVAILABLE, NOW), else_=job.c.scheduled_at),
            errors=appended("errors", KEPT_ERRORS, error),
            metadata_=METADATA.op("||")(_rescues),
            unique_states=case((taken, LET_GO), else_=job.c.unique_states),
        )
        .returning(
            job.c.id,
            job.c.queue,
            job.c.kind,
            STATE_TEXT.label("state"),
            suspect.label("suspect"),
            ours(sentence).label("ours"),
        )
        .cte("rescued")
    )
    told = (
        select(
            notification(
                "river_insert",
                literal("""'{"queue": '""")
                + cast(func.to_json(rescued.c.queue), Text)
                + case(
                    (func.bool_or(rescued.c.suspect), literal("""', "suspects": true}'""")),
                    else_=literal("""', "deaths": true}'"""),
                ),
            ).label("said")
        )
        .where(rescued.c.state == AVAILABLE, _tell)
        .group_by(rescued.c.queue)
        .cte("told")
    )
    return select(*rescued.c, select(func.count(told.c.said)).scalar_subquery())


def _rescue_stuck(which: ColumnElement[bool]) -> Select[Any]:
    return _rescue(
        _stuck(which),
        literal("'rescued: no word of it for an hour'"),
        lambda sentence: sentence.c.owner.is_not(None),
    )


# Caller: duties/rescue.py, every 5 s by one runner of the fleet, again while it finds 1,000. Indexes:
# river_runner_pkey, river_job_running_idx. Locks: the rows of dead runners, then jobs in id order; none waited for. The
# runner's row is locked, so an owner that comes back while its jobs are being freed renews its row after that, and then
# reads that they are lost. One statement: state, owner and lease hold for the very rows that change (a read followed by
# a write resurrects jobs that complete in between). p_refused are those that were refused when they stood alone.
RESCUE_STUCK: Final = _rescue_stuck(_not_refused)

# Caller: duties/rescue.py, after RESCUE_STUCK was refused, for the jobs p_ids, at most 1,000. The same otherwise; a
# statement of its own, for a plan of its own.
RESCUE_STUCK_AMONG: Final = _rescue_stuck(w.c.id == func.any(array_of("p_ids", BigInteger)))

# Caller: duties/rescue.py, before RESCUE_STUCK_AMONG: running jobs, whoever's, 1,000 at a time. It reads nothing of a
# row but its id, which is in the index, so that it goes past a damaged row. Index: river_job_running_idx. Locks: none.
SELECT_RUNNING: Final = (
    select(w.c.id)
    .where(w.c.state == RUNNING, w.c.id > bindparam("p_after", type_=BigInteger), _not_refused)
    .order_by(w.c.id)
    .limit(literal("1000"))
)

_given: Final = (
    func.unnest(array_of("p_ids", BigInteger), array_of("p_tokens", Text))
    .table_valued(column("id", BigInteger), column("token", Text))
    .render_derived(name="given")
)
_fenced: Final = (
    select(w.c.id, w.c.unique_key, would_take_key(w).label("takes"))
    .select_from(w)
    .where(w.c.id == _given.c.id, fence(w, _given.c.token))
    .with_for_update(skip_locked=True, of=w)
    .correlate(_given)
    .lateral("fenced")
)
_strays: Final = (
    select(*_fenced.c, literal("NULL::text").label("owner"), literal("NULL::bigint").label("alone"))
    .select_from(_given.join(_fenced, true()))
    .cte("strays")
)

# Caller: heartbeat.py, for jobs that it has missed for a whole beat: they run by the table, under a token of this
# runner, which holds them no more. No runner died, so no job is blamed. Index: river_job_pkey. Locks: in the order of
# p_ids, which are sorted; none waited for: what somebody holds is still there at the next beat.
RESCUE_STRAYS: Final = _rescue(
    _strays, literal("'rescued: its runner lives, and holds it no more'"), lambda _: literal("true")
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
