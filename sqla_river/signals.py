"""Signals that a process takes for itself, and that the children which it forks get as they were."""

import os
import signal
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

Handler = Callable[[int, FrameType | None], object]

_before: Final[list[dict[int, Any]]] = []
"""What stood before each taking that holds, the latest last."""


class _Mask(threading.local):
    before: set[Any] | None = None


_mask: Final = _Mask()


def take(numbers: Collection[int], handler: Handler) -> dict[int, Any]:
    """Have *handler* called for the signals *numbers*, in this process alone; returns what stood before.

    A forked child has those again: what ours would tell are threads that did not come along, so the child would be
    deaf to `multiprocessing.Process.terminate`, and whoever joins it would wait for ever. Main thread only.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    _before.append(before)  # first: a child that another thread forks meanwhile must not keep ours
    for number in numbers:
        signal.signal(number, handler)
    return before


@contextmanager
def taken(numbers: Collection[int], handler: Handler) -> Generator[None]:
    """`take` for the block."""
    before = take(numbers, handler)
    try:
        yield
    finally:
        if before in _before:  # else this is a forked child, which may have set others by now
            _restore(before)
            _before.remove(before)


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set


def _hold() -> None:
    """Let a signal that would end a child wait while this thread forks: what comes before the child's handlers are
    restored Python forgets (_clear_pending_signals in its signalmodule.c), the kernel does not.

    Not one with a handler in Python: an exception of that, as KeyboardInterrupt, is lost in what is called at a fork.
    """
    found: dict[int, Any] = {}
    for before in _before:
        found = before | found
    deadly = {number for number, handler in found.items() if handler in (signal.SIG_DFL, None)}
    if deadly:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.pthread_sigmask(signal.SIG_BLOCK, deadly)


def _let_go() -> None:
    if _mask.before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)
        _mask.before = None


def _give_back() -> None:
    while _before:
        _restore(_before.pop())
    _let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_give_back)
