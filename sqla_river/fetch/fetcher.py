"""The fetch loop."""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Executable
from sqlalchemy.exc import DBAPIError, IntegrityError

from sqla_river.fetch.ahead import AHEAD, LATE, Ahead
from sqla_river.fetch.alone import Turn
from sqla_river.fetch.bounds import Bounds
from sqla_river.fetch.due import EVERY, DueTimer
from sqla_river.fetch.spared import spare
from sqla_river.fetch.wakeups import Wakeups
from sqla_river.rows import QUEUE, Fetched
from sqla_river.statements import (
    DISCARD_CONFLICTS,
    FETCH_AVAILABLE,
    FETCH_BOUNDED,
    FETCH_SUSPECT,
    SELECT_LOST,
)
from sqla_river.store import STATEMENT_TIMEOUT_SECONDS, OwnConnection

LARGEST_FETCH: Final = 1_000
"""Rows of one fetch: 100 give 90 % of the rate of 1,000, and 5,000 give no more."""
GATHER: Final = 0.001
"""Seconds to wait for more slots to come free while fewer than half of them are: one row a fetch costs 28 times as
much per job.
"""
LOOKS: Final = 5
"""How often it looks meanwhile: a hundred jobs that do nothing are done in half a millisecond."""
RESULT_EVERY: Final = 0.002
"""Seconds between two looks whether the last results are written."""
LOST_EVERY: Final = 1.0
"""Seconds between two looks for what a fetch took whose reply was lost."""
IDLE_POLL: Final = 4
"""An idle runner that LISTENs polls at 1, 2, 4 times its interval."""
JITTER: Final = 0.1
_queue_of: Final = itemgetter(QUEUE)


