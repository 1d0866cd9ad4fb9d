"""Timeouts: what a handler is told, and what becomes of one that does not listen."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

import sqla_river
from sqla_river import Exponential, JobContext, Workers
from sqla_river.health import Health
from tests.database import emptied, shared_database
from tests.making import Count, Gate, Greet, all_are, count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.working import HOUR, SLOW_POLL, errors, handling, outcome, put, released, settled, working

ROOT: Final = Path(sqla_river.__file__).parent.parent
SHORT: Final = timedelta(seconds=0.1)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler may ignore its timeout for 0.2 s, not for 10."""
    monkeypatch.setattr("sqla_river.watch.STUCK_AFTER", 0.2)


def _waits(release: threading.Event, _: JobContext[Any]) -> None:
    release.wait(60)


def test_the_workers_timeout_goes_before_the_runners(engine: Engine) -> None:
    reasons: dict[str, Any] = {}
    workers = Workers()

    @workers.register(Count, timeout=SHORT)
    def short(job: JobContext[Count]) -> None:
        job.cancelled.wait(30)
        reasons["short"] = job.cancelled.reason

    @workers.register(Greet, timeout=HOUR)
    def long(job: JobContext[Greet]) -> None:
        assert not job.cancelled.wait(0.5)
        reasons["long"] = job.cancelled.reason

    make_job(engine)
    make_job(engine, kind="greet", args={"name": "x"})
    with working(engine, workers, timeout=timedelta(seconds=0.2)):
        eventually(all_are(engine, "completed", 2))

    assert reasons == {"short": "timeout", "long": None}


def test_the_clock_runs_from_the_start_of_the_handler(engine: Engine) -> None:
    """What a job waited for its slot is not its own time."""
    seen: list[bool] = []

    def handler(job: JobContext[Count]) -> None:
        seen.append(job.cancelled.wait(0.6))

    put(engine, *range(4))
    with working(engine, handling(handler, timeout=timedelta(seconds=1.8)), 1):
        eventually(all_are(engine, "completed", 4))

    assert seen == [False] * 4


