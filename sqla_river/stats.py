"""How many jobs stand where."""

import attrs
from sqlalchemy import Connection

from sqla_river import store
from sqla_river.statements import COUNT_STATES
from sqla_river.states import JobState


@attrs.frozen
class StateCount:
    """How many jobs of one queue are in one state."""

    queue: str
    state: JobState
    jobs: int


def count_states(connection: Connection, schema: str | None) -> list[StateCount]:
    """Count the jobs of *schema* by queue and state, in their order; what there is none of is left out.

    One round trip. It reads the whole table: seconds, not milliseconds, for tens of millions of jobs.
    """
    rows = store.execute(connection, schema, COUNT_STATES).all()
    return [StateCount(row.queue, JobState(row.state), row.jobs) for row in rows]
