"""The thread and event loop that async handlers run in."""

import asyncio
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any, Final, cast

from sqla_river.failure import at
from sqla_river.logs import RUNNER, Log
from sqla_river.rows import ID, KIND, Fetched, Result, drained

log: Final = Log(__name__)

LOOP_BLOCKED_AFTER: Final = 1.0
TURN: Final = 100
"""Async jobs that begin one after the other, a millisecond of them, before the loop sees to its other tasks."""
LEFT_TIMEOUT: Final = 0.2
"""Seconds for tasks that ignored a stop to end when the event loop does."""
CLOSE_TIMEOUT: Final = 5.0
"""Seconds for what belongs to the loop to be closed when it ends. Nobody waits for that."""
Last = Callable[[], Callable[[], Coroutine[Any, Any, object]]]
"""Parts with what belongs to a loop, so that no other meets it; what it returns is awaited there to close it."""


def _name(row: Fetched) -> str:
    return f"job {row[ID]} ({row[KIND]})"  # a kind that has a worker, so no text that could break a line


class EventLoop:
    """The thread and event loop of async handlers; made when first needed. *last* is called once, when it ends."""

    def __init__(
        self,
        execute: Callable[[Fetched], Coroutine[Any, Any, Result | None]],
        finished: Callable[[Fetched, Result | None], Fetched | None],
        name: str,
        runner: str,
        last: Last | None = None,
    ) -> None:
        self._execute = execute
        self._finished = finished
        self._name = name
        self._runner = runner
        self._last = last
        self._closing: Callable[[], Coroutine[Any, Any, object]] | None = None
        self._making = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By identity of the row, so that they live."""
        self._context = copy_context()
        self._ready: deque[Fetched] = deque()
        """Rows that have a slot and have not begun."""
        self._start: Start | None = None
        self._beginning = False
        """Whether `_begin` is under way, or will be."""
        self._ticked_at = math.inf
        self._said = False
        self._ended = False

    def deliver(self, rows: Iterable[Fetched]) -> None:
        """Begin *rows*."""
        self._ready.extend(rows)
        self._call()

    def _call(self) -> None:
        with self._making:
            loop = self._loop or self._make()
        if loop is not None:
            with suppress(RuntimeError):  # closed already
                loop.call_soon_threadsafe(self._begin)

    def _make(self) -> asyncio.AbstractEventLoop | None:
        try:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        except (RuntimeError, OSError) as error:  # no thread, or no file for it
            if self._loop is not None:
                self._loop.close()
            self._loop = self._thread = None
            log.warning("async handlers have no event loop: %s", error, runner=self._runner)
        return self._loop

    def take_back(self) -> list[Fetched]:
        """The rows that have not begun, and will not."""
        return drained(self._ready)

    def stop(self) -> None:
        """End the loop. Tasks that still run are cancelled once more, and then left where they are."""
        self._ended = True
        if self._loop is not None:
            with suppress(RuntimeError):  # closed already
                self._loop.call_soon_threadsafe(self._loop.stop)

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread's end. After that nobody meets what belongs to the loop."""
        if self._thread is not None:
            self._thread.join(timeout)
            self._part()

    def _part(self) -> None:
        """Part with what belongs to the loop, once: what another one has by then is not touched."""
        with self._making:
            if self._last is not None:
                self._closing, self._last = self._last(), None

    def stack_of(self, row: Fetched) -> str:
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
        """Say so if a handler blocks the loop, once each time; and where none could be made for rows that wait, try
        again. Called by the watch, about every second.
        """
        if self._ready and self._loop is None:
            self._call()
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
        self._start = Start(loop)
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
        with suppress(BaseException):
            self._part()
            if self._closing is not None:
                loop.run_until_complete(asyncio.wait_for(self._closing(), CLOSE_TIMEOUT))
        loop.close()

    def _tick(self) -> None:
        assert self._loop is not None
        self._ticked_at = time.monotonic()
        self._loop.call_later(LOOP_BLOCKED_AFTER / 4, self._tick)

    def _begin(self) -> None:
        """Begin what is ready, and what follows the ones that are over at once; a hundred, and then it is the turn of
        whoever else waits for the loop.
        """
        loop, start, ready = self._loop, self._start, self._ready
        assert loop is not None
        assert start is not None
        self._beginning = True
        try:
            for _ in range(min(len(ready), TURN)):
                try:
                    row = ready.popleft()
                except IndexError:  # taken back
                    break
                # Of the loop's own context: what follows is begun in that of the job before it.
                task = start(self._work(row), _name(row), self._context.copy())
                if not task.done():
                    self._tasks[id(row)] = task
        finally:
            self._beginning = bool(ready)
            if ready:
                loop.call_soon(self._begin, context=self._context)  # else that of a job lives on in it

    async def _work(self, row: Fetched) -> None:
        if self._ended:  # it was given back, and may run elsewhere
            return
        following = self._finished(row, await self._execute(row))
        self._tasks.pop(id(row), None)
        if following is not None:
            self._ready.append(following)
            if not self._beginning and self._loop is not None:  # else it is begun after this one
                self._beginning = True
                self._loop.call_soon(self._begin, context=self._context)


if sys.version_info >= (3, 12):

    class Start:
        """Makes tasks that take their first step at once: many jobs need no other."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._loop = loop

        def __call__(self, coroutine: Coroutine[Any, Any, None], name: str, context: Context) -> "asyncio.Task[None]":
            return asyncio.Task(coroutine, loop=self._loop, name=name, context=context, eager_start=True)

else:

    class Start:
        """The same where a task cannot do that: its constructor hands its first step to the loop's call_soon. Taken
        there, and done at once, it saves a tenth of a short job. Other loops than asyncio's own may not let us.
        """

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self._loop = loop
            self._call_soon: Callable[..., asyncio.Handle] = loop.call_soon
            self._taking = False
            self._step: Callable[[], object] | None = None
            with suppress(AttributeError):
                cast("Any", loop).call_soon = self._take

        def _take(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
            if not self._taking:
                return self._call_soon(callback, *args, context=context)
            self._taking = False
            self._step = callback
            return None

        def __call__(self, coroutine: Coroutine[Any, Any, None], name: str, context: Context) -> "asyncio.Task[None]":
            self._taking = True
            task = asyncio.Task(coroutine, loop=self._loop, name=name, context=context)
            self._taking = False
            step, self._step = self._step, None
            if step is not None:
                context.run(step)
            return task
