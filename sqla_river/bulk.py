"""The door for many jobs at once."""

import json
from collections.abc import Sequence
from functools import partial

from sqlalchemy import Connection

from sqla_river import ddl, store
from sqla_river.rows import InsertRow, expiring, place
from sqla_river.statements import INSERT_JOBS, INSERT_NUMBERED_JOBS, RESERVE_IDS


def insert_rows(
    connection: Connection, schema: str | None, rows: Sequence[InsertRow], *, returning: bool
) -> tuple[list[int], set[str]]:
    """Insert a block of plain rows in one round trip, two where ids are asked for.

    Returns:
        The ids in input order (empty unless *returning*), and the queues that runners should hear of.
    """
    ids: list[int] = []
    if returning:
        table = f"{ddl.qualifier(schema)}river_job"
        ids = list(store.execute(connection, schema, RESERVE_IDS, {"p_table": table, "p_count": len(rows)}).scalars())
    queues: set[str] = set()
    now = partial(store.transaction_now, connection)
    texts: list[str] = []
    for number, row in enumerate(rows):
        state, at, told = place(row.when, row.pending, now)
        if told:
            queues.add(row.queue)
        rest = {
            "id": ids[number] if returning else None,
            "kind": row.kind,
            "queue": row.queue,
            "priority": row.priority,
            "max_attempts": row.max_attempts,
            "tags": list(row.tags),
            "metadata": expiring(row.metadata, row.expires, now),
            "state": state.value,
            "scheduled_at": at.isoformat() if at is not None else None,
        }
        texts.append(f'{{"args":{row.args.decode()},{json.dumps(rest)[1:]}')
    statement = INSERT_NUMBERED_JOBS if returning else INSERT_JOBS
    store.execute(connection, schema, statement, {"p_rows": f"[{','.join(texts)}]"})
    return ids, queues
