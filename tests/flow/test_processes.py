"""Runners in processes of their own, with real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import pytest
from sqlalchemy import Engine, text

import sqla_river
from sqla_river import Runner, Workers
from sqla_river.errors import RunnerError
from tests.commands import read_until
from tests.making import (
    Gate,
    count_states,
    eventually,
    make_job,
    make_jobs,
    read_job,
    read_jobs,
)
from tests.working import backends, handling, put

ROOT: Final = Path(sqla_river.__file__).parent.parent


PROGRAM: Final = """
import logging, sys, threading, time
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

url, manner, stop_timeout = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
workers = Workers()

@workers.register(Count)
def work(job):
    if manner == "quick":
        time.sleep(0.002)
        return
    sys.stdout.write("begun\\n")
    sys.stdout.flush()
    if manner == "polite":
        job.cancelled.wait()
        raise RuntimeError("told to stop")
    elif manner == "slow":
        time.sleep(0.5)
    else:
        threading.Event().wait()

Runner(create_engine(url), workers, queues={"default": 8}, stop_timeout=timedelta(seconds=float(stop_timeout))).run()
print("done", flush=True)
"""
Manner = Literal["quick", "polite", "slow", "deaf"]


@contextmanager
def process(url: str, manner: Manner, stop_timeout: float) -> Generator["subprocess.Popen[str]"]:
    """A process of its own in which a runner runs."""
    command = [sys.executable, "-c", PROGRAM, url, manner, str(stop_timeout)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        watchdog = threading.Timer(120, running.kill)
        watchdog.start()
        try:
            yield running
        finally:
            watchdog.cancel()
            running.kill()


def has_begun(running: "subprocess.Popen[str]", jobs: int) -> None:
    """Wait until the handlers of so many jobs run."""
    assert running.stdout is not None
    read: list[str] = []
    while read.count("begun\n") < jobs:
        read.append(running.stdout.readline())
        assert read[-1], "".join(read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_stops_the_process_and_leaves_nothing_running(
    url: str, engine: Engine, number: signal.Signals
) -> None:
    make_jobs(engine, 5_000)

    with process(url, "quick", 20) as running:
        eventually(lambda: count_states(engine).get("completed", 0) >= 200, within=30, what="some work")
        running.send_signal(number)
        output, _ = running.communicate(timeout=60)

    assert running.returncode == 0, output
    assert output.endswith("done\n")
    assert set(count_states(engine)) == {"completed", "available"}
    assert {row["attempt"] for row in read_jobs(engine) if row["state"] == "available"} == {0}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM river_runner").all() == []


def test_running_jobs_finish_before_a_process_ends(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "slow", 20) as running:
        has_begun(running, 8)
        running.terminate()
        output, _ = running.communicate(timeout=60)

    assert running.returncode == 0, output
    assert count_states(engine) == {"completed": 8}


def test_a_second_signal_interrupts_the_running_jobs(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "polite", 60) as running:
        has_begun(running, 8)
        running.terminate()
        eventually(lambda: backends(engine, "fetch") == 0, what="the fetch to end")
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=30)

    assert running.returncode == 0, output
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_handlers_that_ignore_everything_are_left_behind(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "deaf", 0.2) as running:
        has_begun(running, 8)
        began = time.monotonic()
        running.terminate()
        output, _ = running.communicate(timeout=60)
        took = time.monotonic() - began

    assert running.returncode == 0, output
    assert took < 0.2 + 6 + 1
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_a_third_signal_leaves_them_behind_at_once(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "deaf", 60) as running:
        has_begun(running, 8)
        running.terminate()
        eventually(lambda: backends(engine, "fetch") == 0, what="the fetch to end")
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGINT)  # another one: two of a kind may be taken as one
        output, _ = running.communicate(timeout=60)
        took = time.monotonic() - began

    assert running.returncode == 0, output
    assert took < 4
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


TWO: Final = """
import sys, threading
from sqlalchemy import create_engine
from sqla_river import Runner
from tests.making import Gate
from tests.working import handling

engine, gate = create_engine(sys.argv[1]), Gate()
first, second = [Runner(engine, handling(gate), queues={name: 1}) for name in ("first", "second")]
first.start()
second.start()
gate.wait(1)
first.stop()
"""


def test_a_process_that_ends_gives_back_the_jobs_of_each_runner_that_nobody_stopped(url: str, engine: Engine) -> None:
    job_id = make_job(engine, queue="second")

    subprocess.run([sys.executable, "-c", TWO, url], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"]) == ("available", 0)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM river_runner")).scalar() == 0


FORKING: Final = """
import multiprocessing, os, signal, sys, time, warnings
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, as this one is
fork = multiprocessing.get_context("fork")
workers = Workers()

def stay(lives):
    lives.set()
    while True:  # a signal that comes just before pause() would leave it waiting for another
        time.sleep(0.01)

def ends_at(number):
    lives = fork.Event()
    child = fork.Process(target=stay, args=(lives,), daemon=True)
    child.start()
    if number != signal.SIGTERM:  # which ends one that has not come to itself yet, too
        lives.wait(20)
    os.kill(child.pid, number)
    child.join(30)
    code = child.exitcode
    child.kill()
    return code

@workers.register(Count)
def work(job):
    found = {number: {ends_at(number) for _ in range(10)} for number in (signal.SIGTERM, signal.SIGINT)}
    print("ended", found == {signal.SIGTERM: {-signal.SIGTERM}, signal.SIGINT: {1}}, found, flush=True)
    with fork.Pool(2) as pool:
        print(pool.map(abs, [-1, -2]), flush=True)
    left = fork.Process(target=signal.pause, daemon=True)
    left.start()
    print("left", left.pid, flush=True)

Runner(create_engine(sys.argv[1]), workers, queues={"default": 1}).run()
"""


def test_children_that_a_handler_forks_obey_signals_as_if_there_were_no_runner(url: str, engine: Engine) -> None:
    make_job(engine)
    command = [sys.executable, "-c", FORKING, url]

    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the traces of the interrupted children
        text=True,
        start_new_session=True,
    ) as running:
        watchdog = threading.Timer(120, os.killpg, (running.pid, signal.SIGKILL))
        watchdog.start()
        said = read_until(running, "left")
        child = int(said.split()[-1])
        eventually(lambda: count_states(engine) == {"completed": 1}, within=20)
        running.terminate()  # and multiprocessing ends its daemons with it
        running.communicate()
        watchdog.cancel()

    assert "ended True" in said
    assert "[1, 2]" in said
    assert running.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_signals_can_be_taken_in_the_main_thread_only(engine: Engine) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            Runner(engine, Workers(), queues={"default": 1}).run()
        except RunnerError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)

    assert "main thread" in str(failures[0])


def test_run_gives_the_signals_back(engine: Engine) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    gate = Gate(opened=True)
    put(engine, 1)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    def end() -> None:
        gate.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    runner.run()
    ending.join()

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert runner.id is None


def test_what_is_asked_of_a_run_is_as_far_as_it_goes_however_often(engine: Engine) -> None:
    gate = Gate()
    job_id = make_job(engine)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    def end() -> None:
        gate.wait()
        for _ in range(3):
            runner.ask(2)

    ending = threading.Thread(target=end)
    ending.start()
    runner.run()
    ending.join()

    assert gate.reasons == ["stop"]
    assert (read_job(engine, job_id)["state"], read_job(engine, job_id)["attempt"]) == ("available", 0)
