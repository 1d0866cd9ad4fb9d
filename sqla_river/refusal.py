"""What PostgreSQL refuses: a batch is halved until what is refused stands alone, and all else of it is written."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from sqla_river.logs import Log, first_line

T = TypeVar("T")
Rows = Sequence[Any]
log: Final = Log(__name__)

REFUSED_FOR: Final = 60.0
"""Seconds for which what was refused alone is left out: tried at each sweep, a thousand such rows would be two thousand
errors in the server's log every five seconds.
"""
_ELSEWHERE: Final = frozenset({"08", "25", "53"})
_STOPPING: Final = "57P"
_LIMIT_EXCEEDED: Final = "54000"


def _sqlstate(error: Exception) -> str | None:
    # At the commit of a pooler's transaction it is the driver's own error, without SQLAlchemy's around it.
    code: str | None = getattr(getattr(error, "orig", error), "sqlstate", None)
    return code


def is_refusal(error: Exception) -> bool:
    """Whether the error may be that of one row: a trigger, a damaged page, a wait for something that it alone needs.

    Not that of a connection, of a standby, of a full disk or memory, of a server that stops: no part would do better.
    """
    code = _sqlstate(error)
    return code is not None and code[:2] not in _ELSEWHERE and not code.startswith(_STOPPING)


def in_parts(
    parts: Iterable[Sequence[T]], write: Callable[[Sequence[T]], Rows], refused: Callable[[T, Exception], None]
) -> Iterator[Rows]:
    """Have *parts* written, each in halves where that is refused; yields what each statement brought, nothing where it
    was refused, so that whoever asks may look at the clock in between, and stop.

    About 2 log2(n) statements for one bad item of a part of n, and never more than 2n - 1.

    Args:
        parts: of at least one item each; written in this order.
        write: writes all of a part or, refused, nothing of it.
        refused: told of each that is refused when it stands alone.
    """
    left = list(parts)[::-1]
    while left:
        part = left.pop()
        try:
            brought = write(part)
        except Exception as error:
            if not is_refusal(error):
                raise
            brought = ()
            if len(part) > 1:
                middle = len(part) // 2
                left += [part[middle:], part[:middle]]
            else:
                refused(part[0], error)
        yield brought


def told_if_possible(write: Callable[[bool], Rows]) -> Rows:
    """What *write* brings when it may notify; if that is refused as it is by a full queue of notifications, what it
    brings when it may not: a notification is a hint, and runners poll.
    """
    try:
        return write(True)
    except Exception as error:
        if _sqlstate(error) != _LIMIT_EXCEEDED:
            raise
        brought = write(False)
        log.remind(
            "freed jobs without a word to runners that wait, which find them by polling: %s; look in pg_stat_activity "
            "for an old transaction of a connection that listens, and end it",
            first_line(error),
        )
        return brought