class Fetcher:
    """The fetch loop of one runner; `step` is what its thread repeats.

    Args:
        own: its connection.
        runner_id: the owner's part of the tokens.
        slots: the size of each queue.
        kinds: the kinds that have a worker here. A job of another kind stays available, unburnt.
        deliver: takes the fetched rows, at once.
        give_back: lets go of the jobs of a queue that were fetched ahead and have not begun.
        ready: whether results are written fast enough to take on more.
        written: whether every result is.
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
        deliver: Callable[[list[Fetched]], None],
        give_back: Callable[[str], None],
        ready: Callable[[], bool],
        written: Callable[[], bool],
        poll: float,
        hears: Callable[[], bool],
        wake: Callable[[], None],
    ) -> None:
        self._own = own
        self._runner_id = runner_id
        self._slots = self._resized = slots
        self._busy = dict.fromkeys(slots, 0)
        self._kinds = kinds
        self._deliver = deliver
        self._give_back = give_back
        self._ready = ready
        self._written = written
        self._poll = poll
        self._hears = hears
        self._wake = wake
        self._freed: deque[str] = deque()
        self._returned: deque[str] = deque()
        self._number = 0
        self._lost: dict[str, float] = {}
        self._recover_at = 0.0
        self._bounds = Bounds(poll)
        self._ahead = Ahead()
        self._resumed: deque[str | None] = deque()
        # What the next step has to do, and when (monotonic).
        self._hungry = set(slots)
        self._idle = 1
        self._poll_at = 0.0
        self._starved = False
        self.wakeups = Wakeups(poll)
        self.due = DueTimer(own, poll, wake)
        self.turn = Turn(own, runner_id, self._asked_everywhere, wake)
        self.suspects = False
        self.deaths = False
        """Whether jobs are known whose runners died: what is fetched ahead would be blamed for the next death too."""

    # ---- called from other threads ---------------------------------------------------------------------------------

    def heard(self, queue: str | None, pid: int = 0) -> None:
        """A notification of the backend *pid*: a job of *queue*, of any queue where None, is there or due soon."""
        if queue is None or queue in self._slots:
            self.wakeups.heard(queue, pid)
            self._wake()

    def resumed(self, queue: str | None) -> None:
        """The pause of *queue*, of any queue where None, may be over. Its jobs may have waited long, and fetches have
        passed them by: the next one begins at the start.
        """
        self._resumed.append(queue)
        self.heard(queue)

    @property
    def unsure(self) -> set[str]:
        """The tokens of fetches that may have brought what was not delivered yet."""
        return set(self._lost)

    def resize(self, slots: Mapping[str, int]) -> None:
        """Fetch as *slots* says, which nobody changes any more, from the next step on."""
        self._resized = slots
        self._wake()

    def freed(self, queue: str) -> None:
        """A slot of *queue* is free. Constant time, no lock."""
        self._freed.append(queue)
        if self._starved:
            self._wake()

    def returned(self, queue: str) -> None:
        """A job of *queue* is let go without having come to its end: that says nothing of how soon others do."""
        self._returned.append(queue)
        if self._starved:
            self._wake()

    def relieved(self) -> None:
        """Results are being written again."""
        if self._starved:
            self._wake()

    # ---- the loop --------------------------------------------------------------------------------------------------

    def step(self) -> float:
        """Schedule what is due, fetch what is available; seconds until the next look."""
        now = time.monotonic()
        self._starved = False
        self._heed_resize()
        self._let_go_of_late(now)
        woken, twice = self.wakeups.take(self._slots, now)
        self._hungry |= woken
        while self._resumed:
            self._bounds.forget(self._resumed.popleft())
        polling = now >= self._poll_at
        if polling:
            self._hungry = set(self._slots)
        if polling or woken:
            self.due.doubt()
        self._hungry |= self.due.fire() & set(self._slots)
        if self.turn.on:
            return self._step_alone()
        free = self._free()
        fetched = self._fetch(free, twice, polling=polling) if free and self._ready() else 0
        self._recover()
        self.due.look(unbounded=polling)
        self._plan_poll(now, polling=polling, idle=not fetched)
        return self._pause()

    def _heed_resize(self) -> None:
        """Take on what `resize` said. A queue that is gone keeps its count: it may come back before its jobs end."""
        slots, before = self._resized, self._slots
        if slots is before:
            return
        self._busy = dict.fromkeys(slots, 0) | self._busy  # first: `free_queues` looks for what stands in the slots
        self._slots = slots
        grown = {queue for queue, size in slots.items() if size > before.get(queue, 0)}
        self._hungry = (self._hungry | grown) & slots.keys()
        for queue in slots.keys() - before.keys():
            self._bounds.forget(queue)

    def _free(self) -> dict[str, int]:
        """How many jobs to fetch of the queues that may have work: for their free slots, and ahead."""
        free = self._free_now()
        for _ in range(LOOKS):
            most = sum(self._slots[queue] + self._ahead_of(queue) for queue in self._hungry)
            if not 0 < 2 * sum(free.values()) < min(most, LARGEST_FETCH):
                break
            time.sleep(GATHER / LOOKS if self._any_free() else AHEAD / 4 / LOOKS)
            free = self._free_now()
        return free

    def _free_now(self) -> dict[str, int]:
        self._count_freed()
        free = {queue: self._slots[queue] + self._ahead_of(queue) - self._busy[queue] for queue in self._hungry}
        return {queue: slots for queue, slots in free.items() if slots > 0}

    def _any_free(self) -> bool:
        return any(self._busy[queue] < self._slots[queue] for queue in self._hungry)

    def _ahead_of(self, queue: str) -> int:
        return 0 if self.deaths or self.turn.on else self._ahead.of(queue, self._slots[queue])

    def _count_freed(self) -> None:
        ended = _drained(self._freed)
        for queue, count in (ended + _drained(self._returned)).items():
            self._busy[queue] -= count
        self._ahead.freed(ended, time.monotonic())

    def _waiting(self) -> list[str]:
        """The queues of which jobs were fetched ahead, and wait."""
        return [queue for queue, slots in self._slots.items() if self._busy[queue] > slots]

    def _let_go_of_late(self, now: float) -> None:
        waiting = self._waiting()
        if waiting:
            self._count_freed()
            for queue in self._ahead.late(waiting, now):
                self._give_back(queue)

    def free_queues(self) -> list[str]:
        """The queues that have a free slot, as far as any thread can tell."""
        return [queue for queue, slots in self._slots.items() if self._busy[queue] < slots]

    def _fetch(self, free: Mapping[str, int], twice: Collection[str], *, polling: bool) -> int:
        """Fetch for the queues in *free*. Those that gave nothing are done with, until something wakes them."""
        share = max(1, LARGEST_FETCH // len(free))
        asked = {queue: min(slots, share) for queue, slots in free.items()}
        given = {"p_queues": list(asked), "p_slots": list(asked.values()), "p_kinds": self._kinds()}
        began = time.monotonic()
        bounds = {} if polling else self._bounds.of(asked, began)
        if bounds:
            given |= self._bounds.parameters(asked, bounds)
            rows = self._execute_fetch(FETCH_BOUNDED, given)
            self._bounds.tried(bounds, time.monotonic() - began)
        else:
            rows = self._execute_fetch(FETCH_AVAILABLE, given)
            try:
                self._bounds.learn(self._own, asked, rows, began, time.monotonic())
            except DBAPIError as error:
                spare(self._own, error, "reading how far a fetch came")
        # A row may change between snapshot and lock, so a short fetch is not the end of a queue; an empty one is, if
        # nothing had just woken it: then a second look costs less than a job that waits for the poll.
        self._hungry -= set(free) - set(map(_queue_of, rows)) - set(twice)
        return len(rows)

    def _execute_fetch(self, statement: Executable, asked: Mapping[str, Any]) -> list[Fetched]:
        self._number += 1
        token = f"{self._runner_id}/{self._number}"
        self._lost[token] = time.monotonic() + STATEMENT_TIMEOUT_SECONDS + 1
        given = {**asked, "p_token": token}
        try:
            found = self._send_fetch(statement, given)
        except BaseException as error:
            if isinstance(error, DBAPIError) and self._own.is_open and getattr(error.orig, "sqlstate", None):
                del self._lost[token]  # the server refused it, and has locked nothing
            else:
                self.turn.lost, self._recover_at = True, 0.0
            raise
        tail = (token,)
        rows: list[Fetched] = [values + tail for values in found]
        try:
            self._take(rows)
        finally:  # only now, or the heartbeat could miss them in between
            del self._lost[token]
        return rows

    def _send_fetch(self, statement: Executable, given: Mapping[str, Any]) -> list[Any]:
        try:
            return self._own.fetch(statement, given)
        except IntegrityError:
            # Keys that stand twice among rows which some other client made with a mask of its own: one of them must go.
            self._own.execute(DISCARD_CONFLICTS)
            return self._own.fetch(statement, given)

    def _asked_everywhere(self) -> dict[str, list[str]]:
        return {"p_queues": list(self._slots), "p_kinds": self._kinds()}

    def _fetch_suspect(self) -> bool:
        asked = {**self._asked_everywhere(), "p_id": self._runner_id}
        try:
            return self._ready() and bool(self._execute_fetch(FETCH_SUSPECT, asked))
        except DBAPIError as error:
            spare(self._own, error, "fetching a job that is to run alone")
            return False

    def _step_alone(self) -> float:
        """One look at the suspects' turn; when it is over the slots fill again."""
        self._recover()
        self._count_freed()
        self._starved = True
        self._hungry = set(self._slots)  # for when it is over
        # A job that has ended is not alone with the next one before its result is written: it would run again.
        ended = not any(self._busy.values())
        self.turn.step(busy=not (ended and self._written()), fetch=self._fetch_suspect)
        if not self.turn.on:
            return 0.0
        if ended and not any(self._busy.values()) and not self.turn.lost:
            return RESULT_EVERY
        now = time.monotonic()
        wait = [self.turn.wait(now), self._poll, max(self.due.at - now, EVERY)]
        if self.turn.lost:
            wait.append(LOST_EVERY)
        return max(0.0, min(wait))

    def _take(self, rows: list[Fetched]) -> None:
        # RETURNING comes in the order of the table.
        rows.sort()
        if not any(self._busy.values()):
            self._ahead.begun(time.monotonic())
        for queue, count in Counter(map(_queue_of, rows)).items():
            self._busy[queue] += count
        self._deliver(rows)

    def _recover(self) -> None:
        """Take what a fetch locked whose reply was lost: it is running under our token, and nobody else will free it
        while we live.
        """
        if not self._lost or time.monotonic() < self._recover_at:
            return
        self._recover_at = time.monotonic() + LOST_EVERY
        try:
            found = self._own.execute(SELECT_LOST, {"p_tokens": list(self._lost)}).all()
        except DBAPIError as error:
            spare(self._own, error, "looking for what a fetch took whose reply was lost")
            return
        now = time.monotonic()
        for row in found:
            self._take([tuple(row)])
        for token in {row[-1] for row in found} | {token for token, until in self._lost.items() if now > until}:
            del self._lost[token]
        self.turn.lost = bool(self._lost)

    def _plan_poll(self, now: float, *, polling: bool, idle: bool) -> None:
        """Poll again one interval after the last poll, later while there is nothing; work in one queue puts off no look
        at another.
        """
        if polling:
            self._idle = min(self._idle * 2, IDLE_POLL) if idle and self._hears() else 1
        elif idle or self._idle == 1:
            return
        else:
            self._idle = 1
        pause = self._poll * self._idle * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311
        self._poll_at = now + pause if polling else min(self._poll_at, now + pause)

    def _pause(self) -> float:
        now = time.monotonic()
        if self._hungry:
            self._starved = True  # before the look: who relieves it after this wakes it
            if self._ready() and self._free_now():
                return 0.0
        wait = [self._poll_at - now, self.due.wait(now), self.wakeups.wait(now)]
        if self._lost:
            wait.append(LOST_EVERY)
        if self._waiting():
            wait.append(LATE)
        return max(0.0, min(wait))


def _drained(queues: deque[str]) -> Counter[str]:
    """What stood in *queues*, to which others append, counted."""
    return Counter(queues.popleft() for _ in range(len(queues)))
