"""A runner inside the development server: one, and only where requests are served."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from flask import Flask
from sqlalchemy import Engine, create_engine, text

from sqla_river import create_all
from tests.ext.flask_app import create_app
from tests.making import eventually
from tests.working import settled

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0


@contextmanager
def served(folder: Path, url: str, *words: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    """``flask run``, and its address."""
    (folder / "app.py").write_text("from tests.ext.flask_app import create_app\n")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", "flask", "run", "--port", "0", *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": path,
            "FLASK_SQLALCHEMY_DATABASE_URI": url,
            "FLASK_SQLA_RIVER_IN_PROCESS": "true",
        },
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        yield (
            process,
            next(found[0] for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line))),
        )
    finally:
        with process, suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ask(address: str, path: str, *, method: str = "GET") -> int:
    with urlopen(Request(f"{address}{path}", method=method), timeout=PATIENCE) as answer:
        return int(answer.read())


def runners(engine: Engine) -> list[int]:
    """The processes that runners live in."""
    with engine.connect() as connection:
        ids = connection.execute(text("SELECT id FROM river_runner")).scalars()
        return [int(each.split(":")[1]) for each in ids]


def test_under_the_reloader_the_child_alone_has_a_runner_and_a_reload_replaces_it(
    tmp_path: Path, engine: Engine, url: str
) -> None:
    with served(tmp_path, url, "--debug") as (parent, address):
        eventually(lambda: runners(engine), PATIENCE)  # before anybody asks for anything
        child = ask(address, "/pid")
        row = settled(engine, ask(address, "/jobs", method="POST"), PATIENCE)
        assert (row["state"], row["metadata"]["output"]["pid"]) == ("completed", child)
        assert runners(engine) == [child] != [parent.pid]

        (tmp_path / "app.py").write_text("from tests.ext.flask_app import create_app  # changed\n")
        eventually(lambda: runners(engine) not in ([child], []), PATIENCE)
        second = ask(address, "/pid")
        settled(engine, ask(address, "/jobs", method="POST"), PATIENCE)
        assert runners(engine) == [second] != [child]

        os.kill(second, signal.SIGTERM)
        parent.communicate(timeout=PATIENCE)
        assert runners(engine) == []


def test_without_the_reloader_the_server_has_a_runner(tmp_path: Path, engine: Engine, url: str) -> None:
    with served(tmp_path, url) as (server, address):
        eventually(lambda: runners(engine), PATIENCE)
        settled(engine, ask(address, "/jobs", method="POST"), PATIENCE)

        assert runners(engine) == [server.pid]


@pytest.fixture
def app(empty_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    """An app of another server, which Flask's commands know nothing of; its database is empty."""
    monkeypatch.setenv("FLASK_SQLALCHEMY_DATABASE_URI", empty_url)
    monkeypatch.setenv("FLASK_SQLA_RIVER_IN_PROCESS", "true")
    app = create_app()
    yield app
    with app.app_context():
        app.extensions["sqlalchemy"].engine.dispose()


def starter(app: Flask) -> Any:
    return getattr(app.wsgi_app, "__self__")  # noqa: B009


def test_with_another_server_the_first_request_starts_it_and_a_failed_start_is_tried_again(
    app: Flask, empty_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(empty_url)
    with caplog.at_level(logging.ERROR):
        assert app.test_client().get("/pid").status_code == 200
        eventually(lambda: "table river_job is missing" in caplog.text)
        eventually(lambda: not starter(app)._begun)
    create_all(engine)

    assert app.test_client().get("/pid").status_code == 200
    eventually(lambda: starter(app).runner)
    app.test_client().get("/pid")
    assert runners(engine) == [os.getpid()]

    starter(app).runner.stop()
    engine.dispose()


def test_an_app_under_test_has_none(app: Flask) -> None:
    app.testing = True
    app.test_client().get("/pid")

    assert not starter(app)._begun
