"""Execute: call user code. Knows no SQL, catches everything, and always hands on a Result."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, cast

from sqla_river import failure, redact, states
from sqla_river.args import Codec
from sqla_river.context import JobContext, cancel_context, cancel_reason, staged_metadata
from sqla_river.hooks import WORK_EVERYWHERE, Around, ErrorHandler, WorkMiddleware
from sqla_river.logs import Log, of_job, one_line
from sqla_river.outcomes import LONGEST_DELAY, Cancel, Snooze
from sqla_river.policy import RIVER_POLICY, Exponential, RiverPolicy
from sqla_river.rows import JobRow, Result
from sqla_river.states import AttemptError, JobState, Transition
from sqla_river.workers import Retry, Worker, Workers

log: Final = Log(__name__)

_OURS: Final = (Exponential, RiverPolicy)


class Unit(Protocol):
    """A transactional attempt: its session, and the way to commit it together with the job."""

    session: Any

    def settle(self, session: Any, transition: Transition) -> JobState: ...


class Scope(Protocol):
    """Opens units; what is not settled when one is left is rolled back."""

    unknown: type[BaseException]
    no_failure: tuple[type[BaseException], ...]

    def open(self, row: JobRow) -> AbstractContextManager[Unit]: ...
    def open_async(self, row: JobRow) -> AbstractAsyncContextManager[Unit]: ...
    def resolve(self, row: JobRow) -> JobState | None: ...


class Executor:
    """Decodes, calls the handler, and judges what came of it.

    Args:
        workers: the handlers.
        codec: decodes the args of a job for its class.
        retry: for workers that have no policy of their own.
        timeout: likewise; None is no timeout.
        watch: told of each job that has a timeout when its handler starts (seconds).
        scope: for transactional workers.
        progressed: told of each progress.
        middleware: around every call, the first outermost.
        around: entered before all else of an attempt, its session too, and left when it is settled.
        on_error: asked after each failure; it may answer Cancel.
        keep_logs: for workers that do not say whether what ``job.log`` says is kept with the job.
        log_args: whether the record of a failure carries the args, with ``***`` for redacted fields, as ``job_args``.
    """

    def __init__(
        self,
        workers: Workers,
        codec: Codec,
        *,
        retry: Retry | None,
        timeout: timedelta | None,
        watch: Callable[[JobContext[Any], float], None],
        scope: Scope,
        progressed: Callable[[JobContext[Any]], object] | None = None,
        middleware: Sequence[WorkMiddleware] = (),
        around: Around | None = None,
        on_error: ErrorHandler | None = None,
        keep_logs: bool = False,
        log_args: bool = False,
    ) -> None:
        self._workers = workers
        self._codec = codec
        self._retry = retry if retry is not None else RIVER_POLICY
        self._timeout = timeout
        self._watch = watch
        self._scope = scope
        self._progressed = progressed
        self._middleware = tuple(middleware)
        self._around: Around = nullcontext if around is None else lambda: _Surroundings(around())
        self._on_error = on_error
        self._keep_logs = keep_logs
        self._log_args = log_args
        self._interrupted = False
        self._cancelled: set[int] = set()
        self.running: dict[int, JobContext[Any]] = {}
        """The jobs whose handler runs now, by id."""

    def interrupt(self) -> None:
        """Tell all handlers, and those that begin from now on, that the runner stops."""
        self._interrupted = True
        for job in list(self.running.values()):
            cancel_context(job, "stop")

    def cancel(self, job_id: int) -> None:
        """Tell the handler of this job that somebody asked to cancel it; if it has yet to begin, as soon as it does."""
        self._cancelled.add(job_id)  # first: what begins in between looks there
        job = self.running.get(job_id)
        if job is not None:
            cancel_context(job, "cancel")

    def is_async(self, row: JobRow) -> bool:
        """Whether *row* belongs on the event loop."""
        worker = self._workers.get(row.kind)
        return worker is not None and worker.is_async

    def execute(self, row: JobRow) -> Result:
        """One attempt at *row*, in this thread. Never raises."""
        attempt = _Attempt(row)
        try:
            with self._around():
                worker = self._begin(attempt)
                if attempt.transition is None:
                    if worker.transactional:
                        with self._scope.open(row) as unit:
                            self._start(worker, attempt)
                            transition = self._wished(attempt, self._chain(worker)(attempt.job, unit.session))
                            attempt.transition = transition
                            attempt.settled = unit.settle(unit.session, transition)
                    else:
                        self._start(worker, attempt)
                        attempt.transition = self._wished(attempt, self._chain(worker)(attempt.job))
        except BaseException as error:  # noqa: BLE001 - SystemExit, KeyboardInterrupt and worse end an attempt, never a slot
            if isinstance(error, self._scope.unknown):
                attempt.settled = self._scope.resolve(row)
            self._failed(attempt, error)
        return self._end(attempt)

    async def execute_async(self, row: JobRow) -> Result:
        """One attempt at *row*, on the running event loop. Never raises."""
        attempt = _Attempt(row)
        try:
            with self._around():
                worker = self._begin(attempt)
                if attempt.transition is None:
                    if worker.transactional:
                        async with self._scope.open_async(row) as unit:
                            transition = self._wished(attempt, await self._call(worker, attempt, unit.session))
                            attempt.transition = transition
                            attempt.settled = await unit.session.run_sync(unit.settle, transition)
                    else:
                        attempt.transition = self._wished(attempt, await self._call(worker, attempt))
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, self._scope.unknown):
                attempt.settled = await asyncio.to_thread(self._scope.resolve, row)
            if self._asks(attempt.worker):  # what it asks is the user's, and may take its time: not here
                await asyncio.to_thread(self._failed, attempt, error)
            else:
                self._failed(attempt, error)
        return self._end(attempt)

    # ---- the steps of an attempt ------------------------------------------------------------

    def _begin(self, attempt: "_Attempt") -> Worker:
        row = attempt.row
        worker = self._workers.get(row.kind)
        if worker is None:
            raise LookupError(f"kind {row.kind!r} has no worker here")
        attempt.worker = worker
        if row.expired:
            attempt.transition = states.cancelled(
                AttemptError(row.attempt, "expired: it was fetched later than its expiry")
            )
        else:
            attempt.job = job = JobContext(row, self._codec.decode(worker.args_type, row.args))
            job.tell = self._progressed
            if self._keep_logs if worker.keep_logs is None else worker.keep_logs:
                job.logs_since = attempt.began
        return worker

    def _start(self, worker: Worker, attempt: "_Attempt") -> None:
        """The clock of the timeout runs from here: what a job waited for a connection is not its own time."""
        job = attempt.job
        self.running[job.id] = job
        if self._interrupted:
            cancel_context(job, "stop")
        elif job.id in self._cancelled:
            cancel_context(job, "cancel")
        timeout = worker.timeout or self._timeout
        if timeout is not None:
            self._watch(job, timeout.total_seconds())

    async def _call(self, worker: Worker, attempt: "_Attempt", *session: Any) -> object:
        """Await the handler in a task of its own, so that cancelling it never reaches what is around it."""
        job = attempt.job
        loop = asyncio.get_running_loop()
        task = loop.create_task(
            _awaited(self._chain(worker), job, *session), name=f"job {job.id} ({one_line(job.kind)})"
        )
        job.interrupt = lambda: loop.call_soon_threadsafe(task.cancel)
        self._start(worker, attempt)
        try:
            outcome = await task
        finally:
            job.interrupt = None
        if isinstance(outcome, _Exit):
            raise outcome.error
        return outcome

    def _chain(self, worker: Worker) -> Callable[..., Any]:
        around = (*WORK_EVERYWHERE, *self._middleware) if WORK_EVERYWHERE else self._middleware
        if not around:
            return worker.handler
        handler = worker.handler

        def call(job: JobContext[Any], *session: Any) -> Any:
            def innermost(job: JobContext[Any]) -> Any:
                return handler(job, *session)

            next_: Callable[[JobContext[Any]], Any] = innermost
            for middleware in reversed(around):
                next_ = _around(middleware, next_)
            return next_(job)

        return call

    def _wished(self, attempt: "_Attempt", outcome: object) -> Transition:
        """The row change for what a handler returned."""
        metadata = staged_metadata(attempt.job)
        if outcome is None:
            return states.completed(metadata)
        return _wish(attempt.row.attempt, outcome, metadata, attempt.job.redact)

    def _failed(self, attempt: "_Attempt", error: BaseException) -> None:
        row = attempt.row
        if attempt.settled is not None:  # it is committed: what came after that is no matter of the job's
            said = failure.message_of(error, _hides(attempt.worker, row, attempt.job_or_none))
            log.warning("job %d (%s) is settled, in spite of %s", row.id, row.kind, said, **of_job(row))
        elif isinstance(error, self._scope.no_failure):
            attempt.error = error
            attempt.transition = states.interrupted()
        else:
            attempt.error = error
            attempt.transition = self._judge(attempt.worker, row, attempt.job_or_none, error)

    def _end(self, attempt: "_Attempt") -> Result:
        job = attempt.job_or_none
        if job is not None and self.running.get(job.id) is job:  # a later attempt may stand there
            del self.running[job.id]
        self._cancelled.discard(attempt.row.id)
        assert attempt.transition is not None
        seconds = time.monotonic() - attempt.began
        return Result(attempt.row, attempt.transition, seconds, attempt.settled, attempt.error)

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

    # ---- judging a failure ------------------------------------------------------------

    def _judge(
        self, worker: Worker | None, row: JobRow, job: JobContext[Any] | None, error: BaseException
    ) -> Transition:
        """The row change that *error* asks for, whatever else goes wrong on the way."""
        hide = _hides(worker, row, job)
        try:
            metadata = staged_metadata(job) if job is not None else None
            if isinstance(error, Snooze | Cancel):
                return _wish(row.attempt, error, metadata, hide)
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
            wish = self._ask(worker, row, job, error)
            if isinstance(wish, Cancel):
                return states.cancelled(_cancel_error(row.attempt, wish, hide, said.trace), metadata)
            if row.attempt >= row.max_attempts:
                return states.discarded(said, metadata)
            return states.errored(said, wish, metadata)
        except BaseException as second:  # noqa: BLE001 - judging must not fail either
            return states.errored(failure.attempt_error(row.attempt, second, hide), RIVER_POLICY.delay(row.attempt))

    def _args_of(self, worker: Worker | None, row: JobRow) -> dict[str, object]:
        if not self._log_args or worker is None:
            return {}
        return {"job_args": one_line(redact.shown_args(worker.args_type, row.args))}

    def _asks(self, worker: Worker | None) -> bool:
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
            said = failure.message_of(second, _hides(worker, row, job))
            log.warning("the retry policy of kind %r failed, River's is used: %s", row.kind, said, **of_job(row))
            return RIVER_POLICY.delay(row.attempt)

    def _answer(self, job: JobContext[Any], error: BaseException) -> object:
        try:
            return self._on_error(job, error) if self._on_error is not None else None
        except BaseException as second:  # noqa: BLE001 - nor must the error handler
            said = failure.message_of(second, job.redact)
            log.warning("the error handler failed for job %d: %s", job.id, said, **of_job(job.row))
            return None


class _Attempt:
    """What is known of one attempt while it runs."""

    __slots__ = ("began", "error", "job_or_none", "row", "settled", "transition", "worker")

    def __init__(self, row: JobRow) -> None:
        self.row = row
        self.began = time.monotonic()
        self.worker: Worker | None = None
        self.job_or_none: JobContext[Any] | None = None
        self.transition: Transition | None = None
        self.settled: JobState | None = None
        self.error: BaseException | None = None

    @property
    def job(self) -> JobContext[Any]:
        assert self.job_or_none is not None
        return self.job_or_none

    @job.setter
    def job(self, job: JobContext[Any]) -> None:
        self.job_or_none = job


class _Surroundings:
    """A context manager that swallows no error, whatever the one inside it would: an attempt that failed has failed."""

    __slots__ = ("_inner",)

    def __init__(self, inner: AbstractContextManager[object]) -> None:
        self._inner = inner

    def __enter__(self) -> None:
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)


class _Exit(NamedTuple):
    """A SystemExit, KeyboardInterrupt or GeneratorExit of a handler: they would end the loop, or all who await."""

    error: BaseException


async def _awaited(call: Callable[..., Any], job: JobContext[Any], *session: Any) -> object:
    try:
        outcome = call(job, *session)
        return await cast("Awaitable[object]", outcome) if isinstance(outcome, Awaitable) else outcome
    except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
        return _Exit(error)


def _around(middleware: WorkMiddleware, next_: Callable[[JobContext[Any]], Any]) -> Callable[[JobContext[Any]], Any]:
    return lambda job: middleware.work(job, next_)


def _hides(worker: Worker | None, row: JobRow, job: JobContext[Any] | None) -> Callable[[str], str]:
    """What takes the secrets of a job out of a text."""
    if job is not None:
        return job.redact
    return (redact.hider(worker.args_type, row.args) if worker is not None else None) or str


def _wish(attempt: int, outcome: object, metadata: str | None, hide: Callable[[str], str]) -> Transition:
    """The row change for what a handler returned or raised as its wish."""
    if isinstance(outcome, Snooze):
        return states.snoozed(outcome.delay, metadata)
    if isinstance(outcome, Cancel):
        return states.cancelled(_cancel_error(attempt, outcome, hide), metadata)
    raise TypeError(f"a handler returns None, Snooze(...) or Cancel(...), this one returned {type(outcome).__name__}")


def _cancel_error(attempt: int, cancel: Cancel, hide: Callable[[str], str], trace: str = "") -> AttemptError:
    return AttemptError(attempt, failure.storable(f"JobCancelError: {hide(str(cancel.reason))}", 2_000), trace)
