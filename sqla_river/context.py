"""`JobContext`: what a handler is given."""

import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from types import MethodType
from typing import Any, Final, Generic, Literal, NoReturn, TypeVar, cast

from sqla_river import redact
from sqla_river.errors import InvalidOptionError
from sqla_river.joblog import JobLog
from sqla_river.logs import one_line
from sqla_river.options import check_json, json_text
from sqla_river.rows import JobRow

A_co = TypeVar("A_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

CancelReason = Literal["timeout", "cancel", "stop", "lease lost"]

LONGEST_OUTPUT: Final = 1_048_576
KEPT_LOGS: Final = 25
"""Attempts of a job whose log is kept, the last ones; as many as errors."""
_LOGS_KEY: Final = "river:log"

_lock: Final = threading.Lock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread holds it could never ask `job.cancelled`
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Cancelled(threading.Event):
    """Set when the handler should end soon; `reason` says why: timeout, cancel, stop or lease lost. None until then."""

    reason: CancelReason | None = None


class Metadata(MutableMapping[str, Any]):
    """The job's metadata: reads what is stored, and keeps what is assigned; it is stored with the outcome, whatever
    that is.

    A value is encoded when it is assigned: changing it afterwards changes nothing.
    """

    def __init__(self, stored: dict[str, Any]) -> None:
        self._stored = stored
        self._changes: dict[str, str] = {}

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._changes[key]) if key in self._changes else self._stored[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key.startswith("river:"):
            raise InvalidOptionError(
                "metadata", f"metadata keys that start with 'river:' are River's own, got {key!r}; take another"
            )
        check_json("metadata", key)
        self._changes[key] = json_text("metadata", value)

    def __delitem__(self, key: str) -> None:
        raise InvalidOptionError("metadata", f"metadata is merged, a key cannot be taken out; assign None to {key!r}")

    def __iter__(self) -> Iterator[str]:
        return iter({**self._stored, **self._changes})

    def __len__(self) -> int:
        return len({**self._stored, **self._changes})

    def add_log(self, attempt: int, text: str) -> None:
        """Keep what *attempt* logged, in River's shape, behind what earlier ones did."""
        found: object = self._stored.get(_LOGS_KEY)
        earlier = cast("list[object]", found) if isinstance(found, list) else []
        entries = [*earlier[-KEPT_LOGS + 1 :], {"attempt": attempt, "log": text}]
        self._changes[_LOGS_KEY] = json.dumps(entries)

    @property
    def staged(self) -> str | None:
        """What was assigned, as the JSON text of an object; None if nothing was."""
        if not self._changes:
            return None
        changes = self._changes.copy()  # a handler that was given up may go on assigning
        return "{" + ",".join(f"{json.dumps(key)}:{text}" for key, text in changes.items()) + "}"


class _Verb:
    """A method that no assignment hides: ``job.output = 5`` would store nothing, and say nothing."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, job: object, _: type | None = None) -> Callable[..., Any]:
        return self._method if job is None else MethodType(self._method, job)

    def __set__(self, job: object, value: object) -> NoReturn:
        name = self._method.__name__
        raise AttributeError(f"job.{name} is a method, and stores what it is called with: write job.{name}(...)")


def _verb(method: F) -> F:
    return cast("F", _Verb(method))


class JobContext(Generic[A_co]):
    """One attempt at one job, as its handler sees it.

    Attributes:
        args: the typed args.
        row: the raw row, as it was fetched.
        id, kind, queue, priority, max_attempts: of the row.
        attempt: this attempt, counted from 1.
        deadline: when its timeout is over (monotonic seconds); infinite without one.
        timed_out: whether it was told so.
        progressed: the last progress, as JSON text.
        tell: called after each progress.
        error: None while the handler runs; for a ``retry`` callable the exception that ended this attempt.
        logs_since: when the attempt began (monotonic), where its log is to be kept; else None.
    """

    # What most attempts leave as it is stands in the class: a job is made in a third of the time.
    deadline: float = math.inf
    timed_out: bool = False
    progressed: str | None = None
    tell: "Callable[[JobContext[Any]], object] | None" = None
    error: BaseException | None = None
    logs_since: float | None = None
    _cancelled: Cancelled | None = None
    _reason: CancelReason | None = None
    _hide: Callable[[str], str] | None = None
    _log: JobLog | None = None
    _metadata: Metadata | None = None

    def __init__(self, row: JobRow, args: A_co) -> None:
        self.row = row
        self.args = args

    @property
    def id(self) -> int:
        return self.row.id

    @property
    def kind(self) -> str:
        return self.row.kind

    @property
    def queue(self) -> str:
        return self.row.queue

    @property
    def attempt(self) -> int:
        return self.row.attempt

    @property
    def max_attempts(self) -> int:
        return self.row.max_attempts

    @property
    def priority(self) -> int:
        return self.row.priority

    @property
    def metadata(self) -> Metadata:
        """The job's metadata; what is assigned is stored with the outcome."""
        if self._metadata is None:
            stored = json.loads(self.row.metadata)
            self._metadata = Metadata(cast("dict[str, Any]", stored) if isinstance(stored, dict) else {})
        return self._metadata

    @_verb
    def output(self, value: Any) -> None:
        """Record a result, at most 1 MiB of JSON, under River's metadata key ``output``; stored with the outcome,
        whatever that is.

        Raises:
            InvalidOptionError: a value that is larger, or no JSON.
        """
        text = json_text("output", value)
        if len(text) > LONGEST_OUTPUT:
            raise InvalidOptionError(
                "output",
                f"output must be at most {LONGEST_OUTPUT} characters of JSON, got {len(text)}; store it elsewhere",
            )
        self.metadata["output"] = value

    @_verb
    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Show how far the job is, in its metadata under ``sqla_river:progress``, while it runs. Cheap: written at
        most once a second. Of a transactional job on an engine of REPEATABLE READ or SERIALIZABLE nothing is shown: its
        completion would fail.

        Raises:
            InvalidOptionError: no JSON.
        """
        self.progressed = json_text("progress", {"done": done, "total": total, "note": note[:1_000]})
        if self.tell is not None:
            self.tell(self)

    @property
    def log(self) -> "logging.LoggerAdapter[logging.Logger]":
        """A logger whose records carry job_id, kind, queue, attempt and runner, and no secrets of the args.

        With ``keep_logs`` of the worker or the runner, its last 64 kB from INFO on are stored with the outcome, in
        River's metadata key ``river:log``.
        """
        if self._log is None:
            self._log = JobLog(self.row, self.redact, self.logs_since)
        return self._log

    def redact(self, text: str) -> str:
        """*text* with ``***`` for the values of redacted args fields: for whoever sends the text of an error, or of a
        log, elsewhere.

        A value of fewer than four characters is hidden where it stands alone.
        """
        if self._hide is None:
            self._hide = redact.hider(type(self.args), self.row.args, self.args) or str
        return self._hide(text)

    @property
    def cancelled(self) -> Cancelled:
        """Set when this attempt should end soon; a handler that runs long looks at it, or waits on it instead of
        sleeping.
        """
        # Made when first looked at: an Event costs more than all else that a short job needs.
        with _lock:
            if self._cancelled is None:
                self._cancelled = Cancelled()
                if self._reason is not None:
                    self._cancelled.reason = self._reason
                    self._cancelled.set()
            return self._cancelled

    def interrupt(self) -> None:
        """End an async handler where it awaits; nothing can do that to a plain one."""

    def __repr__(self) -> str:
        return f"<job {self.id} {one_line(self.kind)} attempt {self.attempt}>"


def cancel_context(job: JobContext[Any], reason: CancelReason) -> None:
    """Tell *job*'s handler to end soon; an async one gets CancelledError. The first reason stands, but the runner's
    stop comes on top of it.
    """
    with _lock:
        news = job._reason is None or (reason == "stop" and job._reason != "stop")
        if job._reason is None:
            job._reason = reason
            if job._cancelled is not None:
                job._cancelled.reason = reason
                job._cancelled.set()
    if news:
        with suppress(RuntimeError):  # its event loop is closed
            job.interrupt()


def cancel_reason(job: JobContext[Any]) -> CancelReason | None:
    """Why *job* was told to end, if it was."""
    return job._reason


def staged_metadata(job: JobContext[Any]) -> str | None:
    """What the handler assigned to the metadata, as JSON text, if anything; and its log, if that is kept."""
    if job._log is not None and job.logs_since is not None:
        text = job._log.kept()
        if text is not None:
            job.metadata.add_log(job.attempt, text)
    return None if job._metadata is None else job._metadata.staged
