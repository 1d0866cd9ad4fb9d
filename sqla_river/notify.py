"""Wake-up, the sending side: a queue's name on River's channel, never data.

Three modes. ``transaction``: one NOTIFY per transaction (or savepoint) and queue, inside it. ``after_commit``: the
Engine's commit event marks the queue, and a side connection, one for each pool of connections, announces it once the
transaction is over; commits that NOTIFY take turns server-wide (PreCommit_Notify in PostgreSQL's async.c): with a 2 ms
disk flush, 16 clients made 390 commits/s with NOTIFY inside and 4,550 with it outside. ``off``: runners poll.

Under AUTOCOMMIT, where each statement is a transaction, each is announced.
"""

import asyncio
import atexit
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Connection, Engine, Executable, Transaction, TwoPhaseTransaction, event

from sqla_river import store
from sqla_river.config import NotifyMode
from sqla_river.logs import Log, first_line
from sqla_river.rows import ANNOUNCED_AHEAD, Heard
from sqla_river.statements import NOTIFY_QUEUES

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

log: Final = Log(__name__)

COALESCE: Final = 0.010
"""Seconds between two announcements; what came in between goes with the next: the last job of a burst is announced."""
_FIRST_LOOK: Final = 0.0002
"""The commit event fires just before COMMIT, and a plain COMMIT ends in well under a millisecond."""
_IDLE: Final = 60.0
"""Seconds after which an announcer with nothing to say closes its connection and goes."""
_LAST_WORDS: Final = 1.0
"""Seconds for which a program that ends waits for its announcers."""

Announcement = tuple[str | None, str]
"""Schema and queue."""

_told: WeakKeyDictionary[Transaction, set[Announcement]] = WeakKeyDictionary()
_coming: WeakKeyDictionary[Transaction, Counter[Announcement]] = WeakKeyDictionary()
"""Under AUTOCOMMIT: the jobs of a flush of which `tell` has not heard yet."""
_marked: WeakKeyDictionary[Transaction, set[Announcement]] = WeakKeyDictionary()
_due: WeakKeyDictionary[Transaction, dict[tuple[str | None, str, NotifyMode], datetime]] = WeakKeyDictionary()
_heard: WeakSet[Engine] = WeakSet()
_announcers: dict[Any, "Announcer"] = {}
_lock: Final = threading.Lock()


if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could never enqueue
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def untold(connection: Connection, schema: str | None, heard: Heard, mode: NotifyMode) -> bool:
    """Whether the statement that puts in a job of one queue is to announce it by itself. If it has, tell `tell`."""
    if mode != "transaction" or not heard.now:
        return False
    root = connection.get_transaction() or connection.begin()
    if isinstance(root, TwoPhaseTransaction):
        return False
    return store.is_autocommit(connection) or not _named(schema, heard.now) <= _told_in(connection)


def says(connection: Connection, schema: str | None, heard: Heard, mode: NotifyMode) -> bool:
    """`untold`, for a job of a flush: which asks for each job before it puts any in, and calls `tell` for each after.

    It is answered as if the one told to announce had done so, for a flush that fails ends the transaction. Under
    AUTOCOMMIT nobody is told to: the jobs may be committed one by one, so the last `tell` announces them.
    """
    fresh = untold(connection, schema, heard, mode)
    if fresh and store.is_autocommit(connection):
        _coming.setdefault(_innermost(connection), Counter()).update(_named(schema, heard.now))
        return False
    if fresh:
        _told_in(connection).update(_named(schema, heard.now))
    return fresh


def tell(connection: Connection, schema: str | None, heard: Heard, mode: NotifyMode, *, said: bool = False) -> None:
    """See that runners hear of new jobs when the transaction of *connection* commits: of what is to be heard now, and
    of what is due, or nearly so, by the time of the commit.

    In mode ``transaction`` one round trip for queues that this transaction (or savepoint) has not named yet, and one
    before a commit that comes late; else none. Two-phase transactions are left to the poll: PostgreSQL refuses to
    PREPARE what has executed NOTIFY.

    Args:
        connection: that of the statement that put the jobs in.
        schema: the real one.
        heard: what there is to hear.
        mode: how it is announced.
        said: whether that statement has announced ``heard.now``.
    """
    root = connection.get_transaction()
    if mode == "off" or root is None:
        return
    at_once = store.is_autocommit(connection)
    if not said:
        _announce(connection, root, schema, heard.now, mode, at_once=at_once)
    elif not at_once:
        _told_in(connection).update(_named(schema, heard.now))
    if heard.due and not at_once and not isinstance(root, TwoPhaseTransaction):
        with _lock:
            due = _due.setdefault(root, {})
            for queue, at in heard.due.items():
                due[schema, queue, mode] = min(at, due.get((schema, queue, mode), at))
            _hear(connection.engine)


