"""Figures of the whole database, for whoever measures: looked at by one runner of the fleet at a time."""

from collections.abc import Sequence
from datetime import timedelta

import attrs

from sqla_river.hooks import Meters
from sqla_river.statements import SELECT_FIGURES
from sqla_river.stats import QueueStats, stats_of_all
from sqla_river.store import OwnConnection


@attrs.frozen
class Figures:
    """How a database stands."""

    queues: Sequence[QueueStats]
    dead_tuples: int
    """Rows of river_job that no VACUUM has taken away yet, as PostgreSQL estimates."""
    oldest_transaction: timedelta
    """Age of the oldest transaction that is open in this database, prepared ones included, as far as the runner's role
    may see: it keeps VACUUM from its work. Zero where there is none.
    """
    notification_usage: float
    """Which part of the server's queue of notifications is full, 0 to 1; at 1 every NOTIFY fails."""


class LookAround:
    """Tells the meters of this runner how the database stands; done only by runners that have any."""

    name = "figures"
    every = timedelta(seconds=30)

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    def entitled(self) -> bool:
        return self._meters.attached

    def do(self, own: OwnConnection) -> bool:
        queues = stats_of_all(own.execute, own.schema)
        row = own.execute(SELECT_FIGURES, {"p_schema": own.schema}).one()
        self._meters.tell("looked", Figures(queues, row.dead, row.oldest, row.usage))
        return False
