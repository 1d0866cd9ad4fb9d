"""How many jobs stand where: of the live ones by a bounded look, of the finished ones by what runners counted."""

from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ColumnElement,
    Double,
    Integer,
    Interval,
    MetaData,
    Table,
    Text,
    bindparam,
    case,
    cast,
    column,
    delete,
    extract,
    func,
    or_,
    select,
    true,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import OID
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.rescue import OUR_ID, OWNER
from sqla_river.statements.words import AVAILABLE, MOMENT, NOW, RUNNING, array_of, literal, state, w
from sqla_river.tables import river_counter, river_history, river_leader, river_queue

_present: Final = func.clock_timestamp()  # in a transaction that is open for long, now() is its start
ALL_TIME: Final[ColumnElement[Any]] = literal("'-infinity'::timestamptz")
_most: Final[ColumnElement[Any]] = literal("10001")
"""One more than the index entries that count: whether there are more."""

# ---- live ------------------------------------------------------------------------------------------------------------

_asked: Final = func.unnest(array_of("p_queues", Text)).table_valued(column("queue", Text)).render_derived(name="q")


def _count_of(name: str, *order: ColumnElement[Any]) -> Any:
    """How many rows of a queue are in a state whose index begins with the queue; ordered as that index is, or a plan
    of the empty table might read all of it.
    """
    some = (
        select(literal("1").label("one"))
        .select_from(w)
        .where(w.c.state == state(name), w.c.queue == _asked.c.queue)
        .order_by(*order)
        .limit(_most)
        .correlate(_asked)
        .subquery(f"some_{name}")
    )
    return select(func.count()).select_from(some).scalar_subquery().label(name)


_due: Final = (
    select(w.c.queue, cast(w.c.state, Text).label("state"))
    .where(w.c.state.in_([state("retryable"), state("scheduled")]))
    .order_by(w.c.scheduled_at, w.c.id)
    .limit(_most)
    .cte("due")
)
_running: Final = select(w.c.queue).where(w.c.state == RUNNING).order_by(w.c.id).limit(_most).cte("running")
_priorities: Final = (
    func.unnest(cast(literal("'{1,2,3,4}'"), ARRAY(Integer)))
    .table_valued(column("priority", Integer))
    .render_derived(name="p")
)
_first: Final = (
    select(w.c.scheduled_at)
    .where(w.c.state == AVAILABLE, w.c.queue == _asked.c.queue, w.c.priority == _priorities.c.priority)
    .order_by(w.c.scheduled_at)
    .limit(literal("1"))
    .correlate(_asked, _priorities)
    .lateral("first")
)
_oldest: Final = (
    # Subtracting -infinity would raise.
    select(_present - func.greatest(func.min(_first.c.scheduled_at), _present - literal("interval '100 years'")))
    .select_from(_priorities.join(_first, true()))
    .having(func.count() > literal("0"))
    .correlate(_asked)
    .scalar_subquery()
)


def _of_queue(cte: Any, *conditions: ColumnElement[bool]) -> Any:
    mine = select(func.count()).select_from(cte).where(cte.c.queue == _asked.c.queue, *conditions)
    return mine.correlate(_asked).scalar_subquery()


def _all_of(cte: Any) -> Any:
    return select(func.count()).select_from(cte).scalar_subquery()


# Caller: stats.py. Indexes: river_job_fetch_idx and river_job_pending_idx, by queue; river_job_due_idx and
# river_job_running_idx, which are not by queue: one look for all. At most 10,001 entries of each are read, and one of
# each priority for the oldest; none of a finished job. No locks.
COUNT_LIVE: Final = select(
    _asked.c.queue,
    _count_of("available", w.c.priority, w.c.scheduled_at, w.c.id),
    _count_of("pending", w.c.id),
    _of_queue(_running).label("running"),
    _of_queue(_due, _due.c.state == state("scheduled")).label("scheduled"),
    _of_queue(_due, _due.c.state == state("retryable")).label("retryable"),
    _all_of(_running).label("all_running"),
    _all_of(_due).label("all_due"),
    _oldest.label("oldest"),
).select_from(_asked)


