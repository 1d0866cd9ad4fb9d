"""Admission to the slots: of each queue as many jobs run as it has slots, and what was fetched ahead waits here."""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Final

from sqla_river.rows import QUEUE, Fetched, drained

_queue_of: Final = itemgetter(QUEUE)


def _by_queue(rows: Sequence[Fetched]) -> dict[str, Sequence[Fetched]]:
    """*rows* in groups, in their order. Most runners work one queue, and a loop over all costs as much as the rest."""
    queues = set(map(_queue_of, rows))
    if len(queues) == 1:
        return {queues.pop(): rows}
    groups: dict[str, list[Fetched]] = {queue: [] for queue in queues}
    for row in rows:
        groups[row[QUEUE]].append(row)
    return dict[str, Sequence[Fetched]](groups)


class Admission:
    """Which of the fetched jobs may begin.

    Args:
        slots: by queue.
    """

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._slots = slots
        self._running = dict.fromkeys(slots, 0)
        self._waiting: dict[str, deque[Fetched]] = {queue: deque() for queue in slots}
        self._crowded = False
        """Whether more jobs of some queue may be running than it has slots by now."""
        self._lock = threading.Lock()
        self.passed = 0
        """Jobs that have a slot."""

    def admit(self, rows: Sequence[Fetched]) -> list[Fetched]:
        """Those of *rows* that begin now. The others wait, in their order, behind what waits already."""
        begin: list[Fetched] = []
        groups = _by_queue(rows)
        with self._lock:
            for queue, own in groups.items():
                free = max(self._slots.get(queue, 0) - self._running[queue], 0)
                first = own[:free]
                self._running[queue] += len(first)
                self._waiting[queue].extend(own[free:])
                begin += first
            self.passed += len(begin)
        if len(groups) > 1:
            begin.sort()
        return begin

    def leave(self, queue: str) -> Fetched | None:
        """A job of *queue* has left its slot: the one that begins in its place. No lock while there is one."""
        if not self._crowded:
            try:  # not `suppress`, which costs more than all else here
                return self._waiting[queue].popleft()
            except IndexError:
                pass
        with self._lock:  # else a job that comes to wait at this moment would wait for ever
            if self._running[queue] <= self._slots.get(queue, 0):
                with suppress(IndexError):
                    return self._waiting[queue].popleft()
            self._running[queue] -= 1
            self.passed -= 1
            if self._crowded:
                self._see_the_crowd()
            return None

    def turn_away(self, queue: str | None = None) -> list[Fetched]:
        """The jobs that wait, those of *queue* where one is named: they wait no longer."""
        with self._lock:
            queues = self._waiting.values() if queue is None else [self._waiting.get(queue, deque())]
            return [row for waiting in queues for row in drained(waiting)]

    def resize(self, slots: Mapping[str, int]) -> None:
        """Let as many run as *slots* says. What runs goes on; a queue that is gone keeps its count."""
        with self._lock:
            for queue in slots:
                self._running.setdefault(queue, 0)
                self._waiting.setdefault(queue, deque())
            self._slots = slots
            self._see_the_crowd()

    def _see_the_crowd(self) -> None:
        self._crowded = any(running > self._slots.get(queue, 0) for queue, running in self._running.items())
