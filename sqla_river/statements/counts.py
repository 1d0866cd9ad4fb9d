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
    extract,
    func,
    or_,
    select,
    true,
    union,
    union_all,
)
from sqlalchemy.dialects.postgresql import OID

from sqla_river.statements.words import AVAILABLE, MOMENT, NOW, RUNNING, array_of, literal, state, w
from sqla_river.tables import river_counter, river_history, river_queue

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
    # Subtracting an infinity would raise; and what is available ahead of its time is not overdue.
    select(
        _present
        - func.greatest(
            func.least(func.min(_first.c.scheduled_at), _present), _present - literal("interval '100 years'")
        )
    )
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

# Caller: stats.py: every queue that is known, has jobs that wait or run, or ever had one that was finished. Index: as
# COUNT_LIVE, and river_history_pkey.
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
