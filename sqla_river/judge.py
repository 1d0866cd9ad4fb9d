"""Judge: which row change an attempt asks for that did not simply come to its end."""

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from sqla_river import failure, redact, states
from sqla_river.context import JobContext, cancel_reason, staged_metadata
from sqla_river.hooks import ErrorHandler
from sqla_river.logs import Log, of_job, one_line
from sqla_river.outcomes import LONGEST_DELAY, Cancel, Snooze
from sqla_river.policy import RIVER_POLICY, Exponential, RiverPolicy
from sqla_river.rows import JobRow
from sqla_river.states import AttemptError, Transition
from sqla_river.workers import Retry, Worker, Workers

log: Final = Log(__name__)

_OURS: Final = (Exponential, RiverPolicy)


class Judge:
    """Makes row changes of failures, whatever else goes wrong on the way.

    Args:
        workers: the handlers.
        retry: for workers that have no policy of their own.
        on_error: asked after each failure; it may answer Cancel.
        log_args: whether the record of a failure carries the args, with ``***`` for redacted fields, as ``job_args``.
    """

    def __init__(
        self,
        workers: Workers,
        *,
        retry: Retry | None = None,
        on_error: ErrorHandler | None = None,
        log_args: bool = False,
    ) -> None:
        self._workers = workers
        self._retry = retry if retry is not None else RIVER_POLICY
        self._on_error = on_error
        self._log_args = log_args

    def judge(
        self, worker: Worker | None, row: JobRow, job: JobContext[Any] | None, error: BaseException
    ) -> Transition:
        """The row change that *error* asks for, whatever else goes wrong on the way."""
        hide = hides(worker, row, job)
        try:
            metadata = staged_metadata(job) if job is not None else None
            if isinstance(error, Snooze | Cancel):
                return wish(row.attempt, error, metadata, hide)
            reason = cancel_reason(job) if job is not None else None
            if reason == "stop":
                return states.interrupted(metadata)
            said = failure.attempt_error(row.attempt, error, hide)
            if reason == "timeout" and isinstance(error, asyncio.CancelledError):
                said = AttemptError(
                    row.attempt, "TimeoutError: the handler was cancelled, it was over its timeout", said.trace
                )
            if reason == "cancel":
                return states.cancelled(said, metadata)
            log.warning(
                "job %d (%s) failed in attempt %d of %d: %s",
                row.id,
                row.kind,
                row.attempt,
                row.max_attempts,
                said.error,
                **of_job(row),
                **self._args_of(worker, row),
            )
            answer = self._ask(worker, row, job, error)
            if isinstance(answer, Cancel):
                return states.cancelled(cancel_error(row.attempt, answer, hide, said.trace), metadata)
            if row.attempt >= row.max_attempts:
                return states.discarded(said, metadata)
            return states.errored(said, answer, metadata)
        except BaseException as second:  # noqa: BLE001 - judging must not fail either
            said = failure.attempt_error(row.attempt, second, hide)
            if row.attempt >= row.max_attempts:
                return states.discarded(said)
            return states.errored(said, RIVER_POLICY.delay(row.attempt))

    def _args_of(self, worker: Worker | None, row: JobRow) -> dict[str, object]:
        if not self._log_args or worker is None:
            return {}
        return {"job_args": one_line(redact.shown_args(worker.args_type, row.args))}

    def asks(self, worker: Worker | None) -> bool:
        """Whether a failure is put before code of the user's."""
        retry = (worker.retry if worker is not None else None) or self._retry
        return self._on_error is not None or not isinstance(retry, _OURS)

    def _ask(
        self, worker: Worker | None, row: JobRow, job: JobContext[Any] | None, error: BaseException
    ) -> timedelta | Cancel:
        """What the error handler and the retry policy make of *error*."""
        retry = (worker.retry if worker is not None else None) or self._retry
        if job is not None:
            job.error = error
            answer = self._answer(job, error)
            if isinstance(answer, Cancel):
                return answer
        try:
            policy: Any = getattr(retry, "delay", None)
            if policy is None and job is None:
                return RIVER_POLICY.delay(
                    row.attempt
                )  # args that do not decode: there is nothing to ask a callable about
            asked: Any = retry
            delay: Any = policy(row.attempt) if policy is not None else asked(job)
            return delay if isinstance(delay, Cancel) else min(max(delay, timedelta(0)), LONGEST_DELAY)
        except BaseException as second:  # noqa: BLE001 - the policy must not hide what ended the attempt
            said = failure.message_of(second, hides(worker, row, job))
            log.warning("the retry policy of kind %r failed, River's is used: %s", row.kind, said, **of_job(row))
            return RIVER_POLICY.delay(row.attempt)

    def _answer(self, job: JobContext[Any], error: BaseException) -> object:
        try:
            return self._on_error(job, error) if self._on_error is not None else None
        except BaseException as second:  # noqa: BLE001 - nor must the error handler
            said = failure.message_of(second, job.redact)
            log.warning("the error handler failed for job %d: %s", job.id, said, **of_job(job.row))
            return None

    def give_up(self, job: JobContext[Any], stack: str) -> Transition:
        """The row change for a job whose handler ignores its timeout; *stack* says where it hangs. Asks no code of the
        user's.
        """
        row = job.row
        error = AttemptError(
            row.attempt,
            "TimeoutError: the handler ignored its timeout and was given up",
            failure.storable(stack, 8_000),
        )
        if row.attempt >= row.max_attempts:
            return states.discarded(error, staged_metadata(job))
        worker = self._workers.get(row.kind)
        retry = (worker.retry if worker is not None else None) or self._retry
        policy = retry if isinstance(retry, _OURS) else RIVER_POLICY
        return states.errored(error, policy.delay(row.attempt), staged_metadata(job))


def hides(worker: Worker | None, row: JobRow, job: JobContext[Any] | None) -> Callable[[str], str]:
    """What takes the secrets of a job out of a text."""
    if job is not None:
        return job.redact
    return (redact.hider(worker.args_type, row.args) if worker is not None else None) or str


def wish(attempt: int, outcome: object, metadata: str | None, hide: Callable[[str], str]) -> Transition:
    """The row change for what a handler returned or raised as its wish."""
    if isinstance(outcome, Snooze):
        return states.snoozed(outcome.delay, metadata)
    if isinstance(outcome, Cancel):
        return states.cancelled(cancel_error(attempt, outcome, hide), metadata)
    raise TypeError(f"a handler returns None, Snooze(...) or Cancel(...), this one returned {type(outcome).__name__}")


def cancel_error(attempt: int, cancel: Cancel, hide: Callable[[str], str], trace: str = "") -> AttemptError:
    return AttemptError(attempt, failure.storable(f"JobCancelError: {hide(str(cancel.reason))}", 2_000), trace)
