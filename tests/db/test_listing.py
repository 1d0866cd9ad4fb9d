"""Pages of jobs: complete, in order, along an index; and the recipes of the README with their plans."""

import asyncio
from collections.abc import Iterator
from typing import Any, Final, cast

import pytest
from sqlalchemy import Engine, Select, create_engine, event, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import Job, JobMixin, JobState, River, create_all, enqueue, list_jobs
from sqla_river import asyncio as awaited
from sqla_river.errors import InvalidOptionError
from sqla_river.listing import Order, page
from sqla_river.models import RiverBase
from tests.database import emptied, shared_database
from tests.jobs import Ping
from tests.making import Plan, make_job, make_jobs

J: Final = JobState
ORDERS: Final[tuple[Order, ...]] = ("id", "scheduled_at", "finalized_at")


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("descending", [True, False])
def test_pages_bring_every_job_once_in_order_whatever_comes_in_between(
    engine: Engine, by: Order, descending: bool
) -> None:
    state, time = (J.COMPLETED, "finalized_at") if by == "finalized_at" else (J.SCHEDULED, "scheduled_at")

    def make_at(at: str, count: int = 3) -> None:
        columns: dict[str, Any] = {time: at}
        make_jobs(engine, count, state=state, **columns)

    times = ["2040-01-01 00:00:00.000001Z", "2040-01-01 00:00:00.000002Z", "2039-01-01Z"]
    for at in times:
        make_at(at)
    make_job(engine, state=J.PENDING, scheduled_at="2040-01-01Z")
    which = Job.state != J.PENDING
    pages: list[list[Job]] = []
    after: str | None = None
    with Session(engine) as session:
        while True:
            found = list_jobs(session, which, by=by, descending=descending, after=after, limit=2)
            pages.append(found.jobs)
            after = found.after
            if after is None:
                break
            make_at("2041-01-01Z" if descending else "2038-01-01Z", 1)

        jobs = [job for jobs in pages for job in jobs][:9]
        keys = [(0 if by == "id" else getattr(job, by), job.id) for job in jobs]
        assert keys == sorted(keys, reverse=descending)
        assert sorted(job.id for job in jobs) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        assert [len(each) for each in pages[:4]] == [2, 2, 2, 2]


def test_a_last_page_that_is_full_says_that_there_are_no_more(engine: Engine) -> None:
    make_jobs(engine, 4)
    with Session(engine) as session:
        first = list_jobs(session, limit=2)
        last = list_jobs(session, limit=2, after=first.after)

    assert ([job.id for job in first.jobs], [job.id for job in last.jobs]) == ([4, 3], [2, 1])
    assert last.after is None
    assert first.after is not None


def pages_of(session: Session, which: Any, limit: int = 2, **words: Any) -> Iterator[list[int]]:
    """The ids of page after page."""
    after: str | None = None
    while True:
        found = list_jobs(session, which, limit=limit, after=after, **words)
        yield [job.id for job in found.jobs]
        if (after := found.after) is None:
            return


@pytest.mark.parametrize("given", [{"limit": 1}, {"offset": 2}, {"fetch": 1}, {"limit": 1, "offset": 1}], ids=str)
def test_the_order_limit_and_offset_of_the_choice_give_way_and_its_joins_stay(
    engine: Engine, given: dict[str, int]
) -> None:
    make_jobs(engine, 3, queue="mail")
    make_job(engine)
    names = select(Job.queue).where(Job.queue == "mail").distinct().subquery()
    which = select(Job).join(names, names.c.queue == Job.queue).order_by(Job.id)
    plain = select(Job).where(Job.queue == "mail").order_by(Job.id)
    for name, count in given.items():
        which, plain = getattr(which, name)(count), getattr(plain, name)(count)
    with Session(engine) as session:
        assert list(pages_of(session, which)) == list(pages_of(session, plain)) == [[3, 2], [1]]


