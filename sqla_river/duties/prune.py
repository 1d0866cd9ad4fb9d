"""Prune: delete finished jobs whose retention is over; clean: the rows of queues and runners that are gone."""

import math
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from sqla_river.options import Retention
from sqla_river.statements import (
    DELETE_GONE_RUNNERS,
    DELETE_UNTOUCHED_QUEUES,
    PRUNE_CANCELLED,
    PRUNE_COMPLETED,
    PRUNE_DISCARDED,
)
from sqla_river.store import OwnConnection

BATCH: Final = 1_000
WHOLE_EVERY: Final = 3_600.0
"""Seconds between two sweeps that look at everything."""
LATEST_COMMIT: Final = 600.0
"""Seconds from the end of a job to its commit, in which the next sweep still finds it."""
PRUNE: Final = {"completed": PRUNE_COMPLETED, "cancelled": PRUNE_CANCELLED, "discarded": PRUNE_DISCARDED}


class Prune:
    """Deletes 1,000 rows at a time, oldest first; goes on until none is left over its time."""

    name = "prune"
    every = timedelta(seconds=30)

    def __init__(self, retention: Retention) -> None:
        self._sweeps = [_Sweep(state, parameters) for state, parameters in _asked(retention)]
        self._failed: dict[_Sweep, DBAPIError] = {}

    def entitled(self) -> bool:
        return bool(self._sweeps)

    def do(self, own: OwnConnection) -> bool:
        """One batch of each state and queue. One that cannot be pruned keeps no other, nor slows it down: it is passed
        by until the others are done, and only then the duty fails.
        """
        more = False
        for sweep in self._sweeps:
            if sweep not in self._failed:
                try:
                    more = sweep.batch(own) or more
                except DBAPIError as error:
                    self._failed[sweep] = error
        if not more and self._failed:
            failed, self._failed = self._failed, {}
            raise next(iter(failed.values()))
        return more


class _Sweep:
    """What one statement of a retention deletes, and how far back it looks.

    It begins where the last sweep came to its end, or each would read all that other queues keep (300,000 rows: 0.2 s,
    every 30 s), and the index entries of all that was deleted since the last VACUUM. Every `WHOLE_EVERY` it looks at
    everything, for rows that were locked, or had ended long before their transaction did, and for a clock that was set.
    """

    def __init__(self, state: str, parameters: Mapping[str, Any]) -> None:
        self._state = state
        self._parameters = parameters
        self._ended = self._whole = -math.inf

    def batch(self, own: OwnConnection) -> bool:
        """Delete some; whether there are more."""
        began = time.monotonic()
        whole = began - self._whole >= WHOLE_EVERY
        back = None if whole else timedelta(seconds=began - self._ended + LATEST_COMMIT)
        more = own.execute(PRUNE[self._state], {**self._parameters, "p_back": back}).rowcount >= BATCH
        if not more:
            self._ended = began
            if whole:
                self._whole = began
        return more


def _asked(retention: Retention) -> Iterator[tuple[str, dict[str, Any]]]:
    """State and parameters of each statement that *retention* asks for; none for what is kept for ever."""
    for state in PRUNE:
        age = getattr(retention, state)
        if age is not None:
            yield state, {"p_age": age, "p_queue": None, "p_others": sorted(retention.queues)}
        for queue, other in sorted(retention.queues.items()):
            age = getattr(other, state)
            if age is not None:
                yield state, {"p_age": age, "p_queue": queue, "p_others": []}


class Clean:
    """Takes away the rows of queues that nobody touched for a day, and of runners that are long gone."""

    name = "clean"
    every = timedelta(hours=1)

    def entitled(self) -> bool:
        return True

    def do(self, own: OwnConnection) -> bool:
        own.execute(DELETE_UNTOUCHED_QUEUES)
        own.execute(DELETE_GONE_RUNNERS)
        return False
