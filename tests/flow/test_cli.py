"""The command line, as processes of their own: what they print, how they end, and what they leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sqla_river.cli.work import find_runner
from tests.commands import ROOT, ask, environment, read_until, run, start, wait_for

COMMANDS = ("demo", "migrate", "stats")
LACKING = (["work", "-A", "greeting:runner"], ["stats"], ["jobs", "list"], ["bench", "insert"])
HURRY = {"SHOP_PAY_WITHIN": "2", "SHOP_SMS_PAUSE": "0.2", "SHOP_SENDING_TAKES": "0.01"}
SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'sqla_river_demo%'"
TABLES = "SELECT array_agg(oid::regclass::text ORDER BY oid) FROM pg_class WHERE relkind = 'r' AND oid >= 16384"
WORKER = """
from typing import ClassVar

import attrs
from sqlalchemy import create_engine
from sqla_river import JobContext, Runner, Workers

@attrs.frozen
class Greet:
    kind: ClassVar[str] = "greet"
    name: str

workers = Workers()

@workers.register(Greet)
def greet(job: JobContext[Greet]) -> None:
    job.log.info("hello, %s", job.args.name)

engine = create_engine({url!r})
runner = Runner(engine, workers, queues={{"default": 1}})
def make(): return Runner(engine, workers, queues={{"default": 1}})
number = 7
"""
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@pytest.fixture
def base() -> Iterator[Path]:
    """A TMPDIR of the test's own, which marks what is its; short, and open to the account that runs the server."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


def traces(base: Path) -> list[str]:
    """Folders and processes that are left of what ran with *base* as its TMPDIR."""
    found = [str(path) for path in base.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(base) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile, or not ours
            continue
    return found


# ---- demo -----------------------------------------------------------------------------------------------------------


@needs_proc
def test_demo_tells_its_story_and_leaves_nothing(base: Path) -> None:
    ended = run("demo", env=HURRY | {"TMPDIR": str(base)})

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not ended.stderr
    for part in (
        "order 4: still pending; jobs before: 14, jobs now: 14",
        "failed in attempt 1 of 3: GatewayError",
        "SMS sent, in attempt 2",
        "order 5: not paid in time, cancelled; 1 back on the shelf",
        "1,000 of 1,000 notices sent",
        "| send_notice |     1,000 |",
        "orders: 1 cancelled, 4 paid; teapots: 96 on the shelf, 0 set aside; points: 40",
    ):
        assert part in ended.stdout
    assert "\x1b" not in ended.stdout
    assert traces(base) == []


def test_demo_leaves_a_server_of_the_users_as_it_was(url: str) -> None:
    before = ask(url, TABLES)

    ended = run("demo", "--orders", "3", "--database-url", url, env=HURRY)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "in schema sqla_river_demo_" in ended.stdout
    assert ask(url, TABLES) == before
    assert ask(url, SCHEMAS) == 0
    assert ask(url, "SELECT count(*) FROM river_job") == 0


@needs_proc
@pytest.mark.parametrize("sign", ["imports", "river-*", "river-*/data/PG_VERSION", "river-*/.s.PGSQL.5432"])
def test_interrupt_while_the_demo_starts_leaves_nothing(base: Path, sign: str) -> None:
    process = start("demo", env=HURRY | {"TMPDIR": str(base)})
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "sqlalchemy" in maps.read_text() if sign == "imports" else any(base.glob(sign)))
    process.send_signal(signal.SIGINT)

    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    wait_for(lambda: not traces(base))


INTERRUPTED_IN_A_CALLBACK = """
import os, signal, sys, weakref
from sqla_river.cli import main

class Module: ...

class Interrupts:
    def find_spec(self, name, *_):
        if name == "rich":
            module = Module()
            watch = weakref.ref(module, lambda _: os.kill(os.getpid(), signal.SIGINT))
            del module

sys.meta_path.insert(0, Interrupts())
sys.argv = ["sqla-river", "--version"]
main()
"""


def test_an_interrupt_in_a_callback_of_an_import_is_neither_lost_nor_printed_by_python() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IN_A_CALLBACK], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