@pytest.mark.parametrize("by", ORDERS)
def test_a_job_comes_once_however_often_a_join_brings_it(engine: Engine, by: Order) -> None:
    state = J.COMPLETED if by == "finalized_at" else J.SCHEDULED
    make_jobs(engine, 5, state=state)
    times = func.generate_series(1, 3).table_valued("n").render_derived()
    several = times.c.n < Job.id + 2
    joined = select(Job).join(times, several)
    with Session(engine) as session:
        for which in (joined, joined.add_columns(times.c.n), select(Job).where(several), joined.distinct()):
            assert list(pages_of(session, which, by=by)) == [[5, 4], [3, 2], [1]]
        often = joined.group_by(Job.id).having(func.count() > 1)
        assert list(pages_of(session, often, by=by, limit=3)) == [[5, 4, 3], [2, 1]]


def test_pages_go_on_where_they_ended_beside_stale_and_changed_objects(engine: Engine) -> None:
    make_jobs(engine, 5, state=J.RUNNING)
    with Session(engine, autoflush=False) as session:
        held = session.scalars(select(Job).order_by(Job.id)).all()
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET state = 'completed', finalized_at = now()"))
        held[3].queue = "changed"
        found = list(pages_of(session, Job.state == J.COMPLETED, by="finalized_at"))

        assert found == [[5, 4], [3, 2], [1]]
        assert held[3] in session.dirty
        assert held[3].queue == "changed"


@pytest.mark.parametrize(
    "words",
    [
        {"by": "kind"},
        {"limit": 0},
        {"limit": 10_001},
        {"limit": True},
        {"after": "nonsense"},
        {"after": "W10"},
        {"after": 7},
        {"which": 7},
        {"which": True},
    ],
    ids=str,
)
def test_what_makes_no_page_is_refused_by_name(engine: Engine, words: dict[str, Any]) -> None:
    with Session(engine) as session, pytest.raises(InvalidOptionError) as caught:
        list_jobs(session, **words)

    assert caught.value.option in words


def test_a_cursor_goes_on_in_its_own_order_only(engine: Engine) -> None:
    make_jobs(engine, 3)
    with Session(engine) as session:
        after = list_jobs(session, limit=1).after
        for words in ({"descending": False}, {"by": "scheduled_at"}):
            with pytest.raises(InvalidOptionError, match="cursor"):
                list_jobs(session, after=after, **cast("Any", words))


class Mine(JobMixin, RiverBase):
    __river_schema__ = "jobs"


def test_every_kind_of_session_will_do_and_a_schema_of_its_own(empty_url: str) -> None:
    engine = create_engine(empty_url)
    create_all(engine)
    create_all(engine, "jobs")
    mine = River(job_class=Mine)
    with Session(engine) as session, session.begin():
        enqueue(session, Ping(1))
        mine.enqueue(session, Ping(2))
        (job,) = mine.list_jobs(session, select(Mine)).jobs
        assert (type(job), job.args, job in session) == (Mine, {"n": 2}, True)
    with engine.connect() as connection:
        (one,) = list_jobs(connection, Job.kind == "ping").jobs
        assert (type(one), one.args) == (Job, {"n": 1})

    async def run() -> list[Job]:
        own = create_async_engine(empty_url)
        async with AsyncSession(own) as session:
            found = await awaited.list_jobs(session, by="id", limit=1)
        await own.dispose()
        return found.jobs

    assert [job.args for job in asyncio.run(run())] == [{"n": 1}]
    engine.dispose()


# ---- plans -----------------------------------------------------------------------------------------------------------

FILL: Final = """
    INSERT INTO river_job (kind, queue, args, tags, state, scheduled_at, finalized_at, priority)
    SELECT CASE WHEN n % 3000 = 7 THEN 'rare' ELSE 'kind_' || n % 50 END,
           CASE WHEN n % 3000 = 8 THEN 'rare' ELSE 'queue_' || n % 20 END, jsonb_build_object('order_id', n),
           CASE WHEN n % 1000 = 0 THEN '{vip}' ELSE '{plain}' END::varchar[], s::river_job_state,
           now() + n * interval '1 second',
           CASE WHEN s IN ('completed', 'discarded') THEN now() - n * interval '1 second' END, n % 4 + 1
    FROM generate_series(1, 30000) n,
         LATERAL (SELECT CASE WHEN n % 100 > 5 THEN 'completed' ELSE
             (ARRAY['available', 'scheduled', 'retryable', 'running', 'pending', 'discarded'])[n % 100 + 1] END) _(s)
"""


