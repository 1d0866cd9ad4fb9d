"""Threads beside an event loop, for what may take its time."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import Final

MOST: Final = 8
"""Threads: what they call may want a connection each, and a thousand jobs may fail at once."""


class Aside:
    """A few threads of their own: those of the loop's executor may all be hanging in what handlers asked of them. They
    are made when needed, end when nothing waits, and keep no process from its end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: deque[Callable[[], None]] = deque()
        self._made = 0
        self._lock = threading.Lock()

    async def run(self, call: Callable[[], object]) -> None:
        """Await *call*, whoever cancels this task meanwhile, or has done so; here where no thread can be had for it."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        context = copy_context()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                context.run(call)
            except BaseException as error:  # noqa: BLE001 - it is the caller's
                errors.append(error)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(over.set_result, None)

        if not self._hand_over(work):
            call()
            return
        while not over.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([over])
        if errors:
            raise errors.pop()

    def _hand_over(self, work: Callable[[], None]) -> bool:
        """Let a thread do *work*; False if there is none, and none can be made."""
        with self._lock:
            self._waiting.append(work)
            if self._made >= MOST:
                return True
            self._made += 1
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._made -= 1
                if self._made or work not in self._waiting:
                    return True
                self._waiting.remove(work)
                return False
        return True

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._made -= 1
                    return
                work = self._waiting.popleft()
            work()
