"""The recipes of examples/recipes, under the command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.database import shared_database

ROOT = Path(__file__).parents[2]
APP = """
import os
from recipes.structlog_lines import set_up
from sqlalchemy import create_engine
from sqla_river import Runner, Workers

set_up()
runner = Runner(create_engine(os.environ["DATABASE_URL"]), Workers(), queues={"default": 1})
"""


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


def test_structlog_writes_each_line_once_under_the_command_work(url: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    path = os.pathsep.join([str(ROOT / "examples"), str(ROOT)])
    command = [sys.executable, "-m", "sqla_river.cli", "work", "-A", "app:runner"]
    env = {**os.environ, "DATABASE_URL": url, "PYTHONPATH": path}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said: list[str] = []
    while "works queues" not in (line := process.stderr.readline()):
        assert line, said
        said.append(line)
    said.append(line)
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=30)

    events = [json.loads(line)["event"] for line in (*said, *rest.splitlines())]
    assert process.returncode == 0
    assert sum("works queues" in event for event in events) == 1
    assert sum("has stopped" in event for event in events) == 1
