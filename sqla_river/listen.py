"""Wake-up, the receiving side: one connection per runner that LISTENs. A notification is a hint; state is always read
again.
"""

import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from psycopg import sql
from sqlalchemy import Engine, func, select

from sqla_river.logs import RUNNER, Log
from sqla_river.loop import Backoff
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

PING: Final = 5.0
"""Seconds without a word after which the connection is asked whether it still lives; River's number."""
ECHO_WITHIN: Final = 2.0
"""Seconds for a notification of our own to come back."""


class Listener:
    """A thread that hands every notification on River's channels of one schema to *heard*, and reconnects by itself.

    *heard* is called with topic, payload and the backend that sent it; with topic None after each (re)connect, for
    whatever was said in between. It must not block.
    """

    def __init__(
        self,
        engine: Engine,
        declared_schema: str | None,
        name: str,
        topics: tuple[str, ...],
        heard: Callable[[str | None, str, int], None],
        runner: str = "",
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._own = OwnConnection(engine, declared_schema, name, {"statement_timeout": "10s"}, prepare=False)
        self._topics = topics
        self._heard = heard
        self._stopping = threading.Event()
        self._wake_read: socket.socket
        self._wake_write: socket.socket
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.ready = threading.Event()
        """Set while LISTEN is in force."""
        self.deaf = False
        """Whether notifications do not come through, because a transaction pooler stands in between."""
        self.turned = self.moved = time.monotonic()
        """As those of a `Loop`."""

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def hears(self) -> bool:
        """Whether notifications come through."""
        return self.ready.is_set() and not self.deaf

    def start(self) -> None:
        self.turned = self.moved = time.monotonic()
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end, without waiting for it."""
        self._stopping.set()
        with suppress(OSError):  # it has ended, and closed its sockets
            self._wake_write.send(b"x")

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the thread's end."""
        self._thread.join(timeout)

    def _run(self) -> None:
        RUNNER.set(self._runner)
        backoff = Backoff(log, "listen")
        with self._wake_read, self._wake_write:
            while not self._stopping.is_set():
                try:
                    self._listen(backoff)
                except Exception as error:  # noqa: BLE001 - a listener outlives whatever happens; the poll covers the gap
                    self.turned = time.monotonic()
                    self.ready.clear()
                    self._own.close()
                    self._stopping.wait(backoff.failed(error))
            self._own.close()

    def _is_deaf(self, raw: Any) -> bool:
        """Whether a transaction pooler hands our LISTEN from one server connection to the next.

        Where there is a pooler, a notification of our own, sent on another connection, tells: one that pools sessions
        lets it through.
        """
        if not self._own.pooled:
            return False
        channel = f"sqla_river_echo_{secrets.token_hex(4)}"
        raw.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        other = OwnConnection(self._engine, None, "sqla_river:echo", prepare=False)
        try:
            other.get().execute(select(func.pg_notify(channel, "")))
        finally:
            other.close()
        heard = any(each.channel == channel for each in raw.notifies(timeout=ECHO_WITHIN))
        raw.execute(sql.SQL("UNLISTEN {}").format(sql.Identifier(channel)))
        if not heard:
            log.remind(
                "LISTEN goes through a transaction pooler, and no notification comes back: jobs wait for the poll; "
                "give the Runner listen=, an engine that connects to PostgreSQL directly"
            )
        return not heard

    def _listen(self, backoff: Backoff) -> None:
        connection = self._own.get()
        schema = self._own.schema or connection.execute(select(func.current_schema())).scalar_one()
        raw = self._own.raw
        channels = {f"{schema}.{topic}": topic for topic in self._topics}
        for channel in channels:
            raw.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
        self.deaf = self._is_deaf(raw)
        self.ready.set()
        self._heard(None, "", 0)
        with selectors.DefaultSelector() as waiting:
            waiting.register(raw.fileno(), selectors.EVENT_READ)
            waiting.register(self._wake_read, selectors.EVENT_READ)
            while not self._stopping.is_set():
                if not waiting.select(PING):
                    raw.execute("SELECT 1")
                for notification in raw.notifies(timeout=0):
                    topic = channels.get(notification.channel)
                    if topic is not None:
                        self._heard(topic, notification.payload, notification.pid)
                self.turned = self.moved = time.monotonic()
                backoff.worked()
