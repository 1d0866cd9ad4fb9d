"""Queues for their operator: which there are, paused and resumed, as part of the caller's transaction.

A pause is a row, which every fetch reads in its own snapshot; the notification beside it is for River's other clients
and for events.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import attrs
from sqlalchemy import Executable, TwoPhaseTransaction

from sqla_river import store
from sqla_river.errors import InvalidOptionError, QueueNotFoundError
from sqla_river.models import JobMixin, declared_schema
from sqla_river.options import check_metadata, check_queue
from sqla_river.session import connect, mark_changed, sync_session
from sqla_river.statements import PAUSE_QUEUES, RESUME_QUEUES, SELECT_QUEUES, UPDATE_QUEUE

EVERY_QUEUE: Final = "*"
MAX_METADATA: Final = 7_800
"""Bytes of JSON: River's control message carries them, and PostgreSQL takes no payload of 8,000 bytes or more."""


def _utc(at: datetime) -> datetime:
    return at.astimezone(UTC)


@attrs.frozen
class QueueInfo:
    """A queue as its row says: since when it is paused (None while it is not), and what is noted with it.

    `updated_at` is when a runner last said that it works it, or somebody changed it. Times are aware, in UTC.
    """

    name: str
    paused_at: datetime | None = attrs.field(converter=attrs.converters.optional(_utc))
    metadata: Mapping[str, Any]
    created_at: datetime = attrs.field(converter=_utc)
    updated_at: datetime = attrs.field(converter=_utc)


def pause(session: Any, queue: str, job_class: type[JobMixin]) -> list[QueueInfo]:
    """See `River.pause`."""
    return _change(session, queue, job_class, PAUSE_QUEUES)


def resume(session: Any, queue: str, job_class: type[JobMixin]) -> list[QueueInfo]:
    """See `River.resume`."""
    return _found(queue, _change(session, queue, job_class, RESUME_QUEUES))


def update(session: Any, queue: str, metadata: Mapping[str, Any], job_class: type[JobMixin]) -> QueueInfo:
    """See `River.update_queue`."""
    check_queue(queue)
    text = json.dumps(check_metadata(metadata), ensure_ascii=False, separators=(",", ":"))
    size = len(text.encode())
    if size > MAX_METADATA:
        raise InvalidOptionError(
            "metadata",
            f"the metadata of a queue must be at most {MAX_METADATA:,} bytes of JSON, got {size:,}: "
            "a notification carries it; keep the rest in a table of your own",
        )
    (updated,) = _found(queue, _change(session, queue, job_class, UPDATE_QUEUE, p_metadata=text))
    return updated


def select_all(session: Any, job_class: type[JobMixin]) -> list[QueueInfo]:
    """See `River.list_queues`."""
    connection = connect(sync_session(session), job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    return _infos(store.execute(connection, schema, SELECT_QUEUES))


def _change(
    session: Any, queue: str, job_class: type[JobMixin], statement: Executable, **parameters: Any
) -> list[QueueInfo]:
    if queue != EVERY_QUEUE:
        check_queue(queue)
    plain = sync_session(session)
    connection = connect(plain, job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    # PostgreSQL refuses to PREPARE what has executed NOTIFY; the rows alone are enough for every fetch.
    tell = not isinstance(connection.get_transaction(), TwoPhaseTransaction)
    given = {"p_queue": queue, "p_schema": schema, "p_tell": tell, **parameters}
    changed = _infos(store.execute(connection, schema, statement, given))
    mark_changed(plain)
    return changed


def _infos(rows: Iterable[Any]) -> list[QueueInfo]:
    return [QueueInfo(*row[:5]) for row in rows]


def _found(queue: str, changed: list[QueueInfo]) -> list[QueueInfo]:
    if not changed and queue != EVERY_QUEUE:
        raise QueueNotFoundError(
            queue,
            f"queue '{queue}' has no row; a runner that works it makes one, and so does pause(session, '{queue}')",
        )
    return changed
