"""The door for many jobs at once: COPY on the caller's own connection where that is psycopg 3 and speaks UTF-8, else
one INSERT of a JSON document.

COPY goes binary, in blocks that are packed before it opens: what is the same for many rows is packed once.
"""

import json
import re
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, cast

from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from sqla_river import ddl, store
from sqla_river.rows import AT_ONCE, Heard, InsertRow, Place, expiring, place
from sqla_river.statements import COPY_COLUMNS, INSERT_JOBS, INSERT_NUMBERED_JOBS, INSERT_UNIQUE_JOBS, RESERVE_IDS
from sqla_river.states import mask_of

_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack("!ii", 0, 0)
_TRAILER: Final = struct.pack("!h", -1)
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_VARCHAR: Final = 1043
"""The type of the items of ``tags``."""
_FOREIGN: Final = re.compile("[^\x00-\x7f]+")
_args_head: Final = struct.Struct("!hiB").pack  # fields of the row; length of args; jsonb's version
_id_field: Final = struct.Struct("!iq").pack


def insert_rows(
    connection: Connection, schema: str | None, rows: Sequence[InsertRow], *, returning: bool
) -> tuple[list[int], Heard]:
    """Insert a block of plain rows: two exchanges for a COPY, which is opened and then filled, one for an INSERT; one
    more where ids are asked for.

    Returns:
        The ids in input order (empty unless *returning*), and what runners should hear of them.

    Raises:
        sqlalchemy.exc.DBAPIError: as an INSERT would raise it; the transaction is then aborted, and rolled back in the
            usual way.
    """
    ids: list[int] = []
    if returning:
        table = f"{ddl.qualifier(schema)}river_job"
        ids = list(store.execute(connection, schema, RESERVE_IDS, {"p_table": table, "p_count": len(rows)}).scalars())
    now = partial(store.transaction_now, connection)
    places = [AT_ONCE if row.when is None and not row.pending else place(row.when, row.pending, now) for row in rows]
    heard = Heard.of({(row.queue, placed) for row, placed in zip(rows, places, strict=True)})
    if _copies_utf8(connection):
        _copy(connection, schema, rows, places, ids)
    else:
        _insert(connection, schema, rows, places, ids)
    return ids, heard


def insert_unique(
    connection: Connection, schema: str | None, rows: Sequence[InsertRow]
) -> tuple[list[int | None], Heard]:
    """Insert a block of unique rows in one round trip; those whose key is held are left out.

    It waits while another open transaction holds one of the keys, which it takes in their order: transactions of one
    block cannot deadlock, those of several blocks can.

    Returns:
        The ids in input order, None where left out, and what runners should hear of them.
    """
    now = partial(store.transaction_now, connection)
    places = [place(row.when, row.pending, now) for row in rows]
    keys = [
        row.unique_at(placed.at or now()) for row, placed in zip(rows, places, strict=True) if row.unique_at is not None
    ]
    texts = [
        _document(
            row,
            placed,
            now,
            unique_key=key.hex(),
            unique_states=mask_of(row.unique_states or frozenset()),
            number=number,
        )
        for number, (row, placed, key) in enumerate(zip(rows, places, keys, strict=True))
    ]
    found = store.execute(connection, schema, INSERT_UNIQUE_JOBS, {"p_rows": f"[{','.join(texts)}]"})
    new = {bytes(key): job_id for job_id, key in found}
    heard = Heard.of((row.queue, placed) for row, placed, key in zip(rows, places, keys, strict=True) if key in new)
    return [new.pop(key, None) for key in keys], heard


def unique_key(connection: Connection, row: InsertRow) -> bytes:
    """The key of a unique row, as the transaction of *connection* puts it in."""
    now = partial(store.transaction_now, connection)
    assert row.unique_at is not None
    return row.unique_at(place(row.when, row.pending, now).at or now())


def _copies_utf8(connection: Connection) -> bool:
    """Whether COPY is to be had, and reads UTF-8: the server takes text and jsonb in the encoding of the client."""
    return connection.dialect.driver == "psycopg" and (
        cast("Any", connection.connection.driver_connection).info.encoding == "utf-8"
    )


