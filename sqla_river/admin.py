"""The hands of an operator: verbs on jobs that are there already, part of the caller's transaction."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar, overload

import attrs
from sqlalchemy import Connection, Executable, Select, inspect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqla_river import notify, statements, store
from sqla_river.choice import Filter, check_which
from sqla_river.config import NotifyMode
from sqla_river.errors import (
    JobFinishedError,
    JobNotFoundError,
    JobRunningError,
    UniqueKeyTakenError,
    UniqueRaceError,
)
from sqla_river.models import JobMixin, declared_schema
from sqla_river.options import check_priority, check_when
from sqla_river.rows import Heard, Place, place
from sqla_river.session import AnySession, connect, load, load_anew, mark_changed, sync_session
from sqla_river.states import FINALIZED, JobState

J = TypeVar("J", bound=JobMixin)

BATCH: Final = 1_000
_UNIQUE_VIOLATION: Final = "23505"
_AT_ONCE: Final = Place(JobState.AVAILABLE, None, told=True)


@attrs.frozen
class Changed:
    """What a verb did to many jobs: how many it changed, and why it left the others, by id.

    The reasons: ``running``, ``finished``, ``available`` (already), ``locked`` (by another transaction), ``gone``, or
    ``key taken by job 4711``.
    """

    count: int
    left: Mapping[int, str] = attrs.field(factory=dict[int, str])


@attrs.frozen
class _Verb:
    """What is done to a job, in the words of an error; the statements that do it; the states that it leaves alone,
    where nothing is to be done, and those in which it is refused.
    """

    done: str
    one: Executable
    many: Executable
    idle: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()
    takes_key: bool = False

    def reason(self, state: str) -> str:
        """Why a job in *state* was left."""
        if state not in self.idle | self.refused:
            return "locked"  # or it was until now, and has changed meanwhile
        return "finished" if state in FINALIZED else state


_RUNNING: Final = frozenset({"running"})
_FINISHED: Final = frozenset(state.value for state in FINALIZED)

_CANCEL: Final = _Verb("cancelled", statements.CANCEL_JOB, statements.CANCEL_JOBS, idle=_FINISHED)
_RETRY: Final = _Verb(
    "retried",
    statements.RETRY_JOB,
    statements.RETRY_JOBS,
    idle=frozenset({"available"}),
    refused=_RUNNING,
    takes_key=True,
)
_DELETE: Final = _Verb("deleted", statements.DELETE_JOB, statements.DELETE_JOBS, refused=_RUNNING)
_RESCHEDULE: Final = _Verb(
    "rescheduled",
    statements.RESCHEDULE_JOB,
    statements.RESCHEDULE_JOBS,
    refused=_RUNNING | _FINISHED,
    takes_key=True,
)
_CHANGE_PRIORITY: Final = _Verb(
    "given another priority",
    statements.CHANGE_PRIORITY_OF_JOB,
    statements.CHANGE_PRIORITY_OF_JOBS,
    refused=_FINISHED,
)


class JobVerbs(Generic[J]):
    """The verbs on jobs that are there already; each takes the id of one, or chooses many.

    One job: its row is waited for while another transaction has it, and the Job is returned as it stands then; two
    round trips. Many, by ``select(Job)...`` or a condition on Job: asked once for their ids, then 1,000 at a time in id
    order, one round trip each; rows that are locked elsewhere are left. Nothing is committed, and objects of a Session
    show the change: many when they are next looked at, those of an AsyncSession, which cannot wait then, at once, for
    one more round trip. Retry and reschedule set a savepoint (two more round trips), for a unique key may be taken by
    somebody else at that moment.

    Raises, each of them:
        JobNotFoundError: no job has that id.
        InvalidOptionError: what is neither an id nor a choice.
    """

    job_class: type[J]

    @overload
    def cancel(self, session: AnySession, which: int) -> J: ...
    @overload
    def cancel(self, session: AnySession, which: Filter) -> Changed: ...
    def cancel(self, session: AnySession, which: int | Filter) -> J | Changed:
        """Cancel one job by its id, or those that a ``select(Job)``, or a condition on it, chooses. Part of the
        caller's transaction.

        What does not run is cancelled at once. What runs is marked, and its handler told when this commits: within
        milliseconds, or with the next heartbeat (5 s) of a runner that does not LISTEN. It never runs again; a handler
        that completes all the same stays completed (River's rule). A finished job is left as it is.

        Returns:
            The Job as it stands now; for many, how many were changed, and why others were left.

        Raises:
            JobNotFoundError: no job has that id.
        """
        return self._do(_CANCEL, session, which)

    @overload
    def retry(self, session: AnySession, which: int) -> J: ...
    @overload
    def retry(self, session: AnySession, which: Filter) -> Changed: ...
    def retry(self, session: AnySession, which: int | Filter) -> J | Changed:
        """Make a job available at once, whatever became of it: finished, waiting or pending. Runners hear of it when
        this commits.

        It gets one attempt more where all were used up, and its errors stay. A cancel is forgotten: should it fail, it
        is tried again. An expiry stands. What is available and due already is left as it is.

        Raises:
            JobRunningError: it runs.
            UniqueKeyTakenError: another job holds its unique key; nothing is changed.
            UniqueRaceError: the same, of a job that this transaction cannot see (REPEATABLE READ).
        """
        return self._do(_RETRY, session, which, placed=_AT_ONCE)

    @overload
    def delete(self, session: AnySession, which: int) -> J: ...
    @overload
    def delete(self, session: AnySession, which: Filter) -> Changed: ...
    def delete(self, session: AnySession, which: int | Filter) -> J | Changed:
        """Delete the row of a job that does not run.

        Returns:
            The Job as it stood, detached; for many, how many are gone, and why others were left. Objects of the Session
            are expunged.

        Raises:
            JobRunningError: it runs; cancel it first.
        """
        which = check_which(which, self.job_class)
        if not isinstance(which, int):
            return self._many(_DELETE, session, which)
        plain = sync_session(session)
        connect(plain, self.job_class)
        job = load(plain, which, self.job_class, lock=True)
        self._one(_DELETE, session, which)
        if isinstance(plain, Session):
            plain.expunge(job)
        return job

    @overload
    def reschedule(self, session: AnySession, which: int, *, scheduled_at: datetime | timedelta) -> J: ...
    @overload
    def reschedule(self, session: AnySession, which: Filter, *, scheduled_at: datetime | timedelta) -> Changed: ...
    def reschedule(
        self, session: AnySession, which: int | Filter, *, scheduled_at: datetime | timedelta
    ) -> J | Changed:
        """Give a job that waits another time, by the rules of `enqueue`: a time that has come makes it available, and
        runners hear of what is due within 5 s.

        A pending job stays pending, and one that waits for another attempt stays retryable until then.

        Args:
            session: as for all verbs; one more round trip asks for its now(), once per transaction.
            which: as for all verbs.
            scheduled_at: an aware datetime, or a timedelta from the database's now(), the start of the transaction.

        Raises:
            JobRunningError, JobFinishedError: it waits no more; `retry` makes a finished job wait again.
            UniqueKeyTakenError, UniqueRaceError: as for `retry`, where it becomes available.
        """
        when = check_when("scheduled_at", scheduled_at)
        connection = connect(sync_session(session), self.job_class)
        placed = place(when, False, partial(store.transaction_now, connection))
        due = placed.state is JobState.AVAILABLE
        return self._do(_RESCHEDULE, session, which, placed=placed, p_scheduled_at=placed.at, p_due=due)

    @overload
    def change_priority(self, session: AnySession, which: int, *, priority: int) -> J: ...
    @overload
    def change_priority(self, session: AnySession, which: Filter, *, priority: int) -> Changed: ...
    def change_priority(self, session: AnySession, which: int | Filter, *, priority: int) -> J | Changed:
        """Give a job that is not finished another priority, 1 (first) to 4. For one that runs it counts from its next
        attempt.

        Raises:
            JobFinishedError: it will not run again.
        """
        return self._do(_CHANGE_PRIORITY, session, which, p_priority=check_priority(priority))

    def _do(
        self, verb: _Verb, session: AnySession, which: int | Filter, *, placed: Place | None = None, **given: Any
    ) -> J | Changed:
        which = check_which(which, self.job_class)
        if not isinstance(which, int):
            return self._many(verb, session, which, placed=placed, **given)
        self._one(verb, session, which, placed=placed, **given)
        return load(sync_session(session), which, self.job_class)

    def _one(self, verb: _Verb, session: AnySession, job_id: int, *, placed: Place | None = None, **given: Any) -> None:
        work = _Work(verb, session, self.job_class, given)
        seen = next(iter(work.run(verb.one, [job_id])), None)
        if seen is None:
            raise JobNotFoundError(job_id)
        if seen.holder is not None:
            raise UniqueKeyTakenError(job_id, seen.holder, verb.done)
        if not seen.done and seen.state in verb.refused:
            if seen.state == "running":
                raise JobRunningError(job_id, verb.done)
            raise JobFinishedError(job_id, seen.state, verb.done)
        work.finish([seen], placed)

    def _many(
        self, verb: _Verb, session: AnySession, which: Select[Any], *, placed: Place | None = None, **given: Any
    ) -> Changed:
        work = _Work(verb, session, self.job_class, given)
        changed: set[int] = set()
        left: dict[int, str] = {}
        for ids in _batches(work.connection, which, self.job_class):
            rows = {row.id: row for row in work.run(verb.many, ids)}
            done = [row for row in rows.values() if row.done]
            work.finish(done, placed)
            changed.update(row.id for row in done)
            left |= work.reasons(rows, [job_id for job_id in ids if job_id not in rows])
        work.show(changed)
        return Changed(len(changed), left)


class _Work:
    """One use of a verb, on the caller's connection."""

    def __init__(self, verb: _Verb, session: AnySession, job_class: type[JobMixin], given: Mapping[str, Any]) -> None:
        self._verb = verb
        self._given = given
        self._job_class = job_class
        self._notify: NotifyMode = job_class.__river__.notify
        self.session = sync_session(session)
        self.connection = connect(self.session, job_class)
        self._schema = store.real_schema(self.connection, declared_schema(job_class))

    def run(self, statement: Executable, ids: Sequence[int]) -> Sequence[Any]:
        """What came of the jobs *ids*: `state` before and `now`, whether `done`, `holder` of the key, `queue`.

        A key that is taken between our look and our write makes the write fail; a second look tells the holder.
        """
        given = {"p_ids": ids, "p_schema": self._schema, **self._given}
        guarded = self._verb.takes_key and not store.is_autocommit(self.connection)
        for tries_left in (2, 1, 0):
            try:
                with self.connection.begin_nested() if guarded else nullcontext():
                    return store.execute(self.connection, self._schema, statement, given).all()
            except IntegrityError as error:
                if not self._verb.takes_key or _sqlstate(error) != _UNIQUE_VIOLATION:
                    raise
                if not tries_left:
                    raise UniqueRaceError(
                        f"the unique key of a job to be {self._verb.done} was taken by one that this transaction "
                        "cannot see; roll back and do it again"
                    ) from error
        raise AssertionError

    def finish(self, rows: Sequence[Any], placed: Place | None) -> None:
        """Tell whoever is to know of the jobs that were changed: of the new place of those that have one."""
        done = [row for row in rows if row.done]
        if done:
            mark_changed(self.session)
        if placed is not None:
            heard = Heard.of((row.queue, placed) for row in done if row.now != "pending")
            notify.tell(self.connection, self._schema, heard, self._notify)

    def show(self, changed: AbstractSet[int]) -> None:
        """Have the objects of the Session show that those jobs were changed, or are gone."""
        if not isinstance(self.session, Session):
            return
        ours = [each for each in list(self.session.identity_map.values()) if isinstance(each, self._job_class)]
        known = {inspect(each).identity[0]: each for each in ours}
        ids = sorted(known.keys() & changed)
        if self.connection.dialect.is_async and self._verb is not _DELETE:  # where an expired one cannot be looked at
            for start in range(0, len(ids), BATCH):
                load_anew(self.session, ids[start : start + BATCH], self._job_class)
            return
        for job_id in ids:
            (self.session.expunge if self._verb is _DELETE else self.session.expire)(known[job_id])

    def reasons(self, rows: Mapping[int, Any], missing: Sequence[int]) -> dict[int, str]:
        """Why jobs were left: those whose key is taken, and the *missing*, which are looked up."""
        left = {row.id: f"key taken by job {row.holder}" for row in rows.values() if row.holder is not None}
        if missing:
            found = store.execute(self.connection, self._schema, statements.SELECT_STATES, {"p_ids": missing})
            states = {row.id: row.state for row in found}
            left |= {job_id: self._verb.reason(states[job_id]) if job_id in states else "gone" for job_id in missing}
        return left


def _sqlstate(error: IntegrityError) -> str | None:
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


def _batches(connection: Connection, which: Select[Any], job_class: type[JobMixin]) -> Iterator[Sequence[int]]:
    """The ids that *which* chooses now, joins, order and limit of its own included; it is asked once."""
    found = connection.execute(which.with_only_columns(job_class.id, maintain_column_froms=True)).scalars()
    ids = sorted(set(found))
    for start in range(0, len(ids), BATCH):
        yield ids[start : start + BATCH]
