"""Where a fetch may begin, while what lies before has shown to be of no use.

A long transaction pins dead entries at the head of the fetch index, and waiting rows of unknown kinds lie there too; a
scan from the start pays for them every time. With 200,000 dead entries pinned: 5,865 buffers and 28 ms from the start,
43 buffers and 0.2 ms from a bound.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Final, NamedTuple

from sqla_river.rows import Fetched, row_of
from sqla_river.statements import SELECT_BOUNDS
from sqla_river.store import OwnConnection

WASTEFUL: Final = 0.010
"""Seconds from which on a scan may have been wasteful: a good one of a few rows takes one."""
WASTEFUL_PER_ROW: Final = 0.0002
"""Seconds: a good scan takes 0.03 ms a row, on a crowded machine several times as long."""
MARGIN: Final = 1.0
"""Seconds before a scan that no bound reaches into: transactions that were open then bring rows with such times."""
LONGEST: Final = 1.0
"""Seconds that a bound holds at most, however seldom a runner polls."""
PRIORITIES: Final = (1, 2, 3, 4)
START: Final = "-infinity"


class Bound(NamedTuple):
    """For each priority the ``scheduled_at`` to begin with, until when (monotonic) that holds, and how long the scan
    from the start took.
    """

    since: tuple[str, ...]
    until: float
    cost: float


class Bounds:
    """The bounds of each queue. They hold for one poll, a second at most, after the scan from the start that gave them:
    so a bound can delay a job by that (a late commit, a retry by hand, another priority), and never lose it.

    On a crowded machine any scan may take long. So it takes two wasteful ones, one after the other, for a bound; and a
    bound that does not make the scan cheaper is forgotten.
    """

    def __init__(self, poll: float) -> None:
        self._lasts = min(poll, LONGEST)
        self._bounds: dict[str, Bound] = {}
        self._suspected: set[str] = set()

    def of(self, queues: Iterable[str], now: float) -> dict[str, Bound]:
        """Those that hold now."""
        if not self._bounds:
            return {}
        found = ((queue, self._bounds.get(queue)) for queue in queues)
        return {queue: bound for queue, bound in found if bound is not None and now < bound.until}

    def tried(self, bounds: Mapping[str, Bound], seconds: float) -> None:
        """A fetch with *bounds* took so long."""
        for queue, bound in bounds.items():
            if seconds > bound.cost / 2:
                self.forget(queue)

    def forget(self, queue: str | None) -> None:
        """Let the next scan of *queue*, of every queue where None, begin at the start."""
        if queue is None:
            self._bounds.clear()
            self._suspected.clear()
        else:
            self._bounds.pop(queue, None)
            self._suspected.discard(queue)

    def parameters(self, queues: Iterable[str], bounds: Mapping[str, Bound]) -> dict[str, list[str]]:
        """What FETCH_BOUNDED needs beside the queues."""
        sinces = [bounds[queue].since if queue in bounds else (START,) * len(PRIORITIES) for queue in queues]
        return {
            f"p_since_{priority}": [since[number] for since in sinces] for number, priority in enumerate(PRIORITIES)
        }

    def learn(
        self, own: OwnConnection, asked: Mapping[str, int], fetched: Sequence[Fetched], began: float, ended: float
    ) -> None:
        """Of a scan from the start, for up to *asked* rows of each queue, that took from *began* to *ended*: set bounds
        if it was wasteful, as the one before, forget them if not. One round trip if it was.
        """
        if ended - began < max(WASTEFUL, len(fetched) * WASTEFUL_PER_ROW):
            for queue in asked:
                self.forget(queue)
            return
        if not self._suspected.issuperset(asked):
            self._suspected.update(asked)
            return
        rows = list(map(row_of, fetched))
        found = Counter(row.queue for row in rows)
        last = {
            queue: max(row.priority for row in rows if row.queue == queue)
            for queue, slots in asked.items()
            if found[queue] >= slots
        }
        ids = [row.id for row in rows if last.get(row.queue) == row.priority]
        given = own.execute(SELECT_BOUNDS, {"p_ids": ids, "p_before": timedelta(seconds=ended - began + MARGIN)}).all()
        keys = {row.queue: row.since for row in given}
        moment = keys[None]
        for queue in asked:
            since = (
                tuple(_since(priority, last[queue], keys[queue], moment) for priority in PRIORITIES)
                if queue in last
                else (moment,) * len(PRIORITIES)
            )
            self._bounds[queue] = Bound(since, began + self._lasts, ended - began)


def _since(priority: int, last: int, key: str, moment: str) -> str:
    """Before the *last* priority all was scanned, in it up to *key*, behind it nothing."""
    if priority == last:
        return key
    return moment if priority < last else START
