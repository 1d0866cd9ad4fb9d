"""Execute: call user code. Knows no SQL, catches everything, and always hands on a Result."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, cast

from sqla_river import failure, states
from sqla_river.args import Codec
from sqla_river.context import JobContext, cancel_context, staged_metadata
from sqla_river.hooks import WORK_EVERYWHERE, Around, WorkMiddleware
from sqla_river.judge import Judge, hides, wish
from sqla_river.logs import Log, of_job, one_line
from sqla_river.rows import JobRow, Result
from sqla_river.states import AttemptError, JobState, Transition
from sqla_river.workers import Worker, Workers

log: Final = Log(__name__)

_NOTHING: Final = nullcontext()


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
        judge: of what failed.
        timeout: for workers that have none of their own; None is no timeout.
        watch: told of each job that has a timeout when its handler starts (seconds).
        scope: for transactional workers.
        progressed: told of each progress.
        middleware: around every call, the first outermost.
        around: entered before all else of an attempt, its session too, and left when it is settled.
        keep_logs: for workers that do not say whether what ``job.log`` says is kept with the job.
    """

    def __init__(
        self,
        workers: Workers,
        codec: Codec,
        judge: Judge,
        *,
        timeout: timedelta | None,
        watch: Callable[[JobContext[Any], float], None],
        scope: Scope,
        progressed: Callable[[JobContext[Any]], object] | None = None,
        middleware: Sequence[WorkMiddleware] = (),
        around: Around | None = None,
        keep_logs: bool = False,
    ) -> None:
        self._workers = workers
        self._codec = codec
        self.judge: Final = judge
        self._timeout = timeout
        self._watch = watch
        self._scope = scope
        self._progressed = progressed
        self._middleware = tuple(middleware)
        self._around: Around | None = None if around is None else lambda: _Surroundings(around())
        self._keep_logs = keep_logs
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

    def is_async(self, kind: str) -> bool:
        """Whether jobs of *kind* belong on the event loop."""
        worker = self._workers.get(kind)
        return worker is not None and worker.is_async

    def execute(self, row: JobRow) -> Result:
        """One attempt at *row*, in this thread. Never raises."""
        attempt = _Attempt(row)
        try:
            with self._around() if self._around is not None else _NOTHING:
                self._work(attempt)
        except BaseException as error:  # noqa: BLE001 - SystemExit, KeyboardInterrupt and worse end an attempt, never a slot
            if isinstance(error, self._scope.unknown):
                attempt.settled = self._scope.resolve(row)
            self._failed(attempt, error)
        return self._end(attempt)

    def _work(self, attempt: "_Attempt") -> None:
        worker = self._begin(attempt)
        if attempt.transition is not None:
            return
        if worker.transactional:
            with self._scope.open(attempt.row) as unit:
                self._start(worker, attempt)
                transition = self._wished(attempt, self._chain(worker)(attempt.job, unit.session))
                attempt.transition = transition
                attempt.settled = unit.settle(unit.session, transition)
        else:
            self._start(worker, attempt)
            attempt.transition = self._wished(attempt, self._chain(worker)(attempt.job))

    async def execute_async(self, row: JobRow) -> Result:
        """One attempt at *row*, in a task of its own on the running event loop. Never raises."""
        attempt = _Attempt(row)
        try:
            with self._around() if self._around is not None else _NOTHING:
                worker = self._begin(attempt)
                if attempt.transition is not None:
                    pass
                elif worker.transactional:
                    async with self._scope.open_async(row) as unit:
                        transition = self._wished(attempt, await self._call_apart(worker, attempt, unit.session))
                        attempt.transition = transition
                        attempt.settled = await unit.session.run_sync(unit.settle, transition)
                else:
                    job = attempt.job
                    interruption = job.interrupt = _Interruption(asyncio.current_task())
                    try:
                        self._start(worker, attempt)
                        outcome = self._chain(worker)(job)
                        if isinstance(outcome, Awaitable):
                            outcome = await cast("Awaitable[object]", outcome)
                    finally:
                        interruption.over()
                    attempt.transition = self._wished(attempt, outcome)
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, self._scope.unknown):
                attempt.settled = await asyncio.to_thread(self._scope.resolve, row)
            if self.judge.asks(attempt.worker):  # what it asks is the user's, and may take its time: not here
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
        job_id = attempt.row.id
        self.running[job_id] = job
        if self._interrupted:
            cancel_context(job, "stop")
        elif job_id in self._cancelled:
            cancel_context(job, "cancel")
        timeout = worker.timeout or self._timeout
        if timeout is not None:
            self._watch(job, timeout.total_seconds())

    async def _call_apart(self, worker: Worker, attempt: "_Attempt", *session: Any) -> object:
        """Await the handler in a task of its own: whatever it does to that, what commits its work goes on."""
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
        handler = worker.handler
        if not (WORK_EVERYWHERE or self._middleware):
            return handler
        around = (*WORK_EVERYWHERE, *self._middleware)

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
        return wish(attempt.row.attempt, outcome, metadata, attempt.job.redact)

    def _failed(self, attempt: "_Attempt", error: BaseException) -> None:
        row = attempt.row
        if attempt.settled is not None:  # it is committed: what came after that is no matter of the job's
            said = failure.message_of(error, hides(attempt.worker, row, attempt.job_or_none))
            log.warning("job %d (%s) is settled, in spite of %s", row.id, row.kind, said, **of_job(row))
        elif isinstance(error, self._scope.no_failure):
            attempt.error = error
            attempt.transition = states.interrupted()
        else:
            attempt.error = error
            attempt.transition = self.judge.judge(attempt.worker, row, attempt.job_or_none, error)

    def _end(self, attempt: "_Attempt") -> Result:
        job = attempt.job_or_none
        job_id = attempt.row.id
        if job is not None and self.running.get(job_id) is job:  # a later attempt may stand there
            del self.running[job_id]
        if self._cancelled:
            self._cancelled.discard(job_id)
        assert attempt.transition is not None
        seconds = time.monotonic() - attempt.began
        return Result(attempt.row, attempt.transition, seconds, attempt.settled, attempt.error)


class _Attempt:
    """What is known of one attempt while it runs. What most attempts leave as it is stands in the class."""

    worker: Worker | None = None
    job_or_none: JobContext[Any] | None = None
    transition: Transition | None = None
    settled: JobState | None = None
    error: BaseException | None = None

    def __init__(self, row: JobRow) -> None:
        self.row = row
        self.began = time.monotonic()

    @property
    def job(self) -> JobContext[Any]:
        assert self.job_or_none is not None
        return self.job_or_none

    @job.setter
    def job(self, job: JobContext[Any]) -> None:
        self.job_or_none = job


class _Interruption:
    """Cancels the task of an async handler, for as long as the handler runs: never what comes after it."""

    __slots__ = ("_on", "_task", "_told")

    def __init__(self, task: "asyncio.Task[Any] | None") -> None:
        assert task is not None
        self._task = task
        self._on = True
        self._told = 0

    def __call__(self) -> None:
        """Let the handler have a CancelledError where it awaits. From any thread."""
        self._task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._on:
            self._told += self._task.cancel()

    def over(self) -> None:
        """The handler has come to its end."""
        self._on = False
        for _ in range(self._told):
            self._task.uncancel()


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
