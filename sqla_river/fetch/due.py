"""The one timer of a runner: when the next job of the table comes due, and the statement that makes it available."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from sqla_river.statements import SCHEDULE_DUE, SCHEDULE_KEYLESS, SCHEDULE_ONE, SELECT_LATER_DUE, SELECT_NEXT_DUE
from sqla_river.store import OwnConnection

EVERY: Final = 0.025
"""Seconds between two schedules, and between two looks at the next due time."""
WASTEFUL: Final = 0.005
"""Seconds that an unbounded look at the next due time may take before the next ones begin where it ended: a long
transaction pins dead entries at the head of the index.
"""
STAGGER: Final = 0.005
"""Seconds by which each further runner of a fleet looks later at what is due: fifty of them need not all fire for one
job.
"""
BATCH: Final = 1_000
"""Rows that one schedule moves at most."""
KEY_IN_THE_WAY: Final = {"55P03", "23505", "40P01"}
"""Waited for too long; taken since the statement began; waited for by each other."""


class DueTimer:
    """Knows the next due time, and schedules what has come due.

    Args:
        own: the fetcher's connection.
        poll: seconds; the longest pause before a due job that somebody has locked is tried again.
        wake: lets the fetcher's next step begin.
    """

    def __init__(self, own: OwnConnection, poll: float, wake: Callable[[], None]) -> None:
        self._own = own
        self._poll = poll
        self._wake = wake
        self._asked: deque[float] = deque()
        self._since: str | None = None
        self._bounded = False
        self._blocked = 0.0
        self._looked_at = 0.0
        self._stale = True
        self.at = 0.0
        """When the next job is due (monotonic)."""
        self.rank = 0
        """How many live runners of the fleet come before this one."""

    def due_in(self, seconds: float) -> None:
        """A job of this runner is due in *seconds*: a retry or a snooze. Called from other threads."""
        at = time.monotonic() + seconds
        self._asked.append(at)
        if at < self.at:
            self._wake()

    def doubt(self) -> None:
        """Something was announced: the next due time is to be read again."""
        self._stale = True

    def fire(self) -> set[str]:
        """Make available what is due, if it is time; the queues that got some."""
        now = time.monotonic()
        self.at = min(self.at, self._soonest_asked())
        if now < self.at or now - self._looked_at < EVERY:
            return set()
        if self.rank:
            # Others come before: by now they may have done it.
            self._read(unbounded=False)
            if self.at > self._looked_at + self.rank * STAGGER:
                return set()
        moved, rest = self._schedule()
        self._read(unbounded=False)
        if (rest or not moved) and self.at <= self._looked_at + self.rank * STAGGER:
            # What is due is locked by somebody: look again, but ever more slowly, or the timer would spin.
            self._blocked = min(max(2 * self._blocked, EVERY), self._poll)
            later = self._own.execute(SELECT_LATER_DUE, {"p_since": self._since}).one_or_none()
            self.at = self._looked_at + min(self._blocked, later[0] if later is not None else math.inf)
        else:
            self._blocked = 0.0
        return {row.queue for row in moved}

    def _schedule(self) -> tuple[list[Any], bool]:
        """What is made available; and whether there is no more but what waits for a key that an open transaction is
        about to take.
        """
        given = {"p_schema": self._own.schema}
        try:
            return list(self._own.execute(SCHEDULE_DUE, given).all()), False
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in KEY_IN_THE_WAY:
                raise
        moved = list(self._own.execute(SCHEDULE_KEYLESS, given).all())
        if sum(row.jobs for row in moved) >= BATCH:
            return moved, False
        try:
            moved += self._own.execute(SCHEDULE_ONE, given).all()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in KEY_IN_THE_WAY:
                raise
        return moved, True

    def look(self, *, unbounded: bool) -> None:
        """Read the next due time, if there is a doubt about it and the last look is not of just now."""
        if self._stale and time.monotonic() - self._looked_at >= EVERY:
            self._read(unbounded=unbounded)

    def wait(self, now: float) -> float:
        """Seconds from *now* until `fire` or `look` has something to do."""
        again = self._looked_at + EVERY
        return min(max(self.at, again), again if self._stale else math.inf) - now

    def _read(self, *, unbounded: bool) -> None:
        since = None if unbounded or not self._bounded else self._since
        began = time.monotonic()
        row = self._own.execute(SELECT_NEXT_DUE, {"p_since": since}).one_or_none()
        self._looked_at = now = time.monotonic()
        self._stale = False
        if since is None:
            self._bounded = now - began > WASTEFUL
        if row is None:
            self.at = self._soonest_asked()
        else:
            seconds, self._since = row
            self.at = min(now + max(seconds, 0.0) + self.rank * STAGGER, self._soonest_asked())

    def _soonest_asked(self) -> float:
        """The soonest time that `due_in` named since the last look."""
        soonest = math.inf
        while self._asked:
            soonest = min(soonest, self._asked.popleft())
        return soonest
