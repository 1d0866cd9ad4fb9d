"""Whose turn it is: the loop that claims duties and does them, on a connection of its own."""

import logging
import random
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Protocol

from sqla_river.statements import CLAIM_DUTY, FINISH_DUTY, INSERT_DUTIES, POSTPONE_DUTY, SELECT_DUTIES
from sqla_river.store import OwnConnection

log: Final = logging.getLogger(__name__)

STATEMENT_TIMEOUT: Final = "10s"
_LONGEST_LOOK: Final = 5.0
_JITTER: Final = 0.25
"""Seconds over which the runners of a fleet spread their looks."""
_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 60.0


class Duty(Protocol):
    """One piece of maintenance: short, idempotent, and safe if two runners do it at once."""

    name: str
    every: timedelta

    def entitled(self) -> bool:
        """Whether this runner may do it now; one that may not does not claim it."""
        ...

    def do(self, own: OwnConnection) -> bool:
        """One bounded batch of it; True if there is more to do at once."""
        ...


class Turns:
    """The duties of one runner; `step` is what its thread repeats."""

    def __init__(self, own: OwnConnection, duties: Sequence[Duty]) -> None:
        self._own = own
        self._duties = {duty.name: duty for duty in duties}
        self._unfinished: list[Duty] = []
        self._failures: dict[str, int] = {}
        self._known = False
        self.done_ago: dict[str, float | None] = {}
        """Seconds since each duty last succeeded anywhere, as read at the last look; None if it never did."""

    def step(self) -> float:
        """Do a batch of each duty that is this runner's turn; seconds until the next look."""
        if not self._known:
            self._own.execute(INSERT_DUTIES, {"p_names": list(self._duties)})
            self._known = True
        soonest = _LONGEST_LOOK
        for name, due_in, done_ago in self._own.execute(SELECT_DUTIES).all():
            self.done_ago[name] = done_ago
            duty = self._duties.get(name)
            if duty is None or duty in self._unfinished:
                continue
            if due_in > 0:
                soonest = min(soonest, due_in)
            elif not duty.entitled():
                soonest = min(soonest, duty.every.total_seconds())
            elif self._claim(duty):
                self._unfinished.append(duty)
        self._unfinished = [duty for duty in self._unfinished if self._do(duty)]
        return 0.0 if self._unfinished else soonest + random.uniform(0, _JITTER) * min(soonest, 1.0)  # noqa: S311

    def postpone(self, name: str, after: timedelta) -> None:
        """Make the duty *name* due *after* from now, wherever it stands. Called in this loop's thread only."""
        self._own.execute(POSTPONE_DUTY, {"p_name": name, "p_after": after})

    def _claim(self, duty: Duty) -> bool:
        return self._own.execute(CLAIM_DUTY, {"p_name": duty.name, "p_every": duty.every}).first() is not None

    def _do(self, duty: Duty) -> bool:
        """Whether *duty* is to go on in the next step."""
        began = time.monotonic()
        try:
            more = duty.do(self._own)
            if not more:
                self._own.execute(FINISH_DUTY, {"p_name": duty.name})
        except Exception as error:  # noqa: BLE001 - a failing duty stops no other
            failures = self._failures[duty.name] = self._failures.get(duty.name, 0) + 1
            pause = min(_LONGEST_RETRY, _FIRST_RETRY * 2.0 ** min(failures - 1, 10))
            log.warning(
                "duty %s failed (%d in a row) after %.1f s: %s; due again in %.0f s",
                duty.name,
                failures,
                time.monotonic() - began,
                str(error).partition("\n")[0],
                pause,
            )
            self.postpone(duty.name, timedelta(seconds=pause))
            return False
        self._failures.pop(duty.name, None)
        return more
