"""Execute: call user code. Knows no SQL, catches everything, and always hands on a Result."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Final

from sqla_river import failure, states
from sqla_river.args import Codec
from sqla_river.context import CancelReason, JobContext, cancel_context, cancel_reason, staged_metadata
from sqla_river.outcomes import LONGEST_DELAY, Cancel, Snooze
from sqla_river.policy import RIVER_POLICY
from sqla_river.rows import JobRow, Result
from sqla_river.states import AttemptError, Transition
from sqla_river.workers import Retry, Worker, Workers

log: Final = logging.getLogger(__name__)


class Executor:
    """Decodes, calls the handler, and judges what came of it.

    Args:
        workers: the handlers.
        codec: decodes the args of a job for its class.
        retry: for workers that have no policy of their own.
        timeout: likewise; None is no timeout.
        watch: told of each job that has a timeout when its handler starts (seconds).
    """

    def __init__(
        self,
        workers: Workers,
        codec: Codec,
        *,
        retry: Retry | None,
        timeout: timedelta | None,
        watch: Callable[[JobContext[Any], float], None],
    ) -> None:
        self._workers = workers
        self._codec = codec
        self._retry = retry if retry is not None else RIVER_POLICY
        self._timeout = timeout
        self._watch = watch
        self.running: dict[int, JobContext[Any]] = {}
        """The jobs whose handler runs now, by id."""

    def execute(self, row: JobRow) -> Result:
        """One attempt at *row*. Never raises."""
        began = time.monotonic()
        job: JobContext[Any] | None = None
        worker = self._workers.get(row.kind)
        try:
            if worker is None:
                raise LookupError(f"kind {row.kind!r} has no worker here")
            job = JobContext(row, self._codec.decode(worker.args_type, row.args))
            transition = self._call(worker, job)
        except BaseException as error:  # noqa: BLE001 - SystemExit, KeyboardInterrupt and worse end an attempt, never a slot
            transition = self._judge(worker, row, job, error)
        finally:
            self.running.pop(row.id, None)
        return Result(row, transition, time.monotonic() - began)

    def _call(self, worker: Worker, job: JobContext[Any]) -> Transition:
        timeout = worker.timeout or self._timeout
        self.running[job.id] = job
        if timeout is not None:
            self._watch(job, timeout.total_seconds())
        outcome = worker.handler(job)
        metadata = staged_metadata(job)
        if outcome is None:
            return states.completed(metadata)
        return _wished(job.attempt, outcome, metadata)

    def _judge(self, worker: Worker | None, row: JobRow, job: JobContext[Any] | None, error: BaseException) -> Transition:
        """The row change that *error* asks for, whatever else goes wrong on the way."""
        try:
            metadata = staged_metadata(job) if job is not None else None
            if isinstance(error, Snooze | Cancel):
                return _wished(row.attempt, error, metadata)
            if job is not None and cancel_reason(job) == "stop":
                return states.interrupted(metadata)
            said = failure.attempt_error(row.attempt, error)
            if job is not None and cancel_reason(job) == "cancel":
                return states.cancelled(said, metadata)
            log.warning("job %d (%s) failed in attempt %d of %d: %s", row.id, row.kind, row.attempt, row.max_attempts, said.error)
            if row.attempt >= row.max_attempts:
                return states.discarded(said, metadata)
            delay = self._delay(worker, row, job, error)
            if isinstance(delay, Cancel):
                return states.cancelled(AttemptError(row.attempt, failure.storable(delay.reason, 2_000), said.trace), metadata)
            return states.errored(said, delay, metadata)
        except BaseException as second:  # noqa: BLE001 - judging must not fail either
            return states.errored(failure.attempt_error(row.attempt, second), RIVER_POLICY.delay(row.attempt))

    def _delay(self, worker: Worker | None, row: JobRow, job: JobContext[Any] | None, error: BaseException) -> timedelta | Cancel:
        retry = (worker.retry if worker is not None else None) or self._retry
        try:
            if hasattr(retry, "delay"):
                delay: timedelta | Cancel = retry.delay(row.attempt)
            elif job is None:
                return RIVER_POLICY.delay(row.attempt)  # args that do not decode: there is nothing to ask a callable about
            else:
                job.error = error
                delay = retry(job)
            return delay if isinstance(delay, Cancel) else min(max(delay, timedelta(0)), LONGEST_DELAY)
        except BaseException as second:  # noqa: BLE001 - the policy must not hide what ended the attempt
            log.warning("the retry policy of kind %r failed, River's is used: %s", row.kind, failure.message_of(second))
            return RIVER_POLICY.delay(row.attempt)


def _wished(attempt: int, outcome: object, metadata: str | None) -> Transition:
    """The row change for what a handler returned or raised as its wish."""
    if isinstance(outcome, Snooze):
        return states.snoozed(outcome.delay, metadata)
    if isinstance(outcome, Cancel):
        return states.cancelled(AttemptError(attempt, failure.storable(f"JobCancelError: {outcome.reason}", 2_000)), metadata)
    raise TypeError(f"a handler returns None, Snooze(...) or Cancel(...), this one returned {type(outcome).__name__}")


class Slots:
    """The threads that execute, as many as the runner has slots; made when first needed."""

    def __init__(self, size: int, execute: Callable[[JobRow], Result], finished: Callable[[Result], None], name: str) -> None:
        self._size = size
        self._execute = execute
        self._finished = finished
        self._name = name
        self._waiting: SimpleQueue[JobRow | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def deliver(self, rows: Iterable[JobRow]) -> None:
        """Hand *rows* over. Called by one thread only, never with more than there are free slots."""
        count = 0
        for row in rows:
            self._waiting.put(row)
            count += 1
        for _ in range(min(count, self._size - len(self._threads))):
            thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def take_back(self) -> list[JobRow]:
        """The rows that no slot has begun."""
        rows: list[JobRow] = []
        while True:
            try:
                row = self._waiting.get_nowait()
            except Empty:
                return rows
            if row is not None:
                rows.append(row)

    def put_back(self, rows: Iterable[JobRow]) -> None:
        """Return what `take_back` took."""
        for row in rows:
            self._waiting.put(row)

    def stop(self) -> None:
        """Let each thread end after what it is doing."""
        for _ in self._threads:
            self._waiting.put(None)

    def _run(self) -> None:
        while (row := self._waiting.get()) is not None:
            self._finished(self._execute(row))


class Watch:
    """Sets ``job.cancelled`` when a timeout is over. `step` is what its thread repeats; only jobs with a timeout wake it."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._next = math.inf

    def add(self, job: JobContext[Any], seconds: float) -> None:
        """Give *job* so many seconds from now."""
        job.deadline = time.monotonic() + seconds
        if job.deadline < self._next:
            self._next = job.deadline
            self._wake()

    def step(self, running: dict[int, JobContext[Any]]) -> float:
        """Cancel what is over its time; seconds until the next look."""
        self._next = math.inf  # before the look: who is added meanwhile wakes the next one
        now = time.monotonic()
        soonest = math.inf
        for job in list(running.values()):
            if job.deadline <= now:
                job.deadline = math.inf
                log.warning("job %d (%s) is over its timeout", job.id, job.kind)
                cancel_context(job, "timeout")
            soonest = min(soonest, job.deadline)
        self._next = min(self._next, soonest)
        return min(60.0, max(self._next - time.monotonic(), 0.0))


def interrupt(running: dict[int, JobContext[Any]], reason: CancelReason) -> None:
    """Tell every running handler to end soon."""
    for job in list(running.values()):
        cancel_context(job, reason)
