"""Metrics of several processes: their files in one folder, before and after a fork."""

import os
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import click
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Engine, text

from sqla_river import Runner
from sqla_river.cli.serving import FOLDER, serve, serve_processes
from sqla_river.errors import ConfigError
from sqla_river.ext.prometheus import make_wsgi_app, shared_health, watch
from sqla_river.ext.prometheus.shared import Shared
from tests.database import emptied, shared_database
from tests.making import eventually
from tests.working import handling, nothing, put

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    for engine in emptied(shared):
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE river_counter, river_history, river_queue, river_duty"))
        yield engine


SHARING = """
import sys
from sqlalchemy import create_engine
from sqla_river import Runner
from sqla_river.cli.serving import share
from tests.working import handling, nothing

runner = Runner(create_engine(sys.argv[1]), handling(nothing), queues={"default": 2})
share(runner)
with runner:
    print("works", flush=True)
    sys.stdin.readline()
"""


def test_processes_share_one_port_for_their_metrics_and_health(
    engine: Engine, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, "")  # to be put back as it was
    monkeypatch.delenv(FOLDER)
    serving = serve_processes(0)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, shared], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]

    def get(path: str) -> str:
        try:
            with urlopen(f"http://127.0.0.1:{serving.port}{path}", timeout=10) as answer:
                return str(answer.read().decode())
        except HTTPError as error:
            with error:
                return str(error.read().decode())

    try:
        assert get("/readyz") == "no process has started yet\n"
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "works\n"
        put(engine, *range(40))
        total = 'sqla_river_jobs_completed_total{kind="count",queue="default"} 40.0'
        eventually(lambda: total in get("/metrics"), 20, "all of them, wherever they ran")
        for part in ('loop_age_seconds{loop="fetch"}', 'queue_depth{queue="default",state="available"}'):
            eventually(lambda: f"sqla_river_{part}" in get("/metrics"), 20, part)  # noqa: B023
        eventually(lambda: get("/readyz") == "ok\n", 20, "both to be well")

        processes[0].send_signal(signal.SIGSTOP)
        eventually(lambda: not shared_health(timedelta(seconds=2)).alive, 20, "word that one is frozen")
        said = shared_health(timedelta(seconds=2)).problems
        processes[0].kill()
        processes[0].wait(20)
        eventually(lambda: shared_health(timedelta(seconds=2)).ready, 20, "the other to be well")
        assert total in get("/metrics")  # what the dead one counted stays
    finally:
        processes[0].kill()
        for process in processes:
            process.communicate("\n", timeout=20)
        serving.stop()

    assert "has said nothing" in said[0]
    assert processes[1].returncode == 0


PREFORK = """
import os, sys
from prometheus_client import Counter
from sqlalchemy import create_engine
from sqla_river import Runner
from sqla_river.ext.prometheus import watch
from tests.working import handling, nothing

views = Counter("views", "A metric of the application's own.")
runner = Runner(create_engine(sys.argv[1]), handling(nothing), queues={"default": 2})
watch(runner)

def child(works):
    if os.fork() == 0:
        views.inc()
        if works:
            runner.start()
        print("forked", flush=True)
        os.read(0, 1)
        runner.stop()
        os._exit(0)

"""
LOADED_BEFORE = "child(True)\nchild(False)\nos.read(0, 1)"
STARTED_BEFORE = "runner.start()\nprint('works', flush=True)\nos.read(0, 1)\nchild(False)\nos.read(0, 1)\nrunner.stop()"


@contextmanager
def program(folder: Path, url: str, rest: str) -> Generator["subprocess.Popen[str]"]:
    """PREFORK, and then *rest*; its processes end with its input."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), FOLDER: str(folder), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-c", PREFORK + rest, url], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.communicate(timeout=30)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def scraped() -> str:
    registry = CollectorRegistry()
    collector: Any = Shared()
    registry.register(collector)
    return generate_latest(registry).decode()


def test_a_server_may_load_the_application_before_it_forks(engine: Engine, shared: str, folder: Path) -> None:
    """The runner works in one child; the parent and the other child say nothing of it."""
    with program(folder, shared, LOADED_BEFORE) as process:
        assert [line_of(process), line_of(process)] == ["forked\n"] * 2
        eventually(lambda: shared_health().ready, what="the child that works to be well")
        put(engine, 1, 2)
        done = 'sqla_river_jobs_completed_total{kind="count",queue="default"} 2.0'
        eventually(lambda: done in scraped(), what="its jobs")
        first = shared_health(timedelta(seconds=2))
        said_at = [line for line in scraped().splitlines() if line.startswith("sqla_river_refresh_timestamp")]
        eventually(lambda: said_at[0] not in scraped(), what="it to look again")
        files = sorted(path.name for path in folder.glob("gauge_livemin_*"))

    assert first.problems == ()
    assert "views_total 2.0" in scraped()
    assert len(files) == 1


def test_a_child_of_a_process_that_has_a_runner_says_nothing_of_it(engine: Engine, shared: str, folder: Path) -> None:
    with program(folder, shared, STARTED_BEFORE) as process:
        assert line_of(process) == "works\n"
        eventually(lambda: shared_health().ready, what="the runner to be well")
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert line_of(process) == "forked\n"
        eventually(lambda: "views_total 1.0" in scraped(), what="the child's own metric")
        files = list(folder.glob("gauge_livemin_*"))
        health = shared_health()

    assert len(files) == 2  # prometheus_client wrote that of the child, by itself
    assert health.problems == ()


def test_a_folder_that_is_none_is_told(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "missing")
    monkeypatch.setenv(FOLDER, missing)
    runner = Runner(engine, handling(nothing), queues={"default": 1})
    calls: list[Any] = [lambda: watch(runner, CollectorRegistry()), make_wsgi_app, shared_health]
    for call in calls:
        with pytest.raises(ConfigError, match=f"PROMETHEUS_MULTIPROC_DIR must name a folder, got '{missing}'; make it"):
            call()
    commands: list[Any] = [lambda: serve(runner, 0), lambda: serve_processes(0)]
    for command in commands:
        with pytest.raises(click.ClickException, match="must name a folder"):
            command()
