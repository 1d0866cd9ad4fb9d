"""The hands on queues: their rows, and the word on River's control channel."""

from typing import Any, Final

from sqlalchemy import (
    CTE,
    JSON,
    Boolean,
    ColumnElement,
    Text,
    bindparam,
    case,
    cast,
    func,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as pg_insert

from sqla_river.statements.words import NOW, literal, notification
from sqla_river.tables import river_queue

_q: Final = river_queue.c
_shown: Final = (_q.name, _q.paused_at, _q.metadata_, _q.created_at, _q.updated_at)
_queue: Final = bindparam("p_queue", type_=Text)
_every: Final = _queue == literal("'*'")
_metadata: Final = bindparam("p_metadata", type_=Text)


def _told(action: str, *more: ColumnElement[Any]) -> CTE:
    """River's control message, once; none without p_tell, for a transaction that is to be prepared may not NOTIFY."""
    payload = func.json_build_object(
        literal("'action'"), literal(f"'{action}'"), *more, literal("'queue'"), cast(_queue, Text)
    )
    said = notification("river_control", cast(payload, Text))
    return select(case((bindparam("p_tell", type_=Boolean), said)).label("said")).cte("told")


def _and_told(changed: CTE, told: CTE) -> Any:
    """The rows of *changed*, by name; what *told* says is selected, or PostgreSQL would never call it."""
    return select(*changed.c, told.c.said).select_from(changed.join(told, true())).order_by(changed.c.name)


_meant: Final = union_all(
    select(cast(_queue, Text).label("name")).where(~_every), select(_q.name).where(_every)
).subquery("meant")
_paused: Final = (
    pg_insert(river_queue)
    .from_select(["name", "paused_at"], select(_meant.c.name, NOW).order_by(_meant.c.name), include_defaults=False)
    .on_conflict_do_update(
        index_elements=["name"],
        set_={
            "paused_at": func.coalesce(_q.paused_at, NOW),
            "updated_at": case((_q.paused_at.is_(None), NOW), else_=_q.updated_at),
        },
    )
    .returning(*_shown)
    .cte("paused")
)

# Caller: queues.py. One queue, with or without a row, or with '*' all that have one. What is paused already keeps its
# time. Locks: the rows, in name order.
PAUSE_QUEUES: Final = _and_told(_paused, _told("pause"))

_held: Final = select(_q.name).where(or_(_every, _q.name == _queue)).order_by(_q.name).with_for_update().cte("held")
_resumed: Final = (
    update(river_queue)
    .where(_q.name == _held.c.name)
    .values(paused_at=null(), updated_at=case((_q.paused_at.is_not(None), NOW), else_=_q.updated_at))
    .returning(*_shown)
    .cte("resumed")
)

# Caller: queues.py. One queue, or with '*' all of them. Locks: the rows, in name order.
RESUME_QUEUES: Final = _and_told(_resumed, _told("resume"))

_updated: Final = (
    update(river_queue)
    .where(_q.name == _queue)
    .values(metadata_=cast(_metadata, JSONB), updated_at=NOW)
    .returning(*_shown)
    .cte("updated")
)

# Caller: queues.py. Locks: one row.
UPDATE_QUEUE: Final = _and_told(_updated, _told("metadata_changed", literal("'metadata'"), cast(_metadata, JSON)))

# Caller: queues.py. A row per queue: the whole table.
SELECT_QUEUES: Final = select(*_shown).order_by(_q.name)
