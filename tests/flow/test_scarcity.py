"""A machine that has no more threads to give, for a while: nothing is lost by that, and nothing is left behind."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text

from sqla_river import JobContext, Runner, Workers
from tests.database import emptied, shared_database
from tests.making import Count, Gate, Greet, count_states, eventually, make_jobs, read_jobs
from tests.working import backends, errors, handling, nothing, put, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url, "river_queue", "river_duty", "river_runner")


def threads_named(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


class Scarcity:
    """No thread whose name begins with *name* can be started, but for the first *most*."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.most = 0
        self.refused = threading.Event()
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith(name) and threads_named(name) >= self.most:
                self.refused.set()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_slot_for_which_no_thread_can_be_made_gets_one_later(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    scarcity = Scarcity(monkeypatch, "sqla_river-slot")
    gate = Gate()
    make_jobs(engine, 10)
    with working(engine, gate, queues={"default": 10}):
        assert scarcity.refused.wait(30)
        for scarcity.most in (3, 10):
            gate.wait(scarcity.most)
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 10})


def test_async_jobs_wait_for_an_event_loop_and_no_others_wait_for_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarcity = Scarcity(monkeypatch, "sqla_river-loop")
    workers = Workers()

    @workers.register(Count)
    async def count(_: JobContext[Count]) -> None:
        pass

    @workers.register(Greet)
    def greet(_: JobContext[Greet]) -> None:
        pass

    make_jobs(engine, 3)
    make_jobs(engine, 3, kind="greet", args={})
    with working(engine, workers, slots=10):
        assert scarcity.refused.wait(30)
        eventually(lambda: count_states(engine) == {"running": 3, "completed": 3}, what="the plain ones")
        scarcity.most = 1
        eventually(lambda: count_states(engine) == {"completed": 6})
        put(engine, 0)
        eventually(lambda: count_states(engine) == {"completed": 7})


def test_a_runner_whose_event_loop_was_never_made_stops_and_gives_back_what_waited_for_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarcity = Scarcity(monkeypatch, "sqla_river-loop")

    async def handler(_: JobContext[Count]) -> None:
        pass

    make_jobs(engine, 3)
    with working(engine, handler):
        assert scarcity.refused.wait(30)

    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_an_async_failure_is_judged_once_where_no_thread_can_be_had_for_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scarcity = Scarcity(monkeypatch, "sqla_river-judge")
    told: list[str] = []

    async def handler(_: JobContext[Count]) -> None:
        raise ValueError("no")

    def on_error(_: JobContext[Any], error: BaseException) -> None:
        told.append(str(error))

    make_jobs(engine, max_attempts=1)
    with working(engine, handler, on_error=on_error):
        eventually(lambda: count_states(engine) == {"discarded": 1})
        scarcity.most = 1  # and what was put before the threads is not done a second time
        make_jobs(engine, max_attempts=1)
        eventually(lambda: count_states(engine) == {"discarded": 2})

    assert scarcity.refused.is_set()
    assert told == ["no", "no"]
    assert [errors(row) for row in read_jobs(engine)] == [["ValueError: no"]] * 2


@pytest.mark.parametrize("name", ["complete", "heartbeat", "duties", "watch", "fetch"])
def test_a_start_that_fails_leaves_nothing_and_may_be_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scarcity = Scarcity(monkeypatch, f"sqla_river-{name}")
    runner = Runner(engine, handling(nothing), queues={"default": 1})
    before = set(threading.enumerate())

    with pytest.raises(RuntimeError, match="can't start new thread"):
        runner.start()

    eventually(lambda: set(threading.enumerate()) <= before, what="its threads to end")
    eventually(lambda: backends(engine) == 0, what="its connections to be gone")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM river_runner")).scalar() == 0

    scarcity.most = 1
    make_jobs(engine)
    with runner:
        eventually(lambda: count_states(engine) == {"completed": 1})
