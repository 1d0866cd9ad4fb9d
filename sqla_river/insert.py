"""Enqueue: jobs join the caller's unit of work. Nothing here commits, and nothing opens a savepoint."""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar, cast

import attrs
from sqlalchemy import Connection
from sqlalchemy.orm import Session, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from sqla_river import bulk, notify, store
from sqla_river.args import JobArgs
from sqla_river.config import NotifyMode, Settings
from sqla_river.errors import EncodeError, InvalidOptionError, UniqueRaceError
from sqla_river.models import JobMixin, declared_schema
from sqla_river.options import NOTHING_SAID, InsertOptions, shown
from sqla_river.rows import Heard, InsertRow, expiring, place
from sqla_river.session import check_bind, connect, load, mark_changed, sync_session
from sqla_river.statements import INSERT_JOB, SELECT_HOLDER
from sqla_river.tables import river_job

J = TypeVar("J", bound=JobMixin)
Items = Iterable[JobArgs | tuple[JobArgs, InsertOptions]]

BLOCK_ROWS = 10_000
BLOCK_BYTES = 8 * 1024 * 1024


@attrs.frozen
class Inserted:
    """What `enqueue_many` did: rows put in, rows left out as duplicates, and the ids in input order, if asked for."""

    count: int
    skipped: int = 0
    ids: list[int | None] | None = None


def enqueue(session: Any, args: JobArgs, said: InsertOptions, job_class: type[J]) -> J:
    """See `River.enqueue`."""
    session = sync_session(session)
    check_bind(session, job_class)
    row = job_class.__river__.one(args, said)
    if row.unique_at is not None:
        return _insert_unique(session, row, job_class)
    job = job_class(args, _row=row)
    if isinstance(session, Connection):
        _insert_now(session, job, row)
    else:
        session.add(job)
    return job


def _insert_now(connection: Connection, job: JobMixin, row: InsertRow) -> None:
    """Through Core, for code that has no Session, such as a mapper event. One round trip, the notification in it."""
    schema = store.real_schema(connection, declared_schema(type(job)))
    now = partial(store.transaction_now, connection)
    placed = place(row.when, row.pending, now)
    heard = Heard.of([(row.queue, placed)])
    mode = job.__river__.notify
    said = notify.untold(connection, schema, heard, mode)
    values: dict[str, Any] = {
        "p_kind": row.kind,
        "p_args": job.args,
        "p_queue": row.queue,
        "p_priority": row.priority,
        "p_max_attempts": row.max_attempts,
        "p_tags": list(row.tags),
        "p_metadata": expiring(row.metadata, row.expires, now),
        "p_state": placed.state,
        "p_scheduled_at": placed.at,
        "p_schema": schema,
        "p_said": said,
    }
    stored = store.execute(connection, schema, INSERT_JOB, values).one()
    for key, value in zip(river_job.c.keys(), stored, strict=False):
        set_committed_value(job, key, value)
    make_transient_to_detached(job)
    notify.tell(connection, schema, heard, mode, said=said)


