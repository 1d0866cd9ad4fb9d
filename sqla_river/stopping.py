"""How a runner comes to its end: it waits for what runs, then interrupts it, then leaves it behind."""

import math
import time
from typing import Final

from sqla_river.complete import Completer
from sqla_river.execute import Executor
from sqla_river.held import Held
from sqla_river.logs import Log
from sqla_river.loop import Loop
from sqla_river.rows import ID, KIND

log: Final = Log(__name__)

INTERRUPT_TIMEOUT: Final = 5.0
"""Seconds that handlers get after ``job.cancelled`` was set by a stop, before they are left behind."""
FETCH_TIMEOUT: Final = 2.0
"""Seconds for a fetch that is on its way when nothing else is left."""
FLUSH_TIMEOUT: Final = 0.5
"""Seconds for the last results, beyond what is left of the stop's own time."""


class Stop:
    """The stop of one incarnation, and how far somebody wants it to go.

    Args:
        held: the jobs that are to end.
        executor: what interrupts them.
        completer: what has their results.
        fetching: the loop that brings more.
        completing: the loop that writes results; it ends with the last.
        runner: the id that the log lines bear.
    """

    def __init__(
        self, held: Held, executor: Executor, completer: Completer, fetching: Loop, completing: Loop, runner: str
    ) -> None:
        self._held = held
        self._executor = executor
        self._completer = completer
        self._fetching = fetching
        self._completing = completing
        self._runner = runner
        self._asked = 0
        self._hurry = 0
        self.flush_by = math.inf
        """Until when the last results may be written (monotonic)."""

    def hurry(self) -> None:
        """Go one step further: from starting to started, from waiting to interrupting, from there to leaving behind."""
        self._hurry += 1
        self._held.changed.set()

    def ask(self, step: int) -> None:
        """Go at least so far: 1 is to stop, 2 to interrupt, 3 to leave behind."""
        self._asked = max(self._asked, step)
        self._held.changed.set()

    @property
    def wanted(self) -> bool:
        """Whether somebody has asked or hurried."""
        return bool(self._hurry or self._asked)

    @property
    def _hurried(self) -> int:
        """How many steps the stop is to go beyond waiting."""
        return max(self._hurry, self._asked - 1)

    def run(self, soft: float) -> None:
        """Fetch no more, wait *soft* seconds for what runs, interrupt it, leave it behind, and write the last results;
        at most *soft* + 6 s.
        """
        self._hurry = 0
        began = time.monotonic()
        self._fetching.stop()
        self._held.give_back_waiting()
        if not self._finish_by(began + soft, hurried=1):
            if self._held:
                took = time.monotonic() - began
                log.warning(
                    "%d jobs still run after %.1f s and are interrupted", len(self._held), took, runner=self._runner
                )
            self._executor.interrupt()
            # What a fetch on its way brings must go back before the last results are written.
            patience = INTERRUPT_TIMEOUT if self._held else FETCH_TIMEOUT
            if not self._finish_by(time.monotonic() + patience, hurried=2) and self._held:
                left = self._held.rows
                log.error(
                    "%d jobs ignore the stop and are left behind: %s",
                    len(left),
                    [(row[ID], row[KIND]) for row in left[:20]],
                    runner=self._runner,
                )
                self._held.give_back(left)
        self._held.stop()
        self._write_the_last(max(began + soft, time.monotonic()) + FLUSH_TIMEOUT)

    def _write_the_last(self, deadline: float) -> None:
        """Write every result that is left; a database that is on its way back has until *deadline*, unless the stop is
        hurried.
        """
        hurried = self._hurried
        self.flush_by = deadline
        self._completing.stop()
        while self._completing.alive and time.monotonic() < self.flush_by:
            self._completing.join(0.05)
            if self._hurried > hurried:
                self.flush_by = min(self.flush_by, time.monotonic() + FLUSH_TIMEOUT)
                hurried = self._hurried + 1
        self._completing.join(0.1)
        if self._completer.backlog:
            log.error(
                "%d results could not be written; their jobs run again when the lease of %s is over",
                self._completer.backlog,
                self._runner,
                runner=self._runner,
            )

    def _finish_by(self, deadline: float, hurried: int) -> bool:
        """Wait until nothing runs any more; False at *deadline*, or once the stop was hurried so often."""
        while self._held or self._fetching.alive:
            self._held.changed.clear()
            self._held.give_back_waiting()
            left = deadline - time.monotonic()
            if left <= 0 or self._hurried >= hurried:
                return False
            if self._fetching.alive:
                self._fetching.join(min(left, 0.05))
            elif self._held:
                self._held.changed.wait(min(left, 0.5))
        return True
