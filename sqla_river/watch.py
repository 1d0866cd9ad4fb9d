"""The watch over the timeouts of handlers."""

import math
import time
from collections.abc import Callable
from typing import Any, Final

from sqla_river.context import JobContext, cancel_context
from sqla_river.logs import Log, of_job

log: Final = Log(__name__)

STUCK_AFTER: Final = 10.0
"""Seconds that a handler may ignore its timeout, before it is given up; River's number."""


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
        deadline = job.deadline = time.monotonic() + seconds
        if deadline < self._next:
            self._next = deadline
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
