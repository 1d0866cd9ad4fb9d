"""`sqla-river bench`, as a process of its own, on the server of the tests."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, make_url, text

from sqla_river import JobState
from sqla_river.cli import profiles
from sqla_river.cli.profiles import Viewer
from tests.commands import ROOT, ask, environment
from tests.database import catalog
from tests.making import make_job
from tests.pooling import pgbouncer

SHORT = ["--jobs", "300", "--seconds", "0.2", "--rate", "50", "--slots", "10"]
SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'sqla_river_bench%'"
MINE = "SELECT array_agg(river_job::text ORDER BY id) FROM river_job"
INTERRUPTED = "interrupted; all that was made is removed\n"


def _run(url: str, *arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """What comes of the bench, in a process that has done *first*."""
    program = f"from sqla_river.cli import main, profiles\n{first}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", program, "bench", *SHORT, "--database-url", url, *arguments],
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _bench(url: str, *arguments: str) -> str:
    ended = _run(url, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return ended.stdout


@pytest.mark.parametrize("handlers", ["threads", "asyncio"])
def test_every_profile_gives_its_figures_and_leaves_nothing_behind(empty_url: str, handlers: str) -> None:
    told: dict[str, Any] = json.loads(_bench(empty_url, "--json", "--handlers", handlers))

    figures = {(figure["profile"], figure["name"]): figure["value"] for figure in told["figures"]}
    assert {profile for profile, _ in figures} == {"insert", "work", "latency", "mixed"}
    assert all(value >= 0 for value in figures.values())
    assert figures["latency", "idle, p50"] <= figures["latency", "idle, p95"] <= figures["latency", "idle, max"]
    assert told["settings"]["handlers"] == handlers
    assert set(told["versions"]) == {"postgresql", "sqlalchemy", "psycopg", "python"}
    assert ask(empty_url, SCHEMAS) == 0


def test_a_profile_that_is_named_is_measured_alone_and_shown_in_a_table(empty_url: str) -> None:
    shown = _bench(empty_url, "work")

    assert "| work " in shown
    assert "insert" not in shown
    assert "your server, in schema sqla_river_bench_" in shown
    assert "pooler" not in shown


# ---- the ground -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("ignored", ["options", "extra_float_digits"], ids=["drops options", "refuses options"])
def test_a_bench_through_a_pooler_touches_no_row_and_no_table_of_the_user(
    url: str, engine: Engine, mode: str, ignored: str
) -> None:
    for state in JobState:
        make_job(engine, state=state)
    before, tables = ask(url, MINE), catalog(make_url(url))

    with pgbouncer(url, mode, ignored=ignored) as through:
        ended = _run(through, "insert", "work", "mixed")

    assert ask(url, MINE) == before
    assert catalog(make_url(url)) == tables
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "through a pooler" in ended.stdout


@contextmanager
def _login_whose_rights_are_another_roles(url: str) -> Generator[str]:
    name = f"river_{os.getpid()}"
    ask(url, f"CREATE ROLE {name}_owner; CREATE ROLE {name}_login LOGIN NOINHERIT IN ROLE {name}_owner")
    ask(url, f"GRANT CREATE ON DATABASE {make_url(url).database} TO {name}_owner")
    theirs = make_url(url).set(username=f"{name}_login").update_query_dict({"options": f"-crole={name}_owner"})
    try:
        yield theirs.render_as_string(hide_password=False)
    finally:
        ask(url, f"DROP OWNED BY {name}_owner CASCADE")
        ask(url, f"DROP ROLE {name}_login; DROP ROLE {name}_owner")


def test_the_schema_is_dropped_under_the_options_that_it_was_made_with(empty_url: str) -> None:
    with _login_whose_rights_are_another_roles(empty_url) as theirs:
        _bench(theirs, "insert")

        assert ask(empty_url, SCHEMAS) == 0


def test_where_no_server_answers_nothing_is_to_be_dropped_by_hand() -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        ended = _run(f"postgresql://postgres@127.0.0.1:{taken.getsockname()[1]}/postgres", "insert")

    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: the database says: connection failed")
    assert "schema" not in ended.stderr


# ---- signals --------------------------------------------------------------------------------------------------------

LOSE = """
import signal, threading, time, types, weakref

class Thing: ...

def lose():
    thing = Thing()
    watch = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    del thing
"""
IN_A_COMMIT = """
enqueue, count = profiles.enqueue, 0

def enqueue_and_lose(session, args):
    global count
    count += 1
    if count == 5:
        lose()
    return enqueue(session, args)

profiles.enqueue = enqueue_and_lose
"""
IN_A_BULK = """
measured = profiles.Measured

