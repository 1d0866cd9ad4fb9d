"""What a handler may say besides returning nothing: `Snooze` and `Cancel`, returned or raised."""

from datetime import timedelta
from typing import Final

from sqla_river.errors import InvalidOptionError

LONGEST_DELAY: Final = timedelta(days=36_500)
"""A hundred years: far beyond any use, and far below what a timestamp of PostgreSQL or Python can hold."""


class Snooze(Exception):  # noqa: N818 - not an error: a wish
    """Run this job again after *delay*; the attempt is given back.

    Returned, the effects of a transactional handler commit with it; raised, they roll back.

    Args:
        delay: zero up to a hundred years.

    Raises:
        InvalidOptionError: for a negative or longer delay.
    """

    def __init__(self, delay: timedelta) -> None:
        super().__init__(delay)
        if not timedelta(0) <= delay <= LONGEST_DELAY:
            raise InvalidOptionError("delay", f"a snooze must be 0 to {LONGEST_DELAY.days} days long, got {delay}")
        self.delay = delay


class Cancel(Exception):  # noqa: N818 - not an error: a wish
    """Never run this job again; *reason* is kept with its errors.

    Returned, the effects of a transactional handler commit with it; raised, they roll back.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
