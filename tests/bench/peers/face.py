"""What every peer looks like to the bench.

A peer runs in a process and an environment of its own, where neither sqla_river nor the rest of the tests can count on
being there: here and in `measure` only the standard library is imported.
"""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

ASKED: Final = "SQLA_RIVER_BENCH_ASKED"
"""The environment variable that tells a peer, and the workers that it starts, what to do."""
BATCH: Final = 1_000
"""Jobs of one call, and of one commit where there is one, when many are put in."""
SLOTS: Final = 100
"""Jobs at a time, for peers whose concurrency is a number that users choose freely."""
FAREWELL: Final = 20.0
"""Seconds that worker processes have to end."""
RECORD: Final = struct.Struct("=d")


@dataclass(frozen=True)
class Asked:
    """What a process of a peer shall do, with which server."""

    phase: str
    url: str
    variant: str
    jobs: int
    singles: int
    pings: int
    folder: str
    """For logs and marks."""

    @property
    def marks(self) -> Path:
        return Path(self.folder) / "marks"

    def environment(self) -> dict[str, str]:
        return {**os.environ, ASKED: json.dumps(asdict(self))}


@cache
def asked() -> Asked:
    return Asked(**json.loads(os.environ[ASKED]))


class Marks:
    """When handlers ran, noted by handlers of this process: an append, for which no other thread has to wait."""

    def __init__(self) -> None:
        self._noted: list[float] = []

    def note(self) -> None:
        self._noted.append(time.time())

    def count(self) -> int:
        return len(self._noted)

    def times(self) -> list[float]:
        return sorted(self._noted)

    def cpu(self) -> float | None:
        """Seconds of CPU that the worker has used so far; None where that cannot be told."""
        return time.process_time()


class FileMarks(Marks):
    """When handlers ran, noted by handlers of other processes: an append to a file, some 3 us for each."""

    def __init__(self, path: Path, session: int) -> None:
        super().__init__()
        self._path = path
        self._session = session

    def count(self) -> int:
        return self._path.stat().st_size // RECORD.size

    def times(self) -> list[float]:
        return sorted(moment for (moment,) in RECORD.iter_unpack(self._path.read_bytes()))

    def cpu(self) -> float | None:
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended since, and its parent has its time by now
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._session:
                    ticks += sum(map(int, fields[11:15]))  # user and system: its own, and of children that have ended
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


def mark() -> None:
    """Note that a handler runs, in a worker process of a CommandPeer."""
    os.write(_marks_of(os.getpid()), RECORD.pack(time.time()))


@cache
def _marks_of(_process: int) -> int:
    return os.open(asked().marks, os.O_WRONLY | os.O_APPEND)


class Peer(ABC):
    """A job queue by its public face. Its job has two small fields, ``num`` and ``t``, and does nothing."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked

    def prepare(self) -> None:  # noqa: B027 - most brokers need nothing
        """Make what must be there before a job can be put in."""

    @abstractmethod
    def fill(self, numbers: Sequence[int]) -> None:
        """Put many in, at most BATCH of them, in the way that is meant for many."""

    @abstractmethod
    def put(self, number: int) -> None:
        """Put one in, and return when that is done."""

    def put_all(self, count: int) -> None:
        """Put *count* in, one after the other."""
        for number in range(count):
            self.put(number)

    @abstractmethod
    def working(self) -> AbstractContextManager[Marks]:
        """Have a worker at work in the block."""

    def unfinished(self) -> bool:
        """Say whether the outcome of some job is not stored yet; where nobody can tell, the handlers alone count."""
        return False

    def close(self) -> None:  # noqa: B027
        """Close connections."""


class AsyncPeer(Peer):
    """A peer on asyncio: jobs are put in by a loop of the main thread and worked by one of another thread."""

    new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._main = asyncio.Runner(loop_factory=self.new_loop)

    def run(self, coroutine: Any) -> Any:
        """Run it on the loop of the main thread."""
        return self._main.run(coroutine)

    @abstractmethod
    def serving(self, marks: Marks) -> AbstractAsyncContextManager[Any]:
        """Have a worker at work in the block, on the loop that enters it."""

    @contextmanager
    def working(self) -> Generator[Marks]:
        marks = Marks()
        ready: Future[None] = Future()
        stop = threading.Event()

        async def serve() -> None:
            async with self.serving(marks):
                ready.set_result(None)
                await asyncio.to_thread(stop.wait)

        def thread() -> None:
            with asyncio.Runner(loop_factory=self.new_loop) as runner:
                runner.run(serve())

        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(thread)
            try:
                wait([ready, ended], return_when=FIRST_COMPLETED)
                if not ended.done():
                    yield marks
            finally:
                stop.set()
            ended.result()

    def close(self) -> None:
        self._main.close()


class CommandPeer(Peer):
    """A peer whose worker is a command."""

    @abstractmethod
    def command(self) -> list[str]:
        """Name the worker's program in the environment of the peer, or elsewhere on the machine, with its arguments."""

    @contextmanager
    def working(self) -> Generator[Marks]:
        self.asked.marks.touch()
        with (Path(self.asked.folder) / "worker.log").open("wb") as log:
            worker = subprocess.Popen(self.command(), stdout=log, stderr=log, start_new_session=True)
        marks = FileMarks(self.asked.marks, worker.pid)
        try:
            yield marks
        finally:
            _end(worker)

    def program(self, name: str) -> str:
        """Give the path of a program of the environment of the peer."""
        return str(Path(sys.executable).with_name(name))


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(timeout=FAREWELL)
    with suppress(ProcessLookupError):  # children that it left, or itself
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
