"""How we log: one line per event, whatever is in it; repeats at most once a second; which job and which runner in
``extra``.

The records are those of standard `logging`, under ``sqla_river.<module>``.
"""

import logging
import os
import re
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any, Final, cast

REPEAT_EVERY: Final = 1.0
"""Seconds between two lines that say the same."""
REMIND_EVERY: Final = 600.0
"""Seconds between two reminders of what goes on being so."""
_MOST_KEYS: Final = 1_000

RUNNER: Final[ContextVar[str]] = ContextVar("sqla_river_runner", default="")
"""The id of the runner that this thread belongs to."""

# Control characters of both sets, line and paragraph separators, what turns the direction of writing, and lone
# surrogates, which no stream can encode.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_IN_URL: Final = re.compile(r"(://[^\s:/@]*:)\S+(?=@)")
_IN_WORDS: Final = re.compile(
    r"""(?i)(password\s*=\s*|password['"]\s*[:=]\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s'",;&)}]+)"""
)
_DIGITS: Final = re.compile(r"[0-9]+")

_said: Final[dict[tuple[Any, ...], tuple[float, int]]] = {}
# Reentrant: a signal handler that logs may meet its own thread here.
_lock: Final = threading.RLock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it would hang on its first line
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def first_line(error: BaseException) -> str:
    """What *error* says, without the statement that SQLAlchemy shows below it."""
    return str(error).partition("\n")[0][:500]


def one_line(text: str) -> str:
    r"""*text* with its control characters written out, a newline as ``\n``: it makes no second line, and moves no
    terminal.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_passwords(text: str) -> str:
    """*text* with ``***`` for the password of each URL or connection string in it."""
    if "://" not in text and "password" not in text.lower():
        return text
    return _IN_WORDS.sub(r"\1***", _IN_URL.sub(r"\1***", text))


def clean(text: str) -> str:
    """*text* as it may stand in a log."""
    return one_line(without_passwords(text))


def rendered(message: str, args: tuple[object, ...], cleaned: Callable[[str], str]) -> tuple[str, tuple[object, ...]]:
    """Message and args for a record: as they are (for whoever groups by the message), unless their text has to be
    *cleaned*.
    """
    given: object = args
    if len(args) == 1 and args[0] and isinstance(args[0], Mapping):  # as logging takes it
        given = cast("Mapping[str, object]", args[0])
    try:
        text = message % given if args else message
    except Exception:  # noqa: BLE001 - logging would print the args
        return cleaned(f"{message} (with args that do not fit)"), ()
    fit = cleaned(text)
    return (message, args) if fit == text else (fit, ())


def of_job(row: Any) -> dict[str, object]:
    """What ``extra`` says of a job: job_id, kind, queue, attempt, runner."""
    return {
        "job_id": row.id,
        "kind": one_line(row.kind),
        "queue": one_line(row.queue),
        "attempt": row.attempt,
        "runner": row.token.partition("/")[0],
    }


class Log:
    """The logger of one of our modules. Keywords go into ``extra``, and the id of the runner does so by itself."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, *args: object, **extra: object) -> None:
        self._say(logging.DEBUG, REPEAT_EVERY, message, args, extra)

    def info(self, message: str, *args: object, **extra: object) -> None:
        self._say(logging.INFO, REPEAT_EVERY, message, args, extra)

    def warning(self, message: str, *args: object, **extra: object) -> None:
        self._say(logging.WARNING, REPEAT_EVERY, message, args, extra)

    def error(self, message: str, *args: object, **extra: object) -> None:
        self._say(logging.ERROR, REPEAT_EVERY, message, args, extra)

    def remind(self, message: str, *args: object, **extra: object) -> None:
        """Warn of something that lasts: now, and every ten minutes for as long as it is said again."""
        self._say(logging.WARNING, REMIND_EVERY, message, args, extra)

    def _say(self, level: int, every: float, message: str, args: tuple[object, ...], extra: dict[str, object]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        runner = extra.setdefault("runner", RUNNER.get())
        words = tuple(_DIGITS.sub("0", str(arg)[:200]) for arg in args if isinstance(arg, str | BaseException))
        more = _since(every, (self._logger.name, level, message, runner, words))
        if more is None:
            return
        message, args = rendered(message, args, clean)
        if more:
            message = f"{message} (and {more} more like it)"
        try:
            self._logger.log(level, message, *args, extra=extra, stacklevel=3)
        except Exception:  # noqa: BLE001 - a filter or handler of the user's: no thread of ours ends for that
            if logging.raiseExceptions:  # as logging itself says what goes wrong within a handler
                with suppress(Exception):
                    traceback.print_exc()


def _since(every: float, key: tuple[Any, ...]) -> int | None:
    """How often *key* was kept quiet since it was last said; None where that was less than *every* seconds ago."""
    now = monotonic()
    with _lock:
        at, more = _said.get(key, (now - every, 0))
        if now - at < every:
            _said[key] = at, more + 1
            return None
        if len(_said) >= _MOST_KEYS:
            _said.clear()
        _said[key] = now, 0
        return more
