"""Health: red while any inner loop stands still, whatever the others do, and green again when it goes on."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from sqlalchemy import Engine, create_engine, text

from sqla_river import Runner, listen, loop
from sqla_river.cli.serving import serve
from sqla_river.health import Health, fleet, judge
from tests.crashing import silence
from tests.making import Gate, count_states, eventually
from tests.working import SLOW_POLL, handling, nothing, put

LIMIT = timedelta(seconds=0.6)
LOOPS = ("fetch", "complete", "heartbeat", "listen")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is 1 s and 5 s to users."""
    monkeypatch.setattr(loop, "SIGN_OF_LIFE", 0.05)
    monkeypatch.setattr(listen, "PING", 0.05)


def probe(port: int, path: str) -> tuple[int, str]:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@contextmanager
def frozen(runner: Runner, name: str) -> Generator[None]:
    """Let the loop hang where it would work; what wakes it is there."""
    life = runner._incarnation
    assert life is not None
    thaw = threading.Event()
    place: Any
    attribute = "_step"
    if name == "listen":
        place, attribute = life._listener, "_heard"
    else:
        place = {"fetch": life._fetching, "complete": life._completing, "heartbeat": life._beating}[name]
    works: Callable[..., Any] = getattr(place, attribute)

    def hang(*given: Any) -> Any:
        thaw.wait(60)
        return works(*given)

    setattr(place, attribute, hang)
    try:
        yield
    finally:
        setattr(place, attribute, works)
        thaw.set()


def test_each_inner_loop_that_hangs_turns_the_probes_red_and_no_other(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing), queues={"default": 2}, heartbeat=timedelta(milliseconds=300))
    serving = serve(runner, 0, LIMIT)
    try:
        assert probe(serving.port, "/healthz") == (200, "the runner has not started\n")
        assert probe(serving.port, "/readyz")[0] == 503
        with runner:
            for name in LOOPS:
                eventually(lambda: probe(serving.port, "/readyz") == (200, "ok\n"), 20, "all to be well")
                with frozen(runner, name):
                    put(engine, 1)  # something for every loop to do
                    said = eventually(lambda: _red_for(serving.port, name), 20, f"red for {name}")  # noqa: B023
                    assert probe(serving.port, "/readyz")[0] == 503
                assert "hangs: it has not moved for" in said
            eventually(lambda: probe(serving.port, "/healthz") == (200, "ok\n"), 20, "all to be well again")
            eventually(lambda: count_states(engine) == {"completed": len(LOOPS)}, 20, "all jobs")
            assert b"sqla_river_jobs_started_total" in urlopen(f"http://127.0.0.1:{serving.port}/metrics").read()
            assert probe(serving.port, "/elsewhere")[0] == 404
    finally:
        serving.stop()


def _red_for(port: int, name: str) -> str:
    """What /healthz says, once it is red for that loop alone."""
    code, said = probe(port, "/healthz")
    return said if code == 503 and said.startswith(f"the {name} loop") and said.count("\n") == 1 else ""


def test_a_loop_without_anything_to_do_says_that_it_is_well(engine: Engine) -> None:
    seldom: dict[str, Any] = {"heartbeat": timedelta(minutes=5), "lease": timedelta(hours=1), "poll": SLOW_POLL}
    with Runner(engine, handling(nothing), queues={"default": 1}, **seldom) as runner:
        life = runner._incarnation
        assert life is not None
        for _ in range(3):
            before = life.loops()
            eventually(lambda: all(life.loops()[name] > before[name] for name in before), what="a sign of each")  # noqa: B023
        ages = runner.loops

    assert set(ages) == {*LOOPS, "duties", "watch"}
    assert runner.loops == {}


def test_a_runner_that_waits_for_its_jobs_to_end_lives_but_is_not_ready(engine: Engine) -> None:
    gate = Gate()
    put(engine, 1)
    runner = Runner(engine, handling(gate), queues={"default": 1})
    runner.start()
    gate.wait()
    stopping = threading.Thread(target=runner.stop)
    stopping.start()
    life = runner._incarnation
    assert life is not None
    eventually(lambda: life._fetching.alive is False, what="the end of fetching")
    over = time.monotonic()
    eventually(lambda: life._beating.moved > over + LIMIT.total_seconds(), what="a while")
    stops = Health(True, False, ("the runner stops",))
    eventually(lambda: runner.health(LIMIT) == stops, what="no other loop to be late")  # as one may be under load
    gate.open()
    stopping.join()


def test_a_long_duty_is_no_hang() -> None:
    now = time.monotonic()

    assert judge({"duties": (now - 60, now - 60), "fetch": (now, now)}, timedelta(seconds=15)) == Health(True, True, ())


def test_a_loop_that_fails_lives_but_is_not_ready() -> None:
    now = time.monotonic()

    fails = judge({"fetch": (now, now - 20), "complete": (now, now)}, timedelta(seconds=15))
    hangs = judge({"fetch": (now - 16, now - 16)}, timedelta(seconds=15))

    assert (fails.alive, fails.ready, fails.problems) == (True, False, ("the fetch loop has failed for 20 s",))
    assert (hangs.alive, hangs.ready) == (False, False)


def test_without_the_database_a_runner_lives_but_is_not_ready(engine: Engine, url: str) -> None:
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with Runner(engine, handling(nothing), queues={"default": 1}, heartbeat=timedelta(milliseconds=300)) as runner:
        eventually(lambda: runner.health(LIMIT).ready, 20, "it to be well")
        with admin.connect() as connection:
            connection.execute(text("ALTER TABLE river_runner RENAME TO river_elsewhere"))
            try:
                eventually(lambda: _lacks_its_heartbeat(runner.health(LIMIT)), 20, "word of it")
            finally:
                connection.execute(text("ALTER TABLE river_elsewhere RENAME TO river_runner"))
            eventually(lambda: runner.health(LIMIT).ready, 20, "it to be well again")
    admin.dispose()


def _lacks_its_heartbeat(health: Health) -> bool:
    failed = any("the heartbeat loop has failed" in problem for problem in health.problems)
    return (health.alive, health.ready, failed) == (True, False, True)


def test_the_fleet_is_known_by_its_heartbeats(engine: Engine) -> None:
    seldom: dict[str, Any] = {"heartbeat": timedelta(seconds=10), "lease": timedelta(seconds=30)}  # none in between
    with Runner(engine, handling(Gate()), queues={"default": 3, "mail": 1}, **seldom):
        with engine.connect() as connection:
            (live,) = fleet(connection, None)
        silence(engine, timedelta(seconds=20))
        with engine.connect() as connection:
            late = fleet(connection, None, timedelta(seconds=5))
        silence(engine, timedelta(seconds=20))
        with engine.connect() as connection:
            dead = fleet(connection, None)

    with engine.connect() as connection:
        assert fleet(connection, None) == []
    assert (live.state, live.queues) == ("live", {"default": 3, "mail": 1})
    assert timedelta(0) <= live.silent < timedelta(seconds=15)
    assert [runner.state for runner in late] == ["late"]
    assert [runner.state for runner in dead] == ["dead"]
