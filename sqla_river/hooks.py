"""What users may put around our work: middleware, an error handler, events, and meters."""

import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from typing import Any, Final, Literal, Protocol, Self

import attrs

from sqla_river.context import JobContext
from sqla_river.failure import message_of
from sqla_river.logs import Log
from sqla_river.outcomes import Cancel
from sqla_river.rows import JobRow, Result
from sqla_river.states import JobState

EventKind = Literal[
    "completed",
    "failed",
    "cancelled",
    "snoozed",
    "discarded",
    "rescued",
    "interrupted",
    "queue_paused",
    "queue_resumed",
]
EVENT_KINDS: Final[tuple[EventKind, ...]] = (
    "completed",
    "failed",
    "cancelled",
    "snoozed",
    "discarded",
    "rescued",
    "interrupted",
    "queue_paused",
    "queue_resumed",
)
KEPT_EVENTS: Final = 1_000
log: Final = Log(__name__)


class WorkMiddleware(Protocol):
    """Around the handler: ``work(job, call_next)`` returns what ``call_next(job)`` returns, or something else, or
    raises.

    Around an async handler ``call_next(job)`` gives an awaitable: hand it on, or be ``async`` and await it.
    """

    def work(self, job: JobContext[Any], call_next: Callable[[JobContext[Any]], Any], /) -> Any: ...


Around = Callable[[], AbstractContextManager[object]]
"""Makes what an attempt runs inside of, where `WorkMiddleware` is not far enough out: entered before the Session of a
transactional job is made, left when its outcome is committed. Flask's ``app.app_context`` is one. It may raise, and the
attempt has failed; it cannot make a failure undone.
"""

WORK_EVERYWHERE: Final[list[WorkMiddleware]] = []
"""Around every handler of this process, outside of each Runner's own: for tools that watch the whole program."""

ErrorHandler = Callable[[JobContext[Any], BaseException], Cancel | None]
"""Called after each failed attempt; the answer Cancel ends the job."""


@attrs.frozen
class Event:
    """Something that happened to a job (or a queue) of this runner, after it was committed.

    `seconds` is how long the handler ran; `error` what ended the attempt; `token` names the fetch it came with: no
    other attempt, of whatever database, has both the same token and the same `job_id`.
    """

    kind: EventKind
    queue: str
    job_id: int | None = None
    job_kind: str | None = None
    attempt: int | None = None
    seconds: float | None = None
    error: BaseException | None = None
    token: str | None = None


EVENTS_EVERYWHERE: Final[list[Callable[[Event], object]]] = []
"""Told of every event of this process, in the runner's own threads: it must not wait. What it raises is logged."""


class Subscription:
    """Events as they come: iterate over it, or call `get`. At most 1,000 wait; what comes on top is dropped and
    counted.
    """

    def __init__(self, kinds: Iterable[EventKind], close: "Callable[[Subscription], None]") -> None:
        self.kinds = frozenset(kinds)
        self._close = close
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self.dropped: Counter[str] = Counter()
        """How many events of each kind nobody read in time."""

    def put(self, event: Event) -> None:
        """Called by the runner; never waits."""
        if event.kind in self.kinds and not self._closed.is_set():
            if self._events.qsize() < KEPT_EVENTS:
                self._events.put(event)
            else:
                self.dropped[event.kind] += 1

    def get(self, timeout: timedelta | None = None) -> Event:
        """The next event.

        Raises:
            queue.Empty: none came within *timeout*, or the subscription is closed and read to its end.
        """
        event = self._events.get(timeout=None if timeout is None else max(timeout.total_seconds(), 0))
        if event is None:
            self._events.put(None)  # for whoever else reads
            raise queue.Empty
        return event

    def close(self) -> None:
        """No more events; a loop over the subscription ends."""
        if not self._closed.is_set():
            self._closed.set()
            self._close(self)
            self._events.put(None)

    def __iter__(self) -> Iterator[Event]:
        with suppress(queue.Empty):
            while True:
                yield self.get()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_BY_STATE: Final[dict[JobState, EventKind]] = {
    JobState.COMPLETED: "completed",
    JobState.RETRYABLE: "failed",
    JobState.DISCARDED: "discarded",
    JobState.CANCELLED: "cancelled",
    JobState.SCHEDULED: "snoozed",
    JobState.AVAILABLE: "interrupted",
    JobState.PENDING: "completed",
    JobState.RUNNING: "completed",
}