def _queues_in(name: str) -> Any:
    """The queues with jobs in a state whose index begins with the queue: one step each, however many jobs there are."""
    first = select(func.min(w.c.queue).label("queue")).where(w.c.state == state(name))
    walk = first.cte(f"walk_{name}", recursive=True)
    step = select(func.min(w.c.queue)).where(w.c.state == state(name), w.c.queue > walk.c.queue).correlate(walk)
    return walk.union_all(select(step.scalar_subquery()).where(walk.c.queue.is_not(None)))


_named: Final = union(
    *(select(walk.c.queue) for walk in (_queues_in("available"), _queues_in("pending"))),
    select(_due.c.queue),
    select(_running.c.queue),
    select(river_queue.c.name),
    select(river_counter.c.queue),
    select(river_history.c.queue).where(river_history.c.minute == ALL_TIME),
).subquery("named")

# Caller: stats.py: every queue that is known, or has jobs that wait or run. Index: as COUNT_LIVE, and
# river_history_pkey.
SELECT_QUEUE_NAMES: Final = select(_named.c.queue).where(_named.c.queue.is_not(None)).order_by(_named.c.queue)

_catalog: Final = MetaData(schema="pg_catalog")
_class: Final = Table(
    "pg_class", _catalog, Column("relname", Text), Column("relnamespace", OID), Column("reltuples", Double)
)
_namespace: Final = Table("pg_namespace", _catalog, Column("oid", OID), Column("nspname", Text))
_schema: Final = func.coalesce(bindparam("p_schema", type_=Text), func.current_schema())

# Caller: stats.py, when there is more than COUNT_LIVE reads. How many entries each index of river_job has by the last
# VACUUM or ANALYZE. Index: of the catalog.
SELECT_INDEX_SIZES: Final = (
    select(_class.c.relname, cast(func.greatest(_class.c.reltuples, literal("0")), BigInteger))
    .join_from(_class, _namespace, _namespace.c.oid == _class.c.relnamespace)
    .where(_namespace.c.nspname == _schema, func.starts_with(_class.c.relname, literal("'river_job_'")))
)

_tables: Final = Table(
    "pg_stat_all_tables",
    _catalog,
    Column("schemaname", Text),
    Column("relname", Text),
    Column("n_dead_tup", BigInteger),
)
_activity: Final = Table(
    "pg_stat_activity", _catalog, Column("datname", Text), Column("pid", Integer), Column("xact_start", MOMENT)
)
_prepared: Final = Table("pg_prepared_xacts", _catalog, Column("database", Text), Column("prepared", MOMENT))
_none: Final[ColumnElement[Any]] = literal("interval '0'")
_here: Final = func.current_database()

# Caller: duties/figures.py, every 30 s by one runner of the fleet. Reads what the server knows of itself.
SELECT_FIGURES: Final = select(
    func.coalesce(
        select(_tables.c.n_dead_tup)
        .where(_tables.c.schemaname == _schema, _tables.c.relname == literal("'river_job'"))
        .scalar_subquery(),
        literal("0"),
    ).label("dead"),
    func.greatest(
        _none,
        select(func.max(_present - _activity.c.xact_start))
        .where(_activity.c.datname == _here, _activity.c.pid != func.pg_backend_pid())
        .scalar_subquery(),
        select(func.max(_present - _prepared.c.prepared)).where(_prepared.c.database == _here).scalar_subquery(),
    ).label("oldest"),
    func.pg_notification_queue_usage().label("usage"),
)

# ---- finished --------------------------------------------------------------------------------------------------------

_given: Final = (
    func.unnest(array_of("p_queues", Text), array_of("p_states", Text), array_of("p_jobs", BigInteger))
    .table_valued(column("queue", Text), column("state", Text), column("jobs", BigInteger))
    .render_derived(name="given")
)

