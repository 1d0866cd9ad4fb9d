"""What queue_stats counts, by which plan, and what it says where there is too much to count."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session

from sqla_river import JobMixin, QueueStats, River, create_all, ddl, enqueue, queue_stats, stats, stats_history
from sqla_river.asyncio import queue_stats as queue_stats_awaited
from sqla_river.errors import AsyncSessionError, InvalidOptionError
from sqla_river.statements import COUNT_LIVE, SELECT_QUEUE_NAMES
from sqla_river.states import JobState
from tests.database import emptied, shared_database
from tests.making import Count, Plan, explain, make_jobs

FINISHED = frozenset({"completed", "failed", "cancelled", "discarded", "throughput", "failures"})

LIVE = {"river_job_fetch_idx", "river_job_pending_idx", "river_job_running_idx", "river_job_due_idx"}
JOB_INDEXES = {*ddl.INDEXES, ddl.ARBITER, "river_job_pkey"}


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    for engine in emptied(shared):
        yield engine
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE river_counter, river_history, river_queue"))


def look(engine: Engine, queue: str = "default") -> QueueStats:
    with Session(engine) as session:
        return queue_stats(session, queue)


def count(
    where: Engine | Connection, state: str, jobs: int, ago: str = "0 s", queue: str = "default", runner: str = "r"
) -> None:
    """A row as a runner writes it."""
    if isinstance(where, Engine):
        with where.begin() as connection:
            return count(connection, state, jobs, ago, queue, runner)
    where.execute(
        text(
            "INSERT INTO river_counter (runner, minute, queue, state, jobs) VALUES "
            "(:runner, date_trunc('minute', now() - CAST(:ago AS interval)), :queue, :state, :jobs)"
        ),
        {"runner": runner, "ago": ago, "queue": queue, "state": state, "jobs": jobs},
    )
    return None


# ---- the figures ----------------------------------------------------------------------------------------------------


def test_what_waits_and_runs_is_counted_and_the_oldest_is_the_first_due_of_any_priority(engine: Engine) -> None:
    make_jobs(engine, 2, due_in=timedelta(seconds=-10))
    make_jobs(engine, 1, due_in=timedelta(hours=-1), priority=4)
    make_jobs(engine, 1, queue="mail", due_in=timedelta(days=-1))
    for state, jobs in (("pending", 4), ("running", 5), ("scheduled", 6), ("retryable", 7), ("completed", 9)):
        make_jobs(engine, jobs, state=state)
        make_jobs(engine, 1, state=state, queue="mail")

    found = look(engine)

    assert found.queue == "default"
    assert (found.pending, found.running, found.completed, found.failed) == (7, 5, 0, 0)
    assert found.by_state == {
        JobState.AVAILABLE: 3,
        JobState.PENDING: 4,
        JobState.RUNNING: 5,
        JobState.SCHEDULED: 6,
        JobState.RETRYABLE: 7,
        **dict.fromkeys((JobState.COMPLETED, JobState.CANCELLED, JobState.DISCARDED), 0),
    }
    assert found.oldest_available is not None
    assert timedelta(hours=1) <= found.oldest_available < timedelta(hours=2)
    assert found.estimated == FINISHED


def test_an_unknown_queue_is_empty_and_a_name_that_river_does_not_take_is_refused(engine: Engine) -> None:
    found = look(engine, "nobody-heard-of-it")

    assert (found.pending, found.running, found.completed, found.oldest_available) == (0, 0, 0, None)
    with Session(engine) as session:
        with pytest.raises(InvalidOptionError, match="queue must be"):
            queue_stats(session, "No Such Queue")
        assert session.execute(text("SELECT 1")).scalar() == 1


def test_a_job_due_since_minus_infinity_is_old_and_no_error(engine: Engine) -> None:
    make_jobs(engine, 1, scheduled_at="-infinity")

    oldest = look(engine).oldest_available
    assert oldest is not None
    assert oldest > timedelta(days=36_000)


@pytest.mark.parametrize("at", ["infinity", "20000-01-01", "2100-01-01"])
def test_an_available_job_far_ahead_is_not_old_and_no_error(engine: Engine, at: str) -> None:
    make_jobs(engine, 1, scheduled_at=at)

    assert (look(engine).pending, look(engine).oldest_available) == (1, timedelta(0))


def test_jobs_of_the_callers_own_transaction_are_seen(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue(session, Count(1))
        inside = queue_stats(session, "default")
        session.rollback()

    assert (inside.pending, look(engine).pending) == (1, 0)


def test_what_is_finished_is_the_sum_of_all_runners_and_of_all_time(engine: Engine) -> None:
    count(engine, "completed", 10, runner="a")
    count(engine, "completed", 5, runner="b")
    count(engine, "retryable", 4)
    count(engine, "discarded", 2, "4 minutes")
    count(engine, "completed", 7, queue="mail")
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_history VALUES ('-infinity', 'default', 'completed', 1000), "
                "('-infinity', 'default', 'cancelled', 3), "
                "(date_trunc('minute', now()) - interval '3 minutes', 'default', 'completed', 45)"
            )
        )

    found = look(engine)

    assert (found.completed, found.failed) == (1_015, 2)
    assert found.by_state[JobState.CANCELLED] == 3
    assert found.by_state[JobState.RETRYABLE] == 0
    assert 60 / 361 <= found.throughput <= 60 / 300  # 10, 5 and 45, over the last five to six minutes
    assert 6 / 361 <= found.failures <= 6 / 300


def test_tables_in_a_schema_of_their_own(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Job(JobMixin, Base):
        __river_schema__ = "apart"

    river = River(job_class=Job)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA apart"))
        create_all(connection, "apart")
        connection.execute(
            text("INSERT INTO apart.river_job (kind, args) SELECT 'k', '{}' FROM generate_series(1, 10050)")
        )
        connection.execute(text("ANALYZE apart.river_job"))
    try:
        with Session(engine) as session:
            river.enqueue(session, Count(1))
            found = river.queue_stats(session, "default")
            river.stats_history(session, "default", timedelta(minutes=1))
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA apart CASCADE"))

    assert found.pending == 10_050
    assert look(engine).pending == 0


async def _look_awaited(url: str) -> QueueStats:
    engine = create_async_engine(url)
    async with AsyncSession(engine) as session:
        with pytest.raises(AsyncSessionError):
            queue_stats(session, "default")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        found = await queue_stats_awaited(session, "default")
    await engine.dispose()
    return found


def test_awaited_it_is_the_same(engine: Engine, shared: str) -> None:
    import asyncio

    make_jobs(engine, 3)

    assert asyncio.run(_look_awaited(shared)).pending == 3


# ---- history --------------------------------------------------------------------------------------------------------


def test_history_has_every_minute_and_adds_runners_and_folded_rows(engine: Engine) -> None:
    with engine.begin() as connection:  # of one minute, all of them
        count(connection, "completed", 2, "1 minute", runner="a")
        count(connection, "completed", 3, "1 minute", runner="b")
        count(connection, "retryable", 4, "3 minutes")
        count(connection, "completed", 8, "3 minutes", queue="mail")
        connection.execute(
            text(
                "INSERT INTO river_history VALUES ('-infinity', 'default', 'completed', 1000), "
                "(date_trunc('minute', now()) - interval '1 minute', 'default', 'completed', 5), "
                "(date_trunc('minute', now()) - interval '3 minutes', 'default', 'discarded', 1), "
                "(date_trunc('minute', now()) - interval '9 minutes', 'default', 'completed', 77)"
            )
        )
        now = connection.execute(text("SELECT now()")).scalar_one()

    with Session(engine) as session:
        mine = stats_history(session, "default", timedelta(minutes=5))
        whole = stats_history(session, None, now - timedelta(minutes=5))

    starts = [minute.minute for minute in mine]
    assert starts == [starts[0] + timedelta(minutes=each) for each in range(6)]
    assert all(start.tzinfo is UTC and start.second == 0 for start in starts)
    by_age = {round((starts[-1] - minute.minute).total_seconds() / 60): minute for minute in mine}
    late = 0 if now.astimezone(UTC).replace(second=0, microsecond=0) == starts[-1] else 1  # a minute began meanwhile
    assert by_age[1 + late].completed == 10
    assert by_age[3 + late].failed == 1
    assert by_age[3 + late].by_state == {
        JobState.COMPLETED: 0,
        JobState.CANCELLED: 0,
        JobState.DISCARDED: 1,
        JobState.RETRYABLE: 4,
    }
    assert sum(minute.completed for minute in mine) == 10
    assert sum(minute.completed for minute in whole) == 18


def test_history_goes_back_a_week_and_refuses_a_time_without_a_zone(engine: Engine) -> None:
    with Session(engine) as session:
        week = stats_history(session, "default", timedelta(days=400))
        with pytest.raises(InvalidOptionError, match="since must be aware"):
            stats_history(session, "default", datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point

    assert len(week) == 7 * 24 * 60 + 1


# ---- many -----------------------------------------------------------------------------------------------------------


def test_more_than_10000_are_estimated_and_named(engine: Engine) -> None:
    make_jobs(engine, 10_500)
    make_jobs(engine, 300, queue="mail")
    make_jobs(engine, 9_000, state="scheduled", due_in=timedelta(hours=1))
    make_jobs(engine, 3_000, state="scheduled", due_in=timedelta(hours=2), queue="mail")
    with engine.begin() as connection:
        before = queue_stats(connection, "default")
        connection.execute(text("ANALYZE river_job"))
        default, mail = queue_stats(connection, "default"), queue_stats(connection, "mail")

    assert before.by_state[JobState.AVAILABLE] >= 10_000  # nothing is known of the index yet
    assert default.by_state[JobState.AVAILABLE] == 10_500  # what the index holds, without the 300 that were counted
    assert default.pending == 10_500
    assert mail.by_state[JobState.AVAILABLE] == 300
    assert default.by_state[JobState.SCHEDULED] == pytest.approx(9_000 / 10_001 * 12_000, abs=2)
    assert default.estimated - FINISHED == {"available", "pending", "scheduled", "retryable"}
    assert mail.estimated - FINISHED == {"scheduled", "retryable"}


def test_all_queues_are_found_wherever_their_jobs_stand(engine: Engine) -> None:
    for state in ("available", "pending", "running", "scheduled"):
        make_jobs(engine, 2, state=state, queue=f"with-{state}")
    make_jobs(engine, 1, queue="with-another")
    count(engine, "completed", 1, queue="counted")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_queue (name) VALUES ('worked')"))
        connection.execute(text("INSERT INTO river_history VALUES ('-infinity', 'long-ago', 'completed', 1)"))
        found = stats.all_stats(connection, None)

    assert [each.queue for each in found] == [
        "counted",
        "long-ago",
        "with-another",
        "with-available",
        "with-pending",
        "with-running",
        "with-scheduled",
        "worked",
    ]


# ---- plans ----------------------------------------------------------------------------------------------------------


def _fill(engine: Engine, finished: int) -> None:
    """A table of which nearly all is finished, as it is after months of work."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_job (kind, args, state, finalized_at) SELECT 'k', '{}', 'completed', now() "
                "FROM generate_series(1, :finished)"
            ),
            {"finished": finished},
        )
    for state in ("available", "pending", "running", "scheduled", "retryable"):
        make_jobs(engine, 200, state=state)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))


