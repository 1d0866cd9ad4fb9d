"""What `bench` measures, on an engine whose tables are there and empty."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple

import attrs
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_river.cli.ground import own_schema
from sqla_river.context import JobContext
from sqla_river.models import Job
from sqla_river.river import enqueue, enqueue_many
from sqla_river.states import JobState
from sqla_river.workers import Workers

if TYPE_CHECKING:
    from sqla_river.runner import Runner

Handlers = Literal["threads", "asyncio"]
PATIENCE: Final = 300.0
"""Seconds without a job that begins or ends, after which a profile gives up."""
LOOK_EVERY: Final = 0.02
LOOKS: Final = 25
"""How many to a count of what is left."""
CHECK_EVERY: Final = 0.2
"""Seconds of waiting between two looks whether a signal has come."""
ADD_ALL: Final = 2_000
"""Rows of the comparison with the unit of work, which is slow."""
IDLE_JOBS: Final = 200
BURSTS: Final = 20
BURST: Final = 50


class Figure(NamedTuple):
    """One thing that was measured."""

    profile: str
    name: str
    value: float
    unit: str


class Settings(NamedTuple):
    """How much, with what."""

    jobs: int
    slots: int
    seconds: float
    rate: float
    handlers: Handlers


class Viewer(NamedTuple):
    """Who looks on while a profile is measured."""

    tell: Callable[[int, int], None]
    """Told how many of how many are done; checks too."""
    check: Callable[[], None]
    """Raises KeyboardInterrupt if a signal has come, whose own may have got lost."""


def unseen(check: Callable[[], None]) -> Viewer:
    """Who only checks."""

    def tell(_done: int, _of: int) -> None:
        check()

    return Viewer(tell, check)


@attrs.frozen
class Measured:
    """Args of two small fields, as River's own bench has them."""

    kind: ClassVar[str] = "sqla_river_bench"
    num: int
    t: int = 0


