"""Jobs that are over in no time are fetched ahead of the slots, and nobody else has to wait for that."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from sqlalchemy import Engine, text

from sqla_river import JobContext, Runner
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually, make_job, make_jobs, read_jobs
from tests.working import SLOW_POLL, handling, nothing, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url, "river_queue", "river_suspect", "river_duty", "river_runner")


def fetches(runner: Runner) -> int:
    assert runner._incarnation is not None
    return runner._incarnation._fetcher._number


def done(engine: Engine, count: int) -> Callable[[], bool]:
    return lambda: count_states(engine).get("completed", 0) >= count


class Sluggish:
    """A handler that has nothing to do for the first jobs, and is then held with each of the others."""

    def __init__(self, quick: int) -> None:
        self._quick = quick
        self.held = Gate()
        self.ran: list[int] = []

    def __call__(self, job: JobContext[Any]) -> None:
        self.ran.append(job.id)
        if len(self.ran) > self._quick:
            self.held(job)


def test_one_fetch_brings_more_jobs_than_there_are_slots_and_they_begin_in_their_order(engine: Engine) -> None:
    make_jobs(engine, 1_000)
    handler = Sluggish(quick=1_000)

    with working(engine, handler, slots=1, poll=SLOW_POLL) as runner:
        eventually(done(engine, 1_000))
        assert fetches(runner) < 500

    assert handler.ran == sorted(handler.ran)
    assert len(set(handler.ran)) == 1_000


def test_what_waits_goes_back_when_jobs_take_longer_than_those_before_them(engine: Engine) -> None:
    make_jobs(engine, 1_500)
    handler = Sluggish(quick=500)

    with working(engine, handler, slots=1, poll=SLOW_POLL) as runner, runner.subscribe("interrupted") as given_back:
        handler.held.wait()
        left = {"completed": 500, "running": 1, "available": 999}
        eventually(lambda: count_states(engine) == left, what="all that wait to be free for others")
        rows = [row for row in read_jobs(engine) if row["state"] == "available"]
        given = given_back.get(timedelta(seconds=30))
        before = fetches(runner)
        with working(engine, nothing, slots=1, poll=SLOW_POLL):
            eventually(done(engine, 1_499))
        assert fetches(runner) == before  # it does not take them again
        handler.held.open()

    assert {(row["attempt"], row["errors"]) for row in rows} == {(0, None)}
    assert given.kind == "interrupted"
    assert count_states(engine) == {"completed": 1_500}


def test_a_stop_gives_back_what_waits_with_its_attempt(engine: Engine) -> None:
    make_jobs(engine, 1_500)
    handler = Sluggish(quick=500)

    with working(engine, handler, slots=1, poll=SLOW_POLL) as runner:
        handler.held.wait()
        runner.stop(timedelta(0))

    assert count_states(engine) == {"completed": 500, "available": 1_000}
    assert {row["attempt"] for row in read_jobs(engine) if row["state"] == "available"} == {0}


def test_nothing_is_fetched_ahead_while_a_job_waits_whose_runner_died(engine: Engine) -> None:
    killer = make_job(engine, queue="elsewhere")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (:id, 1, 0)"), {"id": killer})
    make_jobs(engine, 300)

    with working(engine, nothing, slots=1, poll=SLOW_POLL) as runner:
        eventually(done(engine, 300))
        assert fetches(runner) >= 300


@pytest.mark.parametrize("colour", ["plain", "async", "both"])
def test_no_queue_ever_runs_more_jobs_than_it_has_slots(engine: Engine, colour: str) -> None:
    slots = {"a": 1, "b": 3}
    for queue in slots:
        make_jobs(engine, 600, queue=queue)
        make_jobs(engine, 600, queue=queue, kind="other")
    running, most, lock = Counter[str](), Counter[str](), threading.Lock()

    def enter(job: JobContext[Any], by: int) -> None:
        with lock:
            running[job.queue] += by
            most[job.queue] = max(most[job.queue], running[job.queue])

    def plain(job: JobContext[Any]) -> None:
        enter(job, 1)
        time.sleep(0.0002)
        enter(job, -1)

    async def awaited(job: JobContext[Any]) -> None:
        enter(job, 1)
        await asyncio.sleep(0)
        enter(job, -1)

    class Other(Count):
        kind: ClassVar[str] = "other"

    workers = handling(awaited if colour == "async" else plain)
    workers.register(Other)(plain if colour == "plain" else awaited)
    with working(engine, workers, queues=slots, poll=SLOW_POLL) as runner:
        eventually(done(engine, 2_400))
        assert fetches(runner) < 600

    assert most == slots
