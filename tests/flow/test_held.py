"""The jobs that a runner holds: in wait, in a slot, and twice."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from sqla_river import JobContext, incarnation
from sqla_river.held import Held
from sqla_river.incarnation import Incarnation
from sqla_river.rows import Fetched
from sqla_river.runner import Runner
from tests.database import emptied, shared_database
from tests.making import Gate, count_states, eventually, fetch, make_jobs, opened
from tests.working import HOUR, handling, nothing, put, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url, "river_queue", "river_duty", "river_runner")


def slot_threads() -> int:
    return sum(thread.name.startswith("sqla_river-slot") for thread in threading.enumerate())


def test_what_waits_is_nothing_to_the_garbage_collector(engine: Engine) -> None:
    make_jobs(engine, 50)
    gate = Gate()
    held: list[Fetched] = []
    with working(engine, gate, queues={"default": 50}) as runner:
        gate.wait(50)
        assert runner._incarnation is not None
        gc.collect()
        held += runner._incarnation._held.rows
        gate.open()

    assert len(held) == 50
    assert not any(map(gc.is_tracked, held))


def test_a_job_that_is_fetched_again_while_it_runs_here_frees_both_its_slots(engine: Engine) -> None:
    make_jobs(engine)
    gate = Gate()
    freed: list[str] = []
    stations = Incarnation(Runner(engine, handling(gate), queues={"default": 2})._orders)
    completer, slots = stations.completer, {"default": 2}
    held = Held(
        stations.executor, completer, slots, freed=freed.append, returned=freed.append, runner="test", last=None
    )
    with opened(engine) as own:
        held.deliver(fetch(own, "test/1"))
        gate.wait()
        with engine.begin() as connection:  # somebody took its runner for dead
            connection.execute(text("UPDATE river_job SET state = 'available'"))
        held.deliver(fetch(own, "test/2"))
        gate.wait(2)
    gate.open()
    eventually(lambda: len(freed) == 2, what="both slots to come free")
    eventually(lambda: not held, what="nothing to be held")
    completer.step()
    completer.close()
    held.stop()

    assert count_states(engine) == {"completed": 1}
    assert completer.stale == 1


def test_one_job_needs_one_thread(engine: Engine) -> None:
    with working(engine, nothing, queues={"default": 50}):
        put(engine, 0)
        eventually(lambda: count_states(engine) == {"completed": 1})

        eventually(lambda: slot_threads() == 1, what="one thread, once those of other tests have ended")


def test_as_many_threads_as_slots_run_handlers_that_wait_for_each_other(engine: Engine) -> None:
    together = threading.Barrier(20)

    def meet(_: JobContext[Any]) -> None:
        together.wait(30)

    make_jobs(engine, 60)
    with working(engine, meet, queues={"default": 20}):
        eventually(lambda: count_states(engine) == {"completed": 60})

        eventually(lambda: slot_threads() == 20, what="as many threads, once those of other tests have ended")


def test_a_slot_for_which_no_thread_can_be_made_gets_one_later(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    start, most = threading.Thread.start, [0]

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("sqla_river-slot") and slot_threads() >= most[0]:
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    refused = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    gate = Gate()
    make_jobs(engine, 10)
    with working(engine, gate, queues={"default": 10}):
        assert refused.wait(30)
        for now in (3, 10):
            most[0] = now
            gate.wait(now)
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 10})


def test_no_duty_is_looked_at_before_the_runner_stands_in_the_table() -> None:
    away = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    stations = Incarnation(Runner(away, handling(nothing), queues={"default": 1})._orders)
    stations.started, stations._fetching.began = True, 0.0  # as after ten seconds without a database

    assert stations._maintain() == 0.1


def test_duties_come_after_what_waited_for_the_start(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incarnation, "DUTIES_AFTER", HOUR.total_seconds())
    make_jobs(engine)
    with working(engine, nothing) as runner:
        eventually(lambda: count_states(engine) == {"completed": 1})
        assert runner._incarnation is not None
        left = runner._incarnation._maintain()

    assert left == pytest.approx(HOUR.total_seconds(), abs=60)
