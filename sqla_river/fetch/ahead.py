"""How much to fetch beyond the free slots: jobs that are over in no time would else wait for the next fetch."""

from collections.abc import Iterable, Mapping
from typing import Final

AHEAD: Final = 0.050
"""Seconds of work to have waiting before the slots, by the rate of late. A fetch of 1,000 jobs takes 10 to 20 ms where
both cores are busy, and 100 no-op jobs take less than one: fetched as the slots come free, they would be fetched a
hundred at a time. With 30 ms the slots ran dry in every other fetch.
"""
MOST: Final = 3_000
"""Jobs of a queue that wait at most: three fetches."""
WINDOW: Final = 0.010
"""Seconds over which a rate is taken."""
FIRST: Final = 20
"""Slots, and half of those of the queue, that are to come free before the first window is over for a rate to be taken
already: so work that begins after a rest is not fetched a few at a time.
"""
LATE: Final = 0.250
"""Seconds without a free slot after which what was fetched ahead goes back: the jobs of late are longer."""


class Ahead:
    """The rate at which the slots of each queue come free, and how many jobs may wait for that.

    Only a queue whose slots all come free within `AHEAD` has any fetched ahead; long jobs never are.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._counted = 0.0
        self._freed: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def begun(self, now: float) -> None:
        """Jobs may begin where none ran: the rest before says nothing of how soon they end."""
        if not self._freed:
            self._since = now

    def freed(self, counts: Mapping[str, int], now: float) -> None:
        """So many slots came free since the last call."""
        self._counted = now
        for queue, count in counts.items():
            self._freed[queue] = self._freed.get(queue, 0) + count
            self._last[queue] = now
        passed = now - self._since
        if passed >= WINDOW:
            self._since = now
            smooth = 0.5 if passed < 2 * WINDOW else 0.0
            self._rates = {
                queue: smooth * self._rates.get(queue, 0.0) + (1 - smooth) * count / passed
                for queue, count in self._freed.items()
            }
            self._freed = {}

    def of(self, queue: str, slots: int) -> int:
        """How many jobs of *queue* may wait."""
        rate = self._rates.get(queue)
        if rate is None:
            first = self._freed.get(queue, 0)
            if first < max(slots / 2, FIRST):
                return 0
            rate = first / max(self._counted - self._since, WINDOW / 10)
        ahead = int(rate * AHEAD)
        return min(ahead, MOST) if ahead >= slots else 0

    def late(self, queues: Iterable[str], now: float) -> list[str]:
        """Those of *queues*, which all have jobs waiting, where that takes too long; their rate is forgotten."""
        late = [queue for queue in queues if now - self._last.get(queue, 0.0) >= LATE]
        for queue in late:
            self._rates.pop(queue, None)
        return late