def _insert_unique(session: Session | Connection, row: InsertRow, job_class: type[J]) -> J:
    """At once: the job is new, or it is the one that holds the key; ``inserted`` says which, of this call. Both
    statements are tried twice, for the holder may finish in between.
    """
    connection = connect(session, job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    for _ in range(2):
        (new,), heard = bulk.insert_unique(connection, schema, [row])
        if new is not None:
            notify.tell(connection, schema, heard, job_class.__river__.notify)
            mark_changed(session)
            return load(session, new, job_class)
        key = bulk.unique_key(connection, row)
        holder = store.execute(connection, schema, SELECT_HOLDER, {"p_key": key}).scalar()
        if holder is not None:
            job = load(session, holder, job_class)
            job.inserted = False
            return job
    raise UniqueRaceError(f"the holder of the unique key of this {row.kind!r} job comes and goes; enqueue it again")


def enqueue_many(session: Any, items: Items, job_class: type[JobMixin], *, returning: bool) -> Inserted:
    """See `River.enqueue_many`."""
    session = sync_session(session)
    check_bind(session, job_class)
    settings = job_class.__river__
    count = skipped = 0
    ids: list[int | None] = []
    blocks = _blocks(items, settings)
    if type(items) in (list, tuple):
        blocks = _ahead(blocks, len(cast("list[object]", items)))
    for encoded in blocks:
        block = settings.through(encoded)
        connection = connect(session, job_class)
        schema = store.real_schema(connection, declared_schema(job_class))
        block_ids, new = _insert_block(connection, schema, block, settings.notify, returning=returning)
        mark_changed(session)
        ids.extend(block_ids)
        count += new
        skipped += len(block) - new
    return Inserted(count, skipped, ids if returning else None)


def _insert_block(
    connection: Connection, schema: str | None, block: Sequence[InsertRow], mode: NotifyMode, *, returning: bool
) -> tuple[list[int | None], int]:
    """Plain rows by COPY, unique ones by INSERT; the ids in the order of the block, and how many were new."""
    plain = [number for number, row in enumerate(block) if row.unique_at is None]
    unique = [number for number, row in enumerate(block) if row.unique_at is not None]
    ids: list[int | None] = [None] * len(block) if returning else []
    new = len(plain)
    if plain:
        rows = block if not unique else [block[number] for number in plain]
        found, heard = bulk.insert_rows(connection, schema, rows, returning=returning)
        notify.tell(connection, schema, heard, mode)
        for number, found_id in zip(plain, found, strict=False):
            ids[number] = found_id
    if unique:
        kept, heard = bulk.insert_unique(connection, schema, [block[number] for number in unique])
        notify.tell(connection, schema, heard, mode)
        new += sum(job_id is not None for job_id in kept)
        if returning:
            for number, job_id in zip(unique, kept, strict=True):
                ids[number] = job_id
    return ids, new


def _ahead(blocks: Iterator[list[InsertRow]], count: int) -> Iterator[list[InsertRow]]:
    """*blocks*, of *count* items, each encoded while the server works at the one before. Only where nothing but args is
    looked at on the way: a generator may use the same session.

    Without a thread where one block is all, and where none can be made: there are too many, or the program is ending.
    """
    block = next(blocks, None)
    if block is None or len(block) == count:
        yield from filter(None, [block])
        return
    with ThreadPoolExecutor(1, "sqla_river-encode") as encoder:
        while block is not None:
            coming = None
            with suppress(RuntimeError):
                coming = encoder.submit(copy_context().run, partial(next, blocks, None))
            yield block
            if coming is None:  # and never again: what it took before it failed, a thread made later would do
                break
            block = coming.result()
    yield from blocks


def _blocks(items: Items, settings: Settings) -> Iterator[list[InsertRow]]:
    """Encoded blocks of bounded size, each whole before any of it is sent: the iterable may use the same session."""
    block: list[InsertRow] = []
    size = beside = 0
    metadata: object = None
    tags: object = None
    for position, item in enumerate(items):
        try:
            row = settings.row(*_pair(item))
        except EncodeError as error:
            raise EncodeError(f"$[{position}]{error.path[1:]}", str(error).removeprefix(f"{error.path}: ")) from error
        except InvalidOptionError as error:
            raise InvalidOptionError(error.option, f"item {position}: {error}") from error
        if row.metadata is not metadata or row.tags is not tags:  # most have those of their class
            metadata, tags = row.metadata, row.tags
            beside = len(json.dumps([dict(row.metadata), list(row.tags)]))
        block.append(row)
        size += len(row.args) + beside
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _pair(item: JobArgs | tuple[Any, ...]) -> tuple[JobArgs, InsertOptions]:
    if not isinstance(item, tuple) or hasattr(type(item), "kind"):  # a NamedTuple may be an args class
        return cast("JobArgs", item), NOTHING_SAID
    args, said = item if len(item) == 2 else (item, NOTHING_SAID)  # noqa: PLR2004
    if not isinstance(said, InsertOptions):
        raise InvalidOptionError("options", f"options must be InsertOptions(...), got {shown(said)}")
    return cast("JobArgs", args), said