@needs_proc
@pytest.mark.parametrize(
    ("words", "number", "times"),
    [
        ("is ready", signal.SIGINT, 1),
        ("orders placed", signal.SIGINT, 1),
        ("notices enqueued", signal.SIGINT, 3),
        ("| kind", signal.SIGINT, 1),
        ("notices enqueued", signal.SIGTERM, 1),
    ],
)
def test_interrupt_while_the_demo_runs_leaves_nothing(
    base: Path, words: str, number: signal.Signals, times: int
) -> None:
    process = start("demo", env=HURRY | {"TMPDIR": str(base)})
    read_until(process, words)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0)

    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    wait_for(lambda: not traces(base))


@pytest.mark.parametrize("words", ["is ready", "notices enqueued"])
def test_interrupted_demo_drops_its_schema(empty_url: str, words: str) -> None:
    process = start("demo", env=HURRY | {"DATABASE_URL": empty_url})
    read_until(process, words)
    process.send_signal(signal.SIGINT)

    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("interrupted; all that was started is stopped and removed\n")
    assert ask(empty_url, SCHEMAS) == 0


# ---- migrate, stats -------------------------------------------------------------------------------------------------


def test_migrate_says_what_it_found_and_did(empty_url: str) -> None:
    first, second = (
        run("migrate", "--database-url", empty_url),
        run("migrate", env={"SQLA_RIVER_DATABASE_URL": empty_url}),
    )

    assert first.stdout == "schema 'public': created the tables, version 1\n"
    assert second.stdout == "schema 'public': version 1 already, nothing to do\n"


def test_check_db_says_what_is_wrong_and_migrate_mends_it(url: str, empty_url: str) -> None:
    missing = run("check-db", "--database-url", empty_url)
    ask(url, "DROP INDEX river_job_due_idx")
    damaged = run("check-db", "--database-url", url)
    repaired = run("migrate", "--database-url", url)
    sound = run("check-db", "--database-url", url)

    assert (missing.returncode, "river_job is missing" in missing.stdout) == (1, True)
    assert damaged.stdout.startswith("warning: index river_job_due_idx")
    assert "repaired" in repaired.stdout
    assert sound.stdout == "the tables are as sqla_river needs them, version 1\n"


def test_migrate_makes_the_schema_that_it_is_given(empty_url: str) -> None:
    scheme, _, rest = empty_url.partition("://")
    assert scheme == "postgresql+psycopg"

    ended = run("migrate", "--schema", "jobs", env={"DATABASE_URL": f"postgres://{rest}"})

    assert ended.stdout == "schema 'jobs': created the tables, version 1\n"
    assert ask(empty_url, "SELECT to_regclass('jobs.river_job') IS NOT NULL AND to_regclass('river_job') IS NULL")


def test_stats_counts_queues_and_states(url: str) -> None:
    ask(url, "INSERT INTO river_job (kind, args, queue) SELECT 'a', '{}', 'mail' FROM generate_series(1, 1200)")
    ask(url, "INSERT INTO river_job (kind, args, state) VALUES ('a', '{}', 'retryable')")

    table, as_json = run("stats", "--database-url", url), run("stats", "--json", "--database-url", url)

    assert "| queue   | available | retryable | oldest | done/s | failed/s |" in table.stdout
    assert "| mail    |     1,200 |           |" in table.stdout
    found = json.loads(as_json.stdout)
    assert set(found) == {"default", "mail"}
    assert (found["default"]["retryable"], found["mail"]["available"]) == (1, 1200)
    assert found["mail"]["oldest_available_seconds"] >= 0


def test_stats_of_no_jobs_and_of_no_tables(url: str, empty_url: str) -> None:
    none, missing = run("stats", "--database-url", url), run("stats", "--database-url", empty_url)

    assert none.stdout == "no jobs\n"
    assert missing.returncode == 1
    assert "run 'sqla-river migrate'" in missing.stderr


# ---- work -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("app", "number"),
    [("greeting:runner", signal.SIGTERM), ("greeting:make", signal.SIGINT), ("greeting:runner", signal.SIGHUP)],
)
def test_work_works_until_a_signal_and_ends_with_0(url: str, tmp_path: Path, app: str, number: signal.Signals) -> None:
    (tmp_path / "greeting.py").write_text(WORKER.format(url=url))
    ask(url, """INSERT INTO river_job (kind, args) VALUES ('greet', '{"name": "Ada"}')""")
    process = start("work", "-A", app, cwd=tmp_path)
    read_until(process, "hello, Ada")
    process.send_signal(number)

    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "has stopped" in said
    assert ask(url, "SELECT state::text FROM river_job") == "completed"