def measured_and_lose(number):
    if number == 5_000:
        lose()
    return measured(number)

items = profiles._items
def _items(*words):
    profiles.Measured = measured_and_lose
    yield from items(*words)
    profiles.Measured = measured

profiles._items = _items
"""
WHILE_JOBS_DRAIN = """
def sleep(seconds):
    if not lost:
        lost.append(True)
        lose()
    time.sleep(seconds)

lost = []
profiles.time = types.SimpleNamespace(**{**vars(time), "sleep": sleep})
"""
WHILE_A_JOB_DOES_NOT_START = """
class Deaf(threading.Semaphore):
    def acquire(self, *, timeout):
        if not lost:
            lost.append(True)
            lose()
        return super().acquire(timeout=timeout)

    def release(self):
        pass

lost = []
profiles.PATIENCE = 1
profiles.threading = types.SimpleNamespace(Semaphore=Deaf)
"""


@pytest.mark.parametrize(
    ("profile", "where"),
    [
        pytest.param("insert", IN_A_COMMIT, id="insert, in a commit"),
        pytest.param("insert", IN_A_BULK, id="insert, in a bulk"),
        pytest.param("mixed", IN_A_COMMIT, id="mixed, in a commit"),
        pytest.param("latency", IN_A_COMMIT, id="latency, in a commit"),
        pytest.param("latency", WHILE_A_JOB_DOES_NOT_START, id="latency, while a job does not start"),
        pytest.param("work", IN_A_BULK, id="work, in a bulk"),
        pytest.param("work", WHILE_JOBS_DRAIN, id="work, while jobs drain"),
    ],
)
def test_a_signal_whose_exception_python_forgot_ends_the_bench(empty_url: str, profile: str, where: str) -> None:
    """As of every exception in a callback of a weakref: it is printed, and that is all."""
    ended = _run(empty_url, "--jobs", "20000", "--seconds", "1", profile, first=LOSE + where)

    assert "Exception ignored" in ended.stderr
    assert (ended.returncode, ended.stdout) == (143, "")
    assert ended.stderr.endswith(INTERRUPTED)
    assert ask(empty_url, SCHEMAS) == 0


# ---- little, slow, failing ------------------------------------------------------------------------------------------


def test_a_rate_and_a_time_that_make_less_than_a_job_make_one(empty_url: str) -> None:
    told = json.loads(_bench(empty_url, "latency", "--seconds", "0.5", "--rate", "1", "--json"))

    assert "at 1 jobs/s, p50" in {figure["name"] for figure in told["figures"]}


FAILS = """
def measure_work(engine, settings, viewer):
    yield profiles.Figure("work", "half", 1.0, "x")
    raise {error}

profiles.PROFILES["work"] = measure_work
"""


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (FAILS.format(error="TimeoutError('nothing goes on')"), "Error: nothing goes on\n"),
        (
            "from sqlalchemy.exc import OperationalError"
            + FAILS.format(error="OperationalError('', {}, Exception('I stop'))"),
            "Error: the database says: I stop\n",
        ),
    ],
    ids=["patience", "database"],
)
def test_what_was_measured_before_a_profile_fails_is_shown(empty_url: str, first: str, said: str) -> None:
    ended = _run(empty_url, "insert", "work", "mixed", "--json", first=first)

    assert (ended.returncode, ended.stderr) == (1, said)
    figures = json.loads(ended.stdout)["figures"]
    assert [figure["profile"] for figure in figures] == ["insert"] * 4 + ["work"]


class Clock:
    """On which a count of what is left comes every 125 seconds, while no time passes here."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        self.now += 125 / profiles.LOOKS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(profiles, "time", clock)
    return clock


def test_a_bench_waits_as_long_as_jobs_are_finished(engine: Engine, clock: Clock) -> None:
    for _ in range(5):
        make_job(engine, state=JobState.AVAILABLE)
    told: list[tuple[int, int]] = []

    def finish_one(done: int, of: int) -> None:
        told.append((done, of))
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_job WHERE id = (SELECT min(id) FROM river_job)"))

    profiles._drain(engine, 5, Viewer(finish_one, lambda: None))

    assert told == [(number, 5) for number in range(5)]
    assert clock.now > profiles.PATIENCE


def test_a_bench_gives_up_where_no_job_is_finished_for_long(engine: Engine, clock: Clock) -> None:
    make_job(engine, state=JobState.AVAILABLE)

    with pytest.raises(TimeoutError, match=r"^no job was finished within 300 s; 1 of 1 are left$"):
        profiles._drain(engine, 1, profiles.unseen(lambda: None))

    assert clock.now < profiles.PATIENCE + 125
