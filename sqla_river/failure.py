"""How a failed attempt is put into words: bounded, storable, and never failing itself."""

import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from sqla_river.logs import without_passwords
from sqla_river.states import AttemptError

LONGEST: Final = 10_000
"""Bytes of message and trace together that are kept of one attempt."""
_MESSAGE: Final = 2_000


def storable(text: str, longest: int) -> str:
    """The beginning of *text* as PostgreSQL can keep it: no U+0000 or lone surrogate, at most *longest* bytes."""
    raw = _raw(text[: longest + 1])
    return raw.decode() if len(raw) <= longest else f"{raw[: longest - 3].decode(errors='ignore')}..."


def _storable_end(text: str, longest: int) -> str:
    """The same, of its end."""
    raw = _raw(text[-longest - 1 :])
    return raw.decode() if len(raw) <= longest else f"...{raw[3 - longest :].decode(errors='ignore')}"


def _raw(text: str) -> bytes:
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace")


def _as_it_is(text: str) -> str:
    return text


def message_of(error: BaseException, hide: Callable[[str], str] = _as_it_is) -> str:
    """``Type: text``, even where the text cannot be had; *hide* takes out what nobody may read."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - an error whose __str__ raises is still an error
        text = "<its text cannot be read>"
    # Cut twice: of a secret that the first cut halves, nothing is left by the second.
    text = hide(without_passwords(text[: 4 * _MESSAGE]))
    return storable(f"{name}: {text}" if text else name, _MESSAGE)


def trace_of(error: BaseException, hide: Callable[[str], str] = _as_it_is) -> str:
    """The traceback, without local values, its end kept where it is too long."""
    text = ""
    with suppress(BaseException):
        if len(str(error)) <= LONGEST:  # traceback takes 7 s for 50 MB of lines
            lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-40, chain=True)
            text = "".join(lines)
    if not text:
        with suppress(BaseException):
            text = "".join([*traceback.format_tb(error.__traceback__, limit=-40), message_of(error, hide)])
    return _storable_end(hide(without_passwords(text[-4 * LONGEST :])), LONGEST - _MESSAGE)


def attempt_error(attempt: int, error: BaseException, hide: Callable[[str], str] = _as_it_is) -> AttemptError:
    """What is kept of *error*, which ended attempt number *attempt*."""
    return AttemptError(attempt, message_of(error, hide), trace_of(error, hide))


def at(stack: str) -> str:
    """The places of a formatted *stack* in one line, the innermost first."""
    places = re.findall(r'^ *File "(.*)", line ([0-9]+), in (.*)$', stack, re.MULTILINE)
    return ", from ".join(f"{path}:{line} {name}" for path, line, name in reversed(places[-6:]))
