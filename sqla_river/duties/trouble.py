"""Trouble: warn of what goes wrong slowly, while there is time. It changes nothing."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Final

from sqla_river.logs import Log
from sqla_river.statements import COUNT_BACKLOGS, SELECT_OLD_TRANSACTIONS, SELECT_STRANGERS
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

OLD_TRANSACTION: Final = timedelta(minutes=5)
LARGE_BACKLOG: Final = 10_000
MOST_COUNTED: Final = 100_000
"""Waiting jobs that are counted at most; beyond that a backlog is reported whether or not it grows."""
STRANGE_AFTER: Final = timedelta(minutes=1)


class Trouble:
    """Transactions that stay open, and backlogs that grow.

    Args:
        first: whether this runner is the first of the fleet: one alone remembers how long the backlog was.
    """

    name = "trouble"
    every = timedelta(minutes=1)

    def __init__(self, first: Callable[[], bool]) -> None:
        self.entitled = first
        self._before: Mapping[str, int] | None = None

    def do(self, own: OwnConnection) -> bool:
        for row in own.execute(SELECT_OLD_TRANSACTIONS, {"p_age": OLD_TRANSACTION}).all():
            log.remind(
                "%s (%s) has had a transaction open for %.0f s: vacuum can take away no row that died since; end it, "
                "or set idle_in_transaction_session_timeout",
                row.who,
                row.what,
                row.age.total_seconds(),
            )
        asked = {"p_most": MOST_COUNTED, "p_over": LARGE_BACKLOG}
        now = {row.queue: row.jobs for row in own.execute(COUNT_BACKLOGS, asked).all()}
        before, self._before = self._before, now
        for queue, jobs in now.items():
            if jobs >= MOST_COUNTED or (before is not None and jobs > before.get(queue, LARGE_BACKLOG)):
                log.remind(
                    "queue %s has a backlog of %d jobs or more, and it grows: give it more slots or more runners",
                    queue,
                    jobs,
                    queue=queue,
                )
        return False


class Strangers:
    """Jobs that wait in the queues of this runner, and whose kinds it does not know."""

    name = "strangers"
    every = timedelta(minutes=1)

    def __init__(self, queues: Callable[[], list[str]], kinds: Callable[[], list[str]]) -> None:
        self._queues = queues
        self._kinds = kinds

    def entitled(self) -> bool:
        return True

    def do(self, own: OwnConnection) -> bool:
        asked = {"p_queues": self._queues(), "p_kinds": self._kinds(), "p_age": STRANGE_AFTER}
        found = own.execute(SELECT_STRANGERS, asked).all()
        if found:
            log.remind(
                "jobs wait for over %.0f s whose kinds have no worker in this runner: %s; "
                "import their module before Runner.start(), or start a runner that knows them",
                STRANGE_AFTER.total_seconds(),
                ", ".join(f"{row.jobs} of {row.kind!r}" for row in found),
            )
        return False
