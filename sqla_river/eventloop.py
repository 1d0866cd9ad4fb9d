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
LOST_AFTER: Final = 10.0
"""Seconds that a loop may be blocked for while a handler that was given up is on it: as long as one may ignore its
timeout.
"""
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
    """The event loop of async handlers, and the thread that it turns in; made when first needed.

    A handler may block it for good. Then it is left to those that run there, and the others begin on another one.
    *last* is called once for each, at its end or when it is left.
    """

    def __init__(
        self,
        execute: Callable[[Fetched], Coroutine[Any, Any, Result | None]],
        finished: Callable[[Fetched, Result | None], Fetched | None],
        name: str,
        runner: str,
        last: Last | None = None,
    ) -> None:
        self.execute: Final = execute
        self.finished: Final = finished
        self.name: Final = name
        self.runner: Final = runner
        self._last = last
        self._making = threading.Lock()
        self._turning: _Turning | None = None
        self._left: list[_Turning] = []
        self._ready: deque[Fetched] = deque()
        """Rows that have a slot and have not begun."""

    def deliver(self, rows: Iterable[Fetched]) -> None:
        """Begin *rows*."""
        with self._making:
            self._ready.extend(rows)
            self._call()

    def _call(self) -> None:
        if self._turning is None:
            self._make()
        if self._turning is not None:
            self._turning.call()

    def _make(self) -> None:
        turning: _Turning | None = None
        try:
            turning = _Turning(self, self._ready)
            turning.thread.start()
        except (RuntimeError, OSError) as error:  # no thread, or no file for it
            if turning is not None:
                turning.loop.close()
            log.warning("async handlers have no event loop: %s", error, runner=self.runner)
        else:
            self._turning = turning

    @property
    def _all(self) -> "list[_Turning]":
        """The one that rows begin on, if there is one, and those that were left."""
        return [*([self._turning] if self._turning is not None else []), *self._left]

    def take_back(self) -> list[Fetched]:
        """The rows that have not begun, and will not."""
        with self._making:
            return drained(self._ready) + [row for each in self._left for row in drained(each.ready)]

    def stop(self) -> None:
        """End the loop. Tasks that still run are cancelled once more, and then left where they are."""
        with self._making:
            for each in self._all:
                each.end()

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread's end, but not for a loop that was left. After that nobody
        meets what belongs to any of them.
        """
        turning = self._turning
        if turning is not None:
            turning.thread.join(timeout)
            self.part(turning)

    def part(self, turning: "_Turning") -> None:
        """Part with what belongs to a loop, once: what another one has by then is not touched."""
        with self._making:
            self._part(turning)

    def _part(self, turning: "_Turning") -> None:
        if not turning.parted and self._last is not None:
            turning.closing = self._last()
        turning.parted = True

    def stack_of(self, row: Fetched) -> str:
        """Where the handler of *row* is, or awaits; nothing if it is not known here."""
        return next(filter(None, (each.stack_of(row) for each in self._all)), "")

    def give_up(self, row: Fetched) -> None:
        """*row* is given up: the loop that it is on is left if it is blocked, by the handler of this row, or by another
        one so that this one cannot hear.
        """
        turning = self._turning
        if turning is not None and turning.tasks_of(row):
            turning.given_up.add(row)

    def come_back(self, row: Fetched) -> None:
        """*row* was given up, and has come to its end after all."""
        for each in self._all:
            each.given_up.discard(row)

    def look(self) -> None:
        """Say so if a handler blocks the loop, once each time, and leave the loop if it does not come back; and where
        none could be made for rows that wait, try again. Called by the watch, about every second.
        """
        turning = self._turning
        if turning is None:
            if self._ready:
                self.deliver(())
            return
        blocked = turning.look()
        if turning.given_up and blocked >= LOST_AFTER:
            self._leave(turning)
            log.error(
                "the event loop is blocked for %.0f s; other jobs begin on a new one, in another thread",
                blocked,
                runner=self.runner,
            )

    def _leave(self, turning: "_Turning") -> None:
        """Let rows begin on another loop: what runs on this one ends there when it comes back, and it with the last."""
        with self._making:
            turning.left = True  # first: what it is to begin after this comes here
            self._left = [*(each for each in self._left if each.thread.is_alive()), turning]
            self._turning = None
            self._part(turning)
            self._ready = deque(drained(turning.ready))
            if self._ready:
                self._call()


class _Turning:
    """One loop, the thread that it turns in, and the handlers on it. It begins what is *ready*."""

    def __init__(self, owner: EventLoop, ready: deque[Fetched]) -> None:
        self._owner = owner
        self._execute = owner.execute
        self._finished = owner.finished
        self.ready = ready
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=owner.name, daemon=True)
        self.left = False
        """Whether others begin elsewhere."""
        self.given_up: set[Fetched] = set()
        """Rows here that ignored their timeout, and have not come to their end."""
        self.parted = False
        self.closing: Callable[[], Coroutine[Any, Any, object]] | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By identity of the row, so that they live."""
        self._context = copy_context()
        self._start: Start | None = None
        self._beginning = False
        """Whether `_begin` is under way, or will be."""
        self._ticked_at = math.inf
        self._said = False
        self._ended = False

    def call(self) -> None:
        """Let it look at what is ready. From any thread."""
        with suppress(RuntimeError):  # closed already
            self.loop.call_soon_threadsafe(self._begin)

    def end(self) -> None:
        """Let the loop end. From any thread."""
        self._ended = True
        with suppress(RuntimeError):  # closed already
            self.loop.call_soon_threadsafe(self.loop.stop)

    def tasks_of(self, row: Fetched) -> "list[asyncio.Task[Any]]":
        """Those of *row* on this loop: the one it is worked in, and the one of a handler in a transaction."""
        name = _name(row)
        return [task for task in asyncio.all_tasks(self.loop) if task.get_name() == name]

    def stack_of(self, row: Fetched) -> str:
        """Where the handler of *row* is, or awaits; nothing if it is not known here."""
        tasks = self.tasks_of(row)
        if asyncio.current_task(self.loop) in tasks:  # it awaits nothing
            return self._stack()
        lines: list[str] = []
        for task in tasks:
            coroutine: Any = task.get_coro()
            while (frame := getattr(coroutine, "cr_frame", None)) is not None:
                lines += traceback.format_stack(frame, 1)
                coroutine = coroutine.cr_await
        return "".join(lines)

    def _stack(self) -> str:
        """Where the thread is."""
        frame = sys._current_frames().get(self.thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def look(self) -> float:
        """Seconds that the loop has been blocked for. If it is, say so, once each time."""
        blocked = time.monotonic() - self._ticked_at
        if blocked < LOOP_BLOCKED_AFTER:
            self._said = False
        elif not self._said and self.thread.is_alive():
            self._said = True
            task = asyncio.current_task(self.loop)
            log.warning(
                "%s blocks the event loop for %.1f s; await, or work it in a thread; it is at %s",
                task.get_name() if task is not None else "something",
                blocked,
                at(self._stack()),
            )
        return blocked

    def _run(self) -> None:
        RUNNER.set(self._owner.runner)
        self._context = copy_context()
        loop = self.loop
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
            self._owner.part(self)
            if self.closing is not None:
                loop.run_until_complete(asyncio.wait_for(self.closing(), CLOSE_TIMEOUT))
        loop.close()

    def _tick(self) -> None:
        self._ticked_at = time.monotonic()
        if self.left and not self._tasks and not self.ready:
            self.end()
        self.loop.call_later(LOOP_BLOCKED_AFTER / 4, self._tick)

    def _begin(self) -> None:
        """Begin what is ready, and what follows the ones that are over at once; a hundred, and then it is the turn of
        whoever else waits for the loop.
        """
        loop, start, ready = self.loop, self._start, self.ready
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
            if self.left:
                self._owner.deliver([following])
                return
            self.ready.append(following)
            if not self._beginning:  # else it is begun after this one
                self._beginning = True
                self.loop.call_soon(self._begin, context=self._context)


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
