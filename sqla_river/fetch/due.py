"""The one timer of a runner: when the next job of the table comes due, and the statement that makes it available."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from sqla_river.fetch.spared import spare
from sqla_river.refusal import in_parts
from sqla_river.statements import (
    NOTIFY_QUEUES,
    SCHEDULE_DUE,
    SCHEDULE_DUE_AMONG,
    SELECT_DUE,
    SELECT_LATER_DUE,
    SELECT_NEXT_DUE,
)
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
PATIENCE: Final = 0.1
"""Seconds after which no further part of what is due is tried, once something has come of it: nothing is fetched
meanwhile.
"""


class DueTimer:
    """Knows the next due time, and schedules what has come due. What goes wrong with that, short of a broken
    connection, is logged, and is no reason not to fetch.

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
        self._refused: set[int] = set()
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
        moved: set[str] = set()
        try:
            self._fire(moved)
        except DBAPIError as error:
            self._look_later(error)
        return moved

    def _fire(self, moved: set[str]) -> None:
        if self.rank:
            # Others come before: by now they may have done it.
            self._read(unbounded=False)
            if self.at > self._looked_at + self.rank * STAGGER:
                return
        rest = self._schedule(moved)
        self._read(unbounded=False)
        if (rest or not moved) and self.at <= self._looked_at + self.rank * STAGGER:
            # What is due is locked by somebody, or refused: look again, but ever more slowly, or the timer would spin.
            self._block()
            later = self._own.execute(SELECT_LATER_DUE, {"p_since": self._since}).one_or_none()
            self.at = self._looked_at + min(self._blocked, later[0] if later is not None else math.inf)
        else:
            self._blocked = 0.0

    def _block(self) -> None:
        self._blocked = min(max(2 * self._blocked, EVERY), self._poll)

    def _look_later(self, error: DBAPIError) -> None:
        """After *error*, of a look at what is due."""
        spare(self._own, error, "the look at what is due")
        self._block()
        self._stale = False
        self._looked_at = time.monotonic()
        self.at = self._looked_at + self._blocked

    def _schedule(self, moved: set[str]) -> bool:
        """Make available what is due, and note in *moved* the queues that got some. Whether there is no more but what
        cannot be made available now.
        """
        try:
            rows = self._own.execute(SCHEDULE_DUE, {"p_schema": self._own.schema}).all()
        except DBAPIError as error:
            self._bear(error, "making available at once all that is due")
            return self._schedule_in_parts(moved)
        moved.update(row.queue for row in rows)
        self._refused.clear()
        return False

    def _schedule_in_parts(self, moved: set[str]) -> bool:
        """The same, where all of it at once failed: one may wait for a key that an open transaction is about to take, a
        trigger may refuse one, or nobody can be told of them.
        """
        until = time.monotonic() + PATIENCE
        found = self._own.execute(SELECT_DUE, {"p_refused": list(self._refused)}).all()
        # The ones that wait for no key in halves, and each other by itself, the first one first: a key in the way costs
        # 100 ms, which halves would pay ten times.
        others = [row.id for row in found if not row.takes]
        alone = [[row.id] for row in reversed(found) if row.takes]
        refused = len(self._refused)
        rest = len(found) < BATCH
        for rows in in_parts([others, *alone] if others else alone, self._schedule_among, self._refuse):
            moved.update(row.queue for row in rows)
            if time.monotonic() >= until and (moved or len(self._refused) > refused):
                rest = False
                break
        if rest and len(self._refused) == refused:
            self._refused.clear()  # all others are done with: these may be tried again
        if moved:
            self._tell(moved)
        return rest

    def _schedule_among(self, ids: Sequence[int]) -> Sequence[Any]:
        return self._own.execute(SCHEDULE_DUE_AMONG, {"p_ids": ids}).all()

    def _refuse(self, job_id: int, error: Exception) -> None:
        self._refused.add(job_id)
        if isinstance(error, DBAPIError):
            self._bear(error, f"making available job {job_id}")

    def _tell(self, queues: set[str]) -> None:
        """Tell the other runners that jobs of *queues* are available."""
        try:
            self._own.execute(NOTIFY_QUEUES, {"p_schema": self._own.schema, "p_queues": sorted(queues)})
        except DBAPIError as error:
            self._bear(error, "telling other runners what came due")

    def _bear(self, error: DBAPIError, what: str) -> None:
        """Go on after *error*; say that it was of *what*, if that is worth a word."""
        usual = getattr(error.orig, "sqlstate", None) in KEY_IN_THE_WAY
        spare(self._own, error, "" if usual else what)

    def look(self, *, unbounded: bool) -> None:
        """Read the next due time, if there is a doubt about it and the last look is not of just now."""
        if self._stale and time.monotonic() - self._looked_at >= EVERY:
            try:
                self._read(unbounded=unbounded)
            except DBAPIError as error:
                self._look_later(error)

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
