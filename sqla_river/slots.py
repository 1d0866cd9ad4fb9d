"""Where handlers run: threads for plain ones, one event loop for async ones; and the watch over their timeouts."""

import asyncio
import math
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from queue import SimpleQueue
from typing import Any, Final

from sqla_river.context import JobContext, cancel_context
from sqla_river.logs import RUNNER, Log, of_job
from sqla_river.rows import JobRow, Result

log: Final = Log(__name__)

STUCK_AFTER: Final = 10.0
"""Seconds that a handler may ignore its timeout, before it is given up; River's number."""
LOOP_BLOCKED_AFTER: Final = 1.0
LONG_WAY: Final = 0.002
"""Seconds from a call to the GIL after which it is in demand: a thread that has it gives it up after 5 ms."""
MANY: Final = 32
"""Jobs that are begun in so long where handlers wait for nothing."""
TURN: Final = 100
"""Async jobs that begin one after the other, a millisecond of them, before the loop sees to its other tasks."""
LEFT_TIMEOUT: Final = 0.2
"""Seconds for tasks that ignored a stop to end when the event loop does."""


def _name(row: JobRow) -> str:
    return f"job {row.id} ({row.kind})"  # a kind that has a worker, so no text that could break a line


def at(stack: str) -> str:
    """The places of a formatted *stack* in one line, the innermost first."""
    places = re.findall(r'^ *File "(.*)", line ([0-9]+), in (.*)$', stack, re.MULTILINE)
    return ", from ".join(f"{path}:{line} {name}" for path, line, name in reversed(places[-6:]))


class Threads:
    """The threads that execute plain handlers, as many as the runner has slots; made when first needed.

    Rows wait in a deque, and threads that found it empty sleep. Only one of them is on its way at a time: it takes a
    row and wakes the next before it begins. So handlers that wait for something soon have all the threads, and a
    hundred jobs that do next to nothing are done by a few, without waking a hundred threads that would only fight for
    the GIL (23 k jobs/s against 8 k with a thread woken for each; and where jobs are fetched ahead, so that there is
    always one that waits, 47 k against 27 k without the look of `_await_call`).
    """

    def __init__(
        self,
        size: int,
        execute: Callable[[JobRow], Result],
        finished: Callable[[Result], JobRow | None],
        name: str,
        runner: str,
    ) -> None:
        self._runner = runner
        self._size = size
        self._execute = execute
        self._finished = finished
        self._name = name
        self._waiting: deque[JobRow] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        """One entry wakes one thread; False ends it."""
        self._calling = False
        self._called = (0.0, 0)
        self._begun = 0
        """Jobs, about: no lock for so little."""
        self._made = 0
        self._working: dict[int, JobRow | None] = {}
        self._surplus: set[int] = set()
        self._lock = threading.Lock()

    def deliver(self, rows: Sequence[JobRow], held: int) -> None:
        """Hand *rows* over, each of which has a slot. With them *held* jobs have: more than there are slots while those
        of a removed queue go on, and a thread for each.
        """
        self._waiting.extend(rows)
        most = max(self._size, held)
        if not self._made == self._size == most:  # else none is to be made, and none retires
            with self._lock:
                for _ in range(min(len(rows), most - self._made)):
                    self._made += 1
                    threading.Thread(target=self._run, name=f"{self._name}-{self._made}", daemon=True).start()
        self._call()

    def _call(self) -> None:
        """Wake a thread, unless one is on its way: it looks at what waits after this is set back."""
        if not self._calling:
            self._calling = True
            self._called = time.monotonic(), self._begun
            self._calls.put(True)

    def _await_call(self) -> bool:
        """Sleep until the calling thread is called; False if it is to end.

        Who comes to the GIL late looks on for as long as those that work come back for more, many at a time: their
        handlers wait for nothing, and one more thread would only stand in their way, and in that of the fetch.
        """
        if not self._calls.get():
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
            self._size = size
            for _ in range(self._made - max(size, held)):
                self._made -= 1
                self._calls.put(False)

    def _retire(self) -> bool:
        """Whether the calling thread, which is free, is one too many: then it is not counted any more."""
        with self._lock:
            if self._made <= self._size or self._waiting:
                return False
            self._made -= 1
            return True

    def take_back(self) -> list[JobRow]:
        """The rows that no slot has begun."""
        rows: list[JobRow] = []
        with suppress(IndexError):
            while True:
                rows.append(self._waiting.popleft())
        return rows

    def put_back(self, rows: Iterable[JobRow]) -> None:
        """Return what `take_back` took."""
        self._waiting.extend(rows)
        self._call()

    def stack_of(self, row: JobRow) -> str:
        """Where the handler of *row* is; nothing if it is not known here."""
        ident = self._thread_of(row)
        frame = (
            sys._current_frames().get(ident) if ident is not None else None
        )  # the one way to say where a thread hangs
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def replace(self, row: JobRow) -> None:
        """Let another thread take the place of the one that is stuck in *row*."""
        with self._lock:
            stuck = self._thread_of(row)
            if stuck is not None:
                self._surplus.add(stuck)
                self._made -= 1

    def _thread_of(self, row: JobRow) -> int | None:
        return next((ident for ident, working in list(self._working.items()) if working is row), None)

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
            if waiting:
                self._call()
            working[ident] = row
            result = copy_context().run(self._execute, row)  # what a handler sets is gone with it
            following = self._finished(result)
            if following is not None:
                waiting.append(following)
            working[ident] = None
            if ident in self._surplus or (self._made > self._size and self._retire()):
                break
        with self._lock:
            self._surplus.discard(ident)
            working.pop(ident, None)


