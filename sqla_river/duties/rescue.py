"""Rescue: free the jobs of runners whose lease has run out; and give suspects a runner of their own."""

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqla_river.logs import Log
from sqla_river.statements import DELETE_CLEARED, INSERT_LOST_RUNNERS, POSTPONE_DUTY, RESCUE_STUCK, RESET_AHEAD
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

BATCH: Final = 1_000
ISOLATION: Final = "isolate"


class Rescue:
    """Jobs whose owner's lease has run out become available at once, whatever their kind and attempt.

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
        self.every = every if every is not None else self.every

    def entitled(self) -> bool:
        return self._until() is not None

    def do(self, own: OwnConnection) -> bool:
        own.execute(INSERT_LOST_RUNNERS)
        own.execute(RESET_AHEAD)
        freed = own.execute(RESCUE_STUCK, {"p_schema": own.schema, "p_until": self._until()}).all()
        if freed:
            log.warning(
                "freed %d jobs of runners whose lease ran out: %s",
                len(freed),
                dict(Counter(row.state for row in freed)),
            )
            if any(row.suspect for row in freed):
                own.execute(POSTPONE_DUTY, {"p_name": ISOLATION, "p_after": timedelta(0)})
            self._rescued(freed)
        own.execute(DELETE_CLEARED)
        return len(freed) == BATCH


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