def _announce(
    connection: Connection, root: Transaction, schema: str | None, queues: set[str], mode: NotifyMode, *, at_once: bool
) -> None:
    """*at_once*: what the statements of *root* did is committed already."""
    named = _named(schema, queues)
    if not named:
        return
    if mode == "after_commit":
        if at_once:
            _hand_over(connection.engine, None, named)
        else:
            _mark(connection, root, named)
    elif not isinstance(root, TwoPhaseTransaction):
        fresh = _all_in(connection, named) if at_once else named - _told_in(connection)
        if fresh:
            names = sorted(queue for _, queue in fresh)
            store.execute(connection, schema, NOTIFY_QUEUES, {"p_schema": schema, "p_queues": names})
            if not at_once:
                _told_in(connection).update(fresh)


def _named(schema: str | None, queues: Iterable[str]) -> set[Announcement]:
    return {(schema, queue) for queue in queues}


def _innermost(connection: Connection) -> Transaction:
    transaction = connection.get_nested_transaction() or connection.get_transaction()
    assert transaction is not None
    return transaction


def _told_in(connection: Connection) -> set[Announcement]:
    return _told.setdefault(_innermost(connection), set())


def _all_in(connection: Connection, announcements: set[Announcement]) -> set[Announcement]:
    """Those of *announcements* of which the flush, if there is one, has no more to tell."""
    coming = _coming.get(_innermost(connection), Counter[Announcement]())
    coming.subtract(announcements)
    over = {each for each in announcements if coming[each] <= 0}
    for each in over:
        del coming[each]
    return over


def _late(connection: Connection, root: Transaction) -> None:
    """Before the COMMIT of *root*: announce those of its jobs that are due by now, or nearly so."""
    soon = time.monotonic() + ANNOUNCED_AHEAD.total_seconds()
    for (schema, queue, mode), at in _due.pop(root, {}).items():
        if store.local_time(root, at) <= soon:
            _announce(connection, root, schema, {queue}, mode, at_once=False)


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
        _hand_over(connection.engine, root, announcements)


def _hand_over(engine: Engine, root: Transaction | None, announcements: set[Announcement]) -> None:
    """Have the announcer of *engine* say *announcements* once *root* is over: at once if that is None. It never fails:
    the caller is about to commit.
    """
    key = (os.getpid(), engine.pool)
    try:
        with _lock:
            announcer = _announcers.get(key)
            if announcer is None:
                announcer = Announcer(engine, key)
                announcer.start()
                _announcers[key] = announcer
            announcer.add(root, announcements)
    except RuntimeError as error:  # no thread can be made: there are too many, or the program is ending
        _missed([queue for _, queue in announcements], error)


