"""Leases in real life: who dies is replaced, who only seems dead is left alone."""

import signal
import subprocess
import threading
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, create_engine, text

from sqla_river import create_all
from sqla_river.context import JobContext
from sqla_river.duties.prune import Prune
from sqla_river.embedded import EmbeddedPostgres
from sqla_river.runner import Runner
from sqla_river.store import OwnConnection
from tests.crashing import Ledger, bury, runners, spawn, working
from tests.making import Count, Gate, count_states, eventually, make_job, make_jobs, read_job, read_jobs

ROOMY: Final[dict[str, Any]] = {"heartbeat": timedelta(seconds=0.5), "lease": timedelta(seconds=3)}
"""Short, and long enough for a machine with much else to do."""
LASTING: Final = timedelta(seconds=2.4)
"""A lease of twelve beats."""
PROGRAM: Final = """
import ctypes, os, sys, threading, time
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

url, ledger, manner = sys.argv[1:]
book = os.open(ledger, os.O_WRONLY | os.O_APPEND)

def note(word, number):
    os.write(book, f"{word} {number} {os.getpid()}\\n".encode())

workers = Workers()

@workers.register(Count)
def work(job):
    note("start", job.id)
    if manner == "hold the GIL":
        ctypes.PyDLL(None).usleep(int(8 / 30 * 3 * 1_000_000))
    elif manner == "wait":
        while not os.path.exists(ledger + ".go"):
            time.sleep(0.01)
    elif manner == "wait to be told":
        job.cancelled.wait()
        note(job.cancelled.reason.replace(" ", "_"), job.id)
    note("end", job.id)

times = {"heartbeat": timedelta(seconds=0.5), "lease": timedelta(seconds=3)}
runner = Runner(create_engine(url), workers, queues={"default": 5}, **times)
runner.start()
while not os.path.exists(ledger + ".leave"):
    note("stale", runner.stale)
    time.sleep(0.05)
runner.stop()
"""


def _leave(ledger: Ledger, process: "subprocess.Popen[bytes]") -> None:
    Path(f"{ledger.path}.leave").touch()
    assert process.wait(20) == 0


def _may_rescue(runner: Runner) -> bool:
    incarnation: Any = runner._incarnation
    return incarnation._heart.kept is not None


# ---- the dead --------------------------------------------------------------------------------------------------------


def test_jobs_of_a_killed_runner_run_again_after_a_lease_and_a_sweep(url: str, engine: Engine, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    gate = Gate(opened=True)
    jobs = make_jobs(engine, 5)
    victim = spawn(PROGRAM, url, ledger.path, "wait")
    try:
        eventually(lambda: len(ledger.count("start")) == 5, within=30, what="the jobs to start")
        with working(engine, gate, 5, **ROOMY) as survivor:
            eventually(lambda: _may_rescue(survivor), within=20)
            assert gate.started == []
            victim.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            gate.wait(5, within=20)
            took = time.monotonic() - killed
    finally:
        bury(victim)

    assert took < 3 + 0.5 + 2  # lease, sweep, and a slow machine
    assert {(row["state"], row["attempt"], row["metadata"]["river:rescue_count"]) for row in read_jobs(engine)} == {
        ("completed", 2, 1)
    }
    assert sorted(job.id for job in gate.started) == jobs


def test_the_first_runner_that_starts_frees_what_the_dead_left_behind(engine: Engine) -> None:
    gate = Gate(opened=True)
    make_jobs(engine, 3, state="running", token="host:1:00000000000000aa/1")
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_runner (id, heartbeat_at) "
                "VALUES ('host:1:00000000000000aa', now() - interval '1 hour')"
            )
        )

    before = time.monotonic()
    with working(engine, gate):
        began = time.monotonic()
        gate.wait(3)
        ended = time.monotonic()

    assert ended - before > 1.2  # not before it has kept its own heartbeat for a lease
    assert ended - began < 1.2 + 0.2 + 3


