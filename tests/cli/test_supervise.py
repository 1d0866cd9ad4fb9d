"""`sqla-river work` with a supervisor: real processes, real signals."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from sqlalchemy import Engine

from tests.commands import COMMAND, environment, read_until, run
from tests.crashing import Ledger, runners
from tests.database import emptied, shared_database
from tests.making import count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.ports import reserved_port

APP: Final = """
import os, time
from datetime import timedelta
from pathlib import Path
from sqlalchemy import create_engine
from sqla_river import Runner, Workers, watch
from tests.making import Count, Greet

book = os.open("ledger", os.O_WRONLY | os.O_APPEND)
times = {"heartbeat": timedelta(seconds=0.3), "lease": timedelta(seconds=LEASE), "stop_timeout": timedelta(seconds=60)}
times["poll"] = timedelta(seconds=0.1)
workers = Workers()

def say(word, job):
    os.write(book, f"{word} {job.id} {os.getpid()}\\n".encode())

@workers.register(Count)
def work(job):
    say("start", job)
    if job.args.number == 1:  # is held
        while not Path("open").exists():
            if job.cancelled.wait(0.02):
                say("interrupted", job)
                raise RuntimeError
    if job.args.number == 2:  # is deaf
        time.sleep(600)
    say("end", job)

watch.STUCK_AFTER = 0.1

@workers.register(Greet, timeout=timedelta(seconds=0.1))
def greet(job):  # hangs
    time.sleep(600)

runner = Runner(create_engine(os.environ["DATABASE_URL"]), workers, queues={"default": 4}, **times)
"""


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    for engine in emptied(url):
        yield engine
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM river_runner")  # of those that were killed


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    (tmp_path / "app.py").write_text(APP.replace("LEASE", "2"))
    return Ledger(tmp_path / "ledger")


@contextmanager
def working(
    url: str, folder: Path, *words: str, command: list[str] = COMMAND, env: Mapping[str, str] = {}
) -> Generator[subprocess.Popen[str]]:
    """A supervisor in a process group of its own, all of which is killed in the end, or when it takes too long."""
    supervisor = subprocess.Popen(
        [*command, "work", "-A", "app:runner", *words],
        cwd=folder,
        env=environment({"DATABASE_URL": url, **env}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def end() -> None:
        try:
            os.killpg(supervisor.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    watchdog = threading.Timer(180, end)
    watchdog.start()
    try:
        yield supervisor
    finally:
        watchdog.cancel()
        end()
        supervisor.communicate()


def pids(engine: Engine) -> set[int]:
    """The processes whose runners have a row: they work, or were killed a short while ago."""
    return {int(runner_id.split(":")[1]) for runner_id in runners(engine)}


def got(port: str, path: str) -> str:
    """What the supervisor answers for all its processes."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return str(answer.read().decode())
    except HTTPError as error:
        with error:
            return str(error.read().decode())


def is_held(ledger: Ledger, count: int = 1) -> list[int]:
    """The processes that hold a job, once there are so many jobs held."""

    def held() -> list[int]:
        return [int(pid) for word, _, pid in ledger.lines() if word == "start"]

    return eventually(lambda: held() if len(held()) >= count else [], within=60, what="a job to be held")