class Announcer:
    """One thread and one connection that announce, for all transactions of an engine's pool, when they are over.

    It knows of no rollback once a COMMIT is under way, nor of one to a savepoint: where the one fails, and after the
    other, runners are woken for nothing. A crash between commit and announcement costs one poll.
    """

    def __init__(self, engine: Engine, key: object) -> None:
        self._engine = engine
        self._key = key
        self._waiting: deque[tuple[Transaction | None, set[Announcement]]] = deque()
        self._woken = threading.Event()
        self.quiet = threading.Event()
        """Set while there is nothing left to say."""

    def start(self) -> None:
        """Begin, under the module's lock; raises RuntimeError where no thread can be made."""
        threading.Thread(target=self._run, name="sqla_river-announce", daemon=True).start()

    def add(self, root: Transaction | None, announcements: set[Announcement]) -> None:
        """Announce once *root*, which is about to commit, is over. Called under the module's lock."""
        self._waiting.append((root, announcements))
        self.quiet.clear()
        self._woken.set()

    def _run(self) -> None:
        connection: _Awaited | store.OwnConnection | None = None
        try:
            connection = _connection_like(self._engine)
            self._announce(connection)
        except Exception as error:  # noqa: BLE001 - the next commit makes another
            with _lock:
                self._go()
            _missed([queue for _, announcements in self._waiting for _, queue in announcements], error)
        if connection is not None:
            connection.close()

    def _announce(self, connection: "_Awaited | store.OwnConnection") -> None:
        committing: list[tuple[Transaction | None, set[Announcement]]] = []
        pause = _FIRST_LOOK
        while committing or self._woken.wait(_IDLE) or not self._retire():
            self._woken.clear()
            while self._waiting:
                committing.append(self._waiting.popleft())
            looked_at, committing, over = committing, [], set[Announcement]()
            for root, announcements in looked_at:
                if root is not None and root.is_active:
                    committing.append((root, announcements))
                else:
                    over |= announcements
            if over:
                _notify(connection, over)
                with _lock:
                    if not committing and not self._waiting:
                        self.quiet.set()
                pause = _FIRST_LOOK
                time.sleep(COALESCE)
            else:
                time.sleep(pause)
                pause = min(pause * 2, COALESCE)

    def _retire(self) -> bool:
        with _lock:
            if self._waiting:
                return False
            self._go()
            return True

    def _go(self) -> None:
        self.quiet.set()
        if _announcers.get(self._key) is self:
            del _announcers[self._key]


def _drain() -> None:
    """Let the announcers of this process say what they know: their threads end with the program, and a short one would
    be heard at the next poll only.
    """
    until = time.monotonic() + _LAST_WORDS
    with _lock:
        ours = [announcer for (pid, _), announcer in _announcers.items() if pid == os.getpid()]
    for announcer in ours:
        announcer.quiet.wait(max(0.0, until - time.monotonic()))


atexit.register(_drain)


class _Awaited:
    """A connection of an async *engine*, made as that makes its own, on an event loop of its own; it sets nothing, for
    a pooler may stand in between.
    """

    def __init__(self, engine: Engine) -> None:
        from sqlalchemy.ext.asyncio import AsyncEngine

        self._engine = AsyncEngine(store.twin(engine)).execution_options(isolation_level="AUTOCOMMIT")
        self._loop = asyncio.Runner()
        self._connection: AsyncConnection | None = None

    def execute(self, statement: Executable, parameters: Mapping[str, Any]) -> None:
        """As `store.OwnConnection` does."""
        self._loop.run(self._execute(statement, parameters))

    async def _execute(self, statement: Executable, parameters: Mapping[str, Any]) -> None:
        if self._connection is None:
            self._connection = await self._engine.connect()
        try:
            await self._connection.run_sync(store.execute, None, statement, parameters)
        except BaseException:
            connection, self._connection = self._connection, None
            await connection.invalidate()
            await connection.close()
            raise

    async def _close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
        await self._engine.dispose()

    def close(self) -> None:
        with self._loop:
            self._loop.run(self._close())


def _connection_like(engine: Engine) -> "_Awaited | store.OwnConnection":
    if engine.dialect.is_async:
        return _Awaited(engine)
    return store.OwnConnection(store.twin(engine), None, "sqla_river:announce", {"synchronous_commit": "off"})


def _notify(connection: "_Awaited | store.OwnConnection", announcements: set[Announcement]) -> None:
    by_schema: dict[str | None, list[str]] = {}
    for schema, queue in announcements:
        by_schema.setdefault(schema, []).append(queue)
    for schema, queues in by_schema.items():
        try:
            connection.execute(NOTIFY_QUEUES, {"p_schema": schema, "p_queues": sorted(queues)})
        except Exception as error:  # noqa: BLE001 - the poll finds them
            _missed(queues, error)


def _missed(queues: Iterable[str], error: Exception) -> None:
    log.warning(
        "could not announce queues %s; runners find the jobs at their next poll: %s: %s",
        sorted(set(queues)),
        type(error).__name__,
        first_line(error),
    )
