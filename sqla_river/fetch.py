"""Fetch: lock what is available and mark it running, as many as there are free slots; and move what has come due.

One thread per runner, on a connection of its own. It decodes nothing.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Executable
from sqlalchemy.exc import IntegrityError

from sqla_river.rows import JobRow
from sqla_river.statements import (
    CLEAR_ALONE,
    COUNT_SUSPECTS,
    DISCARD_CONFLICTS,
    FETCH_AVAILABLE,
    FETCH_SUSPECT,
    FETCH_UNSUSPECTED,
    POSTPONE_DUTY,
    SCHEDULE_DUE,
    SELECT_LOST,
    SELECT_NEXT_DUE,
)
from sqla_river.store import STATEMENT_TIMEOUT_SECONDS, OwnConnection

LARGEST_FETCH: Final = 1_000
"""Rows of one fetch: 100 give 90 % of the rate of 1,000, and 5,000 give no more."""
GATHER: Final = 0.001
"""Seconds to wait for more slots to come free while fewer than half of them are: one row a fetch costs 28 times as
much per job.
"""
SCHEDULE_EVERY: Final = 0.025
"""Seconds between two schedules, and between two looks at the next due time."""
WASTEFUL: Final = 0.005
"""Seconds that an unbounded look at the next due time may take before the next ones begin where it ended: a long
transaction pins dead entries at the head of the index.
"""
IDLE_POLL: Final = 4
"""An idle runner that LISTENs polls at 1, 2, 4 times its interval."""
JITTER: Final = 0.1
STAGGER: Final = 0.005
"""Seconds by which each further runner of a fleet looks later at what is due: fifty of them need not all fire for one
job.
"""
RUN_EMPTY_WITHIN: Final = 30.0
"""Seconds that a runner waits for its slots to run empty, before it goes on without running a suspect."""
ISOLATION: Final = "isolate"
"""The duty of giving suspects a runner of their own: one runner of the fleet at a time."""
ALONE_FOR: Final = 60.0
"""Seconds after which a job that ran alone is no longer suspected of the death of its runner."""


class Fetcher:
    """The fetch loop of one runner; `step` is what its thread repeats.

    Args:
        own: its connection.
        runner_id: the owner's part of the tokens.
        slots: the size of each queue.
        kinds: the kinds that have a worker here. A job of another kind stays available, unburnt.
        deliver: takes the fetched rows, at once.
        ready: whether results are written fast enough to take on more.
        poll: seconds between two looks at an idle queue that nobody announced.
        hears: whether LISTEN is in force; without it polling never slows down.
    """

    def __init__(
        self,
        own: OwnConnection,
        runner_id: str,
        slots: Mapping[str, int],
        *,
        kinds: Callable[[], list[str]],
        deliver: Callable[[list[JobRow]], None],
        ready: Callable[[], bool],
        poll: float,
        hears: Callable[[], bool],
        wake: Callable[[], None],
    ) -> None:
        self._own = own
        self._runner_id = runner_id
        self._slots = dict(slots)
        self._busy = dict.fromkeys(slots, 0)
        self._kinds = kinds
        self._deliver = deliver
        self._ready = ready
        self._poll = poll
        self._hears = hears
        self._wake = wake
        self._freed: deque[str] = deque()
        self._asked: deque[float] = deque()
        self._number = 0
        self._lost: dict[str, float] = {}
        # What the next step has to do, and when (monotonic).
        self._hungry = set(slots)
        self._woken: set[str] = set()
        self._idle = 1
        self._poll_at = 0.0
        self._due_at = 0.0
        self._due_since: str | None = None
        self._bounded = False
        self._blocked = 0.0
        self._looked_at = 0.0
        self._look = True
        self._starved = False
        self._alone = False
        self._alone_until = 0.0
        self._turn_until = 0.0
        self._turn_began = 0.0
        self._no_turn_before = 0.0
        self._ran_alone = False
        self.rank = 0
        self.suspects = False

    # ---- called from other threads ---------------------------------------------------------------------------------

    def heard(self, queue: str | None) -> None:
        """A notification: a job of *queue*, of any queue where None, is there or due soon."""
        if queue is None:
            self._woken = set(self._slots)
        elif queue in self._slots:
            self._woken = self._woken | {queue}
        else:
            return
        self._wake()

    def freed(self, queue: str) -> None:
        """A slot of *queue* is free. Constant time, no lock."""
        self._freed.append(queue)
        if self._starved or queue in self._hungry:
            self._wake()

    def relieved(self) -> None:
        """Results are being written again."""
        if self._starved:
            self._wake()

    def due_in(self, seconds: float) -> None:
        """A job of this runner is due in *seconds*: a retry or a snooze."""
        at = time.monotonic() + seconds
        self._asked.append(at)
        if at < self._due_at:
            self._wake()

    def begin_alone(self, own: OwnConnection) -> bool:
        """Let the slots run empty and run suspects alone, one by one; False if there is none for this runner. *own* is
        the caller's connection.
        """
        now = time.monotonic()
        asked = {"p_queues": list(self._slots), "p_kinds": self._kinds()}
        if self._alone or now < self._no_turn_before or not own.execute(COUNT_SUSPECTS, asked).scalar():
            return False
        self._turn_began = now
        self._ran_alone = False
        self._alone_until = now + RUN_EMPTY_WITHIN
        self._turn_until = self._alone_until + RUN_EMPTY_WITHIN
        self._alone = True
        self._wake()
        return True

    # ---- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Schedule what is due, fetch what is available; seconds until the next look."""
        now = time.monotonic()
        self._starved = False
        woken, self._woken = self._woken, set()
        self._hungry |= woken
        polling = now >= self._poll_at
        if polling:
            self._hungry = set(self._slots)
        self._look = self._look or polling or bool(woken)
        self._due_at = min(self._due_at, self._asked_due())
        if now >= self._due_at and now - self._looked_at >= SCHEDULE_EVERY:
            self._schedule()
        if self._alone:
            return self._step_alone()
        free = self._free()
        fetched = 0
        if free and self._ready():
            fetched = self._fetch(free, woken)
        self._recover()
        if self._look and time.monotonic() - self._looked_at >= SCHEDULE_EVERY:
            self._read_next_due(unbounded=polling)
        if polling or fetched:
            self._plan_poll(idle=not fetched)
        return self._pause()

    def _free(self) -> dict[str, int]:
        """The free slots of the queues that may have work."""
        free = self._free_now()
        if 0 < 2 * sum(free.values()) < sum(self._slots[queue] for queue in self._hungry):
            time.sleep(GATHER)
            free = self._free_now()
        return free

    def _free_now(self) -> dict[str, int]:
        self._count_freed()
        free = {queue: self._slots[queue] - self._busy[queue] for queue in self._hungry}
        return {queue: slots for queue, slots in free.items() if slots > 0}

    def _count_freed(self) -> None:
        while self._freed:
            self._busy[self._freed.popleft()] -= 1

    def _fetch(self, free: Mapping[str, int], woken: Collection[str]) -> int:
        """Fetch for the queues in *free*. Those that gave nothing are done with, until something wakes them."""
        share = max(1, LARGEST_FETCH // len(free))
        asked = {
            "p_queues": list(free),
            "p_slots": [min(slots, share) for slots in free.values()],
            "p_kinds": self._kinds(),
        }
        rows = self._execute_fetch(FETCH_UNSUSPECTED if self.suspects else FETCH_AVAILABLE, asked)
        # A row may change between snapshot and lock, so a short fetch is not the end of a queue; an empty one is, if
        # nothing had just woken it: then a second look costs less than a job that waits for the poll.
        self._hungry -= set(free) - {row.queue for row in rows} - set(woken)
        return len(rows)

    def _execute_fetch(self, statement: Executable, asked: Mapping[str, Any]) -> list[JobRow]:
        self._number += 1
        token = f"{self._runner_id}/{self._number}"
        self._lost[token] = time.monotonic() + STATEMENT_TIMEOUT_SECONDS + 1
        given = {**asked, "p_token": token}
        try:
            fetched = self._own.execute(statement, given).all()
        except IntegrityError:
            # Keys that stand twice among rows which some other client made with a mask of its own: one of them must go.
            self._own.execute(DISCARD_CONFLICTS)
            fetched = self._own.execute(statement, given).all()
        rows = [JobRow._make((*row, token)) for row in fetched]
        del self._lost[token]
        self._take(rows)
        return rows

    def _step_alone(self) -> float:
        """One look at the suspects' turn: the slots run empty, one after the other runs alone, and the slots fill
        again.
        """
        self._count_freed()
        now = time.monotonic()
        self._starved = True
        if any(self._busy.values()):
            over = now >= self._alone_until
        else:
            asked = {"p_queues": list(self._slots), "p_kinds": self._kinds(), "p_id": self._runner_id}
            over = now >= self._turn_until or not self._ready() or not self._execute_fetch(FETCH_SUSPECT, asked)
            self._ran_alone = self._ran_alone or not over
            self._alone_until = now + ALONE_FOR
        if over:
            if not self._ran_alone:  # a long job runs here: it must not cost the runner more than a tenth of its time
                self._no_turn_before = now + 9 * (now - self._turn_began)
            self._own.execute(CLEAR_ALONE, {"p_id": self._runner_id})
            self._own.execute(POSTPONE_DUTY, {"p_name": ISOLATION, "p_after": timedelta(0)})
            self._alone = False
            self._hungry = set(self._slots)
            return 0.0
        return max(0.0, min(self._alone_until - now, self._poll, max(self._due_at - now, SCHEDULE_EVERY)))

    def _take(self, rows: list[JobRow]) -> None:
        # RETURNING comes in the order of the table.
        rows.sort(key=lambda row: (row.priority, row.id))
        for row in rows:
            self._busy[row.queue] += 1
        self._deliver(rows)

    def _recover(self) -> None:
        """Take what a fetch locked whose reply was lost: it is running under our token, and nobody else will free it
        while we live.
        """
        if not self._lost:
            return
        found = self._own.execute(SELECT_LOST, {"p_tokens": list(self._lost)}).all()
        now = time.monotonic()
        for row in found:
            self._take([JobRow._make(row)])
        for token in {row[-1] for row in found} | {token for token, until in self._lost.items() if now > until}:
            del self._lost[token]

    def _schedule(self) -> None:
        if self.rank:
            # Others come before: by now they may have done it.
            self._read_next_due(unbounded=False)
            if self._due_at > self._looked_at + self.rank * STAGGER:
                return
        moved = self._own.execute(SCHEDULE_DUE, {"p_schema": self._own.schema}).all()
        self._hungry |= {row.queue for row in moved} & set(self._slots)
        self._read_next_due(unbounded=False)
        if not moved and self._due_at <= self._looked_at + self.rank * STAGGER:
            # What is due is locked by somebody: look again, but ever more slowly, or the timer would spin.
            self._blocked = min(max(2 * self._blocked, SCHEDULE_EVERY), self._poll)
            self._due_at = self._looked_at + self._blocked
        else:
            self._blocked = 0.0

    def _read_next_due(self, *, unbounded: bool) -> None:
        since = None if unbounded or not self._bounded else self._due_since
        began = time.monotonic()
        row = self._own.execute(SELECT_NEXT_DUE, {"p_since": since}).one_or_none()
        self._looked_at = now = time.monotonic()
        self._look = False
        if since is None:
            self._bounded = now - began > WASTEFUL
        if row is None:
            self._due_at = self._asked_due()
        else:
            seconds, self._due_since = row
            self._due_at = min(now + max(seconds, 0.0) + self.rank * STAGGER, self._asked_due())

    def _asked_due(self) -> float:
        """The soonest time that `due_in` named since the last look."""
        soonest = math.inf
        while self._asked:
            soonest = min(soonest, self._asked.popleft())
        return soonest

    def _plan_poll(self, *, idle: bool) -> None:
        self._idle = min(self._idle * 2, IDLE_POLL) if idle and self._hears() else 1
        pause = self._poll * (self._idle if idle else 1)
        self._poll_at = time.monotonic() + pause * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311

    def _pause(self) -> float:
        now = time.monotonic()
        if self._hungry:
            self._starved = True  # before the look: who relieves it after this wakes it
            if self._ready() and self._free_now():
                return 0.0
        wait = [self._poll_at - now, max(self._due_at, self._looked_at + SCHEDULE_EVERY) - now]
        if self._look:
            wait.append(self._looked_at + SCHEDULE_EVERY - now)
        if self._lost:
            wait.append(1.0)
        return max(0.0, min(wait))
