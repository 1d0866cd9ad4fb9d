"""The turn of the suspects: a runner lets its slots run empty and runs them alone, one after the other."""

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final

from sqlalchemy.exc import DBAPIError

from sqla_river.fetch.spared import spare
from sqla_river.logs import Log
from sqla_river.statements import CLEAR_ALONE, COUNT_SUSPECTS, POSTPONE_DUTY
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

RUN_EMPTY_WITHIN: Final = 30.0
"""Seconds that a runner waits for its slots to run empty, before it goes on without running a suspect. After each turn
in vain twice as long, up to `LONGEST`: where there always is a long job the suspect would never run.
"""
LONGEST: Final = 480.0
ALONE_FOR: Final = 60.0
"""Seconds after which a job that ran alone is no longer suspected of the death of its runner."""
ISOLATION: Final = "isolate"
"""The duty of giving suspects a runner of their own: one runner of the fleet at a time."""


class Turn:
    """Whether it is this runner's turn to run suspects, and how far it is.

    Args:
        own: the fetcher's connection.
        runner_id: whose row says which job runs alone.
        asked: the queues and kinds of this runner, as parameters.
        wake: lets the fetcher's next step begin.
    """

    def __init__(
        self, own: OwnConnection, runner_id: str, asked: Callable[[], Mapping[str, Any]], wake: Callable[[], None]
    ) -> None:
        self._own = own
        self._runner_id = runner_id
        self._asked = asked
        self._wake = wake
        self._began = 0.0
        self._alone_until = 0.0
        self._until = 0.0
        self._not_before = 0.0
        self._empty = False
        self._ran = False
        self._in_vain = 0
        self.on = False
        """Whether the slots run empty, or a suspect runs alone."""
        self.lost = False
        """Whether the reply to a fetch is lost: for half a minute nobody may know whether it brought jobs."""

    def begin(self, own: OwnConnection) -> bool:
        """Begin a turn; False if there is no suspect for this runner, or nobody knows whether its slots are empty.
        *own* is the caller's connection, in the duties' thread.
        """
        now = time.monotonic()
        if self.on or self.lost or now < self._not_before or not own.execute(COUNT_SUSPECTS, self._asked()).scalar():
            return False
        self._began = now
        self._empty = self._ran = False
        self._alone_until = now + self._patience
        self._until = self._alone_until + RUN_EMPTY_WITHIN
        self.on = True
        self._wake()
        return True

    @property
    def _patience(self) -> float:
        return min(RUN_EMPTY_WITHIN * 2.0 ** min(self._in_vain, 10), LONGEST)

    @property
    def longest(self) -> timedelta:
        """For which no other runner takes its turn: to run empty, for suspects to begin, and for the last of them
        alone.
        """
        return timedelta(seconds=self._patience + RUN_EMPTY_WITHIN + ALONE_FOR + 10)

    def step(self, *, busy: bool, fetch: Callable[[], bool]) -> None:
        """One look: wait while a slot is *busy*, else *fetch* the next suspect, until there is none or time is up.

        Where the reply to a fetch was lost on the way into the turn, that is called off: it can begin again as soon as
        all is known. Where that of a suspect is lost, it is waited for: it may run, and has to be alone.
        """
        now = time.monotonic()
        if self.lost:
            if not self._empty:
                self._end()
            return
        if busy:
            self._ran = self._ran or self._empty
            over = now >= self._alone_until
        else:
            self._empty = True
            self._alone_until = now + ALONE_FOR
            over = now >= self._until or not fetch()
            self._ran = self._ran or not over
        if over:
            self._end(partial(self._judge, now, in_vain=busy))

    def wait(self, now: float) -> float:
        """Seconds from *now* until a busy slot is no longer waited for."""
        return self._alone_until - now

    def _end(self, judge: Callable[[], None] = lambda: None) -> None:
        self._own.execute(CLEAR_ALONE, {"p_id": self._runner_id})  # before anything runs beside what ran alone
        judge()
        self.on = False
        try:
            self._own.execute(POSTPONE_DUTY, {"p_name": ISOLATION, "p_after": timedelta(0)})
        except DBAPIError as error:
            spare(self._own, error, "letting another runner take its turn to run suspects")

    def _judge(self, now: float, *, in_vain: bool) -> None:
        if in_vain and not self._ran:
            log.remind(
                "a job that met the deaths of two runners waits to run alone, and the slots did not run empty within "
                "%.0f s; start a runner beside this one, or stop one",
                self._patience,
            )
            self._in_vain += 1
        else:
            self._in_vain = 0
        if not self._ran:  # a long job runs here, or it is locked: that may cost no more than a tenth of the time
            self._not_before = now + 9 * (now - self._began)
