"""Examples as real processes: started, asked by HTTP, and ended by a signal."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from sqlalchemy import Engine, text

from tests.making import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"
HURRY = {"SHOP_SMS_PAUSE": "0.05", "SHOP_EMAIL_PAUSE": "0.05", "SHOP_SENDING_TAKES": "0"}
PATIENCE = 60.0
"""Seconds; an idle machine needs two for the start of a process."""


class Process:
    """A program of the examples' folder, on the database *url*."""

    def __init__(self, folder: Path, url: str, *words: str) -> None:
        self._said = folder / f"{words[0]}.txt"
        path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
        env = {**os.environ, **HURRY, "DATABASE_URL": url, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        program = Path(sys.executable).parent / words[0]
        with self._said.open("w") as said:
            self._process = subprocess.Popen([program, *words[1:]], env=env, cwd=EXAMPLES, stdout=said, stderr=said)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait_for(self, pattern: str) -> str:
        """What the group of *pattern* is in what the process says, once it does."""

        def found() -> re.Match[str] | None:
            assert self._process.poll() is None, self.said
            return re.search(pattern, self.said)

        match = eventually(found, PATIENCE, f"{pattern!r} in the output")
        assert match is not None
        return match[1]

    def stop(self) -> int:
        """Its exit code, after SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(PATIENCE)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)


@contextmanager
def process(folder: Path, url: str, *words: str) -> Generator[Process]:
    """Killed when the block ends, if it still runs."""
    started = Process(folder, url, *words)
    try:
        yield started
    finally:
        started.kill()


def run(folder: Path, url: str, *words: str) -> None:
    """A program that ends by itself, well."""
    started = Process(folder, url, *words)
    assert started._process.wait(PATIENCE) == 0, started.said


def ask(url: str, *, post: bool = False) -> tuple[int, str]:
    """The status and the page, redirections followed."""
    try:
        with urlopen(url, data=b"" if post else None, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def let_half_an_hour_go_by(engine: Engine) -> None:
    """So that the shop looks whether its orders were paid."""
    with engine.begin() as connection:
        due = "UPDATE river_job SET state = 'available', scheduled_at = now() WHERE kind = 'check_paid'"
        connection.execute(text(due))


def rows(page: str) -> list[list[str]]:
    """The rows of the tables of *page*, as the texts of their cells."""
    return [
        [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]
