"""The jobs that a runner holds: in wait, in a slot, and twice."""

import gc
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from sqla_river import JobContext, incarnation
from sqla_river.held import Held
from sqla_river.incarnation import Incarnation
from sqla_river.loop import Loop
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
        stations.executor,
        completer,
        slots,
        freed=freed.append,
        returned=freed.append,
        recovered=lambda: None,
        runner="test",
        last=None,
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


def test_what_is_delivered_while_a_stop_begins_goes_back(engine: Engine) -> None:
    make_jobs(engine, 20)
    gate = Gate()
    stations = Incarnation(Runner(engine, handling(gate), queues={"default": 5})._orders)
    held, admission = stations._held, stations._held._admission
    admit, turn_away = admission.admit, admission.turn_away
    delivering, stopping = threading.Event(), threading.Event()

    def admit_late(rows: Sequence[Fetched]) -> list[Fetched]:
        delivering.set()
        stopping.wait(1)  # 1 s where the stop waits for the delivery, as it should
        return admit(rows)

    def turn_away_and_tell(queue: str | None = None) -> list[Fetched]:
        found = turn_away(queue)
        stopping.set()
        fetching.join(1)
        return found

    admission.admit, admission.turn_away = admit_late, turn_away_and_tell  # type: ignore[method-assign]
    with opened(engine) as own:
        fetching = threading.Thread(target=held.deliver, args=[fetch(own, "test/1")])
        fetching.start()
        assert delivering.wait(30)
        held.stopping = True
        held.give_back_waiting()
        fetching.join()
        held.give_back_waiting()
        gate.open()
        eventually(lambda: not held, what="nothing to be held")
        stations.completer.step()
    stations.completer.close()
    held.stop()

    states = count_states(engine)
    assert states == {"available": 20 - len(gate.started), "completed": len(gate.started)}


def test_a_job_that_was_cancelled_and_went_back_is_not_cancelled_when_it_comes_again(engine: Engine) -> None:
    first, second = make_jobs(engine, 2)
    gate = Gate()
    stations = Incarnation(Runner(engine, handling(gate), queues={"default": 1})._orders)
    held, completer = stations._held, stations.completer
    with opened(engine) as own:
        held.deliver(fetch(own, "test/1"))
        gate.wait()
        held.cancel([second])  # it waits for the slot
        held.give_back_ahead(None)
        completer.step()
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET metadata = '{}'"))  # retried by hand
        held.deliver(fetch(own, "test/2"))
        gate.open()
        eventually(lambda: not held, what="nothing to be held")
        completer.step()
    completer.close()
    held.stop()

    assert [job.id for job in gate.started] == [first, second]
    assert not gate.started[1].cancelled.is_set()
    assert not stations.executor._cancelled


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


def test_no_duty_is_looked_at_before_the_runner_stands_in_the_table() -> None:
    away = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    stations = Incarnation(Runner(away, handling(nothing), queues={"default": 1})._orders)
    stations.started, stations._fetching.began = True, 0.0  # as after ten seconds without a database

    assert stations._maintain() == 0.1


def test_a_runner_has_started_only_when_its_fetch_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Loop.start
    had: dict[str, bool] = {}

    def noted(loop: Loop) -> None:
        had[loop._thread.name] = stations.started
        start(loop)

    monkeypatch.setattr(Loop, "start", noted)
    stations = Incarnation(Runner(engine, handling(nothing), queues={"default": 1})._orders)
    stations.start()
    stations.stop(0.0)

    assert had["sqla_river-fetch"] is False  # else a duty could be put off until an hour that never comes
    assert stations.started


def test_duties_come_after_what_waited_for_the_start(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incarnation, "DUTIES_AFTER", HOUR.total_seconds())
    make_jobs(engine)
    with working(engine, nothing) as runner:
        eventually(lambda: count_states(engine) == {"completed": 1})
        assert runner._incarnation is not None
        left = runner._incarnation._maintain()

    assert left == pytest.approx(HOUR.total_seconds(), abs=60)