class EventLoop:
    """The thread and event loop of async handlers; made when first needed. *last* is awaited when it ends."""

    def __init__(
        self,
        execute: Callable[[JobRow], Coroutine[Any, Any, Result]],
        finished: Callable[[Result], JobRow | None],
        name: str,
        runner: str,
        last: Callable[[], Coroutine[Any, Any, object]] | None = None,
    ) -> None:
        self._execute = execute
        self._finished = finished
        self._name = name
        self._runner = runner
        self._last = last
        self._making = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By identity of the row, so that they live."""
        self._context = copy_context()
        self._ready: deque[JobRow] = deque()
        self._beginning = False
        self._ticked_at = math.inf
        self._said = False
        self._ended = False

    def deliver(self, rows: list[JobRow]) -> None:
        """Begin *rows*."""
        with self._making:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self._loop.call_soon_threadsafe(self._begin, rows)

    def stop(self) -> None:
        """End the loop. Tasks that still run are cancelled once more, and then left where they are."""
        self._ended = True
        if self._loop is not None:
            with suppress(RuntimeError):  # closed already
                self._loop.call_soon_threadsafe(self._loop.stop)

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread's end."""
        if self._thread is not None:
            self._thread.join(timeout)

    def stack_of(self, row: JobRow) -> str:
        """Where the handler of *row* awaits; nothing if it is not known here."""
        if self._loop is None:
            return ""
        lines: list[str] = []
        for task in asyncio.all_tasks(self._loop):
            coroutine: Any = task.get_coro() if task.get_name() == _name(row) else None
            while (frame := getattr(coroutine, "cr_frame", None)) is not None:
                lines += traceback.format_stack(frame, 1)
                coroutine = coroutine.cr_await
        return "".join(lines)

    def look(self) -> None:
        """Say so if a handler blocks the loop, once each time. Called by the watch, about every second."""
        blocked = time.monotonic() - self._ticked_at
        if blocked < LOOP_BLOCKED_AFTER:
            self._said = False
        elif not self._said and self._thread is not None and self._thread.is_alive() and self._loop is not None:
            self._said = True
            task = asyncio.current_task(self._loop)
            frame = sys._current_frames().get(self._thread.ident or 0)
            stack = "".join(traceback.format_stack(frame)[-6:]) if frame is not None else ""
            name = task.get_name() if task is not None else "something"
            log.warning(
                "%s blocks the event loop for %.1f s; await, or work it in a thread; it is at %s",
                name,
                blocked,
                at(stack),
            )

    def _run(self) -> None:
        RUNNER.set(self._runner)
        self._context = copy_context()
        loop = self._loop
        assert loop is not None
        asyncio.set_event_loop(loop)
        self._tick()
        while not self._ended:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:  # of a task that a handler made
                log.warning("a task on the event loop tried to end the process: %s", type(error).__name__)
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        with suppress(BaseException):
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=LEFT_TIMEOUT))
            loop.run_until_complete(loop.shutdown_asyncgens())
            if self._last is not None:
                loop.run_until_complete(asyncio.wait_for(self._last(), LEFT_TIMEOUT))
        loop.close()

    def _tick(self) -> None:
        assert self._loop is not None
        self._ticked_at = time.monotonic()
        self._loop.call_later(LOOP_BLOCKED_AFTER / 4, self._tick)

    def _begin(self, rows: Iterable[JobRow] = ()) -> None:
        """Begin *rows*, and those that follow the ones which are over at once; a hundred, and then it is the turn of
        whoever else waits for the loop.
        """
        self._ready.extend(rows)
        if self._beginning:  # in the first step of a job, below: what follows it waits for its turn
            return
        self._beginning = True
        try:
            for _ in range(min(len(self._ready), TURN)):
                row = self._ready.popleft()
                # Of the loop's own context: what follows is begun in that of the job before it.
                task = _task(self._work(row), self._loop, _name(row), self._context.copy())
                if not task.done():
                    self._tasks[id(row)] = task
        finally:
            self._beginning = False
        if self._ready and self._loop is not None:
            self._loop.call_soon(self._begin)

    async def _work(self, row: JobRow) -> None:
        following = self._finished(await self._execute(row))
        self._tasks.pop(id(row), None)
        if following is not None:
            self._begin([following])


