"""Wake-up, the sending side: a queue's name on River's channel, never data.

Three modes. ``transaction``: one NOTIFY per transaction (or savepoint) and queue, inside it. ``after_commit``: the
Engine's commit event marks the queue, and one side connection per process announces it once the transaction is over;
commits that NOTIFY take turns server-wide (PreCommit_Notify in PostgreSQL's async.c): with a 2 ms disk flush, 16
clients made 390 commits/s with NOTIFY inside and 4,550 with it outside. ``off``: runners poll.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import (
    Connection,
    Engine,
    NestedTransaction,
    NullPool,
    Transaction,
    TwoPhaseTransaction,
    create_engine,
    event,
)

from sqla_river import store
from sqla_river.config import NotifyMode
from sqla_river.logs import Log
from sqla_river.rows import ANNOUNCED_AHEAD, Heard
from sqla_river.statements import NOTIFY_QUEUES

log: Final = Log(__name__)

COALESCE: Final = 0.010
"""Seconds between two announcements; what came in between goes with the next: the last job of a burst is announced."""
_FIRST_LOOK: Final = 0.0002
"""The commit event fires just before COMMIT, and a plain COMMIT ends in well under a millisecond."""
_IDLE: Final = 60.0
"""Seconds after which an announcer with nothing to say closes its connection and goes."""

Announcement = tuple[str | None, str]
"""Schema and queue."""

_told: WeakKeyDictionary[Transaction, set[Announcement]] = WeakKeyDictionary()
_marked: WeakKeyDictionary[Transaction, set[Announcement]] = WeakKeyDictionary()
_due: WeakKeyDictionary[Transaction, dict[tuple[str | None, str, NotifyMode], datetime]] = WeakKeyDictionary()
_heard: WeakSet[Engine] = WeakSet()
_announcers: dict[Any, "Announcer"] = {}
_lock: Final = threading.Lock()


if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could never enqueue
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def announce(connection: Connection, schema: str | None, queues: Iterable[str], mode: NotifyMode) -> None:
    """See that runners hear of *queues* when the transaction of *connection* commits, and only then.

    One round trip in mode ``transaction``, for queues that this transaction (or savepoint) has not named yet; none
    otherwise. Two-phase transactions are left to the poll: PostgreSQL refuses to PREPARE what has executed NOTIFY.
    """
    root = connection.get_transaction()
    if mode == "off" or root is None:
        return
    if mode == "after_commit":
        _mark(connection, root, {(schema, queue) for queue in queues})
    elif not isinstance(root, TwoPhaseTransaction):
        told = _told_in(connection, root)
        fresh = sorted({queue for queue in queues if (schema, queue) not in told})
        if fresh:
            store.execute(connection, schema, NOTIFY_QUEUES, {"p_schema": schema, "p_queues": fresh})
            told.update((schema, queue) for queue in fresh)


def _told_in(connection: Connection, root: Transaction) -> set[Announcement]:
    inner: NestedTransaction | Transaction = connection.get_nested_transaction() or root
    return _told.setdefault(inner, set())


def says(connection: Connection, schema: str | None, heard: Heard, mode: NotifyMode) -> bool:
    """Whether the statement that puts in a job of one queue is to announce it by itself, as `tell` would by another:
    which then has nothing left to say.
    """
    if mode != "transaction" or not heard.now:
        return False
    root = connection.get_transaction() or connection.begin()
    if isinstance(root, TwoPhaseTransaction):
        return False
    told, before = _told_in(connection, root), {(schema, queue) for queue in heard.now}
    fresh = not before <= told
    told |= before
    return fresh


def tell(connection: Connection, schema: str | None, heard: Heard, mode: NotifyMode) -> None:
    """`announce` what is to be heard of with this commit; and see to it that a commit which comes only when a job is
    due, or nearly so, is announced too. No further round trip, but for such a commit.
    """
    announce(connection, schema, heard.now, mode)
    root = connection.get_transaction()
    if not heard.due or mode == "off" or root is None or isinstance(root, TwoPhaseTransaction):
        return
    with _lock:
        due = _due.setdefault(root, {})
        for queue, at in heard.due.items():
            due[schema, queue, mode] = min(at, due.get((schema, queue, mode), at))
        _hear(connection.engine)


def _late(connection: Connection, root: Transaction) -> None:
    """Before the COMMIT of *root*: announce those of its jobs that are due by now, or nearly so."""
    soon = time.monotonic() + ANNOUNCED_AHEAD.total_seconds()
    for (schema, queue, mode), at in _due.pop(root, {}).items():
        if store.local_time(root, at) <= soon:
            announce(connection, schema, (queue,), mode)


def _mark(connection: Connection, root: Transaction, announcements: set[Announcement]) -> None:
    """Remember *announcements* until the commit of *root*: the Engine's, as the Session's events fire without one."""
    with _lock:
        _marked.setdefault(root, set()).update(announcements)
        _hear(connection.engine)


def _hear(engine: Engine) -> None:
    if engine not in _heard:
        _heard.add(engine)
        event.listen(engine, "commit", _committing)
        event.listen(engine, "commit_twophase", _committing)


def _committing(connection: Connection, *_twophase: object) -> None:
    root = connection.get_transaction()
    if root is None:
        return
    if root in _due:
        _late(connection, root)
    announcements = _marked.pop(root, None)
    if announcements:
        engine = connection.engine
        key = (os.getpid(), engine.pool)
        with _lock:
            announcer = _announcers.get(key)
            if announcer is None:
                announcer = _announcers[key] = Announcer(engine, lambda: _announcers.pop(key, None))
            announcer.add(root, announcements)


class Announcer:
    """One thread and one connection that announce, for all transactions of an engine's pool, what they have committed.

    A crash between commit and announcement costs one poll.
    """

    def __init__(self, engine: Engine, forget: Any) -> None:
        self._engine = _sync_engine(engine)
        self._forget = forget
        self._waiting: deque[tuple[Transaction, set[Announcement]]] = deque()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, root: Transaction, announcements: set[Announcement]) -> None:
        """Announce once *root*, which is about to commit, is over. Called under the module's lock."""
        self._waiting.append((root, announcements))
        self._woken.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sqla_river-announce", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        connection = store.OwnConnection(self._engine, None, "sqla_river:announce", {"synchronous_commit": "off"})
        committing: list[tuple[Transaction, set[Announcement]]] = []
        pause = _FIRST_LOOK
        while committing or self._woken.wait(_IDLE) or not self._retire():
            self._woken.clear()
            while self._waiting:
                committing.append(self._waiting.popleft())
            over = [announcements for root, announcements in committing if not root.is_active]
            committing = [entry for entry in committing if entry[0].is_active]
            if over:
                _notify(connection, set[Announcement]().union(*over))
                pause = _FIRST_LOOK
                time.sleep(COALESCE)
            else:
                time.sleep(pause)
                pause = min(pause * 2, COALESCE)
        connection.close()

    def _retire(self) -> bool:
        with _lock:
            if self._waiting:
                return False
            self._forget()
            return True


def _notify(connection: store.OwnConnection, announcements: set[Announcement]) -> None:
    by_schema: dict[str | None, list[str]] = {}
    for schema, queue in announcements:
        by_schema.setdefault(schema, []).append(queue)
    for schema, queues in by_schema.items():
        try:
            connection.execute(NOTIFY_QUEUES, {"p_schema": schema, "p_queues": sorted(queues)})
        except Exception as error:  # noqa: BLE001 - the poll finds them
            log.warning(
                "could not announce queues %s; runners find the jobs at their next poll: %s: %s",
                sorted(queues),
                type(error).__name__,
                str(error).partition("\n")[0],
            )


def _sync_engine(engine: Engine) -> Engine:
    """An engine like *engine*; on psycopg, where its driver is async: a thread has no greenlet to await in."""
    if not engine.dialect.is_async:
        return store.twin(engine)
    return create_engine(engine.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
