"""What a stop does to async and transactional handlers; test_runner_stop.py has the laws of plain ones."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.orm import Session

import sqla_river
from sqla_river import JobContext, Snooze, Workers
from tests.database import emptied, shared_database
from tests.making import Count, Gate, Greet, all_are, count_states, eventually, make_jobs, read_job, read_jobs
from tests.working import HOUR, begun, errors, handling, put, released, working

ROOT: Final = Path(sqla_river.__file__).parent.parent
NONE: Final = timedelta(0)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def test_async_jobs_may_finish_within_the_stop_timeout(engine: Engine) -> None:
    reasons: list[Any] = []
    may_end = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def handler(job: JobContext[Count]) -> None:
        loops.append(asyncio.get_running_loop())
        await may_end.wait()
        reasons.append(job.cancelled.reason)

    put(engine, *range(3))
    with working(engine, handler) as runner:
        begun(runner, 3)
        incarnation = runner._incarnation
        assert incarnation is not None
        stopping = threading.Thread(target=runner.stop, args=(timedelta(seconds=60),))
        stopping.start()
        eventually(lambda: incarnation.stopping, what="the stop to begin")
        loops[0].call_soon_threadsafe(may_end.set)
        stopping.join(60)

    assert reasons == [None] * 3
    assert count_states(engine) == {"completed": 3}


def test_async_jobs_that_a_stop_interrupts_get_their_attempt_back(engine: Engine) -> None:
    reasons: list[Any] = []

    async def handler(job: JobContext[Count]) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            reasons.append(job.cancelled.reason)

    put(engine, *range(3))
    with working(engine, handler) as runner:
        begun(runner, 3)
        began = time.monotonic()
        runner.stop(NONE)
        took = time.monotonic() - began

    assert took < 2
    assert reasons == ["stop"] * 3
    for row in read_jobs(engine):
        assert (row["state"], row["attempt"], errors(row)) == ("available", 0, [])


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_a_normal_return_after_an_interrupt_is_completed_and_a_wish_is_a_wish(engine: Engine, colour: str) -> None:
    def ended(job: JobContext[Count]) -> Any:
        if job.args.number == 2:
            raise Snooze(HOUR)
        return Snooze(HOUR) if job.args.number else None

    def plain(job: JobContext[Count]) -> Any:
        assert job.cancelled.wait(30)
        return ended(job)

    async def awaited(job: JobContext[Count]) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return ended(job)

    put(engine, 0, 1, 2)
    with working(engine, plain if colour == "plain" else awaited) as runner:
        begun(runner, 3)
        runner.stop(NONE)

    assert [row["state"] for row in read_jobs(engine)] == ["completed", "scheduled", "scheduled"]


def test_an_async_handler_that_swallows_everything_is_left_behind_and_its_job_given_back(engine: Engine) -> None:
    """At most soft + 5 s + 1 s; and nothing is left running."""
    over: list[int] = []

    async def handler(_: JobContext[Count]) -> None:
        while not over:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    put(engine, 0)
    with working(engine, handler) as runner:
        begun(runner, 1)
        began = time.monotonic()
        runner.stop(NONE)
        took = time.monotonic() - began
        over.append(1)

    assert took < 6 + 1
    (row,) = read_jobs(engine)
    assert (row["state"], row["attempt"], errors(row)) == ("available", 0, [])


def test_a_handler_that_blocks_the_loop_cannot_block_a_stop(engine: Engine) -> None:
    with released() as release:

        async def handler(_: JobContext[Count]) -> None:
            release.wait(60)

        put(engine, 0)
        with working(engine, handler) as runner:
            begun(runner, 1)
            began = time.monotonic()
            runner.stop(NONE)
            took = time.monotonic() - began

    assert took < 6 + 1
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_what_waits_behind_a_blocked_loop_goes_back_and_never_begins(engine: Engine) -> None:
    began: list[int] = []
    with released() as release:

        async def handler(job: JobContext[Count]) -> None:
            began.append(job.id)
            release.wait(60)

        first, *_ = put(engine, *range(5))
        with working(engine, handler, 4) as runner:
            begun(runner, 1)
            runner.stop(NONE)
        states = count_states(engine)

    # The thread of the loop, which had gone on to whatever waited, has ended by now.
    assert states == {"available": 5}
    assert began == [first]


def test_effects_of_a_transactional_handler_that_is_left_behind_are_rolled_back(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (words text)"))
    with released() as release:

        def handler(_: JobContext[Count], session: Session) -> None:
            session.execute(text("INSERT INTO note VALUES ('written')"))
            assert release.wait(60)

        (job_id,) = put(engine, 0)
        with working(engine, handling(handler, transactional=True)) as runner:
            begun(runner, 1)
            runner.stop(NONE)

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"]) == ("available", 0)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM note")).all() == []


def test_an_interrupted_transactional_handler_leaves_nothing_and_one_that_returns_all(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (words text)"))

    def handler(job: JobContext[Count], session: Session) -> None:
        session.execute(text("INSERT INTO note VALUES (:number)"), {"number": str(job.args.number)})
        assert job.cancelled.wait(30)
        if job.args.number == 0:
            raise RuntimeError

    put(engine, 0, 1)
    with working(engine, handling(handler, transactional=True)) as runner:
        begun(runner, 2)
        runner.stop(NONE)

    assert [(row["state"], row["attempt"]) for row in read_jobs(engine)] == [("available", 0), ("completed", 1)]
    with engine.connect() as connection:
        assert connection.execute(text("SELECT words FROM note")).scalars().all() == ["1"]


def test_under_load_nothing_is_left_running_whatever_the_colour(engine: Engine) -> None:
    workers = Workers()

    @workers.register(Count)
    def plain(job: JobContext[Count]) -> None:
        job.cancelled.wait(0.01)

    @workers.register(Greet)
    async def awaited(_: JobContext[Greet]) -> None:
        await asyncio.sleep(0.01)

    make_jobs(engine, 1_000)
    make_jobs(engine, 1_000, kind="greet", args={"name": "x"})
    with working(engine, workers, 20) as runner:
        eventually(lambda: count_states(engine).get("completed", 0) > 50, what="some work")
        began = time.monotonic()
        runner.stop(timedelta(seconds=0.005))
        took = time.monotonic() - began

    assert took < 6 + 1
    assert set(count_states(engine)) == {"completed", "available"}
    assert {row["attempt"] for row in read_jobs(engine) if row["state"] == "available"} == {0}


def test_a_runner_that_worked_async_jobs_can_be_started_again(engine: Engine) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))

    own = create_async_engine(engine.url)
    for number in range(1, 4):
        put(engine, number)
        with working(engine, handling(handler, transactional=True), async_engine=own):
            eventually(all_are(engine, "completed", number))

    assert {row["attempt"] for row in read_jobs(engine)} == {1}


def test_the_next_life_meets_no_connection_of_the_last_one_however_long_they_take_to_close(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.util import await_only

    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))
        if len(own_to_the_loop) == 2:
            two_connections.set()
        await two_connections.wait()

    own = create_async_engine(engine.url)
    own_to_the_loop: list[bool] = []
    two_connections = asyncio.Event()
    closing, closed, slow = threading.Event(), threading.Event(), True

    @event.listens_for(own.sync_engine, "connect")
    def note(_: object, record: Any) -> None:
        record.info["loop"] = asyncio.get_running_loop()

    @event.listens_for(own.sync_engine, "checkout")
    def look(_: object, record: Any, __: object) -> None:
        own_to_the_loop.append(record.info["loop"] is asyncio.get_running_loop())

    @event.listens_for(own.sync_engine, "close")
    def wait(_: object, __: object) -> None:
        closing.set()
        while slow:
            await_only(asyncio.sleep(0.01))
        closed.set()

    monkeypatch.setattr("sqla_river.eventloop.CLOSE_TIMEOUT", 60.0, raising=False)
    put(engine, 1, 2)
    with working(engine, handling(handler, transactional=True), async_engine=own):
        eventually(all_are(engine, "completed", 2))
    assert closing.wait(30)
    put(engine, 3)
    with working(engine, handling(handler, transactional=True), async_engine=own):
        eventually(lambda: len(own_to_the_loop) == 3, what="the job of the second life")
        slow = False

    assert own_to_the_loop == [True, True, True]
    assert closed.wait(30)


PROGRAM: Final = """
import asyncio, sys, threading
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

