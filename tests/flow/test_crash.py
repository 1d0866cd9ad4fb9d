"""Runners that are killed, process and all: no job is lost, and none runs twice but those that were in flight."""

import random
import signal
import subprocess
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from sqlalchemy import Engine, RowMapping

from tests.crashing import Ledger, bury, runners, spawn
from tests.making import count_states, eventually, make_jobs, read_jobs

SLOTS: Final = 5
RUNNERS: Final = 3
MOMENTS: Final = (
    "in the handler",
    "between fetch and start",
    "before completing",
    "while completing",
    "after completing",
    "from outside",
)
PROGRAM: Final = """
import os, signal, sys, threading, time
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from sqla_river.statements import COMPLETE_JOBS, FETCH_AVAILABLE
from sqla_river.store import OwnConnection
from tests.making import Count

url, ledger, moment, number, slots = sys.argv[1:]
left, execute, fetch = int(number), OwnConnection.execute, OwnConnection.fetch
book = os.open(ledger, os.O_WRONLY | os.O_APPEND)

def note(word, job_id):
    os.write(book, f"{word} {job_id} {os.getpid()}\\n".encode())

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def is_time():
    global left
    left -= 1
    return left == 0

def killed(self, statement, parameters=None):
    completing = statement is COMPLETE_JOBS
    if completing and moment == "before completing" and is_time():
        die()
    if completing and moment == "while completing" and is_time():
        threading.Timer(0.0005, die).start()
    answer = execute(self, statement, parameters)
    if completing and moment == "after completing" and is_time():
        die()
    return answer

def fetched(self, statement, parameters):
    rows = fetch(self, statement, parameters)
    if rows and statement is FETCH_AVAILABLE and moment == "between fetch and start" and is_time():
        die()
    return rows

OwnConnection.execute, OwnConnection.fetch = killed, fetched
workers = Workers()

@workers.register(Count)
def work(job):
    note("start", job.id)
    if moment == "in the handler" and is_time():
        die()
    time.sleep(0.005)
    note("end", job.id)

engine = create_engine(url)
Runner(
    engine,
    workers,
    queues={"default": int(slots)},
    heartbeat=timedelta(seconds=0.5),
    lease=timedelta(seconds=3),
    poll=timedelta(seconds=0.2),
).run()
"""


@pytest.mark.crash
def test_killed_runners_lose_no_job_and_run_none_twice_that_was_not_in_flight(
    url: str, engine: Engine, tmp_path: Path, rounds: int
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance = random.Random(seed)
    moments = [MOMENTS[number % len(MOMENTS)] for number in range(rounds)]
    chance.shuffle(moments)
    ledger = Ledger(tmp_path / "ledger")
    killed: set[int] = set()
    running: dict[subprocess.Popen[bytes], str] = {}

    def start() -> None:
        moment = moments.pop() if moments else "never"
        running[spawn(PROGRAM, url, ledger.path, moment, chance.randrange(1, 15), SLOTS)] = moment

    try:
        for _ in range(RUNNERS):
            start()
        deadline = time.monotonic() + 60 + 5 * rounds
        while moments or set(running.values()) != {"never"} or set(count_states(engine)) != {"completed"}:
            assert time.monotonic() < deadline, (seed, moments, running, count_states(engine))
            for process, moment in list(running.items()):
                if moment == "from outside" and str(process.pid) in ledger.path.read_text():
                    process.kill()
                if process.poll() is not None:
                    assert process.returncode == -signal.SIGKILL, (moment, process.returncode)
                    killed.add(process.pid)
                    del running[process]
                    start()
            if set(running.values()) != {"never"} and count_states(engine).get("available", 0) < 50:
                make_jobs(engine, 100)
            time.sleep(0.02)
        for process in running:  # one that is still starting has no handler for the signal yet
            eventually(partial(_has_a_runner, engine, process.pid), what="its runner")
            process.terminate()
        assert [process.wait(20) for process in running] == [0] * RUNNERS
    finally:
        for process in running:
            bury(process)

    assert len(killed) == rounds, seed
    _check(ledger, {row["id"]: row for row in read_jobs(engine)}, killed, seed)


def _has_a_runner(engine: Engine, pid: int) -> bool:
    return any(runner_id.split(":")[1] == str(pid) for runner_id in runners(engine))


def _check(ledger: Ledger, jobs: Mapping[int, RowMapping], killed: set[int], seed: int) -> None:
    starts: dict[int, list[int]] = {}
    for word, job_id, pid in ledger.lines():
        if word == "start":
            starts.setdefault(int(job_id), []).append(int(pid))
    assert set(ledger.count("end")) == set(jobs), seed  # none lost
    for number, pids in starts.items():
        assert killed.issuperset(pids[:-1]), (seed, number, pids)  # none twice, unless its runner was killed
        assert len(set(pids)) == len(pids), (seed, number)
        row = jobs[number]
        assert row["attempt"] == len(row["all_errors"] or []) + 1 == row["metadata"].get("river:rescue_count", 0) + 1
        assert len(pids) <= row["attempt"]
    again = sum(len(pids) - 1 for pids in starts.values())
    # In flight at a kill: what the slots hold, and what they have finished since the last batch was written.
    assert again <= len(killed) * 4 * SLOTS, (seed, again)