def test_processes_are_restarted_replaced_and_stopped_without_losing_a_job(
    url: str, engine: Engine, ledger: Ledger
) -> None:
    folder = ledger.path.parent
    words = ("--processes", "2", "--queues", "default=3,emails=1", "--metrics-port", "0")
    with working(url, folder, *words) as supervisor:
        port = read_until(supervisor, "(place 2) works").partition("/readyz on port ")[2].split()[0]
        first = pids(engine)
        assert len(first) == 2
        with engine.connect() as connection:
            queues = connection.exec_driver_sql("SELECT DISTINCT queues, slots FROM river_runner").all()
        assert [tuple(row) for row in queues] == [(["default", "emails"], [3, 1])]

        job = make_job(engine, args={"number": 1})
        (victim,) = is_held(ledger)
        os.kill(victim, signal.SIGKILL)
        said = read_until(supervisor, "starts in 1 s")
        assert f"process {victim}" in said
        assert "was killed by signal 9" in said
        read_until(supervisor, ") works")
        is_held(ledger, 2)  # by another one, though it is held still
        (folder / "open").touch()
        eventually(lambda: read_job(engine, job)["state"] == "completed", within=60)
        second = pids(engine) - {victim}
        assert len(first & second) == 1

        supervisor.send_signal(signal.SIGHUP)
        more = make_jobs(engine, 200)
        said = read_until(supervisor, ") has stopped") + read_until(supervisor, "(place 2) has stopped")
        assert said.index("(place 1) works") < said.index("(place 1) has stopped") < said.index("(place 2) works")
        eventually(lambda: count_states(engine) == {"completed": len(more) + 1}, within=60)
        total = f'sqla_river_jobs_completed_total{{kind="count",queue="default"}} {len(more) + 1}.0'
        eventually(lambda: total in got(port, "/metrics"), within=60, what="the work of all, the replaced ones too")
        eventually(lambda: got(port, "/readyz") == "ok\n", within=60, what="word that all are well")
        third = pids(engine) - {victim}
        assert (len(third), third & (first | second)) == (2, set())

        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60)
        assert supervisor.returncode == 0, said

    assert "Traceback" not in said
    assert pids(engine) <= {victim}
    assert {row["attempt"] for row in read_jobs(engine) if row["id"] in more} == {1}


def test_a_signal_to_the_whole_group_counts_once_and_a_second_one_interrupts(
    url: str, engine: Engine, ledger: Ledger
) -> None:
    """As systemd sends it by default, or Ctrl-C in a terminal."""
    with working(url, ledger.path.parent, "--processes", "2") as supervisor:
        read_until(supervisor, "(place 2) works")
        job = make_job(engine, args={"number": 1})
        is_held(ledger)
        os.killpg(supervisor.pid, signal.SIGINT)
        read_until(supervisor, ") has stopped")  # the one that has no job
        assert read_job(engine, job)["state"] == "running"
        assert not ledger.count("interrupted")
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60)
        assert supervisor.returncode == 0, said

    assert ledger.count("interrupted") == {job: 1}
    assert (read_job(engine, job)["state"], read_job(engine, job)["attempt"]) == ("available", 0)
    assert pids(engine) == set()


def test_processes_whose_supervisor_is_killed_finish_their_jobs_and_stop(
    url: str, engine: Engine, ledger: Ledger
) -> None:
    with working(url, ledger.path.parent, "--processes", "2") as supervisor:
        read_until(supervisor, "(place 2) works")
        job = make_job(engine, args={"number": 1})
        is_held(ledger)
        supervisor.kill()
        eventually(lambda: len(pids(engine)) == 1, within=60, what="the idle one to stop")
        assert read_job(engine, job)["state"] == "running"
        (ledger.path.parent / "open").touch()
        said, _ = supervisor.communicate(timeout=60)  # until the last process has closed it

    assert "the supervisor is gone" in said
    assert (read_job(engine, job)["state"], read_job(engine, job)["attempt"]) == ("completed", 1)
    assert pids(engine) == set()


def test_a_process_full_of_hung_handlers_is_followed_by_another_and_one_that_does_not_stop_is_killed(
    url: str, engine: Engine, ledger: Ledger
) -> None:
    program = "from sqla_river.cli import crew, main; crew.GRACE = 0.3; main()"
    with working(url, ledger.path.parent, "--max-jobs", "1000", command=[sys.executable, "-c", program]) as supervisor:
        read_until(supervisor, ") works")
        make_jobs(engine, 5, kind="greet", args={"name": "you"}, max_attempts=1)  # one more than there are slots
        said = read_until(supervisor, "starts in 1 s")
        assert "too many handlers hang" in said
        assert "ended with exit code 1" in said
        read_until(supervisor, ") works")

        make_job(engine, args={"number": 2})
        is_held(ledger)
        supervisor.terminate()
        read_until(supervisor, "another signal interrupts them")
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60)

    assert "does not stop, and is killed" in said
    assert supervisor.returncode == 1


