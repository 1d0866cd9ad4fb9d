"""Whose turn it is: the loop that claims duties and does them, on a connection of its own."""

import random
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final, Protocol

from sqla_river.logs import Log, first_line
from sqla_river.statements import CLAIM_DUTY, FINISH_DUTY, INSERT_DUTIES, POSTPONE_DUTY, SELECT_DUTIES
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

STATEMENT_TIMEOUT: Final = "10s"
_LONGEST_LOOK: Final = 5.0
_JITTER: Final = 0.25
"""Seconds over which the runners of a fleet spread their looks."""
_FIRST_RETRY: Final = 1.0
_LONGEST_RETRY: Final = 60.0
_LONGEST_WAIT: Final = timedelta(seconds=10)
"""More than the bound on waits for locks."""


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
    """The duties of one runner; `step` is what its thread repeats.

    Args:
        own: its connection.
        duties: the most urgent first.
    """

    def __init__(self, own: OwnConnection, duties: Sequence[Duty]) -> None:
        self._own = own
        self._duties = {duty.name: duty for duty in duties}
        self._unfinished: set[str] = set()
        self._failures: dict[str, int] = {}
        self._done: dict[str, tuple[float, float] | None] = {}

    def ages(self) -> dict[str, timedelta | None]:
        """How long ago each of this runner's duties last succeeded, wherever that was; None where it never did, as far
        as is known.

        It grows while this loop stands still. A duty that nobody has to do (no suspects, nothing to prune) has no age.
        """
        now = time.monotonic()
        found = {name: self._done.get(name) for name in self._duties}
        return {name: timedelta(seconds=now - done[0] + done[1]) if done else None for name, done in found.items()}

    def step(self) -> float:
        """Do a batch of each duty that is this runner's turn; seconds until the next look."""
        rows = {row.name: row for row in self._own.execute(SELECT_DUTIES).all()}
        now = time.monotonic()
        self._done = {name: None if row.done_ago is None else (now, row.done_ago) for name, row in rows.items()}
        if any(name not in rows for name in self._duties):
            self._own.execute(INSERT_DUTIES, {"p_names": list(self._duties)})
            return 0.0
        soonest = _LONGEST_LOOK
        # What is not done when this raises is somebody's next turn: a duty is taken up again only by a new claim.
        unfinished, self._unfinished = self._unfinished, set()
        for name, duty in self._duties.items():
            due_in = rows[name].due_in
            if not duty.entitled():
                soonest = min(soonest, duty.every.total_seconds())
            elif name in unfinished or (_is_due(duty, due_in) and self._claim(duty)):
                if self._do(duty):
                    self._unfinished.add(name)
                else:
                    soonest = min(soonest, duty.every.total_seconds(), self._pause(name))
            elif due_in > 0:
                soonest = min(soonest, due_in)
        return 0.0 if self._unfinished else soonest + random.uniform(0, _JITTER) * min(soonest, 1.0)  # noqa: S311

    def _claim(self, duty: Duty) -> bool:
        asked = {"p_name": duty.name, "p_every": duty.every, "p_far": _furthest(duty)}
        return self._own.execute(CLAIM_DUTY, asked).first() is not None

    def _do(self, duty: Duty) -> bool:
        """Whether *duty* is to go on in the next step."""
        began = time.monotonic()
        try:
            more = duty.do(self._own)
            if not more:
                self._own.execute(FINISH_DUTY, {"p_name": duty.name})
        except Exception as error:  # noqa: BLE001 - a failing duty stops no other
            self._failures[duty.name] = self._failures.get(duty.name, 0) + 1
            pause = self._pause(duty.name)
            log.warning(
                "duty %s failed (%d in a row) after %.1f s: %s; due again in %.0f s",
                duty.name,
                self._failures[duty.name],
                time.monotonic() - began,
                first_line(error),
                pause,
            )
            self._own.execute(POSTPONE_DUTY, {"p_name": duty.name, "p_after": timedelta(seconds=pause)})
            return False
        self._failures.pop(duty.name, None)
        return more

    def _pause(self, name: str) -> float:
        """Seconds until the duty *name* is tried again, if it failed; else a long time."""
        failures = self._failures.get(name, 0)
        return min(_LONGEST_RETRY, _FIRST_RETRY * 2.0 ** min(failures - 1, 10)) if failures else _LONGEST_RETRY


def _is_due(duty: Duty, due_in: float) -> bool:
    """Due by now; or further ahead than it can be, so that the database's clock was set back. A step back of less than
    that keeps it as long.
    """
    return due_in <= 0 or due_in > _furthest(duty).total_seconds()


def _furthest(duty: Duty) -> timedelta:
    """How far ahead *duty* can be due: after it was done, after it has failed, or for a turn that it takes; by the
    clock of a statement that began before it was postponed, and waited.
    """
    turn: timedelta = getattr(duty, "turn", duty.every)
    return max(duty.every, turn, timedelta(seconds=_LONGEST_RETRY)) + _LONGEST_WAIT
