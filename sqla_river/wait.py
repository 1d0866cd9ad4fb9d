"""Waiting until a job is finished."""

import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from sqla_river import store
from sqla_river.errors import JobNotFoundError, UncommittedJobError, WaitTimeoutError
from sqla_river.models import JobMixin, declared_schema
from sqla_river.session import connect, load, sync_session
from sqla_river.statements import SELECT_STATES

J = TypeVar("J", bound=JobMixin)

FIRST_LOOK: Final = 0.02
LONGEST_PAUSE: Final = 0.5

_waiting: dict[int, list[Callable[[], object]]] = {}
# Reentrant: the garbage collector ends the waits of a loop that is gone, maybe in a thread that holds it already.
_lock: Final = threading.RLock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could never wait, nor finish
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def finished_here(job_ids: Iterable[int]) -> None:
    """Wake whoever waits in this process for one of *job_ids*; raises nothing. Next to nothing if nobody does."""
    if _waiting:
        with _lock:
            told = [finished for job_id in job_ids for finished in _waiting.get(job_id, ())]
        for finished in told:
            with suppress(Exception):  # a runner calls this: who cannot be told must not keep it from its other jobs
                finished()


class Look:
    """One look after another at a job, with growing pauses; for whoever waits, in a thread or on an event loop.

    *finished* is called, by any thread, when this process finishes the job.
    """

    def __init__(self, job_id: int, timeout: timedelta | None, finished: Callable[[], object]) -> None:
        self.job_id = job_id
        self._until = None if timeout is None else time.monotonic() + timeout.total_seconds()
        self._timeout = timeout
        self._pause = FIRST_LOOK
        self._finished = finished

    def look(self, connection: Connection, job_class: type[J]) -> J | None:
        """The job if it is finished."""
        schema = store.real_schema(connection, declared_schema(job_class))
        row = store.execute(connection, schema, SELECT_STATES, {"p_ids": [self.job_id]}).one_or_none()
        if row is None:
            raise JobNotFoundError(self.job_id)
        return load(connection, self.job_id, job_class) if row.finished else None

    def pause(self) -> float:
        """Seconds until the next look; raises `WaitTimeoutError` when the time is over."""
        pause, self._pause = self._pause, min(self._pause * 2, LONGEST_PAUSE)
        if self._until is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(
                    f"job {self.job_id} is not finished after {self._timeout}; it goes on, wait longer or look later"
                )
            pause = min(pause, left)
        return pause

    def __enter__(self) -> Self:
        with _lock:
            _waiting.setdefault(self.job_id, []).append(self._finished)
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            others = [finished for finished in _waiting[self.job_id] if finished is not self._finished]
            if others:
                _waiting[self.job_id] = others
            else:
                del _waiting[self.job_id]


def engine_of(session: Any, job_id: int, job_class: type[JobMixin]) -> Engine:
    """The engine to look on, with the translate map of the session's connection; raises at once for a job that the
    session has not committed, which nobody else could ever finish.
    """
    if isinstance(session, Engine):
        return session
    connection = connect(sync_session(session), job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    if store.execute(connection, schema, SELECT_STATES, {"p_ids": [job_id]}).one_or_none() is not None:
        with connection.engine.connect() as other:
            seen = store.execute(other, schema, SELECT_STATES, {"p_ids": [job_id]}).one_or_none()
        if seen is None:
            raise UncommittedJobError(job_id)
    theirs = connection.get_execution_options().get("schema_translate_map")
    return connection.engine.execution_options(schema_translate_map=theirs) if theirs else connection.engine


def wait_for(
    session: Session | Connection | Engine | Any, job_id: int, job_class: type[J], timeout: timedelta | None
) -> J:
    """See `River.wait_for`."""
    engine = engine_of(session, job_id, job_class)
    finished = threading.Event()
    with Look(job_id, timeout, finished.set) as wait:
        while True:
            with engine.connect() as connection:
                job = wait.look(connection, job_class)
            if job is not None:
                return job
            finished.wait(wait.pause())
            finished.clear()
