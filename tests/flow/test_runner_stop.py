"""A stop of plain handlers: bounded, whatever they do."""

import contextlib
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import Engine, create_engine

from sqla_river import JobContext, Runner, Workers, create_all
from sqla_river.embedded import EmbeddedPostgres
from tests.making import (
    Count,
    Gate,
    count_states,
    eventually,
    make_job,
    make_jobs,
    read_job,
    read_jobs,
)
from tests.working import SLOW_POLL, handling, nothing, put, working


def test_running_jobs_may_finish_within_the_stop_timeout(engine: Engine) -> None:
    gate = Gate()
    make_jobs(engine, 3)
    with working(engine, gate) as runner:
        gate.wait(3)
        stopping = threading.Thread(target=runner.stop, args=(timedelta(seconds=30),))
        stopping.start()
        put(engine, 99)
        gate.open()
        stopping.join(30)

        assert not stopping.is_alive()

    assert gate.reasons == []
    assert count_states(engine) == {"completed": 3, "available": 1}


def test_jobs_that_a_stop_interrupts_get_their_attempt_back(engine: Engine) -> None:
    gate = Gate()
    make_jobs(engine, 3)

    with working(engine, gate) as runner:
        gate.wait(3)
        runner.stop(timedelta(0))

    assert gate.reasons == ["stop"] * 3
    for row in read_jobs(engine):
        assert (row["state"], row["attempt"], row["all_errors"]) == ("available", 0, None)


def test_three_restarts_do_not_discard(engine: Engine) -> None:
    job_id = make_job(engine, max_attempts=1)
    for _ in range(3):
        gate = Gate()
        with working(engine, gate) as runner:
            gate.wait()
            runner.stop(timedelta(0))

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"]) == ("available", 0)


def test_a_job_given_back_starts_elsewhere_at_once(engine: Engine) -> None:
    leaving, staying = Gate(), Gate(opened=True)
    make_job(engine)
    with working(engine, leaving) as runner:
        leaving.wait()
        with working(engine, staying, poll=SLOW_POLL):
            runner.stop(timedelta(0))
            staying.wait()

    assert count_states(engine) == {"completed": 1}


def test_a_stop_before_the_start_does_nothing(engine: Engine) -> None:
    Runner(engine, Workers(), queues={"default": 1}).stop()


def test_a_second_stop_from_another_thread_hurries_the_first(engine: Engine) -> None:
    gate = Gate()
    make_job(engine)

    with working(engine, gate) as runner:
        gate.wait()
        began = time.monotonic()
        first = threading.Thread(target=runner.stop, args=(timedelta(seconds=60),))
        first.start()
        eventually(lambda: _is_stopping(runner), what="the first stop to begin")
        runner.stop()
        first.join(30)

    assert not first.is_alive()
    assert time.monotonic() - began < 10
    assert gate.reasons == ["stop"]
    assert count_states(engine) == {"available": 1}


def _is_stopping(runner: Runner) -> bool:
    incarnation = runner._incarnation
    return incarnation is None or incarnation.stopping


def test_many_stops_at_once_all_return(engine: Engine) -> None:
    with working(engine, nothing) as runner:
        threads = [threading.Thread(target=runner.stop) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

    assert not any(thread.is_alive() for thread in threads)


def test_a_stop_from_inside_a_handler_is_bounded(engine: Engine) -> None:
    ended = threading.Event()

    def handler(_: JobContext[Count]) -> None:
        runner.stop(timedelta(0))
        ended.set()

    make_job(engine)
    with working(engine, handler) as runner:
        assert ended.wait(8)


@contextmanager
def silent_server() -> Generator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"postgresql+psycopg://nobody@127.0.0.1:{listening.getsockname()[1]}/none"


@pytest.mark.parametrize("away", ["refused", "silent"])
def test_start_and_stop_are_bounded_while_the_database_is_away(away: str) -> None:
    with contextlib.ExitStack() as stack:
        url = (
            stack.enter_context(silent_server())
            if away == "silent"
            else "postgresql+psycopg://nobody@/none?host=/nonexistent"
        )
        runner = Runner(create_engine(url), handling(nothing), queues={"default": 1})
        began = time.monotonic()
        starting = threading.Thread(target=runner.start)
        starting.start()
        eventually(lambda: runner.id is not None, what="the start to begin")
        runner.stop(timedelta(0))
        starting.join(8)
        took = time.monotonic() - began

    assert not starting.is_alive()
    assert took < 8


def test_a_runner_that_was_started_without_a_database_works_once_it_is_there() -> None:
    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        make_job(engine)
        engine.dispose()
        postgres.stop_server()
        gate = Gate(opened=True)
        runner = Runner(engine, handling(gate), queues={"default": 1})
        starting = threading.Thread(target=runner.start)
        starting.start()
        eventually(lambda: runner.id is not None, what="the start to begin")
        postgres.start_server()
        gate.wait(within=20)
        starting.join(30)
        runner.stop()
        engine.dispose()
