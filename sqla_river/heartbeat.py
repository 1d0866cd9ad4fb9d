"""The heartbeat: the row that says this runner lives, and the rows of its queues. A thread and a connection of its own."""

import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from sqla_river.statements import DELETE_RUNNER, UPSERT_QUEUES, UPSERT_RUNNER
from sqla_river.store import OwnConnection

TOUCH_QUEUES_EVERY: Final = 600.0
"""Seconds; River's clients delete a queue that nobody touched for 24 h."""


def library_version() -> str:
    try:
        return version("sqla-river")
    except PackageNotFoundError:
        return "unknown"


class Heartbeat:
    """The heartbeat loop of one runner; `step` is what its thread repeats, every *every* seconds."""

    def __init__(self, own: OwnConnection, runner_id: str, slots: Mapping[str, int], every: float) -> None:
        self._own = own
        self._runner_id = runner_id
        self.slots = slots
        self._every = every
        self._touched_at: float | None = None
        self.beat_at = time.monotonic()
        """When the row was last known to be fresh: the moment before the statement was sent (monotonic)."""
        self.beaten = False
        """Whether the row was ever written."""

    def step(self) -> float:
        """Renew the runner's row, and every ten minutes those of its queues; seconds until the next."""
        began = time.monotonic()
        self._own.execute(
            UPSERT_RUNNER,
            {
                "p_id": self._runner_id,
                "p_queues": list(self.slots),
                "p_slots": list(self.slots.values()),
                "p_version": library_version(),
            },
        )
        self.beat_at = began
        if self._touched_at is None or began - self._touched_at >= TOUCH_QUEUES_EVERY:
            self._own.execute(UPSERT_QUEUES, {"p_queues": list(self.slots)})
            self._touched_at = began
        self.beaten = True
        return max(self._every - (time.monotonic() - began), 0.0)

    def leave(self) -> None:
        """Take the runner's row away, unless a running job still names it."""
        self._own.execute(DELETE_RUNNER, {"p_id": self._runner_id})
        self._own.close()
