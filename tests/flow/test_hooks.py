"""What users put around our work: middleware, an error handler, subscriptions."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session

from sqla_river import Cancel, JobContext, JobMixin, River, Snooze, Workers, cancel, enqueue, enqueue_many, hooks
from sqla_river.errors import ConfigError
from sqla_river.hooks import KEPT_EVENTS, Event, Events
from sqla_river.rows import InsertRow
from sqla_river.runner import Runner
from tests.crashing import QUICK, make_runner
from tests.database import emptied, shared_database
from tests.making import Count, Gate, all_are, count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.working import HOUR, after, begun, errors, handling, nothing, outcome, put, working

Next = Callable[[JobContext[Any]], Any]
SOON = timedelta(seconds=30)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


# ---- around work


class Around:
    """Notes when it is entered and left, and with what."""

    def __init__(self, name: str, said: list[Any]) -> None:
        self.name = name
        self.said = said

    def work(self, job: JobContext[Any], call_next: Next) -> Any:
        self.said.append(f"{self.name} in {job.args.number}")
        result = call_next(job)
        self.said.append((f"{self.name} out", result))
        return result


class AsyncAround(Around):
    async def work(self, job: JobContext[Any], call_next: Next) -> Any:
        self.said.append(f"{self.name} in {job.args.number}")
        result = await call_next(job)
        self.said.append((f"{self.name} out", result))
        return result


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_middleware_stands_around_the_handler_the_first_outermost(engine: Engine, colour: str) -> None:
    said: list[Any] = []
    wish = Snooze(HOUR)

    def plain(_: JobContext[Count]) -> Snooze:
        said.append("handler")
        return wish

    async def awaited(job: JobContext[Count]) -> Snooze:
        await asyncio.sleep(0)
        return plain(job)

    kind = Around if colour == "plain" else AsyncAround
    row = outcome(engine, plain if colour == "plain" else awaited, middleware=[kind("a", said), kind("b", said)])

    assert said == ["a in 0", "b in 0", "handler", ("b out", wish), ("a out", wish)]
    assert row["state"] == "scheduled"


class Does:
    """Middleware that does what it is given."""

    def __init__(self, does: Callable[[JobContext[Any], Next], Any]) -> None:
        self.work = does


def test_plain_middleware_hands_on_what_an_async_handler_gives(engine: Engine) -> None:
    runs: list[int] = []

    async def handler(_: JobContext[Count]) -> None:
        await asyncio.sleep(0)
        runs.append(1)

    row = outcome(engine, handler, middleware=[Does(lambda job, call_next: call_next(job))])

    assert (row["state"], runs) == ("completed", [1])


def test_async_middleware_and_plain_handlers_do_not_go_together(engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"AsyncAround is async, the handlers of count are not"):
        Runner(engine, handling(nothing), queues={"default": 1}, middleware=[AsyncAround("a", [])]).start()


def test_middleware_may_change_the_result(engine: Engine) -> None:
    def cancels(job: JobContext[Any], call_next: Next) -> Any:
        assert call_next(job) is None
        return Cancel("by middleware")

    row = outcome(engine, nothing, middleware=[Does(cancels)])

    assert (row["state"], errors(row)) == ("cancelled", ["JobCancelError: by middleware"])


def test_middleware_may_leave_the_handler_out(engine: Engine) -> None:
    gate = Gate(opened=True)

    row = outcome(engine, gate, middleware=[Does(lambda job, call_next: None)])

    assert (row["state"], gate.started) == ("completed", [])


def test_middleware_may_catch_and_may_raise(engine: Engine) -> None:
    def catches(job: JobContext[Any], call_next: Next) -> Any:
        try:
            return call_next(job)
        except ValueError as error:
            raise LookupError("by middleware") from error

    def handler(_: JobContext[Count]) -> None:
        raise ValueError("by handler")

    row = outcome(engine, handler, middleware=[Does(catches)])

    assert (row["state"], errors(row)) == ("retryable", ["LookupError: by middleware"])
    assert "by handler" in row["all_errors"][0]["trace"]


def test_middleware_that_raises_fails_the_attempt_and_harms_nobody_else(engine: Engine) -> None:
    def raises(job: JobContext[Any], call_next: Next) -> Any:
        if job.args.number == 0:
            raise SystemExit
        return call_next(job)

    put(engine, *range(10))
    with working(engine, nothing, 1, middleware=[Does(raises)]):
        eventually(lambda: count_states(engine) == {"retryable": 1, "completed": 9}, what="all")


def test_middleware_stands_around_transactional_handlers(engine: Engine) -> None:
    said: list[Any] = []
    runs: list[Any] = []

    def handler(job: JobContext[Count], session: Session) -> None:
        runs.append(session.execute(text("SELECT 7")).scalar())

    row = outcome(engine, handling(handler, transactional=True), middleware=[Around("a", said)])

    assert (row["state"], runs) == ("completed", [7])
    assert said == ["a in 0", ("a out", None)]


# ---- around the whole attempt


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_what_is_around_an_attempt_outlasts_the_commit_of_a_transactional_one(
    engine: Engine, url: str, colour: str
) -> None:
    said: list[Any] = []
    async_engine = create_async_engine(url)

    @contextmanager
    def around() -> Generator[None]:
        said.append("in")
        yield
        said.append(("out", count_states(engine)))

    def plain(_: JobContext[Any], session: Session) -> None:
        said.append("handler")

    async def awaited(_: JobContext[Any], session: AsyncSession) -> None:
        said.append("handler")

    workers = handling(plain if colour == "plain" else awaited, transactional=True)
    outcome(engine, workers, around=around, async_engine=async_engine)

    assert said == ["in", "handler", ("out", {"completed": 1})]


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_what_is_around_an_attempt_sees_its_error_and_cannot_swallow_it(engine: Engine, colour: str) -> None:
    def plain(_: JobContext[Any]) -> None:
        raise ValueError("broken")

    async def awaited(job: JobContext[Any]) -> None:
        plain(job)

    seen: list[BaseException] = []

    @contextmanager
    def swallowing() -> Generator[None]:
        try:
            yield
        except ValueError as error:
            seen.append(error)

    row = outcome(engine, plain if colour == "plain" else awaited, around=swallowing)

    assert [str(error) for error in seen] == ["broken"]
    assert (row["state"], errors(row)) == ("retryable", ["ValueError: broken"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_in_what_is_around_fails_the_attempt_and_harms_nobody_else(engine: Engine, when: str) -> None:
    entered: list[None] = []

    @contextmanager
    def around() -> Generator[None]:
        entered.append(None)
        if len(entered) == 1 and when == "before":
            raise ValueError("no app")
        yield
        if len(entered) == 1:
            raise ValueError("no app")

    first, second = put(engine, 1, 2)
    with working(engine, nothing, slots=1, around=around):
        eventually(lambda: count_states(engine) == {"retryable": 1, "completed": 1})

    assert [errors(read_job(engine, job_id)) for job_id in (first, second)] == [["ValueError: no app"], []]


# ---- the error handler


def fails(_: JobContext[Count]) -> None:
    raise ValueError("by handler")


async def fails_async(_: JobContext[Count]) -> None:
    raise ValueError("by handler")


@pytest.mark.parametrize("handler", [fails, fails_async])
def test_the_error_handler_is_told_and_may_cancel(engine: Engine, handler: Any) -> None:
    told: list[Any] = []

    def on_error(job: JobContext[Any], error: BaseException) -> Cancel | None:
        told.append((job.args, str(error)))
        return Cancel("hopeless") if job.args.number == 1 else None

    first, second = put(engine, 0, 1)
    with working(engine, handler, 1, on_error=on_error):
        eventually(lambda: count_states(engine) == {"retryable": 1, "cancelled": 1}, what="both")

    assert told == [(Count(0), "by handler"), (Count(1), "by handler")]
    assert read_job(engine, first)["state"] == "retryable"
    assert errors(read_job(engine, second)) == ["JobCancelError: hopeless"]


def test_the_error_handler_is_not_asked_about_wishes_and_interrupts(engine: Engine) -> None:
    told: list[Any] = []

    def handler(job: JobContext[Count]) -> None:
        if job.args.number == 0:
            raise Snooze(HOUR)
        if job.args.number == 1:
            raise Cancel
        assert job.cancelled.wait(30)
        raise RuntimeError

    def on_error(job: JobContext[Any], _: BaseException) -> None:
        told.append(job.args)

    put(engine, 0, 1, 2)
    with working(engine, handler, 3, on_error=on_error) as runner:
        eventually(lambda: count_states(engine) == {"scheduled": 1, "cancelled": 1, "running": 1}, what="all")
        begun(runner, 1)
        runner.stop(timedelta(0))

    assert told == []


@pytest.mark.parametrize("handler", [fails, fails_async])
def test_an_error_handler_that_raises_is_passed_over(engine: Engine, handler: Any) -> None:
    def on_error(*_: Any) -> None:
        raise SystemExit

    row = outcome(engine, handling(handler, retry=after(HOUR)), on_error=on_error)

    assert (row["state"], errors(row)) == ("retryable", ["ValueError: by handler"])
    assert row["delay"] > timedelta(minutes=59)


class Sleeper:
    """An error handler that sleeps until it is let go; and handlers that fail for number 0, and count the others."""

    def __init__(self, colour: str) -> None:
        self.asleep, self._release = threading.Event(), threading.Event()
        self.ran: list[int] = []
        self.handler = self._plain if colour == "plain" else self._awaited

    def on_error(self, *_: Any) -> None:
        self.asleep.set()
        assert self._release.wait(60)

    def let_go(self) -> None:
        self._release.set()

    def again(self) -> None:
        self.asleep.clear()
        self._release.clear()

    def _plain(self, job: JobContext[Count]) -> None:
        if job.args.number == 0:
            raise ValueError
        self.ran.append(job.id)

    async def _awaited(self, job: JobContext[Count]) -> None:
        self._plain(job)


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_a_hook_that_sleeps_holds_up_its_own_job_only(engine: Engine, colour: str) -> None:
    sleeper = Sleeper(colour)

    with working(engine, sleeper.handler, on_error=sleeper.on_error):
        put(engine, 0)
        assert sleeper.asleep.wait(30)
        put(engine, *[1] * 500)
        eventually(lambda: count_states(engine) == {"completed": 500, "running": 1}, what="the others")
        sleeper.let_go()
        eventually(lambda: count_states(engine) == {"completed": 500, "retryable": 1}, what="the slow one")


@pytest.mark.timed
@pytest.mark.parametrize("colour", ["plain", "async"])
def test_a_hook_that_sleeps_costs_the_others_less_than_a_tenth_of_their_rate(engine: Engine, colour: str) -> None:
    """By medians of turns of 20,000 jobs: with it, without it, with it again."""
    sleeper = Sleeper(colour)
    rates: dict[bool, list[float]] = {False: [], True: []}

    def turn(*, asleep: bool) -> None:
        if asleep:
            put(engine, 0)
            assert sleeper.asleep.wait(30)
        sleeper.ran.clear()
        with Session(engine) as session, session.begin():
            enqueue_many(session, (Count(1) for _ in range(20_000)))
        eventually(lambda: len(sleeper.ran), what="the first")
        first, began = len(sleeper.ran), time.monotonic()
        eventually(lambda: len(sleeper.ran) == 20_000, 60, "all")
        rates[asleep].append((20_000 - first) / (time.monotonic() - began))
        sleeper.let_go()
        eventually(lambda: "running" not in count_states(engine), what="all outcomes")
        sleeper.again()

    with working(engine, handling(sleeper.handler, retry=after(HOUR)), 50, on_error=sleeper.on_error):
        for number in range(22):
            turn(asleep=number % 2 == 1)

    # The first two warm up.
    assert median(rates[True][1:]) > median(rates[False][1:]) * 0.9, rates


# ---- around insert


class Stamps:
    """Puts a trace into the metadata of what is put in."""

    def __init__(self, name: str = "trace") -> None:
        self.name = name
        self.blocks: list[int] = []

    def insert(self, rows: Sequence[InsertRow], call_next: Callable[[Sequence[InsertRow]], Sequence[InsertRow]]) -> Any:
        self.blocks.append(len(rows))
        stamped = [row._replace(metadata={**row.metadata, self.name: len(row.metadata)}) for row in rows]
        return call_next(stamped)


def river_with(*middleware: Any) -> River[Any]:
    class Base(DeclarativeBase):
        pass

    class TheirJob(JobMixin, Base):
        pass

    return River(job_class=TheirJob, middleware=middleware)


def test_insert_middleware_runs_when_a_job_is_made_and_once_per_block(engine: Engine) -> None:
    outer, inner = Stamps("outer"), Stamps("inner")
    river = river_with(outer, inner)
    with Session(engine) as session, session.begin():
        session.add(river.job_class(Count(1)))
        river.enqueue(session, Count(2), metadata={"mine": True})
        river.enqueue(session.connection(), Count(3))
        river.enqueue_many(session, [Count(4), Count(5)])
        enqueue(session, Count(6))  # another River's

    assert outer.blocks == inner.blocks == [1, 1, 1, 2]
    rows = sorted(read_jobs(engine), key=lambda row: row["args"]["number"])
    assert [row["metadata"] for row in rows] == [
        {"outer": 0, "inner": 1},
        {"mine": True, "outer": 1, "inner": 2},
        {"outer": 0, "inner": 1},
        {"outer": 0, "inner": 1},
        {"outer": 0, "inner": 1},
        {},
    ]


class Inserts:
    def __init__(self, does: Any) -> None:
        self.insert = does


def test_insert_middleware_that_raises_keeps_the_job_out(engine: Engine) -> None:
    def raises(rows: Any, call_next: Any) -> Any:
        raise ValueError("not now")

    river = river_with(Inserts(raises))
    with Session(engine) as session, session.begin():
        with pytest.raises(ValueError, match="not now"):
            river.job_class(Count())
        with pytest.raises(ValueError, match="not now"):
            river.enqueue(session, Count())
        with pytest.raises(ValueError, match="not now"):
            river.enqueue_many(session, [Count()])

    assert read_jobs(engine) == []


def drops(_: Sequence[InsertRow], __: Any) -> Any:
    return None


def doubles(rows: Sequence[InsertRow], call_next: Any) -> Any:
    return call_next([*rows, *rows])


@pytest.mark.parametrize("does", [drops, doubles])
def test_insert_middleware_neither_adds_nor_drops(engine: Engine, does: Any) -> None:
    river = river_with(Inserts(does))
    with pytest.raises(ConfigError, match="must return the 1 rows"):
        river.job_class(Count())


# ---- events


def heard(subscription: Any, kind: str) -> Event:
    """The next event of *kind*."""
    while True:
        event: Event = subscription.get(SOON)
        if event.kind == kind:
            return event


def test_every_end_of_a_job_is_an_event(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> Any:
        match job.args.number:
            case 0:
                return None
            case 1 | 2:
                raise ValueError(job.args.number)
            case 3:
                return Snooze(HOUR)
            case 4:
                return Cancel("enough")
            case _:
                assert job.cancelled.wait(30)
                raise RuntimeError

    ids = [
        make_job(engine, args={"number": number}, max_attempts=1 if number == 2 else 25, queue="default")
        for number in range(6)
    ]
    runner = Runner(engine, handling(handler), queues={"default": 6}, stop_timeout=timedelta(0))
    subscription = runner.subscribe()
    with runner:
        eventually(lambda: count_states(engine).get("running") == 1 and count_states(engine).get("available") is None)
        begun(runner, 1)
    subscription.close()
    events = {event.job_id: event for event in subscription}

    expected = ["completed", "failed", "discarded", "snoozed", "cancelled", "interrupted"]
    assert [events[job_id].kind for job_id in ids] == expected
    assert [repr(events[job_id].error) for job_id in ids[:3]] == ["None", "ValueError(1)", "ValueError(2)"]
    event = events[ids[0]]
    assert (event.queue, event.job_kind, event.attempt) == ("default", "count", 1)
    assert event.seconds is not None
    assert 0 <= event.seconds < 10
    assert subscription.dropped == {}


def test_events_come_after_their_commit(engine: Engine) -> None:
    with working(engine, nothing) as runner, runner.subscribe("completed") as subscription:
        for _ in range(20):
            (job_id,) = put(engine, 0)
            assert subscription.get(SOON).job_id == job_id
            assert read_job(engine, job_id)["state"] == "completed"


def _are_told(told: list[Event], count: int) -> bool:
    return len(told) >= count


@pytest.mark.parametrize("error", [LookupError, SystemExit])
def test_what_a_listener_raises_is_logged_and_hinders_no_outcome_and_no_other_listener(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    told: list[Event] = []

    def raises(_: Event) -> None:
        raise error("no app here")

    monkeypatch.setattr(hooks, "EVENTS_EVERYWHERE", [raises, told.append])
    with working(engine, nothing) as runner:
        for count in (10, 15):  # the later ones of a blocked completer would stay running
            put(engine, *range(len(told), count))
            eventually(all_are(engine, "completed", count), within=10)
            eventually(partial(_are_told, told, count), within=10, what="the events")
        worked = runner.worked

    assert worked == 15
    assert sorted(event.job_id or 0 for event in told) == [row["id"] for row in read_jobs(engine)]
    assert any("raises(completed) failed: " in record.getMessage() for record in caplog.records)


def test_a_job_cancelled_from_outside_is_an_event(engine: Engine) -> None:
    gate = Gate()
    slow: dict[str, Any] = {"heartbeat": timedelta(minutes=5), "lease": HOUR}  # no beat tells of it
    with working(engine, gate, **slow) as runner, runner.subscribe("cancelled") as subscription:
        (job_id,) = put(engine, 0)
        gate.wait(1)
        with Session(engine) as session, session.begin():
            cancel(session, job_id)
        assert subscription.get(SOON).job_id == job_id


def test_rescued_jobs_are_events(engine: Engine) -> None:
    dead = make_runner(engine, silent=timedelta(minutes=5))
    job_id = make_job(engine, state="running", token=f"{dead}/1")
    runner = Runner(engine, handling(nothing), queues={"default": 1}, **QUICK)
    with runner.subscribe("rescued") as subscription, runner:
        event = subscription.get(SOON)

    assert (event.job_id, event.job_kind, event.queue) == (job_id, "count", "default")


def test_pause_and_resume_of_its_own_queues_are_events(engine: Engine) -> None:
    def say(payload: str) -> None:
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_notify(current_schema() || '.river_control', :p)"), {"p": payload})

    with working(engine, nothing) as runner, runner.subscribe() as subscription:
        say('{"action": "pause", "queue": "of_others"}')
        say('{"action": "pause", "queue": "default"}')
        say('{"action": "resume", "queue": "*"}')
        events = [subscription.get(SOON) for _ in range(2)]

    assert [(event.kind, event.queue) for event in events] == [("queue_paused", "default"), ("queue_resumed", "*")]


def test_a_thousand_events_wait_and_more_are_dropped_with_a_count(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing), queues={"default": 20})
    with runner.subscribe("completed") as lazy, runner.subscribe("failed") as other, runner:
        make_jobs(engine, KEPT_EVENTS + 200)
        eventually(all_are(engine, "completed", KEPT_EVENTS + 200), 30)
        runner.stop()
        lazy.close()
        kept = len(list(lazy))

    assert KEPT_EVENTS == 1_000
    assert kept == 1_000
    assert lazy.dropped == {"completed": 200}
    assert other.dropped == {}


def test_a_closed_subscription_ends_and_hears_no_more() -> None:
    events = Events()
    subscription = events.subscribe(["completed"])
    events.put(Event("completed", "default"))
    subscription.close()
    subscription.close()
    events.put(Event("completed", "default"))

    assert [event.kind for event in subscription] == ["completed"]
    assert list(subscription) == []
    with pytest.raises(queue.Empty):
        subscription.get()
    assert not events.heard


def test_get_gives_up_after_its_timeout() -> None:
    subscription = Events().subscribe(["completed"])
    with pytest.raises(queue.Empty):
        subscription.get(timedelta(seconds=0.01))


def test_unknown_events_are_refused(engine: Engine) -> None:
    runner = Runner(engine, Workers(), queues={"default": 1})
    with pytest.raises(ConfigError, match="no such event: finished"):
        runner.subscribe("finished")  # type: ignore[arg-type]


def test_subscriptions_outlive_a_restart(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing), queues={"default": 1})
    with runner.subscribe("completed") as subscription:
        for _ in range(2):
            (job_id,) = put(engine, 0)
            with runner:
                assert subscription.get(SOON).job_id == job_id
