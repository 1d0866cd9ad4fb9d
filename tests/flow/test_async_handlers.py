"""Async handlers: one event loop for all of them, and nothing else on it."""

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from sqla_river import Cancel, JobContext, Snooze, Workers
from sqla_river.aside import MOST
from tests.database import emptied, shared_database
from tests.making import Count, Greet, all_are, count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.working import HOUR, after, begun, errors, handling, nothing, outcome, put, released, settled, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def test_a_thousand_sleeping_jobs_run_at_once(engine: Engine) -> None:
    running: list[int] = []
    together = threading.Event()
    all_in = asyncio.Event()
    threads: set[int] = set()

    async def handler(job: JobContext[Count]) -> None:
        running.append(job.id)
        threads.add(threading.get_ident())
        if len(running) == 1_000:
            together.set()
            all_in.set()
        await all_in.wait()

    make_jobs(engine, 1_000)
    before = threading.active_count()
    with working(engine, handler, 1_000):
        assert together.wait(30)
        assert threading.active_count() - before < 15
        eventually(all_are(engine, "completed", 1_000), 30)

    assert len(threads) == 1


def test_a_handler_that_cancels_its_own_task_and_fails_has_failed(engine: Engine) -> None:
    told: list[str] = []

    async def handler(job: JobContext[Count]) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        if job.args.number:
            raise ValueError("no")

    def on_error(_: JobContext[Any], error: BaseException) -> None:
        told.append(str(error))

    with working(engine, handler, on_error=on_error):
        fails, returns = put(engine, 1, 0)
        assert errors(settled(engine, fails)) == ["ValueError: no"]
        assert settled(engine, returns)["state"] == "completed"

    assert told == ["no"]


def test_no_more_run_than_there_are_slots(engine: Engine) -> None:
    running: list[int] = []
    most: list[int] = []

    async def handler(job: JobContext[Count]) -> None:
        running.append(job.id)
        most.append(len(running))
        await asyncio.sleep(0.02)
        running.remove(job.id)

    make_jobs(engine, 40)
    with working(engine, handler, 5):
        eventually(all_are(engine, "completed", 40))

    assert max(most) == 5


def test_plain_and_async_jobs_share_a_queue_and_its_slots(engine: Engine) -> None:
    running: list[int] = []
    most: list[int] = []
    workers = Workers()

    @workers.register(Count)
    def plain(job: JobContext[Count]) -> None:
        running.append(job.id)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(job.id)

    @workers.register(Greet)
    async def awaited(job: JobContext[Greet]) -> None:
        running.append(job.id)
        most.append(len(running))
        await asyncio.sleep(0.02)
        running.remove(job.id)

    for _ in range(10):
        make_jobs(engine, 2)
        make_jobs(engine, 2, kind="greet", args={"name": "x"})
    with working(engine, workers, 4):
        eventually(all_are(engine, "completed", 40))

    assert max(most) == 4


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")


@pytest.mark.parametrize("colour", ["async", "plain"])
def test_context_variables_of_a_job_are_its_own(engine: Engine, colour: str) -> None:
    seen: list[str] = []

    def plain(job: JobContext[Count]) -> None:
        seen.append(variable.get())
        variable.set(f"job {job.id}")

    async def awaited(job: JobContext[Count]) -> None:
        plain(job)
        await asyncio.sleep(0.001)
        assert variable.get() == f"job {job.id}"
        await asyncio.create_task(asyncio.sleep(0))
        assert variable.get() == f"job {job.id}"

    make_jobs(engine, 300)  # enough for some that are fetched ahead, and follow one in its slot
    with working(engine, awaited if colour == "async" else plain, 2):
        eventually(all_are(engine, "completed", 300))

    assert seen == ["clean"] * 300


class Evil(BaseException):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError(),
        Evil(),
        StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_exception_ends_the_loop_or_costs_a_slot(engine: Engine, error: BaseException) -> None:
    async def handler(job: JobContext[Count]) -> None:
        if job.args.number == 0:
            await asyncio.sleep(0)
            raise error

    put(engine, 0, 1, 2)
    with working(engine, handler, 1):
        eventually(lambda: count_states(engine) == {"retryable": 1, "completed": 2}, what="all of them")

    assert len(errors(read_jobs(engine)[0])) == 1


def test_a_task_of_a_handler_that_exits_does_not_end_the_loop(engine: Engine) -> None:
    async def exits() -> None:
        raise SystemExit(3)

    async def handler(job: JobContext[Count]) -> None:
        task = asyncio.create_task(exits())
        await asyncio.sleep(0.05)
        assert task.done()
        assert isinstance(task.exception(), SystemExit)

    put(engine, 0, 1)
    with working(engine, handler, 1):
        eventually(all_are(engine, "completed", 2))


@pytest.mark.parametrize(("wish", "state"), [(Snooze(HOUR), "scheduled"), (Cancel("enough"), "cancelled")])
@pytest.mark.parametrize("how", ["returned", "raised"])
def test_wishes_of_async_handlers(engine: Engine, wish: Any, state: str, how: str) -> None:
    async def handler(_: JobContext[Count]) -> Any:
        await asyncio.sleep(0)
        if how == "raised":
            raise wish
        return wish

    assert outcome(engine, handler)["state"] == state