def test_a_runner_that_was_frozen_for_longer_than_its_lease_changes_nothing_when_it_comes_back(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path / "ledger")
    gate = Gate()
    make_jobs(engine, 2)
    frozen = spawn(PROGRAM, url, ledger.path, "wait")
    try:
        eventually(lambda: len(ledger.count("start")) == 2, within=30, what="the jobs to start")
        frozen.send_signal(signal.SIGSTOP)
        with working(engine, gate, **ROOMY):
            gate.wait(2, within=20)
            first, second = (job.id for job in gate.started)
            Path(f"{ledger.path}.go").touch()
            frozen.send_signal(signal.SIGCONT)
            eventually(lambda: ledger.count("stale")[2] > 0, within=20, what="two stale outcomes")
            assert count_states(engine) == {"running": 2}
            assert read_job(engine, first)["token"] == gate.started[0].row.token
            gate.open()
            eventually(lambda: count_states(engine) == {"completed": 2})
        _leave(ledger, frozen)
    finally:
        bury(frozen)

    assert ledger.count("end") == Counter((first, second))  # twice at most, with the other's
    assert {row["attempt"] for row in read_jobs(engine)} == {2}


def test_a_runner_that_comes_back_tells_the_jobs_it_lost_so(url: str, engine: Engine, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    gate = Gate(opened=True)
    job_id = make_job(engine)
    frozen = spawn(PROGRAM, url, ledger.path, "wait to be told")
    try:
        eventually(lambda: ledger.count("start"), within=30, what="the job to start")
        frozen.send_signal(signal.SIGSTOP)
        with working(engine, gate, **ROOMY):
            eventually(lambda: count_states(engine) == {"completed": 1}, within=20)
        before = read_job(engine, job_id)
        frozen.send_signal(signal.SIGCONT)
        eventually(lambda: ledger.count("lease_lost") == Counter([job_id]), within=20, what="the job to be told")
        eventually(lambda: ledger.count("stale")[1] > 0, what="its outcome to be refused")
        _leave(ledger, frozen)
    finally:
        bury(frozen)

    after = read_job(engine, job_id)
    assert {key: value for key, value in after.items() if key != "delay"} == {
        key: value for key, value in before.items() if key != "delay"
    }


# ---- the living ------------------------------------------------------------------------------------------------------


def _lives_on(url: str, engine: Engine, ledger: Ledger, manner: str, freeze: float = 0.0) -> None:
    """A process works one job in that *manner*, beside a runner that may rescue: nobody takes it for dead."""
    gate = Gate(opened=True)
    other = spawn(PROGRAM, url, ledger.path, manner)
    try:
        eventually(lambda: len(runners(engine)) == 1, within=30, what="the process to work")
        with working(engine, gate, **ROOMY, queues={"elsewhere": 1}) as watching:
            eventually(lambda: _may_rescue(watching), within=20)
            job_id = make_job(engine)
            eventually(lambda: ledger.count("start"), what="the job to start")
            if freeze:
                other.send_signal(signal.SIGSTOP)
                time.sleep(freeze)  # what is tested
                other.send_signal(signal.SIGCONT)
                Path(f"{ledger.path}.go").touch()
            eventually(lambda: count_states(engine) == {"completed": 1}, within=20)
        _leave(ledger, other)
    finally:
        bury(other)

    row = read_job(engine, job_id)
    assert (row["attempt"], row["all_errors"]) == (1, None)
    assert ledger.count("start") == Counter([job_id])


def test_a_process_frozen_for_less_than_its_lease_keeps_its_jobs(url: str, engine: Engine, tmp_path: Path) -> None:
    _lives_on(url, engine, Ledger(tmp_path / "ledger"), "wait", freeze=1.5)


def test_a_handler_that_holds_the_gil_is_not_taken_for_dead(url: str, engine: Engine, tmp_path: Path) -> None:
    _lives_on(url, engine, Ledger(tmp_path / "ledger"), "hold the GIL")  # 8 s of 30, to scale


def test_handlers_that_hold_the_whole_pool_are_not_taken_for_dead(url: str, engine: Engine) -> None:
    small = create_engine(url, pool_size=1, max_overflow=0)
    gate = Gate()

    def handler(job: JobContext[Count]) -> None:
        with small.connect():
            gate(job)

    make_job(engine)
    with (
        working(small, handler, lease=LASTING),
        working(engine, Gate(opened=True), queues={"elsewhere": 1}, lease=LASTING) as other,
    ):
        gate.wait()
        eventually(lambda: _may_rescue(other))
        outlived = _beats(engine, 15)
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 1})
    small.dispose()

    assert outlived
    assert {row["attempt"] for row in read_jobs(engine)} == {1}


