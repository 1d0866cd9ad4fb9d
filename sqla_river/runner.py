"""`Runner`: the face of a worker process."""

import inspect
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import Engine, QueuePool

from sqla_river import store
from sqla_river.errors import ConfigError, RunnerError, WrongDatabaseError
from sqla_river.health import LIMIT, Health, judge
from sqla_river.hooks import (
    EVENT_KINDS,
    Around,
    ErrorHandler,
    EventKind,
    Events,
    Meter,
    Meters,
    Subscription,
    WorkMiddleware,
)
from sqla_river.incarnation import Incarnation
from sqla_river.live import Queues
from sqla_river.logs import Log
from sqla_river.models import Job
from sqla_river.options import Retention
from sqla_river.orders import Orders
from sqla_river.river import River
from sqla_river.settle import Scope
from sqla_river.signals import taken
from sqla_river.workers import Retry, Workers

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

log: Final = Log(__name__)


class Runner:
    """Works jobs: fetches them, calls their handlers in threads, and writes what came of it.

    Construction opens and starts nothing, so a module may hold one at import. Use it as ``with Runner(...) as
    runner:``, by `start` and `stop`, or by `run`, which alone installs signal handlers. It opens connections of its
    own from *engine*; handlers have the whole pool.

    Args:
        engine: of PostgreSQL, on psycopg 3.
        workers: the handlers.
        queues: slots by queue: how many of its jobs run at once here. ``runner.queues`` changes them at work; see
            `Queues`. Of jobs that are over in no time more are fetched than there are slots: as many as those get
            through in 50 ms, 3,000 at most; what has not begun when no slot comes free for 0.25 s goes back.
        river: the `River` whose jobs are worked; the one of the shipped `Job` unless said otherwise.
        sessions: the sessionmaker (or scoped_session) that transactional handlers get their Session from: its class,
            options and events; plain Sessions without it. An async_sessionmaker serves async handlers.
        async_engine: for async transactional handlers, on the same database; for them alone, since its connections
            belong to the runner's event loop, and are closed with it.
        timeout: for workers that have none of their own; None is no timeout.
        retry: for workers that have no policy of their own; River's, attempt^4 seconds, unless said otherwise.
        poll: how often to look for jobs that nobody announced.
        heartbeat: how often to renew the row that says this runner lives.
        lease: how long a silent runner keeps its jobs.
        stop_timeout: how long running jobs may go on after `stop`, before they are interrupted.
        retention: how long finished jobs stay.
        reindex: rebuild our indexes of ``river_job`` once a day, concurrently; autovacuum alone does in most cases. Not
            through a pooler.
        keep_logs: store what ``job.log`` says in each attempt with the job, under River's metadata key ``river:log``,
            at most 64 kB; a worker's own setting comes first.
        log_args: let the log record of a failure carry the args, as ``job_args``, with ``***`` for redacted fields.
        listen: whether to LISTEN; or the engine to do it on, where *engine* goes through a transaction pooler.
        middleware: around every handler, the first outermost; see `WorkMiddleware`.
        around: makes the context manager that each attempt runs inside of, its Session included, such as Flask's
            ``app.app_context``.
        on_error: called with the job and the exception after each failed attempt; it may answer Cancel.

    Raises:
        ConfigError: settings that do not go together, named with their values.
        WrongDatabaseError: an engine that is not PostgreSQL's on psycopg 3.
        InvalidOptionError: a queue name that River does not take.
    """

    def __init__(
        self,
        engine: Engine,
        workers: Workers,
        *,
        queues: Mapping[str, int],
        river: River[Any] | None = None,
        sessions: Any = None,
        async_engine: "AsyncEngine | None" = None,
        timeout: timedelta | None = None,
        retry: Retry | None = None,
        poll: timedelta = timedelta(seconds=1),
        heartbeat: timedelta = timedelta(seconds=5),
        lease: timedelta = timedelta(seconds=30),
        stop_timeout: timedelta = timedelta(seconds=20),
        retention: Retention = Retention(),
        reindex: bool = False,
        keep_logs: bool = False,
        log_args: bool = False,
        listen: bool | Engine = True,
        middleware: Sequence[WorkMiddleware] = (),
        around: Around | None = None,
        on_error: ErrorHandler | None = None,
    ) -> None:
        store.check_postgresql(engine.dialect.name, engine.dialect.driver)
        if engine.dialect.driver != "psycopg" or engine.dialect.is_async:
            raise WrongDatabaseError(
                f"a Runner needs a sync engine on postgresql+psycopg, got postgresql+{engine.dialect.driver}"
                f"{' (async)' if engine.dialect.is_async else ''}; make one with create_engine('postgresql+psycopg://...')"
            )
        _check_times(timeout, poll, heartbeat, lease, stop_timeout)
        self.engine = engine
        self.workers = workers
        self.queues = Queues(queues)
        self.river: River[Any] = river if river is not None else River.of(Job)
        self.lease = lease
        self.stop_timeout = stop_timeout
        self._orders = Orders(
            engine,
            workers,
            self.queues,
            self.river,
            sessions,
            async_engine,
            timeout,
            retry,
            poll.total_seconds(),
            heartbeat.total_seconds(),
            lease.total_seconds(),
            retention,
            reindex,
            keep_logs,
            log_args,
            (engine if listen else None) if isinstance(listen, bool) else listen,
            tuple(middleware),
            around,
            on_error,
            Events(),
            Meters(),
        )
        self._lifecycle = threading.Lock()
        self._incarnation: Incarnation | None = None
        self._step = 0
        self._asked = threading.Event()
        for each in (
            engine,
            self._orders.listen_engine,
            async_engine.sync_engine if async_engine is not None else None,
        ):
            if each is not None:
                store.renew_in_forked_children(each)

    @property
    def id(self) -> str | None:
        """The id of the incarnation that runs now; None while the runner does not."""
        return self._incarnation.id if self._incarnation is not None else None

    @property
    def stale(self) -> int:
        """Outcomes that came too late and changed nothing, in this incarnation."""
        return self._incarnation.completer.stale if self._incarnation is not None else 0

    @property
    def started(self) -> bool:
        """Whether `start` has done its work, so that jobs are fetched."""
        return self._incarnation is not None and self._incarnation.started

    @property
    def worked(self) -> int:
        """Attempts whose outcome is written, in this incarnation."""
        return self._incarnation.worked if self._incarnation is not None else 0

    @property
    def duties(self) -> Mapping[str, timedelta | None]:
        """How long ago each duty last succeeded, wherever it was done; None if it never did. Empty while the runner
        does not run.
        """
        return self._incarnation.turns.ages() if self._incarnation is not None else {}

    @property
    def loops(self) -> Mapping[str, timedelta]:
        """How long ago each inner loop (fetch, complete, heartbeat, listen, duties, watch) last did well; one that has
        nothing to do says so every second. Empty while the runner does not run.
        """
        now = time.monotonic()
        found = self._incarnation.loops() if self._incarnation is not None else {}
        return {name: timedelta(seconds=max(now - moved, 0.0)) for name, (_, moved) in found.items()}

    @property
    def in_progress(self) -> Mapping[tuple[str, str], int]:
        """How many handlers run now, by queue and kind."""
        running = list(self._incarnation.executor.running.values()) if self._incarnation is not None else []
        return Counter((job.row.queue, job.row.kind) for job in running)

    def health(self, limit: timedelta = LIMIT) -> Health:
        """Whether this process works: alive while none of its inner loops (fetch, complete, heartbeat, listen) hangs,
        ready while all of them do well, and no more handlers hang beyond their timeout than there are slots.

        No round trip: it tells from when each loop last moved. A loop that cannot reach the database goes on trying, so
        it lives, but is not ready.

        Args:
            limit: how long a loop may stand still.
        """
        incarnation = self._incarnation
        if incarnation is None or not incarnation.started or incarnation.stopping:
            state = "has not started" if incarnation is None or not incarnation.started else "stops"
            return judge(incarnation.loops() if incarnation is not None else {}, limit, f"the runner {state}")
        hang = ("more handlers hang than there are slots",) if incarnation.exhausted else ()
        return judge(incarnation.loops(), limit, *hang)

    def attach(self, meter: Meter) -> None:
        """Let *meter* be told of this runner's work, batch by batch, in this life and in those to come."""
        self._orders.meters.attach(meter)

    def subscribe(self, *kinds: EventKind) -> Subscription:
        """Events of this runner's own jobs as they are committed, of all *kinds* unless some are named; close it when
        done.

        Raises:
            ConfigError: a kind that there is not.
        """
        unknown = sorted(set(kinds) - set(EVENT_KINDS))
        if unknown:
            raise ConfigError(f"no such event: {', '.join(unknown)}; there are {', '.join(EVENT_KINDS)}")
        return self._orders.events.subscribe(kinds or EVENT_KINDS)

    def start(self) -> None:
        """Start working. Returns once LISTEN is set and the runner's row is written, or after 10 s without a database:
        it goes on trying.

        Raises:
            SchemaError: the tables are missing, old or damaged; it says which, and the cure.
            RunnerError: it runs already, or was started by the process that this one was forked from.
        """
        if self._incarnation is not None and self._incarnation.pid != os.getpid():
            # Before the lock, which another thread may have held at the fork: then nobody is left to release it.
            raise RunnerError(
                "this Runner was started before a fork, and its threads did not come along; make a new one in the child"
            )
        with self._lifecycle:
            if self._incarnation is not None:
                raise RunnerError("this Runner runs already; stop() it first, or make another one")
            self._check_workers()
            self._incarnation = incarnation = Incarnation(self._orders)
            try:
                incarnation.start()
            except BaseException:
                incarnation.stop(0.0)
                self._incarnation = None
                raise
            self.queues.follow(incarnation.resize)

    def _check_workers(self) -> None:
        """What can only be known once the handlers are registered."""
        transactional = [worker for worker in self.workers if worker.transactional]
        plain = sorted(worker.kind for worker in self.workers if not worker.is_async)
        awaited = [type(each).__name__ for each in self._orders.middleware if inspect.iscoroutinefunction(each.work)]
        if plain and awaited:
            raise ConfigError(
                f"the work() of {', '.join(awaited)} is async, the handlers of {', '.join(plain)} are not: write a "
                "plain work() that returns call_next(job), which serves both"
            )
        if any(worker.is_async for worker in transactional) and self._orders.async_engine is None:
            kinds = ", ".join(sorted(worker.kind for worker in transactional if worker.is_async))
            raise ConfigError(f"the handlers of {kinds} are async and transactional: give the Runner an async_engine=")
        if transactional:
            Scope(
                self.engine, self.river.job_class, self._orders.sessions, self._orders.async_engine, lambda: True
            ).check()
        if any(not worker.is_async for worker in transactional):
            _check_pool(self.engine, sum(self.queues.values()))
        if any(worker.is_async for worker in transactional) and self._orders.async_engine is not None:
            _check_pool(self._orders.async_engine.sync_engine, sum(self.queues.values()))

    def stop(self, timeout: timedelta | None = None) -> None:
        """Stop: fetch no more, give back what has not begun, let running jobs finish, and write every result.

        After *timeout* (``stop_timeout`` unless said) ``job.cancelled`` is set with reason ``stop``; 5 s later the
        handlers that still run are left behind. Interrupted jobs get their attempt back and are available at once:
        nothing is left running. Returns after at most *timeout* + 6 s, and raises nothing. Calling it again, from any
        thread, hurries it one step on.
        """
        incarnation = self._incarnation
        if incarnation is None or incarnation.pid != os.getpid():
            return
        incarnation.hurry()
        with self._lifecycle:
            if self._incarnation is incarnation:
                incarnation.stop((timeout if timeout is not None else self.stop_timeout).total_seconds())
                self.queues.follow(None)
                self._incarnation = None

    def ask(self, step: int) -> None:
        """Let `run` stop, and go at least so far: 1 is to stop, 2 to interrupt running jobs, 3 to leave them behind.

        Returns at once, in any thread. Asking again for the same changes nothing: so a supervisor may pass on a signal
        that has come here too.
        """
        self._step = max(self._step, step)
        if self._incarnation is not None:
            self._incarnation.ask(self._step)
        self._asked.set()

    def run(self) -> None:
        """Work until SIGTERM or SIGINT, then stop; a second signal interrupts the running jobs, a third leaves them
        behind.

        Only in the main thread, where Python takes signals; everywhere else use `start` and `stop`.

        Raises:
            RunnerError: not the main thread; or more handlers hang beyond their timeout than there are slots.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RunnerError(
                "run() installs signal handlers and needs the main thread; use start() and stop() in another one"
            )
        steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        signals = 0

        def on_signal(_signal: int, _frame: FrameType | None) -> None:
            nonlocal signals
            signals += 1
            steps.put(signals)  # what takes a lock, as an Event does, could wait here for the code that it interrupted

        def follow() -> None:
            while (step := steps.get()) is not None:
                self.ask(step)

        threading.Thread(target=follow, name="sqla_river-signals", daemon=True).start()
        try:
            with taken((signal.SIGTERM, signal.SIGINT), on_signal):
                self._work()
        finally:
            steps.put(None)
            self._step = 0
            self._asked.clear()

    def _work(self) -> None:
        self.start()
        incarnation = self._incarnation
        if incarnation is not None:
            incarnation.ask(self._step)  # what came before there was one
        while not self._asked.wait(0.5):
            if incarnation is not None and incarnation.exhausted:
                self.stop()
                raise RunnerError("too many handlers hang; this process ends, for its supervisor to start another")
        self.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _check_pool(engine: Engine, slots: int) -> None:
    """Warn where jobs will wait for a connection of *engine*."""
    pool = engine.pool
    if isinstance(pool, QueuePool) and pool._max_overflow >= 0:
        connections = pool.size() + pool._max_overflow
        if connections < slots:
            log.warning(
                "%d slots share a pool of %d connections: transactional jobs will wait for one; "
                "create_engine(pool_size=%d) gives each slot its own",
                slots,
                connections,
                slots,
            )


def _check_times(
    timeout: timedelta | None, poll: timedelta, heartbeat: timedelta, lease: timedelta, stop_timeout: timedelta
) -> None:
    if timeout is not None and timeout <= timedelta(0):
        raise ConfigError(f"timeout must be more than zero, got {timeout}; leave it out for none")
    if not timedelta(milliseconds=1) <= poll <= timedelta(minutes=5):
        raise ConfigError(f"poll must be 1 ms to 5 minutes, got {poll}")
    if heartbeat < timedelta(milliseconds=100):
        raise ConfigError(f"heartbeat must be at least 100 ms, got {heartbeat}")
    if lease < 3 * heartbeat:
        raise ConfigError(
            f"lease must be at least three heartbeats, got lease={lease} with heartbeat={heartbeat}; lengthen the lease"
        )
    if stop_timeout < timedelta(0):
        raise ConfigError(f"stop_timeout must not be negative, got {stop_timeout}")
