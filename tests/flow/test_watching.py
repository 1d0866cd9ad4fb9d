"""Watching from the command line: `work --metrics-port`, `health`, and `stats` of what runners did."""

import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from sqlalchemy import create_engine, text

from sqla_river.cli.stats import BARS, bars
from tests.commands import COMMAND, ROOT, environment, read_until, run, start, wait_for
from tests.flow.test_cli import WORKER


def get(port: str, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_worker_shows_its_metrics_and_health_and_the_database_what_it_did(url: str, tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text(WORKER.format(url=url))
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("""INSERT INTO river_job (kind, args) VALUES ('greet', '{"name": "Ada"}')"""))
    before = run("health", "--database-url", url)
    process = start("work", "-A", "greeting:runner", "--metrics-port", "0", cwd=tmp_path)
    port = read_until(process, "on port").split()[-1]
    read_until(process, "hello, Ada")
    completed = 'sqla_river_jobs_completed_total{kind="greet",queue="default"} 1.0'
    wait_for(lambda: completed in get(port, "/metrics"))
    assert get(port, "/healthz") == get(port, "/readyz") == "ok\n"
    during, as_json = (run("health", "--database-url", url, *more) for more in ((), ("--json",)))
    taken = run("work", "-A", "greeting:make", cwd=tmp_path, env={"SQLA_RIVER_METRICS_PORT": port})
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    stats, stats_json = (run("stats", "--database-url", url, *more) for more in ((), ("--json",)))
    with engine.begin() as connection:
        assert connection.execute(text("SELECT count(*) FROM river_counter")).scalar() == 1
    engine.dispose()

    assert (before.returncode, before.stderr) == (1, "no runner lives\n")
    assert during.returncode == 0, during.stderr
    assert "| live  |" in during.stdout
    assert "default=1" in during.stdout
    (runner,) = json.loads(as_json.stdout)
    assert (runner["state"], runner["queues"]) == ("live", {"default": 1})
    assert taken.returncode == 1
    assert f"cannot listen on port {port}" in taken.stderr
    assert "| default |         1 |" in stats.stdout
    assert json.loads(stats_json.stdout)["default"]["completed"] == 1


def test_health_without_tables_says_the_cure(empty_url: str) -> None:
    ended = run("health", "--database-url", empty_url)

    assert ended.returncode == 1
    assert "river_job is missing" in ended.stderr
    assert "sqla-river migrate" in ended.stderr


def test_watch_goes_on_until_ctrl_c_in_a_pipe_and_on_a_terminal(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_job (kind, args) SELECT 'a', '{}' FROM generate_series(1, 1234)"))
        connection.execute(
            text("INSERT INTO river_history VALUES (date_trunc('minute', now()), 'default', 'completed', 4321)")
        )
    engine.dispose()
    words = ("stats", "--watch", "--every", "0.1", "--database-url", url)
    pipe = start(*words, "--json")
    for _ in range(2):
        assert '"available": 1234' in read_until(pipe, "default")
    pipe.send_signal(signal.SIGINT)
    rest, _ = pipe.communicate(timeout=60)
    assert (pipe.returncode, "Traceback" in rest) == (0, False)

    ours, theirs = pty.openpty()
    terminal = subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, env=environment({"TERM": "xterm"}), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while said.count(b"at most 4,321 a minute") < 2:
        said += os.read(ours, 65_536)
    terminal.send_signal(signal.SIGINT)
    assert terminal.wait(20) == 0
    os.close(ours)
    assert "1,234" in said.decode(errors="replace")
    assert BARS[-1] in said.decode(errors="replace")


@pytest.mark.parametrize(
    ("values", "drawn"), [([], ""), ([0, 0], "  "), ([1, 1000, 500], "▁█▄"), ([3], "█"), ([0, 8, 4, 1], " █▄▁")]
)
def test_bars_are_whole_for_the_largest_and_empty_for_zero_only(values: list[int], drawn: str) -> None:
    assert bars(values) == drawn