def _beats(engine: Engine, count: int) -> bool:
    """Wait until every runner has renewed its row *count* times."""

    def read() -> dict[str, Any]:
        with engine.connect() as connection:
            return {
                row.id: row.heartbeat_at
                for row in connection.execute(text("SELECT id, heartbeat_at FROM river_runner"))
            }

    def renewed(before: dict[str, Any]) -> bool:
        return all(id_ in before and at > before[id_] for id_, at in read().items())

    for _ in range(count):
        eventually(partial(renewed, read()), what="a beat")
    return True


def test_a_duty_that_takes_long_ends_no_lease(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()

    def slow(self: Prune, own: OwnConnection) -> bool:
        began.set()
        go.wait(60)
        return False

    monkeypatch.setattr(Prune, "do", slow)
    gate = Gate()
    make_job(engine)
    with (
        working(engine, gate, 1, lease=LASTING),
        working(engine, Gate(opened=True), queues={"elsewhere": 1}, lease=LASTING),
    ):
        gate.wait()
        assert began.wait(30)
        _beats(engine, 15)  # longer than a lease
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 1})
        go.set()

    assert {row["attempt"] for row in read_jobs(engine)} == {1}


def test_a_runner_whose_row_is_lost_keeps_its_jobs(engine: Engine) -> None:
    gate = Gate()
    make_job(engine)
    with (
        working(engine, gate, 1, lease=LASTING) as runner,
        working(engine, Gate(opened=True), queues={"elsewhere": 1}, lease=LASTING) as other,
    ):
        gate.wait()
        eventually(lambda: _may_rescue(other))
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_runner"))
        eventually(lambda: {runner.id, other.id} <= set(runners(engine)), what="the rows to be back")
        _beats(engine, 15)
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 1})

    assert {row["attempt"] for row in read_jobs(engine)} == {1}


def test_an_outage_longer_than_everybodys_lease_frees_nobody() -> None:
    gates = [Gate(), Gate()]
    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        make_jobs(engine, 4)
        with working(engine, gates[0], 2) as first, working(engine, gates[1], 2) as second:
            eventually(lambda: sum(len(gate.started) for gate in gates) == 4)
            eventually(lambda: _may_rescue(first) and _may_rescue(second))
            postgres.stop_server()
            time.sleep(2)  # what is tested: an outage longer than the lease of 1.2 s
            postgres.start_server()
            engine.dispose()
            eventually(lambda: _may_rescue(first) and _may_rescue(second), within=30, what="both to be entitled again")
            assert count_states(engine) == {"running": 4}
            for gate in gates:
                gate.open()
            eventually(lambda: count_states(engine) == {"completed": 4}, within=20)
            assert (first.stale, second.stale) == (0, 0)
        assert {(row["attempt"], row["all_errors"]) for row in read_jobs(engine)} == {(1, None)}
        engine.dispose()


def test_a_runner_out_of_touch_fetches_nothing_keeps_its_jobs_and_then_tells_those_it_lost(engine: Engine) -> None:
    gate = Gate()
    kept, lost = make_jobs(engine, 2)
    with working(engine, gate, 4, poll=timedelta(seconds=0.05)) as runner:
        gate.wait(2)
        incarnation: Any = runner._incarnation
        with engine.begin() as theirs:  # its heartbeat cannot be written, everything else can
            theirs.execute(text("SELECT 1 FROM river_runner FOR UPDATE"))
            eventually(lambda: not incarnation._heart.fresh, what="the heartbeat to be old")
            waiting = make_job(engine)
            with engine.begin() as others:
                others.execute(
                    text("UPDATE river_job SET attempted_by = array_append(attempted_by, 'other/1') WHERE id = :id"),
                    {"id": lost},
                )
            moved = incarnation._fetching.moved
            eventually(lambda: incarnation._fetching.moved > moved + 0.2, what="some steps of the fetch")
            assert read_job(engine, waiting)["state"] == "available"
            assert gate.reasons == []
        eventually(lambda: gate.reasons == ["lease lost"], what="the lost job to be told")
        gate.wait(3)
        gate.open()
        eventually(lambda: runner.stale == 1)
        eventually(lambda: count_states(engine) == {"completed": 2, "running": 1})

    assert read_job(engine, kept)["attempt"] == 1
