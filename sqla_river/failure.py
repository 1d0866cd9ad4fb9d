"""How a failed attempt is put into words: bounded, storable, and never failing itself."""

import traceback
from typing import Final

from sqla_river.states import AttemptError

LONGEST: Final = 10_000
"""Characters of message and trace together that are kept of one attempt."""
_MESSAGE: Final = 2_000


def storable(text: str, longest: int) -> str:
    """*text* as PostgreSQL can keep it: no U+0000, no lone surrogates, and at most *longest* characters."""
    if len(text) > longest:
        text = f"{text[: longest - 3]}..."
    return text.replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()


def message_of(error: BaseException) -> str:
    """``Type: text``, even where the text cannot be had."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 - an error whose __str__ raises is still an error
        text = "<its text cannot be read>"
    return storable(f"{name}: {text}" if text else name, _MESSAGE)


def trace_of(error: BaseException) -> str:
    """The traceback, without local values, its end kept where it is too long."""
    try:
        lines = traceback.format_exception(type(error), error, error.__traceback__, limit=-40, chain=True)
        text = "".join(lines)
    except BaseException:  # noqa: BLE001 - see message_of
        try:
            text = "".join(traceback.format_tb(error.__traceback__, limit=-40))
        except BaseException:  # noqa: BLE001
            text = ""
    longest = LONGEST - _MESSAGE
    return storable(text if len(text) <= longest else f"...{text[3 - longest :]}", longest)


def attempt_error(attempt: int, error: BaseException) -> AttemptError:
    """What is kept of *error*, which ended attempt number *attempt*."""
    return AttemptError(attempt, message_of(error), trace_of(error))