class Events:
    """The subscriptions of a Runner; they outlive its incarnations."""

    def __init__(self) -> None:
        self.subscriptions: tuple[Subscription, ...] = ()
        self._lock = threading.Lock()

    @property
    def heard(self) -> bool:
        """Whether anybody listens."""
        return bool(self.subscriptions or EVENTS_EVERYWHERE)

    def subscribe(self, kinds: Sequence[EventKind]) -> Subscription:
        subscription = Subscription(kinds, self._forget)
        with self._lock:
            self.subscriptions = (*self.subscriptions, subscription)
        return subscription

    def _forget(self, subscription: Subscription) -> None:
        with self._lock:
            self.subscriptions = tuple(each for each in self.subscriptions if each is not subscription)

    def put(self, event: Event) -> None:
        for subscription in self.subscriptions:
            subscription.put(event)
        for told in EVENTS_EVERYWHERE:
            try:
                told(event)
            except BaseException as error:  # noqa: BLE001 - nor does one listener keep the next
                name = getattr(told, "__qualname__", type(told).__name__)
                log.warning("%s(%s) failed: %s", name, event.kind, message_of(error))

    def results(self, written: Iterable[tuple[Result, JobState]]) -> None:
        for result, state in written:
            row = result.job
            kind = _BY_STATE[state]
            self.put(Event(kind, row.queue, row.id, row.kind, row.attempt, result.seconds, result.error, row.token))


class Meter(Protocol):
    """Told of a runner's work in batches, by the threads that do it: it must not wait. What it raises is logged.

    For metrics: a call per batch costs nothing per job, and what is told of has been committed.
    """

    def started(self, runner_id: str, /) -> None:
        """A life of the runner begins, in this process: it may be a fork of the one that attached the meter."""
        ...

    def fetched(self, rows: Sequence[JobRow], /) -> None:
        """These jobs are about to start."""
        ...

    def written(self, written: Sequence[tuple[Result, JobState]], /) -> None:
        """These attempts are over, and the jobs in these states."""
        ...

    def rescued(self, freed: Sequence[Any], /) -> None:
        """These jobs of dead runners are free (`queue`, `kind`, `state`)."""
        ...

    def looked(self, figures: Any, /) -> None:
        """How the whole database stands; told every 30 s to one runner of the fleet."""
        ...


class Meters:
    """The meters of a Runner; they outlive its incarnations."""

    def __init__(self) -> None:
        self.meters: tuple[Meter, ...] = ()

    @property
    def attached(self) -> bool:
        """Whether there are any."""
        return bool(self.meters)

    def attach(self, meter: Meter) -> None:
        self.meters = (*self.meters, meter)

    def tell(self, what: Literal["started", "fetched", "written", "rescued", "looked"], told: Any) -> None:
        """Tell all of them; next to nothing where there are none."""
        for meter in self.meters:
            try:
                getattr(meter, what)(told)
            except BaseException as error:  # noqa: BLE001 - nor does one meter keep the next
                log.warning("%s.%s() failed: %s", type(meter).__name__, what, message_of(error))


class Audience:
    """All who are told of each job that ends."""

    def __init__(self, events: Events, meters: Meters) -> None:
        self._events = events
        self._meters = meters

    @property
    def empty(self) -> bool:
        """Whether there is nobody."""
        return not (self._events.subscriptions or self._meters.meters or EVENTS_EVERYWHERE)