def test_an_error_after_the_timeout_fails_the_attempt_by_the_workers_policy(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> None:
        assert job.cancelled.wait(30)
        raise RuntimeError("gave up")

    row = outcome(engine, handling(handler, timeout=SHORT, retry=Exponential(HOUR)))

    assert (row["state"], errors(row)) == ("retryable", ["RuntimeError: gave up"])
    assert timedelta(minutes=59) < row["delay"] <= HOUR


@pytest.mark.parametrize("most", [1, 25])
def test_a_handler_that_ignores_its_timeout_is_given_up(
    engine: Engine, impatient: None, caplog: pytest.LogCaptureFixture, most: int
) -> None:
    job_id = make_job(engine, max_attempts=most)
    with released() as release:

        def hangs_here(job: JobContext[Count]) -> None:
            job.metadata["step"] = 1
            assert release.wait(60)

        with working(engine, handling(hangs_here, timeout=SHORT, retry=Exponential(HOUR)), 1) as runner:
            row = settled(engine, job_id)
            release.set()
            eventually(lambda: runner.stale == 1, what="the late result")

    assert row["state"] == ("retryable" if most > 1 else "discarded")
    assert errors(row) == ["TimeoutError: the handler ignored its timeout and was given up"]
    assert "hangs_here" in row["all_errors"][0]["trace"]
    assert row["metadata"] == {"step": 1}
    if most > 1:
        assert timedelta(minutes=59) < row["delay"] <= HOUR
    assert read_job(engine, job_id)["state"] == row["state"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert f"job {job_id} (count) ignores its timeout" in said
    assert "hangs_here" in said


def test_the_slot_of_a_handler_that_hangs_is_replaced(engine: Engine, impatient: None) -> None:
    gate = Gate(opened=True)
    with released() as release:
        workers = Workers()
        workers.register(Count, timeout=SHORT, retry=Exponential(HOUR))(partial(_waits, release))
        workers.register(Greet)(gate)
        put(engine, 0)
        with working(engine, workers, 1):
            eventually(lambda: count_states(engine) == {"retryable": 1}, what="giving up")
            make_jobs(engine, 3, kind="greet", args={"name": "x"})
            gate.wait(3)
            eventually(lambda: count_states(engine).get("completed") == 3, what="the others")


def test_a_handler_that_was_given_up_does_not_disturb_the_next_attempt(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run in one runner: the late end of the first takes nothing away from the second."""
    monkeypatch.setattr("sqla_river.watch.STUCK_AFTER", 1.0)  # within which the second has to end by itself
    reasons: list[Any] = []
    second = threading.Event()
    with released() as release:

        def handler(job: JobContext[Count]) -> None:
            if job.attempt == 1:
                assert release.wait(60)
                return
            second.set()
            assert not job.cancelled.wait(0.1)
            release.set()
            job.cancelled.wait(30)
            reasons.append(job.cancelled.reason)

        (job_id,) = put(engine, 0)
        workers = handling(handler, timeout=timedelta(seconds=1), retry=Exponential(timedelta(0)))
        with working(engine, workers, 2) as runner:
            assert second.wait(30)
            eventually(all_are(engine, "completed", 1))
            eventually(lambda: runner.stale == 1, what="the late end of the first")

    assert reasons == ["timeout"]
    row = read_job(engine, job_id)
    assert (row["attempt"], len(errors(row))) == (2, 1)


def test_a_handler_that_hangs_is_given_up_though_its_job_was_fetched_again_here(
    engine: Engine, impatient: None
) -> None:
    started = threading.Event()
    with released() as release:

        def handler(job: JobContext[Count]) -> None:
            if job.attempt == 1:
                started.set()
                assert release.wait(60)

        put(engine, 0)
        workers = handling(handler, timeout=timedelta(seconds=1.5))
        with working(engine, workers, 2, poll=timedelta(seconds=0.05)) as runner:
            assert started.wait(30)
            with engine.begin() as connection:  # somebody took its runner for dead
                connection.execute(text("UPDATE river_job SET state = 'available'"))
            eventually(all_are(engine, "completed", 1))
            eventually(lambda: runner.stale == 1, 10, "the first to be given up")
            assert runner._incarnation is not None
            assert len(runner._incarnation._held) == 0
            assert not release.is_set()


def test_effects_of_a_transactional_handler_that_was_given_up_are_rolled_back(engine: Engine, impatient: None) -> None:
    from sqlalchemy.orm import Session

    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE note (words text)"))
    with released() as release:

        def handler(job: JobContext[Count], session: Session) -> None:
            session.execute(text("INSERT INTO note VALUES ('written')"))
            assert release.wait(60)

        (job_id,) = put(engine, 0)
        workers = handling(handler, transactional=True, timeout=SHORT, retry=Exponential(HOUR))
        with working(engine, workers, 1) as runner:
            settled(engine, job_id)
            release.set()
            eventually(lambda: runner.stale == 1, what="the late result")

    with engine.connect() as connection:
        assert connection.execute(text("SELECT * FROM note")).all() == []
    assert read_job(engine, job_id)["state"] == "retryable"


def test_a_handler_that_hangs_cannot_block_a_stop(engine: Engine, impatient: None) -> None:
    with released() as release:
        put(engine, 0)
        workers = handling(partial(_waits, release), timeout=SHORT, retry=Exponential(HOUR))
        with working(engine, workers, 1, stop_timeout=HOUR) as runner:
            eventually(lambda: count_states(engine) == {"retryable": 1}, what="giving up")
            began = time.monotonic()
            runner.stop()
            took = time.monotonic() - began

    assert took < 3


HANGING: Final = """
import logging, sys, threading
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Exponential, Runner, Workers, watch
from tests.making import Count

logging.basicConfig(level=logging.INFO)
watch.STUCK_AFTER = 0.2
workers = Workers()

@workers.register(Count, timeout=timedelta(seconds=0.1), retry=Exponential(timedelta(hours=1)))
def hang(job):
    threading.Event().wait()

Runner(create_engine(sys.argv[1]), workers, queues={"default": 2}).run()
"""


def hanging(url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", HANGING, url],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_as_many_handlers_may_hang_as_there_are_slots_and_then_the_process_ends(url: str, engine: Engine) -> None:
    put(engine, *range(2))
    with hanging(url) as process:
        try:
            eventually(lambda: count_states(engine) == {"retryable": 2}, 60, "two given up")
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)  # it works on, with fresh slots
            put(engine, 3)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()

    assert process.returncode not in (0, -signal.SIGKILL), output
    assert "too many handlers hang" in output
    assert count_states(engine) == {"retryable": 3}
    assert {row["attempt"] for row in read_jobs(engine)} == {1}


@pytest.mark.parametrize("how", ["they end", "there are more slots"])
def test_nothing_is_fetched_while_more_handlers_hang_than_there_are_slots(
    engine: Engine, impatient: None, how: str
) -> None:
    with released() as release:

        def handler(job: JobContext[Count]) -> None:
            if not job.args.number:
                assert release.wait(60)

        put(engine, 0, 0, 0)
        workers = handling(handler, timeout=SHORT, retry=Exponential(HOUR))
        with working(engine, workers, 2, poll=SLOW_POLL) as runner:
            eventually(lambda: not runner.health().ready, what="it to be noticed")
            assert runner.health() == Health(True, False, ("more handlers hang than there are slots",))
            (job_id,) = put(engine, 1)
            stations = runner._incarnation
            assert stations is not None
            eventually(lambda: "default" in stations._fetcher._hungry, what="the fetch to be woken")
            assert read_job(engine, job_id)["state"] == "available"
            if how == "they end":
                release.set()
            else:
                runner.queues["default"] = 3
            assert settled(engine, job_id)["state"] == "completed"
            assert runner.health() == Health(True, True, ())


# ---- async


def test_an_async_handler_gets_cancelled_error(engine: Engine) -> None:
    seen: list[Any] = []

    async def handler(job: JobContext[Count]) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append(job.cancelled.reason)
            raise

    row = outcome(engine, handling(handler, timeout=SHORT, retry=Exponential(HOUR)))

    assert seen == ["timeout"]
    assert (row["state"], errors(row)) == (
        "retryable",
        ["TimeoutError: the handler was cancelled, it was over its timeout"],
    )


def test_an_async_handler_that_returns_after_its_timeout_has_completed(engine: Engine) -> None:
    async def handler(_: JobContext[Count]) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    assert outcome(engine, handling(handler, timeout=SHORT))["state"] == "completed"


def test_an_async_handler_that_swallows_its_timeout_is_given_up(
    engine: Engine, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    over: list[int] = []

    async def swallows(_: JobContext[Count]) -> None:
        while not over:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    (job_id,) = put(engine, 0)
    with working(engine, handling(swallows, timeout=SHORT, retry=Exponential(HOUR)), 1) as runner:
        row = settled(engine, job_id)
        over.append(1)
        eventually(lambda: runner.stale == 1, what="the late result")

    assert (row["state"], errors(row)) == (
        "retryable",
        ["TimeoutError: the handler ignored its timeout and was given up"],
    )
    assert "swallows" in row["all_errors"][0]["trace"]


# ---- in brief -----------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["worker", "runner"])
def test_a_timeout_is_told_to_the_handler(engine: Engine, whose: str) -> None:
    gate = Gate()
    timeout = timedelta(milliseconds=100)
    job_id = make_job(engine)

    workers = handling(gate, timeout=timeout if whose == "worker" else None, retry=Exponential(HOUR))
    with working(engine, workers, timeout=timeout if whose == "runner" else None):
        eventually(lambda: read_job(engine, job_id)["state"] == "retryable", what="the timeout")

    assert gate.reasons == ["timeout"]
    assert read_job(engine, job_id)["attempt"] == 1


def test_a_handler_that_returns_after_its_timeout_has_completed(engine: Engine) -> None:
    reasons: list[Any] = []

    def handler(job: JobContext[Count]) -> None:
        assert job.cancelled.reason is None
        assert job.cancelled.wait(30)
        reasons.append(job.cancelled.reason)

    row = outcome(engine, handler, timeout=timedelta(seconds=1))  # not over before the first line

    assert reasons == ["timeout"]
    assert row["state"] == "completed"


def test_timeouts_are_kept_in_their_order(engine: Engine) -> None:
    ended: list[int] = []

    workers = Workers()

    @workers.register(Count, timeout=timedelta(seconds=2))
    def slow(job: JobContext[Count]) -> None:
        job.cancelled.wait(30)
        ended.append(1)

    @workers.register(Greet, timeout=timedelta(seconds=0.1))
    def quick(job: JobContext[Greet]) -> None:
        job.cancelled.wait(30)
        ended.append(0)

    make_job(engine)
    make_job(engine, kind="greet", args={"name": "x"})
    with working(engine, workers):
        eventually(all_are(engine, "completed", 2))

    assert ended == [0, 1]