def test_the_shop_works_as_its_readme_says(url: str) -> None:
    env = environment({"DATABASE_URL": url} | HURRY)
    subprocess.run([sys.executable, "-m", "shop"], cwd=ROOT / "examples", env=env, timeout=60, check=True)
    process = start("work", "-A", "shop.worker:runner", cwd=ROOT / "examples", env=env)
    wait_for(lambda: ask(url, "SELECT count(*) FROM river_job WHERE state = 'completed'") == 5)
    process.send_signal(signal.SIGTERM)

    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "SMS sent, in attempt 2" in said
    assert "back on the shelf" in said


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("greeting", "-A is MODULE:NAME"),
        (":runner", "-A is MODULE:NAME"),
        ("no_such_module:runner", "there is no module 'no_such_module'"),
        ("greeting.deeper:runner", "there is no module 'greeting.deeper'"),
        ("greeting:no_such_name", "'greeting' has no 'no_such_name'"),
        ("greeting:number", "'greeting:number' is of type int, neither a Runner"),
        ("greeting:Greet", "'greeting:Greet' is the class Greet, neither a Runner"),
    ],
)
def test_work_says_what_is_wrong_with_its_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: str, said: str
) -> None:
    (tmp_path / "greeting.py").write_text(WORKER.format(url="postgresql+psycopg://"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "greeting", raising=False)

    with pytest.raises(click.UsageError, match=said):
        find_runner(app)


def test_work_without_a_runner_is_a_mistake_in_usage(tmp_path: Path) -> None:
    ended = run("work", cwd=tmp_path, env={"SQLA_RIVER_APP": "no_such_module:runner"})

    assert ended.returncode == 2
    assert "there is no module 'no_such_module'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_work_shows_where_the_module_itself_fails(tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text("import no_such_dependency")

    ended = run("work", "-A", "greeting:runner", cwd=tmp_path)

    assert ended.returncode == 1
    assert "greeting.py" in ended.stderr


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "url", "code", "said"),
    [
        *((command, "postgresql://me:secret@127.0.0.1:1/db", 1, "the database says") for command in COMMANDS),
        ("migrate", "postgresql://me:secret@host:port/db", 2, "not a database URL"),
        ("migrate", "me:secret@host", 2, "not a database URL"),
        ("migrate", "mysql://me:secret@host/db", 2, "got 'mysql'"),
    ],
)
def test_bad_database_is_told_without_its_password(command: str, url: str, code: int, said: str) -> None:
    ended = run(command, "--database-url", url)

    assert ended.returncode == code
    assert said in ended.stderr
    assert "secret" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_migrate_without_a_database_names_the_ways_to_say_it() -> None:
    ended = run("migrate")

    assert ended.returncode == 2
    assert "SQLA_RIVER_DATABASE_URL" in ended.stderr


@pytest.mark.parametrize("name", ["click", "rich"])
def test_missing_extra_is_named(name: str) -> None:
    program = f"import sys; sys.modules[{name!r}] = None; from sqla_river.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", program, "demo"], env=environment({}), capture_output=True, text=True, check=False
    )

    assert ended.returncode == 1
    assert ended.stderr == f"sqla-river needs {name}; run pip install 'sqla-river[cli]'\n"


NO_LIBPQ = """
import ctypes.util, sys
sys.modules |= {"psycopg_binary": None, "psycopg_c": None}
ctypes.util.find_library = lambda name: None
from sqla_river.cli import main; main()
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, ""),
        (["--help"], 0, ""),
        (["work", "--help"], 0, ""),
        *((words, 1, "psycopg finds no libpq; run pip install 'sqla-river[binary]'\n") for words in LACKING),
    ],
)
def test_without_libpq_help_is_given_and_all_else_names_the_cure(
    tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "greeting.py").write_text(WORKER.format(url="postgresql+psycopg://"))
    ended = subprocess.run(
        [sys.executable, "-c", NO_LIBPQ, *words],
        cwd=tmp_path,
        env=environment({"DATABASE_URL": "postgresql://nowhere.invalid/db"}),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (code, said)
    assert bool(ended.stdout) == (code == 0)
