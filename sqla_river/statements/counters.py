"""What runners have finished, on its way into the sums: told, counted for others, folded, and forgotten."""

from typing import Any, Final

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.counts import ALL_TIME
from sqla_river.statements.rescue import OUR_ID, OWNER
from sqla_river.statements.words import MOMENT, NOW, array_of, literal, state, w
from sqla_river.tables import river_counter, river_history, river_leader

_zero: Final[ColumnElement[Any]] = literal("0")
_given: Final = (
    func.unnest(array_of("p_queues", Text), array_of("p_states", Text), array_of("p_jobs", BigInteger))
    .table_valued(column("queue", Text), column("state", Text), column("jobs", BigInteger))
    .render_derived(name="given")
)

# Caller: counters.py, with each heartbeat that has something to tell, and at a stop. Index: river_counter_pkey. Locks:
# rows that nobody touches but the duty that folds them. A batch whose reply was lost is sent again under its own number
# and minute, and counts once: a runner's last batch leaves its rows behind for a day when it is folded.
ADD_COUNTS: Final = (
    pg_insert(river_counter)
    .from_select(
        ["runner", "minute", "queue", "state", "jobs", "batch"],
        select(
            bindparam("p_id", type_=Text),
            func.date_trunc(literal("'minute'"), bindparam("p_at", type_=MOMENT)),
            _given.c.queue,
            _given.c.state,
            _given.c.jobs,
            bindparam("p_batch", type_=BigInteger),
        ).order_by(_given.c.queue, _given.c.state),
        include_defaults=False,
    )
    .on_conflict_do_update(
        index_elements=["runner", "minute", "queue", "state"],
        set_={
            "jobs": river_counter.c.jobs + literal("excluded.jobs"),
            "batch": literal("excluded.batch"),
        },
        where=river_counter.c.batch < literal("excluded.batch"),
    )
)

_last_minutes: Final = (
    func.generate_series(
        func.date_trunc(literal("'minute'"), NOW) - literal("interval '3 minutes'"), NOW, literal("interval '1 minute'")
    )
    .table_valued(column("minute", MOMENT))
    .render_derived(name="last_minutes")
)
_go_leads: Final = select(literal("1")).select_from(river_leader).where(river_leader.c.expires_at > NOW).exists()


def _ended(name: str, *conditions: ColumnElement[bool]) -> Any:
    """The jobs that came to a state in each of the last minutes through no runner of ours."""
    ended = (
        select(w.c.queue, func.coalesce(OWNER, literal("''")).label("owner"))
        .select_from(w)
        .where(
            w.c.state == state(name),
            w.c.finalized_at >= _last_minutes.c.minute,
            w.c.finalized_at < _last_minutes.c.minute + literal("interval '1 minute'"),
            *conditions,
        )
        .order_by(w.c.finalized_at)
        .limit(literal("10000"))
        .correlate(_last_minutes)
        .lateral(f"ended_{name}")
    )
    return (
        select(_last_minutes.c.minute, ended.c.queue, state(name).label("state"))
        .select_from(_last_minutes.join(ended, true()))
        .where(~ended.c.owner.op("~")(OUR_ID))
    )


_others: Final = union_all(_ended("cancelled"), _ended("discarded"), _ended("completed", _go_leads)).subquery("others")

# Caller: duties/count.py, every minute. What has ended through no runner of ours: worked by Go's clients, or cancelled
# while it waited. Those minutes that are not folded yet are counted anew each time, so a job that commits late is
# counted too, and nothing twice. Of each minute and state the first 10,000 entries are looked at; what is completed,
# only while a Go client leads. Index: river_job_finalized_idx. Locks: rows that only this duty writes, in their order.
COUNT_OTHERS: Final = (
    pg_insert(river_counter)
    .from_select(
        ["runner", "minute", "queue", "state", "jobs", "batch"],
        select(literal("'other'"), *_others.c, func.count(), literal("0")).group_by(*_others.c).order_by(*_others.c),
        include_defaults=False,
    )
    .on_conflict_do_update(
        index_elements=["runner", "minute", "queue", "state"], set_={"jobs": literal("excluded.jobs")}
    )
)


