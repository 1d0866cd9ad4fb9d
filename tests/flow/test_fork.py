"""Forks: what a child may do with what its parent made, and a web server that loads the app before it forks."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine

from tests.commands import environment, read_until
from tests.crashing import runners
from tests.database import emptied, shared_database
from tests.making import all_are, eventually

FORK: Final = """
import os, sys, threading, warnings
from datetime import timedelta
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqla_river import River, Runner, Workers
from sqla_river.errors import RunnerError
from tests.making import Count

warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, as this one is
river = River(notify="after_commit")
engine = create_engine(sys.argv[1])
workers = Workers()
worked = []
done = threading.Event()

@workers.register(Count)
def work(job):
    worked.append(job.args.number)
    if len(worked) == 2:
        done.set()

def put(number):
    with Session(engine) as session, session.begin():
        river.enqueue(session, Count(number))
        return session.scalar(text("SELECT pg_backend_pid()"))

runner = Runner(engine, workers, queues={"default": 1}, poll=timedelta(minutes=5))
runner.start()
theirs = put(1)
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    runner.stop()
    for begin in (runner.start, runner.run):
        try:
            begin()
        except RunnerError as error:
            assert "before a fork" in str(error)
        else:
            raise AssertionError("it works in a forked child")
    assert put(2) != theirs
    os.read(reading, 1)  # until the announcement has come
    sys.exit(0)  # with all that is registered for the exit
announced = done.wait(20)
os.write(writing, b".")
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), announced, put(3) == theirs, runner.id is not None)
runner.stop()
"""
LOCKED: Final = """
import os, signal, sys, threading, time, warnings
from ipaddress import IPv4Address
from typing import ClassVar
import attrs, cattrs
from sqla_river.args import CattrsCodec
from sqla_river.wait import Look, finished_here

warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, as this one is
within = threading.Barrier(2)

def slow():
    within.wait()
    time.sleep(0.5)

class Slow(cattrs.Converter):
    def get_structure_hook(self, cls, *rest):
        slow()
        return super().get_structure_hook(cls, *rest)

@attrs.frozen
class First:
    kind: ClassVar[str] = "first"
    address: IPv4Address | None = None

@attrs.frozen
class Second:
    kind: ClassVar[str] = "second"

codec = CattrsCodec(converter=Slow())
codec.converter.register_unstructure_hook(IPv4Address, str)

def tell():
    with Look(1, None, int):
        finished_here(slow() for _ in range(1))

held = {"compiles": lambda: codec.encode(First()), "tells": tell}[sys.argv[1]]
threading.Thread(target=held, daemon=True).start()
within.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    heard = threading.Event()
    with Look(2, None, heard.set):
        finished_here([2])
    assert heard.is_set() and codec.encode(Second()) == b"{}"
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
ALL_LOCKS: Final = """
import importlib, os, pkgutil, sys, threading, warnings
import sqla_river

warnings.simplefilter("ignore")
for module in pkgutil.walk_packages(sqla_river.__path__, "sqla_river."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError:  # of what is not installed
            pass
kinds = (type(threading.Lock()), type(threading.RLock()))
locks = {
    f"{name}.{key}": value
    for name, module in sorted(sys.modules.items())
    if name.partition(".")[0] == "sqla_river"
    for key, value in vars(module).items()
    if isinstance(value, kinds)
}


def hold(lock, held, forked):
    with lock:
        held.set()
        forked.wait(0.2)  # for a fork that waits for the lock there is no more to wait for

stuck = []
for name, lock in locks.items():  # one by one: a fork that waits for one of them finds all of them free
    held, forked = threading.Event(), threading.Event()
    threading.Thread(target=hold, args=(lock, held, forked), daemon=True).start()
    held.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if lock.acquire(blocking=False) else 1)
    forked.set()
    if os.waitpid(child, 0)[1]:
        stuck.append(name)
print(len(locks) >= 8, stuck)
"""
APP: Final = """
import json, os
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqla_river import Runner, Workers, enqueue
from tests.making import Count

PID = text("SELECT pg_backend_pid()")
workers = Workers()

@workers.register(Count)
def work(job):
    pass

engine = create_engine(os.environ["DATABASE_URL"])
with engine.connect() as connection:  # and gives it back to the pool, which the workers find after the fork
    first = connection.scalar(PID)
runner = Runner(engine, workers, queues={"default": 2})

def app(environ, start_response):
    with Session(engine) as session, session.begin():
        enqueue(session, Count(1))
        answer = {"first": first, "backend": session.scalar(PID), "pid": os.getpid()}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
"""
GUNICORN: Final = """
bind = "127.0.0.1:0"
workers = 2
preload_app = True

def post_worker_init(worker):
    import app
    app.runner.start()

def worker_exit(server, worker):
    import app
    app.runner.stop()
"""


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.mark.parametrize("held", ["compiles", "tells"])
def test_a_child_forked_while_another_thread_compiles_args_or_tells_of_an_end_can_do_both(held: str) -> None:
    command = [sys.executable, "-c", LOCKED, held]

    ended = subprocess.run(command, env=environment({}), capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "0\n", ended.stderr


def test_no_lock_of_a_module_is_held_by_nobody_in_a_forked_child() -> None:
    command = [sys.executable, "-c", ALL_LOCKS]

    ended = subprocess.run(command, env=environment({}), capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "True []\n", ended.stderr


def test_a_forked_child_may_enqueue_and_its_parents_runner_goes_on(url: str, engine: Engine) -> None:
    command = [sys.executable, "-c", FORK, url]

    ended = subprocess.run(command, env=environment({}), capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "0 True True True\n", ended.stderr
    assert not ended.stderr


def test_under_gunicorn_an_app_that_is_loaded_before_the_fork_enqueues_and_works(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(GUNICORN)
    gunicorn = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "app:app"],
        cwd=tmp_path,
        env=environment({"DATABASE_URL": url}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = read_until(gunicorn, "Listening at")
        address = re.findall(r"http://[\d.:]+", said)[-1]

        def ask(_: int) -> Any:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return json.load(answer)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, range(100)))
            numbers = itertools.count(len(answers))
            while len({answer["pid"] for answer in answers}) < 2:  # until both have had their turn
                answers.append(ask(next(numbers)))
        backends = {pid: {each["backend"] for each in answers if each["pid"] == pid} for pid in _pids(answers)}
        assert len(backends) == 2
        first, second = backends.values()
        assert not first & second
        assert answers[0]["first"] not in first | second
        eventually(all_are(engine, "completed", len(answers)), within=20)
        assert {int(runner_id.split(":")[1]) for runner_id in runners(engine)} == set(backends)

        gunicorn.terminate()
        said, _ = gunicorn.communicate(timeout=30)
        assert gunicorn.returncode == 0, said
    finally:
        if gunicorn.poll() is None:
            os.killpg(gunicorn.pid, signal.SIGKILL)
        gunicorn.communicate()

    assert "Traceback" not in said
    assert runners(engine) == []


def _pids(answers: list[Any]) -> set[int]:
    return {answer["pid"] for answer in answers}
