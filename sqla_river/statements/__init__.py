"""Every statement of the library, named.

Each is built once over the schema-less tables and runs under a ``schema_translate_map`` (``store.py``). States are
literals. Bind parameters start with ``p_``. Times are now(), the database's clock; durations are bound as intervals.
"""

from sqla_river.statements.admin import CANCEL_JOB, CANCEL_JOBS, SELECT_STATES
from sqla_river.statements.complete import (
    COMPLETE_JOBS,
    NOTE_PROGRESS,
    SELECT_HELD,
    SELECT_OUTCOME,
    SETTLE_JOB,
    SETTLE_JOBS,
)
from sqla_river.statements.due import SCHEDULE_DUE, SELECT_NEXT_DUE
from sqla_river.statements.duties import (
    CLAIM_DUTY,
    DELETE_CLEARED,
    DELETE_GONE_RUNNERS,
    DELETE_UNTOUCHED_QUEUES,
    FINISH_DUTY,
    INSERT_DUTIES,
    INSERT_LOST_RUNNERS,
    POSTPONE_DUTY,
    PRUNE_CANCELLED,
    PRUNE_COMPLETED,
    PRUNE_DISCARDED,
    RESCUE_STUCK,
    RESET_AHEAD,
    SELECT_DUTIES,
)
from sqla_river.statements.fetch import (
    CLEAR_ALONE,
    COUNT_SUSPECTS,
    DISCARD_CONFLICTS,
    FETCH_AVAILABLE,
    FETCH_SUSPECT,
    FETCH_UNSUSPECTED,
    SELECT_LOST,
    WORK_COLUMNS,
)
from sqla_river.statements.insert import (
    COPY_COLUMNS,
    INSERT_JOB,
    INSERT_JOBS,
    INSERT_NUMBERED_JOBS,
    INSERT_UNIQUE_JOBS,
    NOTIFY_QUEUES,
    RESERVE_IDS,
    SELECT_HOLDER,
    SELECT_NOW,
)
from sqla_river.statements.look import COUNT_STATES
from sqla_river.statements.runner import (
    DELETE_RUNNER,
    REFRESH_LONG,
    SELECT_FLEET,
    SELECT_OWN,
    UPSERT_QUEUES,
    UPSERT_RUNNER,
)
from sqla_river.statements.schema import LOCK_SCHEMA, SELECT_CURRENT_SCHEMA, SELECT_IS_TABLE, SELECT_VERSIONS

__all__ = [
    "CANCEL_JOB",
    "CANCEL_JOBS",
    "CLAIM_DUTY",
    "CLEAR_ALONE",
    "COMPLETE_JOBS",
    "COPY_COLUMNS",
    "COUNT_STATES",
    "COUNT_SUSPECTS",
    "DELETE_CLEARED",
    "DELETE_GONE_RUNNERS",
    "DELETE_RUNNER",
    "DELETE_UNTOUCHED_QUEUES",
    "DISCARD_CONFLICTS",
    "FETCH_AVAILABLE",
    "FETCH_SUSPECT",
    "FETCH_UNSUSPECTED",
    "FINISH_DUTY",
    "INSERT_DUTIES",
    "INSERT_JOB",
    "INSERT_JOBS",
    "INSERT_LOST_RUNNERS",
    "INSERT_NUMBERED_JOBS",
    "INSERT_UNIQUE_JOBS",
    "LOCK_SCHEMA",
    "NOTE_PROGRESS",
    "NOTIFY_QUEUES",
    "POSTPONE_DUTY",
    "PRUNE_CANCELLED",
    "PRUNE_COMPLETED",
    "PRUNE_DISCARDED",
    "REFRESH_LONG",
    "RESCUE_STUCK",
    "RESERVE_IDS",
    "RESET_AHEAD",
    "SCHEDULE_DUE",
    "SELECT_CURRENT_SCHEMA",
    "SELECT_DUTIES",
    "SELECT_FLEET",
    "SELECT_HELD",
    "SELECT_HOLDER",
    "SELECT_IS_TABLE",
    "SELECT_LOST",
    "SELECT_NEXT_DUE",
    "SELECT_NOW",
    "SELECT_OUTCOME",
    "SELECT_OWN",
    "SELECT_STATES",
    "SELECT_VERSIONS",
    "SETTLE_JOB",
    "SETTLE_JOBS",
    "UPSERT_QUEUES",
    "UPSERT_RUNNER",
    "WORK_COLUMNS",
]
