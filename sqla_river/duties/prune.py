"""Prune: delete finished jobs whose retention is over; clean: the rows of queues and runners that are gone."""

from collections.abc import Iterator
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
PRUNE: Final = {"completed": PRUNE_COMPLETED, "cancelled": PRUNE_CANCELLED, "discarded": PRUNE_DISCARDED}


class Prune:
    """Deletes 1,000 rows at a time, oldest first; goes on until none is left over its time."""

    name = "prune"
    every = timedelta(seconds=30)

    def __init__(self, retention: Retention) -> None:
        self._batches = list(_batches(retention))

    def entitled(self) -> bool:
        return bool(self._batches)

    def do(self, own: OwnConnection) -> bool:
        more, failed = False, None
        for state, parameters in self._batches:
            try:
                more = own.execute(PRUNE[state], parameters).rowcount >= BATCH or more
            except DBAPIError as error:  # one state or queue that cannot be pruned keeps no other
                failed = error
        if failed is not None:
            raise failed
        return more


def _batches(retention: Retention) -> Iterator[tuple[str, dict[str, Any]]]:
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
