"""Fetching what is available."""

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Integer,
    Interval,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    cast,
    column,
    extract,
    func,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import array

from sqla_river.rows import EXPIRES_KEY
from sqla_river.statements.words import (
    AVAILABLE,
    CTID,
    KEPT_TOKENS,
    LAST_TOKEN,
    MOMENT,
    NOW,
    RUNNING,
    STATE_TEXT,
    SUSPICIOUS,
    appended,
    array_of,
    discarded_if,
    job,
    literal,
    w,
)
from sqla_river.tables import river_queue, river_runner, river_suspect

_expires: Final = job.c.metadata_.op("->")(literal(f"'{EXPIRES_KEY}'"))
WORK_COLUMNS: Final = (
    job.c.priority,
    # For the order of those that wait: of all its forms the cheapest, and one that infinity has too.
    func.date_part(literal("'epoch'"), job.c.scheduled_at).label("due"),
    job.c.id,
    job.c.queue,
    job.c.kind,
    job.c.attempt,
    job.c.max_attempts,
    cast(job.c.args, Text),
    cast(job.c.metadata_, Text),
    # Compared as jsonb, which never raises, whatever somebody put there. The key is looked for first: to build what it
    # is compared with costs 1 us a row.
    case(
        (
            job.c.metadata_.op("?")(literal(f"'{EXPIRES_KEY}'")),
            and_(func.jsonb_typeof(_expires) == literal("'number'"), _expires < func.to_jsonb(extract("epoch", NOW))),
        )
    ).label("expired"),
)
"""What a slot needs, args and metadata as raw text: 8 columns, before ``due`` and ``expired``, cost 2.1 us a row, where
all 18 cost 5.7.
"""

_asked: Final = (
    func.unnest(array_of("p_queues", Text), array_of("p_slots", Integer))
    .table_valued(column("queue", Text), column("slots", Integer))
    .render_derived(name="q")
)
_asked_since: Final = (
    func.unnest(
        array_of("p_queues", Text),
        array_of("p_slots", Integer),
        *(cast(array_of(f"p_since_{priority}", Text), ARRAY(MOMENT)) for priority in (1, 2, 3, 4)),
    )
    .table_valued(
        column("queue", Text),
        column("slots", Integer),
        *(column(f"since_{priority}", MOMENT) for priority in (1, 2, 3, 4)),
    )
    .render_derived(name="q")
)
_begins: Final = (
    func.unnest(
        array([literal(f"{priority}::smallint") for priority in (1, 2, 3, 4)]),
        array([_asked_since.c[f"since_{priority}"] for priority in (1, 2, 3, 4)]),
    )
    .table_valued(column("priority", SmallInteger), column("since", MOMENT))
    .render_derived(name="b")
)
_may_have_company: Final = or_(
    # Each death took an attempt that nothing gives back: a row on its first attempts needs no look.
    w.c.attempt < SUSPICIOUS,
    ~select(river_suspect.c.job_id)
    .where(river_suspect.c.job_id == w.c.id, river_suspect.c.deaths >= SUSPICIOUS)
    .correlate(w)
    .exists(),
)


def first_free(*conditions: ColumnElement[bool]) -> ColumnElement[Any]:
    """The ctids of the first free rows of each queue asked for that is not paused, locked."""
    found = (
        _free_rows(_asked, *conditions).order_by(w.c.priority, w.c.scheduled_at, w.c.id).correlate(_asked).lateral("j")
    )
    return _of_unpaused(_asked, found)


def _first_free_since() -> ColumnElement[Any]:
    """The same, of each priority from a time of its own on. The nested loops pull lazily: no more rows are locked."""
    row = (
        _free_rows(
            _asked_since, _may_have_company, w.c.priority == _begins.c.priority, w.c.scheduled_at >= _begins.c.since
        )
        .order_by(w.c.scheduled_at, w.c.id)
        .correlate(_asked_since, _begins)
        .lateral("r")
    )
    found = (
        select(row.c.ctid)
        .select_from(_begins.join(row, true()))
        .limit(_asked_since.c.slots)
        .correlate(_asked_since)
        .lateral("j")
    )
    return _of_unpaused(_asked_since, found)


def _free_rows(asked: Any, *conditions: ColumnElement[bool]) -> Any:
    return (
        select(literal("w.ctid").label("ctid"))
        .select_from(w)
        .where(
            w.c.state == AVAILABLE,
            w.c.queue == asked.c.queue,
            w.c.scheduled_at <= NOW,
            w.c.kind == func.any(array_of("p_kinds", Text)),
            *conditions,
        )
        .limit(asked.c.slots)
        .with_for_update(skip_locked=True, of=w)
    )


def _of_unpaused(asked: Any, found: Any) -> ColumnElement[Any]:
    # The paused ones are read once, by this statement's own snapshot; a row missing from river_queue is not paused.
    # Joined, each queue of a runner costs three buffers more.
    paused = select(river_queue.c.name).where(river_queue.c.paused_at.is_not(None))
    unpaused = (
        select(found.c.ctid)
        .select_from(asked.join(found, true()))
        .where(asked.c.queue.op("<>")(func.all(func.array(paused.scalar_subquery()))))
    )
    return func.any(func.array(unpaused.scalar_subquery()))


