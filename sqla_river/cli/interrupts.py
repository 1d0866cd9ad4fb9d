"""Ctrl-C that never gets in the way of cleaning up."""

import contextlib
import signal
import threading
from collections.abc import Generator
from types import FrameType
from typing import Final

from sqla_river.signals import take, taken

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def kept() -> Generator[None, None, None]:
    """Raise a Ctrl-C only behind the block, which imports; a second one at once.

    Raised within, it may hit a callback of the import machinery or of a finalizer: Python prints such an exception,
    with its traceback, and forgets it. Only where Python's own handler is in place, which a program that calls us may
    have replaced.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with taken((signal.SIGINT,) if ours else (), note):
        yield
    if came:
        raise KeyboardInterrupt


class Interrupts:
    """Turns the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt; what comes later, or under a shield, is noted.

    The handler raises once at most: so of two nested ``finally`` blocks the outer one is never cut short. An exception
    that got lost, as in a finalizer, is raised again by `check`. Signals that are ignored, as under nohup, stay so.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came."""
        self._armed = True
        take([number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN], self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            if self._armed:
                raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self.number is not None:
            raise KeyboardInterrupt

    def disarm(self) -> None:
        """Raise nothing from now on."""
        self._armed = False

    @contextlib.contextmanager
    def shield(self) -> Generator[None, None, None]:
        """Do the block as a whole; what came meanwhile is raised behind it."""
        self._armed = False
        try:
            yield
        finally:
            self._armed = True
        self.check()
