"""Who looks first: on a notification every runner of a fleet ranks itself, and only the first few look at once.

Fifty idle runners and one job would else make fifty fetches of which one finds something.
"""

import math
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

AT_ONCE: Final = 3
"""Runners that look at once."""
APART: Final = 0.020
"""Seconds by which each further one looks later."""


class Woken(NamedTuple):
    """The queues to look at now; those in `twice` once more if the first look finds nothing there."""

    queues: set[str]
    twice: set[str]


class Wakeups:
    """What was announced, and when this runner looks.

    Args:
        poll: seconds; nobody looks later than that.
    """

    def __init__(self, poll: float) -> None:
        self._poll = poll
        self._heard: deque[tuple[str | None, int]] = deque()
        self._later: dict[str, float] = {}
        self.place = 0
        self.peers: Mapping[str, Sequence[int]] = {}
        """The places of the live runners that have free slots, by queue; learnt with the heartbeat."""

    def heard(self, queue: str | None, pid: int) -> None:
        """A notification of the backend *pid*; 0 where it came by another way, and is looked after at once. Called from
        other threads.
        """
        self._heard.append((queue, pid))

    def take(self, queues: Iterable[str], now: float) -> Woken:
        """What of *queues* is to be looked at now."""
        known = set(queues)
        woken, twice = set[str](), set[str]()
        while self._heard:
            queue, pid = self._heard.popleft()
            if queue is None:
                woken |= known
                twice |= known
                continue
            if queue not in known:
                continue
            rank = self._rank(queue, pid)
            if rank < AT_ONCE:
                woken.add(queue)
                if rank == 0:
                    twice.add(queue)
            else:
                # A look that is put off already, and comes sooner, serves this one too.
                at = now + min(rank * APART, self._poll)
                self._later[queue] = min(at, self._later.get(queue, at))
        for queue in [queue for queue, at in self._later.items() if at <= now]:
            del self._later[queue]
            woken.add(queue)
        return Woken(woken & known, twice)

    def wait(self, now: float) -> float:
        """Seconds from *now* until the next look that was put off; for ever if there is none."""
        return min(self._later.values()) - now if self._later else math.inf

    def _rank(self, queue: str, pid: int) -> int:
        """How many live runners of *queue* come before this one, for a notification of *pid*: another order each
        time, the same for all.
        """
        if not pid:
            return 0
        own = _draw(self.place, pid)
        return sum(_draw(place, pid) < own for place in self.peers.get(queue, ()))


def _draw(place: int, pid: int) -> int:
    return zlib.crc32(b"%d %d" % (place, pid))