class Starts:
    """When the handler of each job began."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.at: dict[int, float] = {}
        self._check = check
        self._told = threading.Semaphore(0)

    def note(self, number: int) -> None:
        self.at[number] = time.perf_counter()
        self._told.release()

    def wait(self, count: int) -> None:
        """Wait until *count* more have begun."""
        for _ in range(count):
            deadline = time.monotonic() + PATIENCE
            while not self._told.acquire(timeout=CHECK_EVERY):
                self._check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a job has not begun within {PATIENCE:.0f} s")
            self._check()


def measure_insert(engine: Engine, settings: Settings, viewer: Viewer) -> Iterator[Figure]:
    """Rows a second: many at once, one after the other, and as the unit of work alone would do it."""
    seconds = _timed(engine, lambda session: enqueue_many(session, _items(settings.jobs, viewer)))
    bulk = settings.jobs / seconds
    yield Figure("insert", "enqueue_many, one transaction", bulk, "jobs/s")
    _clear(engine)
    seconds = _timed(engine, lambda session: session.add_all([Job(Measured(number)) for number in range(ADD_ALL)]))
    yield Figure("insert", "session.add_all, one transaction", ADD_ALL / seconds, "jobs/s")
    yield Figure("insert", "enqueue_many by session.add_all", bulk / (ADD_ALL / seconds), "x")
    _clear(engine)
    began = time.perf_counter()
    count = 0
    while (seconds := time.perf_counter() - began) < settings.seconds:
        with Session(engine) as session, session.begin():
            enqueue(session, Measured(count))
        count += 1
        viewer.check()
    yield Figure("insert", "enqueue and commit, one connection", count / seconds, "jobs/s")


def measure_work(engine: Engine, settings: Settings, viewer: Viewer) -> Iterator[Figure]:
    """Jobs a second that do nothing, from a queue that is full."""
    with Session(engine) as session, session.begin():
        enqueue_many(session, _items(settings.jobs, unseen(viewer.check)))
    _settle(engine)
    cpu = time.process_time()
    began = time.perf_counter()
    with _working(engine, settings, lambda _: None):
        _drain(engine, settings.jobs, viewer)
        seconds = time.perf_counter() - began
        cpu = time.process_time() - cpu
    yield Figure("work", f"{settings.handlers}, {settings.slots} slots", settings.jobs / seconds, "jobs/s")
    yield Figure("work", "CPU of this process", cpu / settings.jobs * 1e6, "us/job")


def measure_latency(engine: Engine, settings: Settings, viewer: Viewer) -> Iterator[Figure]:
    """From commit to the start of the handler: idle, the last of a burst, and at a steady rate."""
    starts = Starts(viewer.check)
    steady = max(1, int(settings.rate * settings.seconds))
    total = IDLE_JOBS + BURSTS + steady
    with _working(engine, settings, starts.note), Session(engine) as session:
        committed: dict[int, float] = {}

        def put(number: int) -> None:
            with session.begin():
                enqueue(session, Measured(number))
            committed[number] = time.perf_counter()

        for number in range(IDLE_JOBS):
            put(number)
            starts.wait(1)
            viewer.tell(number, total)
        yield from _latencies("idle", [starts.at[number] - committed[number] for number in committed])
        last: list[float] = []
        for burst in range(BURSTS):
            numbers = range((burst + 1) * 1_000, (burst + 1) * 1_000 + BURST)
            for number in numbers:
                put(number)
            starts.wait(BURST)
            last.append(starts.at[numbers[-1]] - committed[numbers[-1]])
            viewer.tell(IDLE_JOBS + burst, total)
        yield from _latencies(f"last of a burst of {BURST}", last)
        began = time.perf_counter()
        numbers = range(1_000_000, 1_000_000 + steady)
        for count, number in enumerate(numbers):
            pause = began + count / settings.rate - time.perf_counter()
            if pause > 0:
                time.sleep(pause)
            put(number)
            viewer.tell(IDLE_JOBS + BURSTS + count, total)
        starts.wait(steady)
        found = [starts.at[number] - committed[number] for number in numbers]
        yield from _latencies(f"at {settings.rate:g} jobs/s", found)


def measure_mixed(engine: Engine, settings: Settings, viewer: Viewer) -> Iterator[Figure]:
    """One connection enqueues and commits as fast as it can, while a runner works."""
    starts = Starts(viewer.check)
    committed: dict[int, float] = {}
    with _working(engine, settings, starts.note), Session(engine) as session:
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < settings.seconds:
            number = len(committed)
            with session.begin():
                enqueue(session, Measured(number))
            committed[number] = time.perf_counter()
            viewer.tell(int(seconds * 1_000), int(settings.seconds * 1_000))
        starts.wait(len(committed))
        worked = len(committed) / (time.perf_counter() - began)
    yield Figure("mixed", "enqueued, one connection", len(committed) / seconds, "jobs/s")
    yield Figure("mixed", "worked", worked, "jobs/s")
    for name, figure in _percentiles([starts.at[number] - at for number, at in committed.items()]):
        yield Figure("mixed", f"commit to start, {name}", figure, "ms")


PROFILES: Final[dict[str, Callable[[Engine, Settings, Viewer], Iterator[Figure]]]] = {
    "insert": measure_insert,
    "work": measure_work,
    "latency": measure_latency,
    "mixed": measure_mixed,
}


def run(profile: str, engine: Engine, settings: Settings, viewer: Viewer) -> Iterator[Figure]:
    """Measure *profile* on empty tables. What was found before it fails is handed out."""
    _clear(engine)
    yield from PROFILES[profile](engine, settings, viewer)


@contextmanager
def _working(engine: Engine, settings: Settings, note: Callable[[int], None]) -> "Generator[Runner]":
    from sqla_river.runner import Runner  # which needs libpq; --help does not

    workers = Workers()
    if settings.handlers == "asyncio":

        @workers.register(Measured)
        async def _(job: JobContext[Measured]) -> None:
            note(job.args.num)
    else:

        @workers.register(Measured)
        def _(job: JobContext[Measured]) -> None:
            note(job.args.num)

    with Runner(engine, workers, queues={"default": settings.slots}) as runner:
        yield runner


def _items(count: int, viewer: Viewer) -> Iterator[Measured]:
    for number in range(count):
        if not number % 1_000:
            viewer.tell(number, count)
        yield Measured(number)


def _timed(engine: Engine, act: Callable[[Session], Any]) -> float:
    began = time.perf_counter()
    with Session(engine) as session, session.begin():
        act(session)
    return time.perf_counter() - began


def _drain(engine: Engine, count: int, viewer: Viewer) -> None:
    left = count
    deadline = time.monotonic() + PATIENCE
    unfinished = select(func.count()).where(Job.state.in_([JobState.AVAILABLE, JobState.RUNNING]))
    some = select(select(Job.id).where(Job.state.in_([JobState.AVAILABLE, JobState.RUNNING])).exists())
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        looks = 0
        while connection.execute(some).scalar_one():
            looks += 1
            if looks % LOOKS == 0:
                before, left = left, connection.execute(unfinished).scalar_one()
                viewer.tell(count - left, count)
                if left < before:
                    deadline = time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise TimeoutError(f"no job was finished within {PATIENCE:.0f} s; {left:,} of {count:,} are left")
            viewer.check()
            time.sleep(LOOK_EVERY)


def _clear(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"TRUNCATE {own_schema(engine)}.river_job"))


def _settle(engine: Engine) -> None:
    """As a queue that has been in use for a while."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {own_schema(engine)}.river_job"))


def _latencies(what: str, seconds: list[float]) -> Iterator[Figure]:
    for name, figure in _percentiles(seconds):
        yield Figure("latency", f"{what}, {name}", figure, "ms")


def _percentiles(seconds: list[float]) -> Iterator[tuple[str, float]]:
    """In milliseconds."""
    ordered = sorted(max(each, 0.0) for each in seconds)  # a handler may begin before commit() has returned
    for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
        yield name, ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1_000
