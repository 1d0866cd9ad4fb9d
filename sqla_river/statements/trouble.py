"""Looking for what will be trouble soon."""

from typing import Any, Final

from sqlalchemy import (
    Integer,
    Interval,
    Text,
    bindparam,
    cast,
    column,
    func,
    select,
    text,
    true,
    union_all,
)

from sqla_river.statements.words import AVAILABLE, NOW, array_of, job, literal, w

_age: Final = cast(bindparam("p_age", type_=Interval), Interval)

# Caller: duties/trouble.py, once a minute, by one runner. Index: none; the server's own list of its connections, of
# this database. What another role does is seen only by members of pg_read_all_stats.
SELECT_OLD_TRANSACTIONS: Final[Any] = (
    union_all(
        select(
            literal("'pid ' || a.pid").label("who"),
            literal("concat_ws(', ', a.usename, nullif(a.application_name, ''), a.state)").label("what"),
            cast(NOW - literal("a.xact_start"), Interval).label("age"),
        )
        .select_from(text("pg_stat_activity a"))
        .where(
            literal("a.datname") == func.current_database(),
            literal("a.backend_type") == literal("'client backend'"),
            literal("a.xact_start") < NOW - _age,
        ),
        select(
            literal("'prepared transaction ' || quote_literal(p.gid)"),
            literal("p.owner::text"),
            cast(NOW - literal("p.prepared"), Interval),
        )
        .select_from(text("pg_prepared_xacts p"))
        .where(literal("p.database") == func.current_database(), literal("p.prepared") < NOW - _age),
    )
    .order_by(literal("3 DESC"))
    .limit(literal("3"))
)

_waiting: Final = (
    select(job.c.queue).where(job.c.state == AVAILABLE).limit(bindparam("p_most", type_=Integer)).subquery("waiting")
)

# Caller: duties/trouble.py, once a minute, by one runner. Index: river_job_fetch_idx, p_most of its entries at most.
COUNT_BACKLOGS: Final = (
    select(_waiting.c.queue, func.count().label("jobs"))
    .group_by(_waiting.c.queue)
    .having(func.count() > bindparam("p_over", type_=Integer))
    .order_by(_waiting.c.queue)
)

_asked: Final = func.unnest(array_of("p_queues", Text)).table_valued(column("name", Text)).render_derived(name="asked")
_lanes: Final = (
    func.generate_series(literal("1"), literal("4"))
    .table_valued(column("priority", Integer))
    .render_derived(name="lanes")
)
_oldest: Final = (
    select(w.c.kind.label("kind"))
    .where(
        w.c.state == AVAILABLE,
        w.c.queue == _asked.c.name,
        w.c.priority == _lanes.c.priority,
        w.c.scheduled_at < NOW - _age,
    )
    .order_by(w.c.scheduled_at, w.c.id)
    .limit(literal("250"))
    .correlate(_asked, _lanes)
    .lateral("oldest")
)

# Caller: duties/trouble.py, once a minute, by one runner at a time, about its own queues. Index: river_job_fetch_idx:
# the 250 oldest entries of each queue and priority, and their rows. Jobs of unknown kinds gather there.
SELECT_STRANGERS: Final[Any] = (
    select(_oldest.c.kind, func.count().label("jobs"))
    .select_from(_asked.join(_lanes, true()).join(_oldest, true()))
    .where(_oldest.c.kind != func.all(array_of("p_kinds", Text)))
    .group_by(_oldest.c.kind)
    .order_by(literal("2 DESC"), _oldest.c.kind)
    .limit(literal("20"))
)