def _task(
    coroutine: Coroutine[Any, Any, None], loop: "asyncio.AbstractEventLoop | None", name: str, context: Context
) -> "asyncio.Task[None]":
    """A task that takes its first step now, where Python can do that: many jobs need no other."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, name=name, context=context, eager_start=True)
    return asyncio.Task(coroutine, loop=loop, name=name, context=context)


class Watch:
    """Ends what is over its time. `step` is what its thread repeats; only jobs with a timeout wake it.

    Args:
        wake: lets the next step begin.
        stuck: told of a job whose handler ignored its timeout for 10 s.
        look: called at each step.
    """

    def __init__(
        self, wake: Callable[[], None], stuck: Callable[[JobContext[Any]], None], look: Callable[[], None]
    ) -> None:
        self._wake = wake
        self._stuck = stuck
        self._look = look
        self._next = math.inf

    def add(self, job: JobContext[Any], seconds: float) -> None:
        """Give *job* so many seconds from now."""
        job.deadline = time.monotonic() + seconds
        if job.deadline < self._next:
            self._next = job.deadline
            self._wake()

    def step(self, running: dict[int, JobContext[Any]]) -> float:
        """Cancel what is over its time; seconds until the next look."""
        self._look()
        self._next = math.inf  # before the look: who is added meanwhile wakes the next one
        now = time.monotonic()
        soonest = math.inf
        for job in list(running.values()):
            if job.deadline <= now:
                self._over(job, now)
            soonest = min(soonest, job.deadline)
        self._next = min(self._next, soonest)
        return min(1.0, max(self._next - time.monotonic(), 0.0))

    def _over(self, job: JobContext[Any], now: float) -> None:
        if not job.timed_out:
            job.timed_out = True
            job.deadline = now + STUCK_AFTER
            log.warning("job %d (%s) is over its timeout", job.id, job.kind, **of_job(job.row))
            cancel_context(job, "timeout")
        else:
            job.deadline = math.inf
            self._stuck(job)
