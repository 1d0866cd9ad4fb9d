"""Whether runners work: this one, by when each of its inner loops last moved; those of a fleet, by their heartbeats."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Final, Literal

import attrs
from sqlalchemy import Connection

from sqla_river import store
from sqla_river.statements import SELECT_RUNNERS

LIMIT: Final = timedelta(seconds=15)
"""How long an inner loop may stand still: three heartbeats."""
JUDGED: Final = frozenset({"fetch", "complete", "heartbeat", "listen"})
"""The loops without which no job is worked. A duty may take its time: a REINDEX waits for every older transaction."""


@attrs.frozen
class Health:
    """How a runner is.

    Who is not `alive` should be started anew; who is not `ready` is waited for.
    """

    alive: bool
    ready: bool
    problems: tuple[str, ...]
    """Why not."""


def judge(loops: Mapping[str, tuple[float, float]], limit: timedelta, *problems: str) -> Health:
    """The health of one whose *loops* last turned, and last did well, at those times (monotonic).

    Args:
        loops: by name.
        limit: how long ago that may be.
        problems: why it is not ready in any case.
    """
    now, most = time.monotonic(), limit.total_seconds()
    judged = {name: times for name, times in loops.items() if name in JUDGED}
    hang = {name: now - turned for name, (turned, _) in judged.items() if now - turned > most}
    fail = {name: now - moved for name, (_, moved) in judged.items() if now - moved > most}
    found = [f"the {name} loop hangs: it has not moved for {age:.0f} s" for name, age in hang.items()]
    found += [f"the {name} loop has failed for {age:.0f} s" for name, age in fail.items() if name not in hang]
    return Health(not hang, not found and not problems, (*problems, *found))


@attrs.frozen
class RunnerHealth:
    """How one runner of the fleet is, as far as the database knows."""

    id: str
    state: Literal["live", "late", "dead"]
    """Late without a heartbeat for too long; dead when its lease is over: then its jobs are freed."""
    silent: timedelta
    """Since its last heartbeat."""
    age: timedelta
    """Since its start."""
    queues: Mapping[str, int]
    """Its slots by queue."""
    version: str


def fleet(connection: Connection, schema: str | None, limit: timedelta = LIMIT) -> list[RunnerHealth]:
    """Every runner that has a row in *schema*, the oldest first. One round trip.

    A runner takes its row away when it stops; the row of one that died stays for ten leases.

    Args:
        connection: of the caller.
        schema: where the tables stand.
        limit: for how long one may be silent, or half of its lease if that is longer.
    """
    rows = store.execute(connection, store.real_schema(connection, schema), SELECT_RUNNERS)
    return [
        RunnerHealth(
            row.id,
            "dead" if row.silent > row.lease else "late" if row.silent > max(limit, row.lease / 2) else "live",
            row.silent,
            row.age,
            dict(zip(row.queues, row.slots, strict=True)),
            row.version,
        )
        for row in rows
    ]