def test_a_cancelled_job_gets_cancelled_error(engine: Engine) -> None:
    from sqlalchemy.orm import Session

    from sqla_river import cancel

    seen: list[Any] = []
    started = threading.Event()

    async def handler(job: JobContext[Count]) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(job.cancelled.reason)

    (job_id,) = put(engine, 0)
    with working(engine, handler, heartbeat=timedelta(minutes=5), lease=HOUR):  # no beat tells it so
        assert started.wait(30)
        with Session(engine) as session, session.begin():
            cancel(session, job_id)
        row = eventually(lambda: read_job(engine, job_id) if read_job(engine, job_id)["finalized"] else None)

    assert seen == ["cancel"]
    assert row is not None
    assert row["state"] == "cancelled"


def test_blocking_the_loop_is_reported_by_name_and_leaves_the_heartbeat_alone(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def reported() -> list[str]:
        said = [record.getMessage() for record in caplog.records]
        return [line for line in said if "blocks the event loop" in line]

    def beat() -> Any:
        with engine.connect() as connection:
            return connection.execute(text("SELECT max(heartbeat_at) FROM river_runner")).scalar()

    seen = threading.Event()

    async def blocks_here(job: JobContext[Count]) -> None:
        until = time.monotonic() + 60
        while not seen.is_set() and time.monotonic() < until:
            time.sleep(0.1)  # noqa: ASYNC251 - what must not be done

    (job_id,) = put(engine, 0)
    with working(engine, blocks_here, heartbeat=timedelta(seconds=0.2)):
        eventually(reported, 30)
        for _ in range(5):
            last = beat()
            eventually(lambda: beat() > last, what="a beat")  # noqa: B023
        assert read_job(engine, job_id)["state"] == "running"
        seen.set()
        settled(engine, job_id)

    (said,) = reported()
    assert f"job {job_id} (count) blocks the event loop" in said
    assert "blocks_here" in said


def test_an_object_with_an_async_call_is_async(engine: Engine) -> None:
    class Handler:
        async def __call__(self, job: JobContext[Count]) -> None:
            await asyncio.sleep(0)

    assert outcome(engine, Handler())["state"] == "completed"


def test_the_retry_callable_of_an_async_handler_does_not_run_on_the_loop(engine: Engine) -> None:
    loops: list[int] = []
    asked: list[int] = []

    def retry(job: JobContext[Any]) -> timedelta:
        asked.append(threading.get_ident())
        return HOUR

    async def handler(job: JobContext[Count]) -> None:
        loops.append(threading.get_ident())
        raise ValueError

    row = outcome(engine, handling(handler, retry=retry))

    assert row["state"] == "retryable"
    assert asked[0] != loops[0]


def test_failures_are_judged_though_all_threads_hang_that_handlers_asked_for(engine: Engine) -> None:
    started: list[int] = []
    told: list[str] = []
    with released() as release:

        async def handler(job: JobContext[Count]) -> None:
            if job.args.number:
                raise ValueError("no")
            started.append(job.id)
            await asyncio.to_thread(release.wait, 60)

        def on_error(_: JobContext[Any], error: BaseException) -> None:
            told.append(str(error))

        put(engine, *[0] * 40)
        with working(engine, handler, 50, on_error=on_error):
            eventually(lambda: len(started) == 40, what="all of them")
            (job_id,) = put(engine, 1)
            assert errors(settled(engine, job_id, 10)) == ["ValueError: no"]
            assert told == ["no"]
            assert not release.is_set()
            release.set()


def test_a_few_threads_judge_however_many_fail_at_once(engine: Engine) -> None:
    judging: list[int] = []
    with released() as release:

        async def handler(_: JobContext[Count]) -> None:
            raise ValueError("no")

        def on_error(job: JobContext[Any], _: BaseException) -> None:
            judging.append(job.id)
            release.wait(60)

        make_jobs(engine, 50)
        with working(engine, handling(handler, retry=after(HOUR)), 50, on_error=on_error) as runner:
            begun(runner, 50)
            eventually(lambda: len(judging) == MOST, what="as many as may judge at once")
            release.set()
            eventually(all_are(engine, "retryable", 50))

        assert len(judging) == 50
        eventually(lambda: "sqla_river-judge" not in {each.name for each in threading.enumerate()}, what="their end")


@pytest.mark.usefixtures("engine")
def test_a_runner_without_async_handlers_has_no_loop(engine: Engine) -> None:
    with working(engine, nothing) as runner:
        make_job(engine)
        eventually(all_are(engine, "completed", 1))
        assert runner.id is not None
        assert "sqla_river-loop" not in {thread.name for thread in threading.enumerate()}


def test_logging_names_the_job(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def handler(job: JobContext[Count]) -> None:
        job.log.warning("hello")

    with caplog.at_level(logging.WARNING):
        row = outcome(engine, handler)

    (record,) = [record for record in caplog.records if record.getMessage() == "hello"]
    assert vars(record)["job_id"] == row["id"]
