"""The command line, run as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from sqla_river.cli import main; main()"]
SAYS_ELSE = ("DATABASE_URL", "TEST_DATABASE_URL", "SQLA_RIVER_DATABASE_URL", "SQLA_RIVER_SCHEMA", "SQLA_RIVER_APP")


def environment(more: Mapping[str, str]) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in SAYS_ELSE}
    return {**plain, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "100", **more}


def run(*words: str, cwd: Path = ROOT, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=120, check=False
    )


def start(*words: str, cwd: Path = ROOT, env: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What *process* says, up to the line that holds *words*."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return said
    pytest.fail(f"it ended without a word of {words!r}:\n{said}")


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, "waited 60 seconds in vain"
        time.sleep(0.001)


def ask(url: str, sql: str) -> object:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        result = connection.execute(text(sql))
        return result.scalar() if result.returns_rows else None
