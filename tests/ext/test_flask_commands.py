"""``flask river``: what the commands say, and how ``work`` ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask
from sqlalchemy import Engine, text

from tests.database import emptied, shared_database
from tests.ext.flask_app import create_app
from tests.making import count_states, make_job, make_jobs
from tests.working import settled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture
def app(engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    yield from app_on(url, monkeypatch)


def app_on(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    monkeypatch.setenv("FLASK_SQLALCHEMY_DATABASE_URI", url)
    app = create_app()
    yield app
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


def river(app: Flask, *words: str) -> Result:
    return app.test_cli_runner().invoke(args=["river", *words])


def test_the_commands_are_listed(app: Flask) -> None:
    said = river(app, "--help").output

    for command in ("check-db", "migrate", "pause", "resume", "retry", "stats", "work"):
        assert f"\n  {command} " in said


def test_stats_counts_jobs_by_queue_and_state(app: Flask, engine: Engine) -> None:
    assert river(app, "stats").output == "no jobs\n"
    make_jobs(engine, 3)
    make_job(engine, queue="emails", state="running")

    assert river(app, "stats").output.split() == ["default", "available", "3", "emails", "running", "1"]
    assert json.loads(river(app, "stats", "--json").output) == {"default": {"available": 3}, "emails": {"running": 1}}


def paused(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        found = connection.execute(text("SELECT name FROM river_queue WHERE paused_at IS NOT NULL ORDER BY name"))
        return list(found.scalars())


def test_pause_and_resume(app: Flask, engine: Engine) -> None:
    for queue in ("emails", "sms"):
        assert river(app, "pause", queue).output.startswith(f"queue '{queue}' is paused since ")
    assert paused(engine) == ["emails", "sms"]

    assert river(app, "resume", "sms").output == "queue 'sms' is worked\n"
    assert paused(engine) == ["emails"]
    assert river(app, "resume", "*").exit_code == 0
    assert paused(engine) == []

    ended = river(app, "resume", "nobodys")
    assert (ended.exit_code, ended.output.startswith("Error: queue 'nobodys' ")) == (1, True)


def test_retry_makes_jobs_available_all_or_none(app: Flask, engine: Engine) -> None:
    first, second = make_jobs(engine, 2, state="discarded", attempt=25, max_attempts=25)

    ended = river(app, "retry", str(first), "4711")
    assert (ended.exit_code, ended.output.startswith("Error: job 4711 does not exist")) == (1, True)
    assert count_states(engine) == {"discarded": 2}

    ended = river(app, "retry", str(second), str(first))
    assert ended.output == f"job {first} (count) is available\njob {second} (count) is available\n"
    assert count_states(engine) == {"available": 2}


def test_check_db_and_migrate(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for app in app_on(empty_url, monkeypatch):
        before = river(app, "check-db")
        assert before.exit_code == 1
        assert "problem: table river_job is missing" in before.output
        assert river(app, "stats").exit_code == 1
        assert "river_job" in river(app, "work").output

        assert river(app, "migrate").exit_code == 0

        after = river(app, "check-db")
        assert (after.exit_code, "as sqla_river needs them" in after.output) == (0, True)


def test_errors_are_told_in_a_line(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    app.config["SQLA_RIVER_QUEUES"] = {}
    ended = river(app, "work")

    assert ended.exit_code == 1
    assert ended.output == "Error: queues is empty: a Runner needs at least one, as in queues={'default': 10}\n"


@pytest.mark.parametrize("said", ["default", "default=many", "default=1,"])
def test_queues_are_named_with_their_slots(app: Flask, said: str) -> None:
    ended = river(app, "work", "--queues", said)

    assert (ended.exit_code, "as in default=10,emails=50" in ended.output) == (2, True)


def test_work_works_until_sigterm_and_leaves_nothing(engine: Engine, url: str) -> None:
    job_id = make_job(engine, args={"number": 1})
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "flask",
            "--app",
            "tests.ext.flask_app",
            "river",
            "work",
            "--queues",
            "default=2,other=1",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "FLASK_APP": "tests.ext.flask_app",
            "FLASK_SQLALCHEMY_DATABASE_URI": url,
            "FLASK_SQLA_RIVER_QUEUES": '{"none": 1}',
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        row = settled(engine, job_id, within=30)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()

    assert process.returncode == 0
    assert "works queues default=2, other=1" in said
    assert (row["state"], row["metadata"]["output"]) == ("completed", {"pid": process.pid, "app": "counting"})
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM river_runner")).scalar() == 0