def _key_of(counter: Any) -> tuple[ColumnElement[Any], ...]:
    return counter.c.runner, counter.c.minute, counter.c.queue, counter.c.state


_c: Final = river_counter.alias("c")
_over: Final[CTE] = (
    select(*_key_of(_c), _c.c.jobs)
    .select_from(_c)
    .where(_c.c.minute < func.date_trunc(literal("'minute'"), NOW) - literal("interval '3 minutes'"), _c.c.jobs > _zero)
    .limit(literal("10000"))
    .with_for_update(skip_locked=True, of=_c)
    .cte("over")
)
_folded: Final = (
    update(river_counter)
    .where(*(mine == locked for mine, locked in zip(_key_of(river_counter), _key_of(_over), strict=True)))
    .values(jobs=_zero)
    .returning(*_over.c)
    .cte("folded")
)


def _add_up(minute: ColumnElement[Any], name: str) -> Any:
    total = cast(func.sum(_folded.c.jobs), BigInteger)
    return (
        pg_insert(river_history)
        .from_select(
            ["minute", "queue", "state", "jobs"],
            select(minute, _folded.c.queue, _folded.c.state, total)
            .group_by(minute, _folded.c.queue, _folded.c.state)
            .order_by(minute, _folded.c.queue, _folded.c.state),
            include_defaults=False,
        )
        .on_conflict_do_update(
            index_elements=["minute", "queue", "state"],
            set_={"jobs": river_history.c.jobs + literal("excluded.jobs")},
        )
        .returning(river_history.c.jobs)
        .cte(name)
    )


# Caller: duties/count.py, every minute. Takes up the rows of minutes that are over, of all runners, into one row per
# minute, queue and state, and into the sum of all time; in one statement, so that whoever reads sees each job once.
# They stay with nothing in them, to say which batch of their runner has come. Indexes: river_counter_pkey, of a table
# that is read whole, and river_history_pkey. Locks: the rows that it takes up, none waited for, then those that they
# add to, in the order of their keys.
FOLD_COUNTS: Final = (
    select(func.count())
    .select_from(_folded)
    .add_cte(_add_up(ALL_TIME, "of_all_time"), _add_up(_folded.c.minute, "of_minutes"))
)

_later: Final = river_counter.alias("later")
_spent: Final[Any] = (
    select(literal("c.ctid"))
    .select_from(_c)
    .where(
        _c.c.jobs == _zero,
        or_(
            _c.c.batch == _zero,  # of nobody who sends it again
            _c.c.minute < NOW - literal("interval '1 day'"),
            select(literal("1"))
            .select_from(_later)
            .where(_later.c.runner == _c.c.runner, _later.c.batch > _c.c.batch)
            .correlate(_c)
            .exists(),
        ),
    )
    .limit(literal("10000"))
    .with_for_update(skip_locked=True, of=_c)
)

# Caller: duties/count.py, after it. What was folded goes once its runner has sent another batch, for it sends none
# before the last has come; the last of a runner after a day. Index: river_counter_pkey; river_counter is read whole.
# Locks: the rows that it deletes, none waited for.
DELETE_FOLDED: Final = delete(river_counter).where(
    literal("river_counter.ctid") == func.any(func.array(_spent.scalar_subquery()))
)

_h: Final = river_history.alias("h")
_old: Final[Any] = (
    select(literal("h.ctid"))
    .select_from(_h)
    .where(_h.c.minute > ALL_TIME, _h.c.minute < NOW - literal("interval '7 days'"))
    .limit(literal("10000"))
    .with_for_update(skip_locked=True, of=_h)
)

# Caller: duties/count.py, after it. Minutes stay for a week; the sum of all time keeps what was in them. Index:
# river_history_pkey. Locks: the rows that it deletes, none waited for.
PRUNE_HISTORY: Final = delete(river_history).where(
    literal("river_history.ctid") == func.any(func.array(_old.scalar_subquery()))
)
