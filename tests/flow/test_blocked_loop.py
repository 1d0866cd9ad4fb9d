"""Handlers that block the event loop beyond their timeout: the other jobs go on, on another one."""

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from sqla_river import Exponential, JobContext, Workers
from tests.database import emptied, shared_database
from tests.making import Count, Greet, all_are, count_states, eventually, make_job, make_jobs, read_job
from tests.working import HOUR, errors, handling, put, released, settled, working

SHORT: Final = timedelta(seconds=0.1)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may ignore its timeout for 0.2 s, and block its loop for 0.5, not for 10."""
    monkeypatch.setattr("sqla_river.watch.STUCK_AFTER", 0.2)
    monkeypatch.setattr("sqla_river.eventloop.LOST_AFTER", 0.5, raising=False)


def loops_are(count: int) -> None:
    """Wait until so many threads have an event loop; those of other tests may have yet to end."""
    eventually(lambda: sum(each.name == "sqla_river-loop" for each in threading.enumerate()) == count, what="their end")


def test_jobs_go_on_on_another_loop_when_a_handler_blocks_theirs_for_good(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    workers = Workers()
    with released() as release:

        @workers.register(Count, timeout=SHORT, retry=Exponential(HOUR))
        async def blocks_here(job: JobContext[Count]) -> None:
            if not job.args.number:
                release.wait(60)

        @workers.register(Greet)
        def plain(_: JobContext[Greet]) -> None:
            pass

        (job_id,) = put(engine, 0)
        with working(engine, workers, 2) as runner:
            row = settled(engine, job_id)
            put(engine, *range(1, 6))
            make_jobs(engine, 3, kind="greet", args={"name": "x"})
            eventually(lambda: count_states(engine) == {"retryable": 1, "completed": 8}, 20, "all others")
            assert runner.health().ready
            loops_are(2)
            release.set()
            eventually(lambda: runner.stale == 1, what="the late result")
            loops_are(1)
            put(engine, 6)
            eventually(lambda: count_states(engine)["completed"] == 9, what="one more")
        loops_are(0)

    assert errors(row) == ["TimeoutError: the handler ignored its timeout and was given up"]
    assert "blocks_here" in row["all_errors"][0]["trace"]
    assert "the event loop is blocked" in caplog.text


def test_a_loop_that_was_left_ends_what_runs_on_it_when_it_comes_back_and_begins_nothing(engine: Engine) -> None:
    threads: dict[int, int] = {}
    workers = Workers()
    with released() as release:

        @workers.register(Greet)
        async def waits(job: JobContext[Greet]) -> None:
            suspended.set()
            await asyncio.to_thread(release.wait, 60)
            threads[job.id] = threading.get_ident()

        @workers.register(Count, timeout=SHORT, retry=Exponential(HOUR))
        async def count(job: JobContext[Count]) -> None:
            threads[job.id] = threading.get_ident()
            if not job.args.number:
                release.wait(60)

        suspended = threading.Event()
        waiting = make_job(engine, kind="greet", args={"name": "x"})
        with working(engine, workers, 2) as runner:
            assert suspended.wait(30)
            blocks, other = put(engine, 0, 1)
            assert settled(engine, other, 20)["state"] == "completed"
            assert read_job(engine, waiting)["state"] == "running"
            release.set()
            assert settled(engine, waiting)["state"] == "completed"
            eventually(lambda: runner.stale == 1, what="the late result")
            (last,) = put(engine, 2)
            assert settled(engine, last)["state"] == "completed"

    assert threads[waiting] == threads[blocks]
    assert threads[other] == threads[last] != threads[blocks]


def test_who_cannot_hear_of_its_timeout_on_a_blocked_loop_is_given_up_too(engine: Engine) -> None:
    suspended = threading.Event()
    with released() as release:

        async def handler(job: JobContext[Count]) -> None:
            if job.args.number:
                suspended.set()
                await asyncio.sleep(60)
            release.wait(60)

        (hears_nothing,) = put(engine, 1)
        workers = handling(handler, timeout=timedelta(seconds=1), retry=Exponential(HOUR))
        with working(engine, workers, 2) as runner:
            assert suspended.wait(30)
            put(engine, 0)
            eventually(lambda: count_states(engine) == {"retryable": 2}, what="both to be given up")
            assert errors(read_job(engine, hears_nothing)) == [
                "TimeoutError: the handler ignored its timeout and was given up"
            ]
            release.set()
            eventually(lambda: runner.stale == 2, what="the late results")
            loops_are(0)


def test_a_loop_that_is_blocked_for_good_cannot_block_a_stop(engine: Engine) -> None:
    with released() as release:

        async def handler(job: JobContext[Count]) -> None:
            if not job.args.number:
                release.wait(60)

        put(engine, 0)
        workers = handling(handler, timeout=SHORT, retry=Exponential(HOUR))
        with working(engine, workers, 1, stop_timeout=HOUR) as runner:
            eventually(lambda: count_states(engine) == {"retryable": 1}, what="giving up")
            put(engine, 1)
            eventually(lambda: count_states(engine).get("completed") == 1, what="another")
            began = time.monotonic()
            runner.stop()
            took = time.monotonic() - began
            assert not release.is_set()
        release.set()
        loops_are(0)

    assert took < 3


def test_a_new_loop_has_connections_of_its_own(engine: Engine) -> None:
    own = create_async_engine(engine.url)
    own_to_the_loop: list[bool] = []

    @event.listens_for(own.sync_engine, "connect")
    def note(_: object, record: Any) -> None:
        record.info["loop"] = asyncio.get_running_loop()

    @event.listens_for(own.sync_engine, "checkout")
    def look(_: object, record: Any, __: object) -> None:
        own_to_the_loop.append(record.info["loop"] is asyncio.get_running_loop())

    two_connections = asyncio.Event()
    with released() as release:

        async def handler(job: JobContext[Count], session: AsyncSession) -> None:
            await session.execute(text("SELECT 1"))
            if len(own_to_the_loop) == 2:
                two_connections.set()
            await two_connections.wait()
            if not job.args.number:
                release.wait(60)

        workers = handling(handler, transactional=True, timeout=timedelta(seconds=2), retry=Exponential(HOUR))
        put(engine, 1, 2)
        with working(engine, workers, 2, async_engine=own) as runner:
            eventually(all_are(engine, "completed", 2))
            (job_id,) = put(engine, 0)
            row = settled(engine, job_id)
            put(engine, 3)
            eventually(lambda: count_states(engine).get("completed") == 3, 20, "another one")
            release.set()
            eventually(lambda: runner.stale == 1, what="the late result")
            put(engine, 4)
            eventually(lambda: count_states(engine).get("completed") == 4, what="one more")
            loops_are(1)

    assert "in handler" in row["all_errors"][0]["trace"]
    assert own_to_the_loop == [True] * 5
