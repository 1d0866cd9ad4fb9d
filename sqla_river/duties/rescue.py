"""Rescue: free the jobs of runners whose lease has run out; and give suspects a runner of their own."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Executable

from sqla_river.logs import Log, first_line
from sqla_river.refusal import REFUSED_FOR, in_parts, is_refusal, told_if_possible
from sqla_river.statements import (
    DELETE_CLEARED,
    INSERT_LOST_RUNNERS,
    POSTPONE_DUTY,
    RESCUE_STUCK,
    RESCUE_STUCK_AMONG,
    RESET_AHEAD,
    SELECT_RUNNING,
)
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

BATCH: Final = 1_000
LONGEST_BATCH: Final = 5.0
"""Seconds after which a batch in parts ends, so that other duties have their turn."""
LOWEST_ID: Final = -(2**63)
ISOLATION: Final = "isolate"


class Rescue:
    """Jobs whose owner's lease has run out become available at once, whatever their kind and attempt.

    One that the database refuses (a trigger of the user's, a damaged row) keeps no other: it is left out for a minute.

    Args:
        until: until when, by the database's clock, this runner may do it; None if it may not. It must have kept its
            own heartbeat for a whole lease: after an outage of the database nobody may take everybody else for dead,
            and a statement that arrives only after the outage must find nobody.
        rescued: told of what was freed: id, queue, kind, state, suspect.
    """

    name = "rescue"
    every = timedelta(seconds=5)

    def __init__(
        self,
        until: Callable[[], datetime | None],
        rescued: Callable[[Sequence[Any]], None],
        every: timedelta | None = None,
    ) -> None:
        self._until = until
        self._rescued = rescued
        self._refused: dict[int, float] = {}
        """Jobs that were refused when they stood alone, by id, and until when they are left out (monotonic)."""
        self._parts: Iterator[Sequence[Any]] | None = None
        """The freeing in parts that the next batch goes on with."""
        self._going_on = False
        self.every = every if every is not None else self.every

    def entitled(self) -> bool:
        return self._until() is not None

    def do(self, own: OwnConnection) -> bool:
        if not self._going_on:  # within a sweep nothing is tried again, or it might never end
            now = time.monotonic()
            self._refused = {job_id: until for job_id, until in self._refused.items() if until > now}
        self._going_on = False
        _besides(own, INSERT_LOST_RUNNERS, {"p_refused": list(self._refused)})
        _besides(own, RESET_AHEAD)
        freed: list[Any] = []
        try:
            self._going_on = self._free(own, freed)
        finally:  # what is free is free, whatever came after it
            if freed:
                log.warning(
                    "freed %d jobs of runners whose lease ran out: %s",
                    len(freed),
                    dict(Counter(row.state for row in freed)),
                )
                self._rescued(freed)
        if any(row.suspect for row in freed):
            _besides(own, POSTPONE_DUTY, {"p_name": ISOLATION, "p_after": timedelta(0)})
        _besides(own, DELETE_CLEARED)
        return self._going_on

    def _free(self, own: OwnConnection, freed: list[Any]) -> bool:
        """Add one batch to *freed*; whether there is more."""
        parts, self._parts = self._parts, None
        if parts is None:
            try:
                freed += self._rescue(own, RESCUE_STUCK, {"p_refused": list(self._refused)})
            except Exception as error:
                if not is_refusal(error):
                    raise
                parts = self._in_parts(own)
            else:
                return len(freed) == BATCH
        began = time.monotonic()
        for rows in parts:
            freed += rows
            if time.monotonic() - began > LONGEST_BATCH:
                self._parts = parts
                return True
        return False

    def _in_parts(self, own: OwnConnection) -> Iterator[Sequence[Any]]:
        """The same after a refusal, once over all that run; yields what each statement freed."""

        def rescue(part: Sequence[int]) -> Sequence[Any]:
            return self._rescue(own, RESCUE_STUCK_AMONG, {"p_ids": part})

        after = LOWEST_ID
        while True:
            asked = {"p_after": after, "p_refused": list(self._refused)}
            ids: list[int] = list(own.execute(SELECT_RUNNING, asked).scalars())
            if ids:
                yield from in_parts([ids], rescue, self._leave_out)
            if len(ids) < BATCH:  # what is fetched meanwhile is no reason to go on
                return
            after = ids[-1]

    def _rescue(self, own: OwnConnection, statement: Executable, given: Mapping[str, Any]) -> Sequence[Any]:
        def rescue(tell: bool) -> Sequence[Any]:
            asked = {**given, "p_schema": own.schema, "p_until": self._until(), "p_tell": tell}
            return own.execute(statement, asked).all()

        return told_if_possible(rescue)

    def _leave_out(self, job_id: int, error: Exception) -> None:
        self._refused[job_id] = time.monotonic() + REFUSED_FOR
        log.remind(
            "job %d of a dead runner cannot be freed and stays running, it keeps no other; tried again in %.0f s: %s",
            job_id,
            REFUSED_FOR,
            first_line(error),
            job_id=job_id,
        )


def _besides(own: OwnConnection, statement: Executable, given: Mapping[str, Any] | None = None) -> None:
    """Run what goes with a rescue. If it is refused, as where a damaged row is in its way, the jobs are freed
    nevertheless.
    """
    try:
        own.execute(statement, given)
    except Exception as error:
        if not is_refusal(error):
            raise
        log.remind("a part of the rescue of jobs was refused, which goes on without it: %s", first_line(error))


class Isolate:
    """One runner of the fleet at a time lets its slots run empty and runs one suspect alone.

    Args:
        suspects: whether there are any, as far as this runner knows.
        begin: asks the fetcher to do it; False if it has no suspect to run.
        longest: for how long no other runner may take its turn; the fetcher ends it sooner.
    """

    name = ISOLATION
    every = timedelta(seconds=5)
    turn = timedelta(minutes=10)
    """More than `longest` ever says."""

    def __init__(
        self,
        suspects: Callable[[], bool],
        begin: Callable[[OwnConnection], bool],
        longest: Callable[[], timedelta],
    ) -> None:
        self.entitled = suspects
        self._begin = begin
        self._longest = longest

    def do(self, own: OwnConnection) -> bool:
        own.execute(POSTPONE_DUTY, {"p_name": self.name, "p_after": self._longest()})
        if not self._begin(own):
            own.execute(POSTPONE_DUTY, {"p_name": self.name, "p_after": self.every})
        return False
