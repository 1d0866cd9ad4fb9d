"""The threads that plain handlers run in."""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextvars import copy_context
from queue import SimpleQueue
from typing import Final

from sqla_river.logs import RUNNER, Log
from sqla_river.rows import Fetched, Result, drained

log: Final = Log(__name__)

LONG_WAY: Final = 0.002
"""Seconds from a call to the GIL after which it is in demand: a thread that has it gives it up after 5 ms."""
MANY: Final = 32
"""Jobs that are begun in so long where handlers wait for nothing."""


class Threads:
    """The threads that execute plain handlers, at most as many as the runner has slots; made when first needed.

    Rows wait in a deque, and threads that found it empty sleep. Only one of them is on its way at a time: it takes a
    row and calls the next before it begins, one that sleeps or, where none does, a new one. So handlers that wait for
    something soon have all the threads, and a hundred jobs that do next to nothing are done by a few, without a hundred
    threads that would only fight for the GIL (23 k jobs/s against 8 k with a thread woken for each; and where jobs are
    fetched ahead, so that there is always one that waits, 47 k against 27 k without the look of `_await_call`).
    """

    def __init__(
        self,
        size: int,
        execute: Callable[[Fetched], Result | None],
        finished: Callable[[Fetched, Result | None], Fetched | None],
        name: str,
        runner: str,
    ) -> None:
        self._runner = runner
        self._size = self._most = size
        self._execute = execute
        self._finished = finished
        self._name = name
        self._waiting: deque[Fetched] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        """One entry wakes one thread; False ends it."""
        self._calling = False
        self._called = (0.0, 0)
        self._begun = 0
        """Jobs, about: no lock for so little."""
        self._made = self._asleep = 0
        self._working: dict[int, Fetched | None] = {}
        self._surplus: set[int] = set()
        self._lock = threading.Lock()

    def deliver(self, rows: Sequence[Fetched], held: int) -> None:
        """Hand *rows* over, each of which has a slot. With them *held* jobs have: more than there are slots while those
        of a removed queue go on, and a thread for each.
        """
        self._waiting.extend(rows)
        self._most = max(self._size, held)
        self._call()

    def _call(self) -> None:
        """Call a thread, unless one is on its way: it looks at what waits after this is set back."""
        if not self._calling:
            self._calling = True
            self._called = time.monotonic(), self._begun
            self._calls.put(True)
            if self._made < self._most:
                self._make_one()

    def _make_one(self) -> None:
        """Make a thread that heeds the call, unless one sleeps."""
        with self._lock:
            if self._asleep or self._made >= self._most:
                return
            self._made += 1
            thread = threading.Thread(target=self._run, name=f"{self._name}-{self._made}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            with self._lock:
                self._made -= 1
            if not self._made:  # else those that there are go on
                self._calling = False
            log.warning("%d slots have no thread: %s", self._most - self._made, error, runner=self._runner)

    def look(self) -> None:
        """See that rows which wait have a thread: to make one may have failed. Called about every second."""
        if self._waiting:
            self._call()
            self._make_one()

    def _await_call(self) -> bool:
        """Sleep until the calling thread is called; False if it is to end.

        Who comes to the GIL late looks on for as long as those that work come back for more, many at a time: their
        handlers wait for nothing, and one more thread would only stand in their way, and in that of the fetch.
        """
        with self._lock:
            self._asleep += 1
        alive = self._calls.get()
        with self._lock:
            self._asleep -= 1
        if not alive:
            return False
        at, begun = self._called
        if time.monotonic() - at > LONG_WAY:
            while self._waiting and self._begun - begun >= MANY:
                begun = self._begun
                time.sleep(LONG_WAY)
        self._calling = False
        return True

    def resize(self, size: int, held: int) -> None:
        """Have *size* threads, more while there are more *held* jobs that have a slot: what is idle ends now."""
        with self._lock:
            self._size, self._most = size, max(size, held)
            for _ in range(self._made - self._most):
                self._made -= 1
                self._calls.put(False)

    def _retire(self) -> bool:
        """Whether the calling thread, which is free, is one too many: then it is not counted any more."""
        with self._lock:
            if self._made <= self._size or self._waiting:
                return False
            self._made -= 1
            return True

    def take_back(self) -> list[Fetched]:
        """The rows that no slot has begun."""
        return drained(self._waiting)

    def stack_of(self, row: Fetched) -> str:
        """Where the handler of *row* is; nothing if it is not known here."""
        ident = self._thread_of(row)
        frame = (
            sys._current_frames().get(ident) if ident is not None else None
        )  # the one way to say where a thread hangs
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def replace(self, row: Fetched) -> None:
        """Let another thread take the place of the one that is stuck in *row*."""
        with self._lock:
            stuck = self._thread_of(row)
            if stuck is not None:
                self._surplus.add(stuck)
                self._made -= 1

    def _thread_of(self, row: Fetched) -> int | None:
        return next((ident for ident, working in list(self._working.items()) if working == row), None)

    def stop(self) -> None:
        """Let each thread end after what it is doing."""
        for _ in range(self._made):
            self._calls.put(False)

    def _run(self) -> None:
        RUNNER.set(self._runner)
        ident = threading.get_ident()
        waiting, working = self._waiting, self._working
        alive = self._await_call()
        while alive:
            try:
                row = waiting.popleft()
            except IndexError:
                alive = self._await_call()
                continue
            self._begun += 1
            if waiting and not self._calling:
                self._call()
            working[ident] = row
            result = copy_context().run(self._execute, row)  # what a handler sets is gone with it
            following = self._finished(row, result)
            if following is not None:
                waiting.append(following)
            working[ident] = None
            if ident in self._surplus or (self._made > self._size and self._retire()):
                break
        with self._lock:
            self._surplus.discard(ident)
            working.pop(ident, None)