url, manner = sys.argv[1:]
workers = Workers()

@workers.register(Count)
async def work(job):
    print("begun", flush=True)
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            if manner == "polite":
                raise

Runner(create_engine(url), workers, queues={"default": 4}, stop_timeout=timedelta(seconds=60)).run()
print("done", flush=True)
"""


@pytest.mark.parametrize(("manner", "signals"), [("polite", 2), ("deaf", 3)])
def test_each_further_signal_goes_one_step_further_with_async_handlers(
    url: str, engine: Engine, manner: str, signals: int
) -> None:
    put(engine, *range(4))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, manner],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            for _ in range(4):
                assert process.stdout.readline() == "begun\n"
            process.terminate()
            eventually(lambda: _fetchers(engine) == 0, what="the fetch to end")
            began = time.monotonic()
            for number in (signal.SIGINT, signal.SIGTERM)[: signals - 1]:
                process.send_signal(number)
            output, _ = process.communicate(timeout=60)
            took = time.monotonic() - began
        finally:
            watchdog.cancel()
            process.kill()

    assert process.returncode == 0, output
    assert "done\n" in output
    assert took < 4
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def _fetchers(engine: Engine) -> int:
    with engine.connect() as connection:
        found = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE :name"
        )
        return int(connection.execute(text(found), {"name": "sqla\\_river:fetch:%"}).scalar_one())


def _fetch_waits(engine: Engine) -> bool:
    with engine.connect() as connection:
        found = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE :name AND wait_event_type = 'Lock'"
        return bool(connection.execute(text(found), {"name": "sqla\\_river:fetch:%"}).scalar_one())


def test_what_a_fetch_on_its_way_brings_goes_back(engine: Engine) -> None:
    gate = Gate()
    with working(engine, gate, listen=False) as runner:
        incarnation = runner._incarnation
        assert incarnation is not None
        with engine.connect() as holder:
            holder.execute(text("LOCK TABLE river_queue IN ACCESS EXCLUSIVE MODE"))
            put(engine, *range(4))
            eventually(lambda: _fetch_waits(engine), what="the fetch to wait for the lock")
            stopping = threading.Thread(target=runner.stop, args=(NONE,))
            stopping.start()
            eventually(
                lambda: incarnation.executor._interrupted or not stopping.is_alive(), what="the soft phase to end"
            )
        stopping.join(30)

    assert gate.started == []
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}
