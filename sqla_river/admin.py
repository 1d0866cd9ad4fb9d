"""The hands of an operator: verbs on jobs that are there already, part of the caller's transaction."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import attrs
from sqlalchemy import ColumnElement, Connection, Executable, Select, inspect, select
from sqlalchemy.orm import Session

from sqla_river import store
from sqla_river.models import JobMixin, declared_schema
from sqla_river.session import connect, load, mark_changed, sync_session
from sqla_river.statements import CANCEL_JOB, CANCEL_JOBS, SELECT_STATES

J = TypeVar("J", bound=JobMixin)

BATCH = 1_000
Filter = Select[Any] | ColumnElement[bool]
"""``select(Job).where(...)``, or its condition alone."""


@attrs.frozen
class Changed:
    """What a verb did to many jobs: how many it changed, and why it left the others: finished, running, gone or
    locked, by id.
    """

    count: int
    left: Mapping[int, str] = attrs.field(factory=dict[int, str])


def cancel_one(session: Any, job_id: int, job_class: type[J]) -> J:
    """See `River.cancel`."""
    plain = sync_session(session)
    connection = connect(plain, job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    changed = store.execute(connection, schema, CANCEL_JOB, {"p_ids": [job_id], "p_schema": schema}).all()
    if changed:
        mark_changed(plain)
    return load(plain, job_id, job_class)


def cancel_many(session: Any, which: Filter, job_class: type[JobMixin]) -> Changed:
    """See `River.cancel`."""
    return _change_many(
        session, which, job_class, CANCEL_JOBS, lambda state: "finished" if state in _FINISHED else "locked"
    )


_FINISHED = frozenset({"cancelled", "completed", "discarded"})


def _change_many(
    session: Any, which: Filter, job_class: type[JobMixin], statement: Executable, why: Callable[[str], str]
) -> Changed:
    """Run *statement* over the jobs of a filter, 1,000 at a time, in id order; locked ones are left."""
    plain = sync_session(session)
    connection = connect(plain, job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    all_changed: set[int] = set()
    left: dict[int, str] = {}
    for ids in _batches(connection, which, job_class):
        changed = {row.id for row in store.execute(connection, schema, statement, {"p_ids": ids, "p_schema": schema})}
        all_changed |= changed
        missing = [job_id for job_id in ids if job_id not in changed]
        if missing:
            states = {row.id: row.state for row in store.execute(connection, schema, SELECT_STATES, {"p_ids": missing})}
            left |= {job_id: why(states[job_id]) if job_id in states else "gone" for job_id in missing}
    if all_changed:
        mark_changed(plain)
    if isinstance(plain, Session):
        for known in plain.identity_map.values():
            if isinstance(known, job_class) and inspect(known).identity[0] in all_changed:
                plain.expire(known)
    return Changed(len(all_changed), left)


def _batches(connection: Connection, which: Filter, job_class: type[JobMixin]) -> Iterator[Sequence[int]]:
    """The ids that *which* chooses now, joins, order and limit of its own included; it is asked once."""
    chosen = which if isinstance(which, Select) else select(job_class).where(which)
    found = connection.execute(chosen.with_only_columns(job_class.id, maintain_column_froms=True)).scalars()
    ids = sorted(set(found))
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]
