"""Reindex: make the indexes of river_job anew once a day, where that was asked for."""

from datetime import timedelta
from typing import Final

from sqlalchemy import func, select, text

from sqla_river.ddl.upkeep import FIND_INDEXES, REINDEXED, drop_leftover, leftovers, reindex
from sqla_river.logs import Log
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

TIMEOUT: Final = "60s"
"""For one index, the wait for older transactions included; River's number."""


class Reindex:
    """One index a batch, so that other duties have their turn in between.

    What a batch that was cut short leaves, the next run drops. REINDEX CONCURRENTLY waits for every older transaction,
    on the connection of all duties: give it to a runner that has company, or rescue waits as long.
    """

    name = "reindex"
    every = timedelta(days=1)

    def __init__(self) -> None:
        self._left: list[str] = []

    def entitled(self) -> bool:
        return True

    def do(self, own: OwnConnection) -> bool:
        found = [str(name) for name in own.execute(text(FIND_INDEXES), {"p_schema": own.schema}).scalars()]
        if own.pooled:  # which keeps no bound for what runs in no transaction
            log.warning("no index is made anew, for this runner's engine goes through a pooler; give it another one")
            return False
        if not self._left:
            for name in leftovers(found):
                _patiently(own, drop_leftover(own.schema, name))
            self._left = [name for name in REINDEXED if name in found]
        if self._left:
            _patiently(own, reindex(own.schema, self._left.pop()))
        return bool(self._left)


def _patiently(own: OwnConnection, sql: str) -> None:
    """Run *sql* with a bound of its own on its time and its waits."""
    names = ("statement_timeout", "lock_timeout")
    before = own.execute(select(*(func.current_setting(name) for name in names))).one()
    own.execute(select(*(func.set_config(name, TIMEOUT, False) for name in names)))
    try:
        own.execute(text(sql))
    finally:
        own.execute(select(*(func.set_config(name, value, False) for name, value in zip(names, before, strict=True))))
