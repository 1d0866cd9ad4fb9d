"""A listener of one's own, and a River of one's own to hear."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import sql
from sqlalchemy import make_url
from sqlalchemy.orm import DeclarativeBase

from sqla_river import JobMixin, River

DEFAULT = '{"queue": "default"}'
SMS = '{"queue": "notifications"}'


def until(true: Callable[[], bool]) -> None:
    """Wait for what has no signal of its own."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


class Ear:
    """A listener of its own connection. A mark sent after all else tells when everything said before has been heard."""

    def __init__(self, url: str, channel: str = "public.river_insert") -> None:
        self.channel = channel
        self._waiting: deque[str] = deque()
        self.connection = psycopg.connect(
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
        )
        self.connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

    def heard(self) -> list[str]:
        """All that has been said so far."""
        self.connection.execute("SELECT pg_notify(%s, 'mark')", (self.channel,))
        said: list[str] = []
        while (one := self.next()) != "mark":
            said.append(one)
        return said

    def next(self, timeout: float = 30) -> str:
        """The next that is said."""
        if not self._waiting:
            self._waiting.extend(one.payload for one in self.connection.notifies(timeout=timeout, stop_after=1))
        assert self._waiting, "nothing was heard"
        return self._waiting.popleft()


def river_with(**settings: Any) -> River[Any]:
    """A River over a class of its own."""

    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base): ...

    return River(job_class=Mine, **settings)