def _explained(connection: Connection, mode: Literal["generic", "custom"]) -> list[Plan]:
    asked: list[tuple[Any, dict[str, Any]]] = [(COUNT_LIVE, {"p_queues": ["default"]}), (SELECT_QUEUE_NAMES, {})]
    return [explain(connection, None, each, given, plan=mode, settings={}) for each, given in asked]


def _check_plans(engine: Engine) -> None:
    with engine.connect() as connection:
        plans = [plan for mode in ("generic", "custom") for plan in _explained(connection, mode)]
    for plan in plans:
        assert plan.indexes & JOB_INDEXES <= LIVE, plan
        assert not any("Seq Scan" in node["Node Type"] for node in plan.scans("river_job")), plan
        assert not any(node.get("Rows Removed by Filter") for node in plan.scans("river_job")), plan
        assert plan.buffers < 1_500, plan


def test_no_finished_row_is_read(engine: Engine) -> None:
    _fill(engine, 30_000)

    _check_plans(engine)


@pytest.mark.slow
def test_no_finished_row_of_ten_millions_is_read(engine: Engine) -> None:
    _fill(engine, 10_000_000)

    _check_plans(engine)


def test_a_look_at_a_long_backlog_ends_after_10001_entries(engine: Engine) -> None:
    make_jobs(engine, 25_000)
    make_jobs(engine, 25_000, state="retryable", due_in=timedelta(hours=1))
    with engine.begin() as connection:
        connection.execute(text("ANALYZE river_job"))
        (plan, _) = _explained(connection, "generic")

    assert max(node["Actual Rows"] for node in plan.scans("river_job")) == 10_001
