"""The shape of a runner's threads: one step again and again, which outlives errors of the database."""

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from sqla_river.logs import RUNNER, Log

log: Final = Log(__name__)

SIGN_OF_LIFE: Final = 1.0
"""Seconds after which a loop that has nothing to do says that it is well."""


class Backoff:
    """How long to wait after an error: 50 ms doubling to *longest* seconds, jittered."""

    _FIRST = 0.05

    def __init__(self, logger: Log, name: str, longest: float = 5.0) -> None:
        self._longest = longest
        self._log = logger
        self._name = name
        self._failures = 0

    def failed(self, error: BaseException) -> float:
        """Note *error*; seconds to wait before the next try."""
        self._failures += 1
        pause = min(self._longest, self._FIRST * 2.0 ** min(self._failures - 1, 10))
        pause *= random.uniform(0.5, 1.0)  # noqa: S311
        text = str(error).partition("\n")[0][:300]
        self._log.warning(
            "%s failed (%d in a row): %s: %s; tries again in %.2f s",
            self._name,
            self._failures,
            type(error).__name__,
            text,
            pause,
        )
        return pause

    def worked(self) -> None:
        """Note a success."""
        if self._failures:
            self._log.info("%s works again after %d failures", self._name, self._failures)
        self._failures = 0


class Loop:
    """A thread that repeats *step* until it is stopped.

    *step* returns how many seconds to wait before the next, less if `wake` is called. An exception of any kind is
    logged and the step tried again after a back-off, which `wake` does not shorten. *last* runs in the thread when the
    loop ends. *runner* is the id that its log lines bear.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], float],
        last: Callable[[], None] | None = None,
        longest: float = 5.0,
        runner: str = "",
    ) -> None:
        self._runner = runner
        self._step = step
        self._last = last
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._backoff = Backoff(log, name, longest)
        self.began = math.inf
        """When it was started (monotonic); infinite before that."""
        self.turned = self.moved = time.monotonic()
        """When the thread last showed that it does not hang, and when a step last came to a good end, or the loop had
        nothing to do after one (monotonic).
        """

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self.began = self.turned = self.moved = time.monotonic()
        self._thread.start()

    def wake(self) -> None:
        """Let the next step begin now. Costs next to nothing when it is on its way already."""
        if not self._woken.is_set():
            self._woken.set()

    def stop(self) -> None:
        """Ask the thread to end after its step, without waiting for it."""
        self._stopping.set()
        self._woken.set()

    def join(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds for the thread's end; whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(max(timeout, 0))
        return not self._thread.is_alive()

    def _rest(self, pause: float) -> None:
        until = time.monotonic() + pause
        while True:
            self.turned = self.moved = now = time.monotonic()
            if now >= until or self._woken.wait(min(until - now, SIGN_OF_LIFE)):
                break
        self._woken.clear()

    def _run(self) -> None:
        RUNNER.set(self._runner)
        while not self._stopping.is_set():
            try:
                pause = self._step()
            except Exception as error:  # noqa: BLE001 - one bad step must not end the loop
                self.turned = time.monotonic()
                self._stopping.wait(self._backoff.failed(error))
                continue
            self._backoff.worked()
            self._rest(pause)
        if self._last is not None:
            try:
                self._last()
            except Exception as error:  # noqa: BLE001 - nor must its end
                log.warning("the end of %s failed: %s: %s", self._thread.name, type(error).__name__, error)
