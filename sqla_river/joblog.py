"""`JobLog`: what ``job.log`` is."""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final, cast

from sqla_river import failure
from sqla_river.logs import clean, of_job, one_line, rendered
from sqla_river.rows import JobRow

LONGEST_LOG: Final = 65_536
"""Bytes that are kept of what one attempt logs: the last ones."""
_LONGEST_LINE: Final = 8_192

_logger: Final = logging.getLogger("sqla_river.job")


class JobLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records carry job_id, kind, queue, attempt and runner.

    Control characters are written out, and the values of redacted args fields hidden, in tracebacks too.

    Args:
        row: the job.
        hide: takes its secrets out of a text.
        since: when the attempt began (monotonic), where its lines are to be kept; None keeps nothing. What is kept has
            the level INFO or more, whatever the logger's own level is.
    """

    def __init__(self, row: JobRow, hide: Callable[[str], str], since: float | None) -> None:
        super().__init__(_logger, of_job(row))
        self._hide = hide
        self._since = since
        self._lines: deque[str] = deque()
        self._size = 0
        self._cut = 0
        self._lock = threading.Lock()

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        return super().isEnabledFor(level) or self._keeps(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": self._extra(kwargs.get("extra"))}

    def log(
        self,
        level: int,
        msg: object,
        *args: object,
        exc_info: Any = None,
        stack_info: bool = False,
        stacklevel: int = 1,
        extra: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        if not self.isEnabledFor(level):
            return
        error = _error_of(exc_info)
        trace = None if error is None else self._trace(error)
        message, args = rendered(str(msg), args, self._clean)
        if self._keeps(level):
            self._keep(level, message % args if args else message, trace)
        if super().isEnabledFor(level):
            where = self.logger.findCaller(stack_info, stacklevel + 1)
            told = (type(error), error, error.__traceback__) if error is not None and not self._secret(error) else None
            record = self.logger.makeRecord(
                self.logger.name, level, where[0], where[1], message, args, told, where[2], self._extra(extra), where[3]
            )
            record.exc_text = trace
            self.logger.handle(record)

    def kept(self) -> str | None:
        """What was logged so far, if anything is to be kept of it."""
        with self._lock:  # a handler that was given up may go on logging
            lines = [f"... {self._cut} earlier lines are left out"] if self._cut else []
            lines += self._lines
        return "\n".join(lines) if lines else None

    def _keeps(self, level: int) -> bool:
        return self._since is not None and level >= logging.INFO

    def _keep(self, level: int, text: str, trace: str | None) -> None:
        since = time.monotonic() - (self._since or 0.0)
        line = f"+{since:.3f} {logging.getLevelName(level)} {text}" + (f"\n{trace}" if trace else "")
        line = failure.storable(line, _LONGEST_LINE)
        with self._lock:
            self._lines.append(line)
            self._size += len(line.encode()) + 1
            while self._size > LONGEST_LOG - 100:  # room for the word about what is left out
                self._size -= len(self._lines.popleft().encode()) + 1
                self._cut += 1

    def _extra(self, extra: Mapping[str, object] | None) -> dict[str, object]:
        theirs = {key: self._clean(value) if isinstance(value, str) else value for key, value in (extra or {}).items()}
        return {**theirs, **(self.extra or {})}

    def _clean(self, text: str) -> str:
        return clean(self._hide(text))

    def _trace(self, error: BaseException) -> str:
        return "\n".join(map(one_line, failure.trace_of(error, self._hide).rstrip("\n").split("\n")))

    def _secret(self, error: BaseException) -> bool:
        """Whether the error itself says what nobody may read, so that no handler of records may have it."""
        text = failure.trace_of(error)
        return self._hide(text) != text


def _error_of(exc_info: Any) -> BaseException | None:
    """The exception that ``exc_info`` of logging means, in whatever way it was said."""
    if isinstance(exc_info, BaseException):
        return exc_info
    if isinstance(exc_info, tuple):
        return cast("tuple[object, BaseException | None, object]", exc_info)[1]
    return sys.exc_info()[1] if exc_info else None
