"""Runners that die: their rows, a database whose clock can be set, and processes that are killed or frozen."""

import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Engine, create_engine, text

import sqla_river
from sqla_river.context import JobContext
from sqla_river.duties.rescue import Rescue
from sqla_river.heartbeat import Fleet, Heartbeat
from sqla_river.rows import JobRow, row_of
from sqla_river.runner import Runner
from sqla_river.store import OwnConnection
from sqla_river.workers import Workers
from tests.making import Count

ROOT: Final = Path(sqla_river.__file__).parent.parent
LEASE: Final = timedelta(seconds=30)
QUICK: Final[dict[str, Any]] = {"heartbeat": timedelta(seconds=0.2), "lease": timedelta(seconds=1.2)}
"""Settings of a Runner whose death shows soon."""
FOR_EVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
_nonces = itertools.count()


def new_id(host: str = "host") -> str:
    """An id of the shape that ours have."""
    return f"{host}:1:{next(_nonces):016x}"


def make_runner(
    engine: Engine, runner_id: str | None = None, *, silent: timedelta = timedelta(0), alone: int | None = None
) -> str:
    """The row of a runner whose last word was *silent* ago, with a lease of 30 s. Its id."""
    runner_id = runner_id or new_id()
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_runner (id, heartbeat_at, lease, alone) "
                "VALUES (:id, now() - :silent, :lease, :alone) "
                "ON CONFLICT (id) DO UPDATE SET heartbeat_at = excluded.heartbeat_at, alone = excluded.alone"
            ),
            {"id": runner_id, "silent": silent, "lease": LEASE, "alone": alone},
        )
    return runner_id


def silence(engine: Engine, by: timedelta = timedelta(minutes=1)) -> None:
    """Let every runner's last word lie further back."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE river_runner SET heartbeat_at = heartbeat_at - :by"), {"by": by})


def runners(engine: Engine) -> list[str]:
    """The ids of the runners that have a row."""
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT id FROM river_runner ORDER BY id")).scalars())


def suspects(engine: Engine) -> dict[int, tuple[int, int]]:
    """Deaths, and deaths while alone, by job."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT job_id, deaths, alone FROM river_suspect"))
        return {row.job_id: (row.deaths, row.alone) for row in rows}


def sweep(own: OwnConnection, until: datetime | None = FOR_EVER) -> list[Any]:
    """One sweep by a runner that may rescue *until* then, to its end; what it freed."""
    freed: list[Any] = []
    duty = Rescue(lambda: until, freed.extend)
    while duty.do(own):
        pass
    return freed


def make_heart(
    own: OwnConnection,
    runner_id: str,
    *,
    every: float = 5.0,
    lease: float = 30.0,
    unfinished: Sequence[JobRow] = (),
    lost: Callable[[Sequence[JobRow]], None] = lambda rows: None,
    unknown: Callable[[Sequence[tuple[int, str]]], Sequence[tuple[int, str]]] = lambda running: (),
    rescued: Callable[[Sequence[Any]], None] = lambda freed: None,
    learnt: Callable[[Fleet], None] = lambda fleet: None,
) -> Heartbeat:
    """A heartbeat whose thread is the test."""
    slots = {"default": 1}
    return Heartbeat(
        own,
        runner_id,
        slots,
        every,
        lease,
        free=list,
        unfinished=lambda: unfinished,
        lost=lambda rows: lost(list(map(row_of, rows))),
        unknown=unknown,
        rescued=rescued,
        learnt=learnt,
    )


class Clock:
    """A database's clock that can be set, seen by the connections of `engine` only."""

    def __init__(self, url: str) -> None:
        self._plain = create_engine(url)
        self.engine = create_engine(url, connect_args={"options": "-c search_path=public,pg_catalog"})
        with self._plain.begin() as connection:
            connection.execute(text("CREATE TABLE clock AS SELECT interval '0' AS ahead"))
            for name in ("now", "clock_timestamp"):
                connection.execute(
                    text(
                        f"CREATE FUNCTION public.{name}() RETURNS timestamptz LANGUAGE sql STABLE AS "
                        f"'SELECT pg_catalog.{name}() + (SELECT ahead FROM public.clock)'"
                    )
                )

    def set(self, ahead: timedelta) -> None:
        """Let the clock be *ahead* of what it was at first; negative is behind."""
        with self._plain.begin() as connection:
            connection.execute(text("UPDATE clock SET ahead = :ahead"), {"ahead": ahead})

    def dispose(self) -> None:
        self.engine.dispose()
        self._plain.dispose()


@contextmanager
def working(
    engine: Engine, handler: Workers | Callable[[JobContext[Count]], Any], slots: int = 4, **settings: Any
) -> Generator[Runner]:
    """A started runner of the queue ``default``, with a short lease."""
    if isinstance(handler, Workers):
        workers = handler
    else:
        workers = Workers()
        workers.register(Count)(handler)
    settings = {**QUICK, "queues": {"default": slots}, "stop_timeout": timedelta(seconds=3), **settings}
    with Runner(engine, workers, **settings) as runner:
        yield runner


# ---- processes -------------------------------------------------------------------------------------------------------


class Ledger:
    """What handlers did, written outside the database: a line for each, appended whole, which a kill does not undo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[list[str]]:
        """The words of each line."""
        return [line.split() for line in self.path.read_text().splitlines()]

    def count(self, word: str) -> Counter[int]:
        """How often *word* was said of each job."""
        return Counter(int(line[1]) for line in self.lines() if line[0] == word)


def spawn(program: str, *arguments: object) -> "subprocess.Popen[bytes]":
    """A Python process that runs *program*, and says only what it has to complain of."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )


def bury(process: "subprocess.Popen[bytes]") -> int:
    """Kill *process*, frozen or not, and wait for its end; its return code."""
    process.kill()
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
    return process.wait(30)