def _copy(
    connection: Connection, schema: str | None, rows: Sequence[InsertRow], places: Sequence[Place], ids: Sequence[int]
) -> None:
    now = partial(store.transaction_now, connection)
    timed = any(placed.at is not None for placed in places)
    columns = ["args", *(["id"] if ids else []), *COPY_COLUMNS, *(["scheduled_at"] if timed else [])]
    count = len(columns)
    ends: dict[Any, bytes] = {}
    block = [_HEADER]
    add = block.append
    key: tuple[object, ...] | None
    last: tuple[object, ...] | None = None
    end: bytes | None = None
    for number, (row, placed) in enumerate(zip(rows, places, strict=True)):
        kind, args, queue, priority, max_attempts, tags, metadata, _, _, expires, _, _ = row
        plain = not metadata and expires is None
        key = (kind, queue, priority, max_attempts, tuple(tags), placed) if plain else None
        if end is None or key is None or key != last:  # equal by identity mostly, and so cheaper than a look-up
            last = key
            end = ends.get(key) if key is not None else None
            if end is None:
                at = (placed.at or now()) if timed else None
                end = _end(row, placed, expiring(metadata, expires, now), at)
                if key is not None:
                    ends[key] = end
        add(_args_head(count, len(args) + 1, 1))
        add(args)
        if ids:
            add(_id_field(8, ids[number]))
        add(end)
    add(_TRAILER)
    table = f"{ddl.qualifier(schema)}river_job"
    _send(connection, f"COPY {table} ({', '.join(columns)}) FROM STDIN (FORMAT BINARY)", b"".join(block))


def _end(row: InsertRow, placed: Place, metadata: dict[str, Any], at: datetime | None) -> bytes:
    """The fields behind args, as COPY takes them: COPY_COLUMNS, and the time where the block has any."""
    fields = [
        row.kind.encode(),
        row.queue.encode(),
        struct.pack("!h", row.priority),
        struct.pack("!h", row.max_attempts),
        _text_array(row.tags),
        b"" + json.dumps(metadata, allow_nan=False).encode(),
        placed.state.value.encode(),
    ]
    if at is not None:
        fields.append(struct.pack("!q", (at - _EPOCH) // _MICROSECOND))
    return b"".join(struct.pack("!i", len(field)) + field for field in fields)


def _text_array(items: Sequence[str]) -> bytes:
    if not items:
        return struct.pack("!iiI", 0, 0, _VARCHAR)
    head = struct.pack("!iiIii", 1, 0, _VARCHAR, len(items), 1)
    return head + b"".join(struct.pack("!i", len(item)) + item for item in (each.encode() for each in items))


def _send(connection: Connection, statement: str, block: bytes) -> None:
    """One COPY, on the driver's connection; the transaction is begun, an error raised, and the connection judged, as
    Core would do it.
    """
    if connection.get_transaction() is None:  # or commit() would do nothing, and closing the connection roll back
        connection.begin()
    fairy = connection.connection
    dialect = connection.dialect
    assert dialect.loaded_dbapi is not None
    driver_error: type[Exception] = dialect.loaded_dbapi.Error
    try:
        if dialect.is_async:
            cast("Any", fairy.dbapi_connection).run_async(partial(_send_async, statement=statement, block=block))
        else:
            with cast("Any", fairy.driver_connection).cursor() as cursor, cursor.copy(statement) as copy:
                copy.write(block)
    except driver_error as error:
        if dialect.is_disconnect(cast("Any", error), cast("Any", fairy.dbapi_connection), None):
            with suppress(DBAPIError):
                # Core finds out by itself, and gives up with it what else its pool has from before; we could only tell
                # it of this connection, and each other one would fail once more.
                connection.execute(select(1))
            connection.invalidate(error)
        raise DBAPIError.instance(
            statement, None, error, driver_error, connection_invalidated=connection.invalidated, dialect=dialect
        ) from error


async def _send_async(raw: Any, *, statement: str, block: bytes) -> None:
    async with raw.cursor() as cursor, cursor.copy(statement) as copy:
        await copy.write(block)


def _insert(
    connection: Connection, schema: str | None, rows: Sequence[InsertRow], places: Sequence[Place], ids: Sequence[int]
) -> None:
    now = partial(store.transaction_now, connection)
    texts = [
        _document(row, placed, now, id=ids[number] if ids else None)
        for number, (row, placed) in enumerate(zip(rows, places, strict=True))
    ]
    statement = INSERT_NUMBERED_JOBS if ids else INSERT_JOBS
    store.execute(connection, schema, statement, {"p_rows": f"[{','.join(texts)}]"})


def _document(row: InsertRow, placed: Place, now: Callable[[], datetime], **more: object) -> str:
    """The JSON object of one row, its args as they were encoded; in ASCII, for whatever encoding the client has."""
    rest = {
        "kind": row.kind,
        "queue": row.queue,
        "priority": row.priority,
        "max_attempts": row.max_attempts,
        "tags": list(row.tags),
        "metadata": expiring(row.metadata, row.expires, now),
        "state": placed.state.value,
        "scheduled_at": placed.at.isoformat() if placed.at is not None else None,
        **more,
    }
    args = row.args.decode()
    if not args.isascii():
        args = _FOREIGN.sub(lambda found: json.dumps(found[0])[1:-1], args)
    return f'{{"args":{args},{json.dumps(rest)[1:]}'
