"""`sqla-river queues`: what it prints for people and for programs, and what it asks before it does."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_river import create_all, list_queues
from sqla_river.cli.app import app
from tests.database import emptied, shared_database

COMMAND = [sys.executable, "-c", "from sqla_river.cli import main; main()", "queues"]
FOREIGN = {r"\x1b[31mred": "\x1b[31mred", "[bold]x[/bold]": "[bold]x[/bold]", r"two\nlines": "two\nlines"}
"""What is shown of names that no River would take, by direct SQL."""
SAYS_ELSE = ("DATABASE_URL", "TEST_DATABASE_URL", "SQLA_RIVER_DATABASE_URL", "SQLA_RIVER_SCHEMA")


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    for engine in emptied(url):
        yield engine
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_queue"))


def environment(url: str) -> dict[str, str | None]:
    return {**dict.fromkeys(SAYS_ELSE), "COLUMNS": "60", "SQLA_RIVER_DATABASE_URL": url}


def run(url: str, *words: str) -> Result:
    """In this process, where nobody can be asked."""
    return CliRunner().invoke(app, ["queues", *words], env=environment(url))


def run_on_a_terminal(url: str, *words: str, typed: str = "") -> tuple[int, str]:
    """Exit code and what stood on the screen."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "100"}
    words = (*words, "--database-url", url)
    process = subprocess.Popen([*COMMAND, *words], env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed.encode())
    screen = b""
    try:
        while chunk := os.read(ours, 65_536):
            screen += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    return process.wait(60), screen.decode()


def make(engine: Engine, *names: str) -> None:
    with engine.begin() as connection:
        for name in names:
            connection.execute(text("INSERT INTO river_queue (name) VALUES (:name)"), {"name": name})


def paused(engine: Engine) -> dict[str, bool]:
    with Session(engine) as session:
        return {info.name: info.paused_at is not None for info in list_queues(session)}


def test_pause_list_and_resume_in_a_pipe(engine: Engine, url: str) -> None:
    make(engine, "default", "mail")
    with engine.begin() as connection:
        noted = json.dumps({"why": "x" * 100})
        connection.execute(text("UPDATE river_queue SET metadata = :m WHERE name = 'mail'"), {"m": noted})

    first = run(url, "pause", "mail")
    table, as_json = run(url, "list"), run(url, "list", "--json")
    after = paused(engine)
    back: list[dict[str, Any]] = json.loads(run(url, "resume", "mail", "--json").stdout)

    assert (first.exit_code, first.stderr) == (0, "")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.stdout.strip().splitlines()]
    assert lines[0] == ["queue", "paused since (UTC)", "last touched (UTC)", "metadata"]
    assert [line[0] for line in lines[2:]] == ["default", "mail"]
    assert [bool(line[1]) for line in lines[2:]] == [False, True]
    assert lines[3][3] == noted
    assert table.stdout.isascii()
    rows = json.loads(as_json.stdout)
    assert [(row["name"], bool(row["paused_at"])) for row in rows] == [("default", False), ("mail", True)]
    assert rows[1]["metadata"] == json.loads(noted)
    assert rows[1]["updated_at"].endswith("+00:00")
    assert after == {"default": False, "mail": True}
    assert [(row["name"], row["paused_at"]) for row in back] == [("mail", None)]


def test_every_queue_is_paused_with_yes_in_a_pipe_and_not_without(engine: Engine, url: str) -> None:
    make(engine, "default", "mail")

    refused = run(url, "pause", "*")
    after_refusal = paused(engine)
    run(url, "pause", "*", "--yes")
    after_yes = paused(engine)
    run(url, "resume", "*")

    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert after_refusal == paused(engine) == {"default": False, "mail": False}
    assert after_yes == {"default": True, "mail": True}


def test_a_terminal_is_asked_before_every_queue_is_paused(engine: Engine, url: str) -> None:
    make(engine, *FOREIGN.values())

    refused, asked = run_on_a_terminal(url, "pause", "*", typed="n\n")
    after_refusal = paused(engine)
    done, screen = run_on_a_terminal(url, "pause", "*", typed="y\n")

    assert (refused, done) == (1, 0)
    assert "Pause every queue? [y/N]" in asked
    for shown, name in FOREIGN.items():
        assert shown in screen
        assert not after_refusal[name]
        assert paused(engine)[name]
    assert "\x1b[31mred" not in screen


def test_what_cannot_be_done_is_told_in_a_line(engine: Engine, url: str) -> None:
    none, unknown, bad = run(url, "list"), run(url, "resume", "mial"), run(url, "pause", "\x1b[31m")
    elsewhere = run(url, "list", "--schema", "nowhere")

    assert none.stdout == "no queues\n"
    assert (unknown.exit_code, "queue 'mial' has no row" in unknown.stderr) == (1, True)
    assert (bad.exit_code, "queue must be 1 to 64" in bad.stderr) == (2, True)
    assert (elsewhere.exit_code, "the tables are missing in schema 'nowhere'" in elsewhere.stderr) == (1, True)
    assert "Traceback" not in unknown.stderr + bad.stderr + elsewhere.stderr
    assert "\x1b" not in bad.stderr


def test_names_that_somebody_else_wrote_are_shown_and_not_obeyed(engine: Engine, url: str) -> None:
    make(engine, *FOREIGN.values())

    table = run(url, "list").stdout

    for shown in FOREIGN:
        assert shown in table
    assert "\x1b" not in table


def test_a_schema_is_meant_if_it_is_named(engine: Engine, url: str) -> None:
    create_all(engine, "jobs")
    try:
        run(url, "pause", "mail", "--schema", "jobs")
        rows = json.loads(run(url, "list", "--schema", "jobs", "--json").stdout)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA jobs CASCADE"))

    assert [row["name"] for row in rows] == ["mail"]
    assert paused(engine) == {}