def take(ctids: ColumnElement[Any]) -> Any:
    """Mark the available ones of *ctids* running under p_token. It decodes nothing and cannot overflow: a poison row
    fails later, alone.
    """
    return (
        update(job)
        .where(CTID.op("=")(ctids), STATE_TEXT == AVAILABLE)
        .values(
            state=RUNNING,
            attempt=literal("least(river_job.attempt::int + 1, 32767)"),
            attempted_at=NOW,
            attempted_by=appended("attempted_by", KEPT_TOKENS, bindparam("p_token", type_=Text)),
        )
        .returning(*WORK_COLUMNS)
    )


# Caller: fetch, once per wake-up, for all queues of a runner. Index: river_job_fetch_idx, one scan per queue; a Tid
# Scan outside (River's CTE joins by id: 1.5 to 1.7 times the cost). Locks: up to the sum of p_slots rows, none waited
# for. Fewer rows than asked does not mean that a queue is empty: a row may change between snapshot and lock. Suspects
# run alone, not here: what RESCUE_STUCK frees is a suspect in the snapshot that first shows it free.
FETCH_AVAILABLE: Final = take(first_free(_may_have_company))

# Caller: fetch, where a scan from the start of a queue was wasteful. Index: river_job_fetch_idx, one scan per queue and
# priority, from the time that SELECT_BOUNDS gave. Locks: as FETCH_AVAILABLE.
FETCH_BOUNDED: Final = take(_first_free_since())

_moment: Final = NOW - cast(bindparam("p_before", type_=Interval), Interval)

# Caller: fetch, after a wasteful scan. How far it came in the last priority of each queue, by the rows that it took
# there; and, for a queue of NULL, a moment before it. As text: Python has no type for all of them. Index:
# river_job_pkey.
SELECT_BOUNDS: Final = union_all(
    select(cast(null(), Text).label("queue"), cast(_moment, Text).label("since")),
    select(job.c.queue, cast(func.least(func.max(job.c.scheduled_at), _moment), Text))
    .where(job.c.id == func.any(array_of("p_ids", BigInteger)))
    .group_by(job.c.queue),
)

_suspects: Final[Any] = (
    select(literal("w.ctid"))
    .select_from(
        river_suspect.join(w, w.c.id == river_suspect.c.job_id).outerjoin(river_queue, river_queue.c.name == w.c.queue)
    )
    .where(
        river_suspect.c.deaths >= SUSPICIOUS,
        w.c.state == AVAILABLE,
        w.c.scheduled_at <= NOW,
        w.c.queue == func.any(array_of("p_queues", Text)),
        w.c.kind == func.any(array_of("p_kinds", Text)),
        river_queue.c.paused_at.is_(None),
    )
    .order_by(w.c.priority, w.c.scheduled_at, w.c.id)
    .limit(literal("1"))
)
_suspect: Final = _suspects.with_for_update(skip_locked=True, of=w)
_taken: Final = take(func.any(func.array(_suspect.scalar_subquery()))).cte("taken")
_marked: Final = (
    update(river_runner)
    .where(river_runner.c.id == bindparam("p_id", type_=Text))
    .values(alone=select(_taken.c.id).scalar_subquery())
    .cte("marked")
)

# Caller: fetch, by the runner whose turn it is, once its slots are empty. The runner's row says which job ran alone,
# should it die. Index: river_suspect_pkey, river_job_pkey. Locks: one row.
FETCH_SUSPECT: Final = select(_taken).add_cte(_marked)

# Caller: fetch, before it lets its slots run empty: whether there is one that it could take. Indexes as
# FETCH_SUSPECT.
COUNT_SUSPECTS: Final = select(func.count()).select_from(_suspects.subquery())

# Caller: fetch, when the job that ran alone has ended, or has shown for a minute that it kills nobody.
CLEAR_ALONE: Final = update(river_runner).where(river_runner.c.id == bindparam("p_id", type_=Text)).values(alone=null())

_holder: Final = job.alias("holder")
_conflicts: Final = (
    select(
        w.c.id,
        or_(
            select(_holder.c.id)
            .where(_holder.c.unique_key == w.c.unique_key, _holder.c.state == RUNNING)
            .correlate(w)
            .exists(),
            func.row_number().over(partition_by=w.c.unique_key, order_by=w.c.id) > literal("1"),
        ).label("taken"),
    )
    .where(
        w.c.state == AVAILABLE,
        w.c.unique_key.is_not(None),
        func.get_bit(w.c.unique_states, literal("7")) == literal("0"),
        func.get_bit(w.c.unique_states, literal("1")) == literal("1"),
    )
    .cte("conflicts")
)

# Caller: fetch, when a fetch would put a unique key there twice: rows with masks that no River writes, which hold
# their key when they run but not while they wait. Those whose key is taken, or that are not the first to want it, are
# discarded. Index: river_job_fetch_idx.
DISCARD_CONFLICTS: Final = (
    update(job)
    .where(job.c.id == _conflicts.c.id, _conflicts.c.taken, STATE_TEXT == AVAILABLE)
    .values(**discarded_if(literal("true")))
)

# Caller: fetch, while the reply to a fetch is lost. Index: river_job_running_idx. No locks: the jobs are the
# runner's own.
SELECT_LOST: Final = select(*WORK_COLUMNS, LAST_TOKEN).where(
    job.c.state == RUNNING,
    LAST_TOKEN.op("=")(func.any(array_of("p_tokens", Text))),
)
