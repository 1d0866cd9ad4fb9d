"""`sqla-river jobs`: what it prints on a terminal and in a pipe, what it asks, and how it ends."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, create_engine

from sqla_river import create_all
from sqla_river.cli.app import app
from tests.database import emptied, shared_database
from tests.making import count_states, make_job, make_jobs, read_job, read_jobs

ROOT = Path(__file__).parents[2]
EVIL = "kind\x1b[31m\x07\u202e\n[red]x"
SAYS_ELSE = ("DATABASE_URL", "SQLA_RIVER_DATABASE_URL", "SQLA_RIVER_SCHEMA")


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def run(engine: Engine, *words: str, env: dict[str, str] | None = None) -> Result:
    """The command, in a pipe."""
    url = engine.url.render_as_string(hide_password=False)
    environment = dict.fromkeys(SAYS_ELSE) | {"DATABASE_URL": url} | (env or {})
    return CliRunner().invoke(app, ["jobs", *words], env=environment)


def on_a_terminal(engine: Engine, *words: str, answer: str | None = None) -> tuple[int, str]:
    """Its exit code and what it prints, on a terminal of its own; without an answer it is interrupted when it asks."""
    ours, theirs = pty.openpty()
    url = engine.url.render_as_string(hide_password=False)
    plain = {name: value for name, value in os.environ.items() if name not in SAYS_ELSE}
    process = subprocess.Popen(
        [sys.executable, "-c", "from sqla_river.cli import main; main()", "jobs", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**plain, "DATABASE_URL": url, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 60
    while True:
        if not select.select([ours], [], [], 0.5)[0]:
            assert time.monotonic() < deadline, said
            if answer is None and said.rstrip().endswith(b"[y/N]:"):  # one just before it read woke nobody: press again
                process.send_signal(signal.SIGINT)
            continue
        try:
            piece = os.read(ours, 10_000)
        except OSError:  # the other end is closed
            piece = b""
        if not piece:
            break
        said += piece
        if said.rstrip().endswith(b"[y/N]:"):
            if answer is None:
                process.send_signal(signal.SIGINT)
            else:
                os.write(ours, answer.encode())
    os.close(ours)
    return process.wait(20), said.decode()


# ---- looking ---------------------------------------------------------------------------------------------------------


def test_list_in_a_pipe_is_a_line_for_each_job_that_the_options_choose(engine: Engine) -> None:
    make_jobs(engine, 30, state="completed", finished_ago=None)
    vip = make_job(engine, kind="mail", queue="urgent", tags=["vip", "eu"], scheduled_at="2040-01-01 12:00Z")
    make_job(engine, kind="mail", queue="urgent", state="retryable", attempt=3, max_attempts=5)

    assert len(run(engine, "list").stdout.splitlines()) == 20
    assert run(engine, "list", "--tag", "vip", "--tag", "eu").stdout == (
        f"{vip}\tavailable\tmail\turgent\t1\t0/25\t2040-01-01 12:00:00Z\n"
    )
    lines = run(engine, "list", "--kind", "mail", "--queue", "urgent", "--state", "retryable").stdout.splitlines()
    assert [line.split("\t")[:6] for line in lines] == [["32", "retryable", "mail", "urgent", "1", "3/5"]]
    older = run(engine, "list", "--before", "32", "--limit", "2", "--json")
    assert [(job["id"], job["kind"]) for job in json.loads(older.stdout)] == [(31, "mail"), (30, "count")]
    assert run(engine, "list", "--queue", "none").stdout == ""


def test_list_on_a_terminal_is_a_table_that_steers_nothing(engine: Engine) -> None:
    make_jobs(engine, 2, kind="greet")
    make_job(engine, kind=EVIL)

    code, said = on_a_terminal(engine, "list", "--limit", "2")

    assert code == 0
    assert "state" in said
    assert said.count("greet") == 1
    assert r"kind\x1b[31m\x07\u202e\n[red]x" in said
    assert "there are more: --before 2" in said


def test_show_tells_all_but_the_args_unless_asked(engine: Engine) -> None:
    error = {"at": "2026-01-01T00:00:00Z", "attempt": 1, "error": "ValueError: no", "trace": "line 1\nline 2"}
    job_id = make_job(engine, state="discarded", args={"password": "hunter2"}, errors=[error], attempt=1)

    plain, whole = run(engine, "show", str(job_id)), run(engine, "show", str(job_id), "--args")
    assert "hunter2" not in plain.output
    assert "hidden; --args shows them" in plain.stdout
    assert "error in attempt 1, 2026-01-01T00:00:00Z: ValueError: no\n    line 1\n    line 2\n" in plain.stdout
    assert '{"password": "hunter2"}' in whole.stdout
    document = json.loads(run(engine, "show", str(job_id), "--json").stdout)
    assert "args" not in document
    assert (document["state"], document["errors"]) == ("discarded", [error])
    assert json.loads(run(engine, "show", str(job_id), "--json", "--args").stdout)["args"] == {"password": "hunter2"}
    assert "redact" in run(engine, "show", "--help").stdout

    missing = run(engine, "show", "4711")
    assert (missing.exit_code, missing.stderr) == (
        1,
        "Error: job 4711 does not exist; it may have been pruned or deleted\n",
    )


def test_show_takes_errors_that_are_no_objects(engine: Engine) -> None:
    job_id = make_job(engine, state="discarded")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE river_job SET errors = ARRAY['\"\\u001b[m\"', '[1, 2]', 'null', '{}']::jsonb[]"
        )

    shown = run(engine, "show", str(job_id))

    assert shown.exit_code == 0
    assert shown.stdout.splitlines()[-4:] == [
        r'error: "\u001b[m"',
        "error: [1, 2]",
        "error: null",
        "error in attempt None, None: None",
    ]


def test_what_would_steer_a_terminal_is_escaped(engine: Engine) -> None:
    error = {"at": EVIL, "attempt": 1, "error": EVIL, "trace": EVIL}
    job_id = make_job(
        engine, kind=EVIL, queue=EVIL, tags=[EVIL], metadata={EVIL: EVIL}, errors=[error], args={"a": EVIL}
    )

    show, show_json = ["show", str(job_id), "--args"], ["show", str(job_id), "--args", "--json"]
    for words in (["list"], ["list", "--json"], show, show_json):
        said = run(engine, *words).output
        assert not {"\x1b", "\x07", "\u202e"} & set(said), words
    assert run(engine, "list").stdout.split("\t")[2] == r"kind\x1b[31m\x07\u202e\n[red]x"


# ---- acting ----------------------------------------------------------------------------------------------------------


def test_retry_cancel_and_delete_by_ids_say_what_they_did_and_left(engine: Engine) -> None:
    done, running, waiting = (make_job(engine, state=state) for state in ("discarded", "running", "available"))
    ids = [str(done), str(running), "99"]

    retried = run(engine, "retry", *ids)
    assert (retried.exit_code, retried.stdout) == (1, "retried 1 job\n")
    assert retried.stderr == f"job {running} is left as it is: running\njob 99 is left as it is: gone\n"
    assert read_job(engine, done)["state"] == "available"
    assert run(engine, "cancel", "--yes", str(waiting), str(running)).stdout == "cancelled 2 jobs\n"
    assert count_states(engine) == {"available": 1, "running": 1, "cancelled": 1}
    deleted = run(engine, "delete", "--yes", "--json", *ids)
    assert deleted.exit_code == 1
    assert json.loads(deleted.stdout) == {"count": 1, "left": {str(running): "running", "99": "gone"}}
    good = run(engine, "delete", "--yes", str(waiting))
    assert (good.exit_code, good.stdout, good.stderr) == (0, "deleted 1 job\n", "")


def test_options_choose_what_can_be_done(engine: Engine) -> None:
    for state in ("available", "running", "completed", "discarded", "retryable"):
        make_jobs(engine, 2, state=state, queue="mail")
        make_jobs(engine, 1, state=state, queue="other")

    assert run(engine, "retry", "--state", "discarded", "--state", "retryable", "--queue", "mail").stdout == (
        "retried 4 jobs\n"
    )
    assert run(engine, "cancel", "--queue", "other", "--yes").stdout == "cancelled 3 jobs\n"
    assert run(engine, "delete", "--queue", "mail", "--limit", "3", "--yes").stdout == "deleted 3 jobs\n"
    rows = read_jobs(engine)
    assert sorted(row["state"] for row in rows if row["queue"] == "mail") == [
        *["available"] * 4,
        "completed",
        "running",
        "running",
    ]


def test_what_destroys_asks_on_a_terminal_and_needs_yes_in_a_pipe(engine: Engine) -> None:
    make_jobs(engine, 2, queue="mail")

    for verb in ("cancel", "delete"):
        piped = run(engine, verb, "--queue", "mail")
        assert (piped.exit_code, "needs --yes" in piped.stderr) == (2, True)
    code, said = on_a_terminal(engine, "cancel", "--queue", "mail", answer="n\n")
    assert (code, "cancel 2 jobs?" in said, "nothing done" in said) == (1, True, True)
    assert on_a_terminal(engine, "cancel", "1")[0] == 130
    assert count_states(engine) == {"available": 2}
    assert on_a_terminal(engine, "delete", "--queue", "mail", answer="y\n")[0] == 0
    assert count_states(engine) == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["retry"], "name jobs by their ids, or say their --state"),
        (["retry", "--queue", "mail"], "completed ones would run again"),
        (["cancel", "--yes"], "name jobs by their ids, or choose them"),
        (["delete", "--yes", "--limit", "3"], "name jobs by their ids, or choose them"),
        (["delete", "--yes", "1", "--queue", "mail"], "not both"),
        (["retry", "x"], "not a valid integer"),
        (["list", "--state", "lost"], "'lost' is not one of"),
        (["list", "--limit", "0"], "not in the range"),
    ],
)
def test_mistakes_in_usage_end_with_2_and_a_word(engine: Engine, words: list[str], said: str) -> None:
    make_job(engine)
    ended = run(engine, *words)

    assert (ended.exit_code, said in ended.stderr) == (2, True), ended.output
    assert count_states(engine) == {"available": 1}


def test_a_schema_of_its_own_and_tables_that_are_missing(empty_url: str) -> None:
    engine: Any = create_engine(empty_url)
    missing = run(engine, "list", "--schema", "jobs")
    create_all(engine, "jobs")
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL search_path TO jobs")
        make_job(connection, state="discarded")
    done = run(engine, "retry", "1", env={"SQLA_RIVER_SCHEMA": "jobs"})
    listed = run(engine, "list", "--schema", "jobs", "--json")
    engine.dispose()

    assert (missing.exit_code, "sqla-river migrate" in missing.stderr) == (1, True)
    assert (done.exit_code, done.stdout) == (0, "retried 1 job\n")
    assert json.loads(listed.stdout)[0]["state"] == "available"