def test_a_process_that_has_worked_its_jobs_is_replaced_without_losing_any(
    url: str, engine: Engine, ledger: Ledger
) -> None:
    (ledger.path.parent / "app.py").write_text(APP.replace("LEASE", "0.9"))
    with working(url, ledger.path.parent, "--max-jobs", "20", "--max-rss", "90G") as supervisor:
        read_until(supervisor, ") works")
        make_jobs(engine, 20)
        said = read_until(supervisor, "has worked 20 jobs, and is replaced")
        make_jobs(engine, 10)
        said += read_until(supervisor, ") has stopped")
        assert said.count(") works") == 1
        make_jobs(engine, 5)
        eventually(lambda: count_states(engine) == {"completed": 35}, within=60)
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60)
        assert supervisor.returncode == 0, said

    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    assert len({pid for word, _, pid in ledger.lines() if word == "end"}) == 2


def test_reload_runs_what_was_written_last(url: str, engine: Engine, ledger: Ledger) -> None:
    folder = ledger.path.parent
    words = folder / ".elsewhere" / "words.py"  # watched only because it is imported
    words.parent.mkdir()
    words.write_text("word = 'old'")
    app = "import sys; sys.path.append('.elsewhere'); import words\n" + APP.replace("LEASE", "2")
    app = app.replace('say("end"', "say(words.word")
    (folder / "app.py").write_text(app)
    with working(url, folder, "--reload", env={"PYTHONDONTWRITEBYTECODE": "1"}) as supervisor:
        read_until(supervisor, ") works")
        old = make_job(engine)
        eventually(lambda: count_states(engine) == {"completed": 1}, within=60)
        words.write_text("word = 'newer'")
        assert "words.py has changed" in read_until(supervisor, ") works")
        new = make_job(engine)
        eventually(lambda: count_states(engine) == {"completed": 2}, within=60)

        (folder / "app.py").write_text(app + "(")
        said = read_until(supervisor, "another one starts when a file has changed")
        assert "app.py has changed" in said
        assert "SyntaxError" in said
        (folder / "app.py").write_text(app)
        read_until(supervisor, ") works")
        os.killpg(supervisor.pid, signal.SIGINT)
        said, _ = supervisor.communicate(timeout=60)
        assert supervisor.returncode == 0, said

    assert (ledger.count("old"), ledger.count("newer")) == ({old: 1}, {new: 1})


@pytest.mark.parametrize("words", [("--processes", "2"), ("--max-jobs", "1000"), ("--reload",)])
def test_a_supervisor_answers_on_the_port_that_it_was_given(url: str, ledger: Ledger, words: tuple[str, ...]) -> None:
    with (
        reserved_port("") as number,
        working(url, ledger.path.parent, *words, "--metrics-port", str(number)) as supervisor,
    ):
        port = str(number)
        assert f"on port {port}" in read_until(supervisor, ") works")
        eventually(lambda: got(port, "/readyz") == "ok\n", within=60)
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=60)
        assert supervisor.returncode == 0, said


@pytest.mark.parametrize("where", ["", "2>log", ">log 2>log"])
def test_a_terminal_that_is_closed_stops_them_wherever_they_write(
    url: str, engine: Engine, ledger: Ledger, where: str
) -> None:
    terminal = "import pty, sys; pty.spawn(sys.argv[1:])"
    command = [sys.executable, "-c", terminal, "sh", "-c", f'exec "$@" {where}', "sh", *COMMAND]
    with working(url, ledger.path.parent, "--processes", "2", command=command) as spawner:
        eventually(lambda: len(pids(engine)) == 2, within=30)
        spawner.kill()
        eventually(lambda: pids(engine) == set(), within=30)


def test_an_app_that_is_not_there_is_told_once_and_not_tried_again(tmp_path: Path) -> None:
    ended = run("work", "-A", "no_such_module:runner", "--processes", "4", cwd=tmp_path)

    assert ended.returncode == 2
    assert ended.stderr.count("there is no module 'no_such_module'") == 1
    assert "Traceback" not in ended.stderr