# Caller: counters.py, with each heartbeat that has something to tell, and at a stop. Index: river_counter_pkey. Locks:
# rows that no other runner touches. A batch whose reply was lost is sent again under its own number and minute, and
# counts once.
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

_window: Final = func.date_trunc(literal("'minute'"), NOW) - literal("interval '5 minutes'")
_zero: Final[ColumnElement[Any]] = literal("0")
_counted: Final = union_all(
    select(
        river_history.c.queue, river_history.c.state, river_history.c.jobs.label("jobs"), _zero.label("lately")
    ).where(river_history.c.minute == ALL_TIME),
    select(river_history.c.queue, river_history.c.state, _zero, river_history.c.jobs).where(
        river_history.c.minute >= _window
    ),
    select(
        river_counter.c.queue,
        river_counter.c.state,
        river_counter.c.jobs,
        case((river_counter.c.minute >= _window, river_counter.c.jobs), else_=_zero),
    ),
).subquery("counted")

# Caller: stats.py. What runners finished: of all time, and in the last five minutes and the one that has begun. Index:
# river_history_pkey; river_counter holds minutes only, and is read whole.
SELECT_COUNTS: Final = (
    select(
        _counted.c.queue,
        _counted.c.state,
        cast(func.sum(_counted.c.jobs), BigInteger).label("jobs"),
        cast(func.sum(_counted.c.lately), BigInteger).label("lately"),
        cast(extract("epoch", _present - _window), Double).label("seconds"),
    )
    .where(_counted.c.queue == func.any(array_of("p_queues", Text)))
    .group_by(_counted.c.queue, _counted.c.state)
)

_since: Final = func.date_trunc(
    literal("'minute'"),
    func.greatest(
        func.coalesce(bindparam("p_since", type_=MOMENT), NOW - cast(bindparam("p_back"), Interval)),
        NOW - literal("interval '7 days'"),
    ),
)
_only: Final = bindparam("p_queue", type_=Text)
_by_minute: Final = union_all(
    *(
        select(table.c.minute, table.c.state, table.c.jobs).where(
            table.c.minute >= _since, or_(_only.is_(None), table.c.queue == _only)
        )
        for table in (river_history, river_counter)
    )
).subquery("by_minute")
_minutes: Final = (
    func.generate_series(_since, NOW, literal("interval '1 minute'"))
    .table_valued(column("minute", MOMENT))
    .render_derived(name="minutes")
)

# Caller: stats.py. Every minute since then, without a gap, with what was finished in it by state. Index:
# river_history_pkey.
SELECT_HISTORY: Final = (
    select(_minutes.c.minute, _by_minute.c.state, cast(func.sum(_by_minute.c.jobs), BigInteger).label("jobs"))
    .select_from(_minutes.outerjoin(_by_minute, _by_minute.c.minute == _minutes.c.minute))
    .group_by(_minutes.c.minute, _by_minute.c.state)
    .order_by(_minutes.c.minute)
)

_c: Final = river_counter.alias("c")
_over: Final[Any] = (
    select(literal("c.ctid"))
    .select_from(_c)
    .where(_c.c.minute < func.date_trunc(literal("'minute'"), NOW) - literal("interval '3 minutes'"))
    .limit(literal("10000"))
    .with_for_update(skip_locked=True, of=_c)
)
_folded: Final = (
    delete(river_counter)
    .where(literal("river_counter.ctid") == func.any(func.array(_over.scalar_subquery())))
    .returning(*river_counter.c)
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
# Indexes: river_history_pkey; river_counter is read whole. Locks: the rows that it takes up, none waited for, then
# those that they add to, in the order of their keys.
FOLD_COUNTS: Final = (
    select(func.count())
    .select_from(_folded)
    .add_cte(_add_up(ALL_TIME, "of_all_time"), _add_up(_folded.c.minute, "of_minutes"))
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
