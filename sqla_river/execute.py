"""Execute: call user code. Knows no SQL, and catches everything."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from types import CoroutineType, TracebackType
from typing import Any, Final, NamedTuple, Protocol, cast

from sqla_river import failure, states
from sqla_river.args import CattrsCodec, Codec
from sqla_river.aside import Aside
from sqla_river.context import JobContext, cancel_context, staged_metadata
from sqla_river.hooks import WORK_EVERYWHERE, Around, Audience, WorkMiddleware
from sqla_river.judge import Judge, hides, wish
from sqla_river.logs import Log, of_job, one_line
from sqla_river.rows import ID, TOKEN, Fetched, JobRow, Result, row_of
from sqla_river.states import AttemptError, JobState, Transition
from sqla_river.workers import Worker, Workers

log: Final = Log(__name__)

_COMPLETED: Final = states.completed()
_NOTHING: Final = nullcontext()
_AWAITED: Final = (CoroutineType, Awaitable)
"""The first is known at a glance."""
_result: Final[Callable[[type[Result], tuple[Any, ...]], Result]] = cast("Any", tuple).__new__
"""Without the detour of a NamedTuple's own: half the time."""


class Unit(Protocol):
    """A transactional attempt: its session, and the way to commit it together with the job."""

    session: Any
    follows: bool

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
        audience: where it is empty, no Result is made of a job that just completed; without one always.
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
        audience: Audience | None = None,
    ) -> None:
        self._workers = workers
        self._codec = codec
        self.judge: Final = judge
        self._seconds = None if timeout is None else timeout.total_seconds()
        self._watch = watch
        self._scope = scope
        self._progressed = progressed
        self._middleware = tuple(middleware)
        self._around: Around | None = None if around is None else lambda: _Surroundings(around())
        self._keep_logs = keep_logs
        self._audience = audience
        self._aside = Aside("sqla_river-judge")
        self._interrupted = False
        self._cancelled: set[tuple[int, str]] = set()
        """Id and token: a job may be given back, and begin here again under another one."""
        self.running: dict[int, JobContext[Any]] = {}
        """The jobs whose handler runs now, by the identity of the attempt: a job may be fetched again while an earlier
        attempt at it still hangs here.
        """

    def prepare(self) -> None:
        """Compile what decodes the args of each worker: no job need wait for that."""
        if isinstance(self._codec, CattrsCodec):
            for worker in self._workers:
                self._codec.prepare(worker.args_type)

    def interrupt(self) -> None:
        """Tell all handlers, and those that begin from now on, that the runner stops."""
        self._interrupted = True
        for job in list(self.running.values()):
            cancel_context(job, "stop")

    def cancel(self, fetched: Fetched) -> None:
        """Tell the handler of this job that somebody asked to cancel it; if it has yet to begin, as soon as it does."""
        self._cancelled.add((fetched[ID], fetched[TOKEN]))  # first: what begins in between looks there
        for attempt in list(self.running.values()):
            if attempt.row == fetched:
                cancel_context(attempt, "cancel")

    def forget(self, fetched: Fetched) -> None:
        """Let go of a job that has not begun."""
        self._cancelled.discard((fetched[ID], fetched[TOKEN]))

    def is_async(self, kind: str) -> bool:
        """Whether jobs of *kind* belong on the event loop."""
        return kind in self._workers.async_kinds

    def execute(self, fetched: Fetched) -> Result | None:
        """One attempt at a job, in this thread; None: it just completed, and nobody wants more. Never raises."""
        attempt = _Attempt(fetched)
        try:
            if self._around is None:
                self._work(attempt)
            else:
                with self._around():
                    self._work(attempt)
        except BaseException as error:  # noqa: BLE001 - SystemExit, KeyboardInterrupt and worse end an attempt, never a slot
            self._judge(attempt, error)
        return self._end(attempt)

    def _work(self, attempt: "_Attempt") -> None:
        worker = self._begin(attempt)
        if attempt.transition is not None:
            return
        if worker.transactional:
            with self._scope.open(attempt.row) as unit:
                if not unit.follows:
                    attempt.tell = None
                self._start(worker, attempt)
                transition = self._wished(attempt, self._chain(worker)(attempt, unit.session))
                attempt.transition = transition
                attempt.settled = unit.settle(unit.session, transition)
        else:
            self._start(worker, attempt)
            attempt.transition = self._wished(attempt, self._chain(worker)(attempt))

    async def execute_async(self, fetched: Fetched) -> Result | None:
        """The same in a task of its own on the running event loop."""
        attempt = _AsyncAttempt(fetched)
        try:
            with self._around() if self._around is not None else _NOTHING:
                worker = self._begin(attempt)
                if attempt.transition is not None:
                    pass
                elif worker.transactional:
                    async with self._scope.open_async(attempt.row) as unit:
                        if not unit.follows:
                            attempt.tell = None
                        transition = self._wished(attempt, await self._call_apart(worker, attempt, unit.session))
                        attempt.transition = transition
                        attempt.settled = await unit.session.run_sync(unit.settle, transition)
                else:
                    attempt.task = asyncio.current_task()
                    try:
                        self._start(worker, attempt)
                        outcome = self._chain(worker)(attempt)
                        if isinstance(outcome, _AWAITED):
                            outcome = await cast("Awaitable[object]", outcome)
                    finally:
                        task, attempt.task = attempt.task, None
                        if attempt.told and task is not None:
                            _forget_cancels(task, attempt.told)
                    attempt.transition = self._wished(attempt, outcome)
        except BaseException as error:  # noqa: BLE001
            if isinstance(error, self._scope.unknown) or self.judge.asks(attempt.worker):
                # The database and what is the user's may take their time: not here.
                await self._aside.run(partial(self._judge, attempt, error))
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
            attempt.args = self._codec.decode(worker.args_type, row.args)
            attempt.decoded = True
            attempt.tell = self._progressed
            if self._keep_logs if worker.keep_logs is None else worker.keep_logs:
                attempt.logs_since = attempt.began
        return worker

    def _start(self, worker: Worker, attempt: "_Attempt") -> None:
        """The clock of the timeout runs from here: what a job waited for a connection is not its own time."""
        self.running[id(attempt)] = attempt
        if self._interrupted:
            cancel_context(attempt, "stop")
        elif (attempt.row.id, attempt.row.token) in self._cancelled:
            cancel_context(attempt, "cancel")
        seconds = worker.seconds or self._seconds
        if seconds is not None:
            self._watch(attempt, seconds)

    async def _call_apart(self, worker: Worker, attempt: "_AsyncAttempt", *session: Any) -> object:
        """Await the handler in a task of its own: whatever it does to that, what commits its work goes on."""
        loop = asyncio.get_running_loop()
        name = f"job {attempt.id} ({one_line(attempt.kind)})"
        task = loop.create_task(_awaited(self._chain(worker), attempt, *session), name=name)
        attempt.task = task
        self._start(worker, attempt)
        try:
            outcome = await task
        finally:
            attempt.task = None
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
        metadata = staged_metadata(attempt)
        if outcome is None:
            return states.completed(metadata)
        return wish(attempt.row.attempt, outcome, metadata, attempt.redact)

    def _judge(self, attempt: "_Attempt", error: BaseException) -> None:
        if isinstance(error, self._scope.unknown):
            attempt.settled = self._scope.resolve(attempt.row)
        self._failed(attempt, error)

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

    def _end(self, attempt: "_Attempt") -> Result | None:
        row = attempt.row
        self.running.pop(id(attempt), None)
        if self._cancelled:
            self._cancelled.discard((row.id, row.token))
        assert attempt.transition is not None
        audience = self._audience
        if attempt.transition is _COMPLETED and attempt.settled is None and audience is not None and audience.empty:
            return None
        seconds = time.monotonic() - attempt.began
        return _result(Result, (row, attempt.transition, seconds, attempt.settled, attempt.error))


class _Attempt(JobContext[Any]):
    """What the runner knows of an attempt besides what its handler sees, which has no args until they are decoded. What
    most attempts leave as it is stands in the class.
    """

    worker: Worker | None = None
    decoded: bool = False
    transition: Transition | None = None
    settled: JobState | None = None

    def __init__(self, fetched: Fetched) -> None:
        self.row = row_of(fetched)
        self.began = time.monotonic()

    @property
    def job_or_none(self) -> JobContext[Any] | None:
        """What user code may see."""
        return self if self.decoded else None


class _AsyncAttempt(_Attempt):
    """The same of an async handler."""

    task: "asyncio.Task[Any] | None" = None
    """That of the handler, for as long as it runs: never of what comes after it."""
    told: int = 0
    """How often its task was cancelled."""

    def interrupt(self) -> None:
        """Let the handler have a CancelledError where it awaits. From any thread."""
        task = self.task
        if task is not None:
            task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.told += self.task.cancel()


def _forget_cancels(task: "asyncio.Task[Any]", times: int) -> None:
    """The handler has come to its end: what it was told is no matter of what its task does next."""
    for _ in range(times):
        task.uncancel()


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