@pytest.fixture(scope="module")
def filled(server: str, template: str) -> Iterator[Engine]:
    """30,000 jobs, nearly all of them finished."""
    for url in shared_database(server, template):
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.execute(text(FILL))
            connection.execute(text("ANALYZE river_job"))
        yield engine
        engine.dispose()


def plan_of(engine: Engine, statement: Select[Any], own_index: str | None = None) -> Plan:
    """How PostgreSQL runs *statement*, sent as a session sends it; with *own_index*, if it is said."""
    with engine.connect() as connection:
        if own_index is not None:
            connection.exec_driver_sql(f"CREATE INDEX mine ON river_job {own_index}")
            connection.exec_driver_sql("ANALYZE river_job")

        def explained(_conn: Any, _cursor: Any, sql: str, parameters: Any, *_rest: Any) -> Any:
            return f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", parameters

        event.listen(connection, "before_cursor_execute", explained, retval=True)
        cursor: Any = connection.execute(statement).cursor
        answer = cursor.fetchone()[0]
        connection.rollback()
    return Plan(answer[0]["Plan"])


def condition(which: Any, by: Order = "id", *, descending: bool = True, after: str | None = None) -> Select[Any]:
    return page(which, Job, by=by, descending=descending, after=after, limit=50)


LIVE: Final = {
    "running": (condition(Job.state == J.RUNNING), "river_job_running_idx"),
    "pending in a queue": (
        condition((Job.state == J.PENDING) & (Job.queue == "queue_4"), descending=False),
        "river_job_pending_idx",
    ),
    "waiting, soonest first": (condition(None, "scheduled_at", descending=False), "river_job_due_idx"),
    "waiting, latest first": (condition(Job.kind == "kind_2", "scheduled_at"), "river_job_due_idx"),
    "discarded, latest first": (condition(Job.state == J.DISCARDED, "finalized_at"), "river_job_finalized_idx"),
    "next in a queue": (
        select(Job)
        .where(Job.state == J.AVAILABLE, Job.queue == "queue_0")
        .order_by(Job.priority, Job.scheduled_at, Job.id)
        .limit(50),
        "river_job_fetch_idx",
    ),
    "the newest of all": (condition(None), "river_job_pkey"),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_recipe_with_an_index_reads_a_page_and_not_the_table(filled: Engine, name: str) -> None:
    statement, index = LIVE[name]
    plan = plan_of(filled, statement)

    assert plan.indexes == {index}, plan
    assert plan.buffers < 450, (plan, plan.buffers)  # of some 900 pages; 300 jobs match at most


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("descending", [True, False])
def test_a_page_far_on_costs_no_more_than_the_first(filled: Engine, by: Order, descending: bool) -> None:
    which = Job.state == J.COMPLETED if by == "finalized_at" else None
    after: str | None = None
    with Session(filled) as session:
        for _ in range(2):
            limit = 250 if by == "scheduled_at" else 5_000
            found = list_jobs(session, which, by=by, descending=descending, after=after, limit=limit)
            after = found.after
        assert after is not None
    plan = plan_of(filled, condition(which, by, descending=descending, after=after))

    assert len(plan.indexes) == 1, plan
    assert "Sort" not in plan.types, plan
    assert plan.removed("Filter") < 10, plan
    assert plan.buffers < 60, plan.buffers


OWN: Final = {
    "kind": (condition(Job.kind == "rare"), "(kind, id)"),
    "queue": (condition(Job.queue == "rare"), "(queue, id)"),
    "tag": (condition(Job.tags.contains(["vip"])), "USING gin (tags)"),
    "args": (condition(Job.args.contains({"order_id": 4711})), "USING gin (args jsonb_path_ops)"),
}


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_that_wants_an_index_of_its_own_uses_it(filled: Engine, name: str) -> None:
    statement, own_index = OWN[name]
    without, with_it = plan_of(filled, statement), plan_of(filled, statement, own_index)

    assert with_it.indexes == {"mine"}, with_it
    assert without.indexes <= {"river_job_pkey"}, without
    assert without.removed("Filter") > 500, without
    assert with_it.buffers < without.buffers
