"""Queues that are paused, resumed, added, removed and resized while runners work them."""

import random
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_river import JobContext, pause, resume
from sqla_river.duties.rescue import Isolate
from sqla_river.errors import QueueNotFoundError
from sqla_river.incarnation import Incarnation
from sqla_river.rows import ID
from sqla_river.runner import Runner
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually, fetch, make_job, make_jobs, opened, read_job
from tests.working import SLOW_POLL, handling, is_state, nothing, put, working

SOON = timedelta(seconds=20)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url, "river_queue", "river_suspect", "river_duty", "river_runner")


def now(engine: Engine) -> Any:
    """The database's clock."""
    with engine.connect() as connection:
        return connection.execute(text("SELECT clock_timestamp()")).scalar_one()


def paused(engine: Engine, queue: str) -> None:
    with Session(engine) as session, session.begin():
        pause(session, queue)


def resumed(engine: Engine, queue: str) -> None:
    with Session(engine) as session, session.begin():
        resume(session, queue)


def left(engine: Engine, queue: str) -> int:
    """How many jobs of *queue* wait."""
    with engine.connect() as connection:
        asked = text("SELECT count(*) FROM river_job WHERE state = 'available' AND queue = :queue")
        return int(connection.execute(asked, {"queue": queue}).scalar_one())


def fewer_left(engine: Engine, queue: str, most: int) -> Callable[[], bool]:
    """A condition: some of *most* waiting jobs of *queue* have started."""

    def fewer() -> bool:
        return left(engine, queue) < most

    return fewer


def probe(engine: Engine, *queues: str) -> None:
    """Wait until the runners of *queues* have fetched, all their queues at once, in snapshots that begin now."""
    ids = [put(engine, 0, queue=queue)[0] for queue in queues]
    for job_id in ids:
        eventually(is_state(engine, job_id, "completed"))


# ---- pause


@pytest.mark.parametrize("which", ["load", "*"])
def test_no_fetch_that_begins_after_a_pause_starts_a_job_and_resume_wakes_at_once(engine: Engine, which: str) -> None:
    """Two runners under load; nothing is found by polling. The ledger is the time of each fetch, by the database."""
    windows: list[tuple[Any, Any]] = []
    with (
        working(engine, nothing, queues={"load": 4, "a": 1}, poll=SLOW_POLL),
        working(engine, nothing, queues={"load": 4, "b": 1}, poll=SLOW_POLL),
    ):
        for _ in range(25):
            make_jobs(engine, 60, queue="load")
            paused(engine, which)
            since = now(engine)
            if which == "*":
                put(engine, 0, queue="a")
                resumed(engine, "a")
                resumed(engine, "b")
            put(engine, 0, queue="load")  # both runners hear that there is something in it
            probe(engine, "a", "b")
            windows.append((since, now(engine)))
            waiting = left(engine, "load")
            assert waiting
            resumed(engine, "load")
            eventually(fewer_left(engine, "load", waiting))
        resumed(engine, "*")
        eventually(lambda: set(count_states(engine)) == {"completed"}, within=30)

    with engine.connect() as connection:
        starts = list(
            connection.execute(text("SELECT attempted_at FROM river_job WHERE queue = 'load' ORDER BY 1")).scalars()
        )
    assert len(starts) == 25 * 61
    late = [at for at in starts for since, until in windows if since < at < until]
    assert late == []


def test_nothing_of_a_paused_queue_starts_be_it_due_a_retry_or_a_suspect(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Isolate, "every", timedelta(milliseconds=20))
    soon = timedelta(milliseconds=50)
    ids = [
        make_job(engine, queue="mail", state="scheduled", due_in=soon),
        make_job(engine, queue="mail", state="retryable", due_in=soon, attempt=1),
        make_job(engine, queue="mail", attempt=2),
    ]
    other_suspect = make_job(engine, queue="a", attempt=2)
    with engine.begin() as connection:
        for job_id in (ids[2], other_suspect):
            connection.execute(text("INSERT INTO river_suspect VALUES (:id, 2, 0)"), {"id": job_id})
    paused(engine, "mail")

    with working(engine, nothing, queues={"mail": 5, "a": 1}):
        eventually(is_state(engine, other_suspect, "completed"), what="the suspect of the other queue to run alone")
        for job_id in ids:
            eventually(is_state(engine, job_id, "available"))
        probe(engine, "a")
        before = [read_job(engine, job_id) for job_id in ids]
        resumed(engine, "mail")
        for job_id in ids:
            eventually(is_state(engine, job_id, "completed"), within=20)

    assert [(row["state"], row["attempt"]) for row in before] == [("available", 0), ("available", 1), ("available", 2)]


def test_a_runner_that_only_polls_sees_both_with_its_next_poll(engine: Engine) -> None:
    paused(engine, "mail")
    with working(engine, nothing, queues={"mail": 2, "a": 1}, listen=False, poll=timedelta(milliseconds=20)):
        (job_id,) = put(engine, 0, queue="mail")
        probe(engine, "a")
        probe(engine, "a")
        before = read_job(engine, job_id)["state"]
        resumed(engine, "mail")
        eventually(is_state(engine, job_id, "completed"))
        paused(engine, "mail")
        (again,) = put(engine, 0, queue="mail")
        probe(engine, "a")

    assert (before, read_job(engine, again)["state"]) == ("available", "available")


def test_running_jobs_of_a_paused_queue_go_on_and_jobs_can_be_put_in(engine: Engine) -> None:
    gate = Gate()
    with working(engine, gate, 1):
        (first,) = put(engine, 0)
        gate.wait()
        paused(engine, "default")
        (second,) = put(engine, 0)
        gate.open()
        eventually(is_state(engine, first, "completed"))

    assert read_job(engine, second)["state"] == "available"


def test_pause_and_resume_are_events_once_they_are_committed(engine: Engine) -> None:
    with working(engine, nothing) as runner, runner.subscribe("queue_paused", "queue_resumed") as subscription:
        with Session(engine) as session:
            pause(session, "default")
            session.rollback()
        for verb, queue in ((pause, "of_others"), (pause, "default"), (resume, "default"), (pause, "*"), (resume, "*")):
            with Session(engine) as session, session.begin():
                verb(session, queue)
        events = [subscription.get(SOON) for _ in range(4)]

    assert [(event.kind, event.queue) for event in events] == [
        ("queue_paused", "default"),
        ("queue_resumed", "default"),
        ("queue_paused", "*"),
        ("queue_resumed", "*"),
    ]


@pytest.mark.parametrize("first", [False, True], ids=["of a row", "that makes the row"])
def test_an_open_transaction_that_pauses_holds_up_no_runner(engine: Engine, first: bool) -> None:
    if not first:
        (job_id,) = put(engine, 0)
        with working(engine, nothing):
            eventually(is_state(engine, job_id, "completed"))
    with Session(engine) as session:
        pause(session, "default")
        (job_id,) = put(engine, 0)
        with working(engine, nothing, poll=SLOW_POLL) as runner:
            assert runner._incarnation is not None
            assert runner._incarnation._heart.beaten
            assert runner.health().ready
            eventually(is_state(engine, job_id, "completed"))  # the pause is not there before it is committed
        session.rollback()


# ---- live queues


class Turnstile:
    """A handler that holds each job until one is let through."""

    def __init__(self) -> None:
        self.running = 0
        self._free = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, job: JobContext[Count]) -> None:
        if job.queue == "a":
            return
        with self._lock:
            self.running += 1
        assert self._free.acquire(timeout=60)
        with self._lock:
            self.running -= 1

    def let(self, count: int = 1) -> None:
        self._free.release(count)

    def holds(self, count: int) -> None:
        eventually(lambda: self.running == count, what=f"{count} jobs to run")


def row_of(engine: Engine, runner: Runner) -> dict[str, int]:
    """Slots by queue as the row of *runner* says."""
    with engine.connect() as connection:
        found = connection.execute(text("SELECT queues, slots FROM river_runner WHERE id = :id"), {"id": runner.id})
        queues, slots = found.one()
        return dict(zip(queues, slots, strict=True))


def named(engine: Engine) -> set[str]:
    """The queues that have a row."""
    with engine.connect() as connection:
        return set(connection.execute(text("SELECT name FROM river_queue")).scalars())


def slot_threads() -> int:
    return sum(thread.name.startswith("sqla_river-slot") for thread in threading.enumerate())


def test_a_queue_is_added_to_a_runner_at_work(engine: Engine) -> None:
    (waiting,) = put(engine, 0, queue="mail")
    with working(engine, nothing, queues={"a": 1}, poll=SLOW_POLL) as runner:
        runner.queues.add("mail", 2)
        rows = named(engine)
        eventually(is_state(engine, waiting, "completed"))
        probe(engine, "mail", "a")  # it is announced like the others
        eventually(lambda: row_of(engine, runner) == {"a": 1, "mail": 2}, what="the row of the runner to follow")

    assert rows == {"a", "mail"}


def test_an_added_queue_is_paused_if_it_was_and_can_be_by_a_star(engine: Engine) -> None:
    paused(engine, "mail")
    put(engine, 0, queue="mail")
    with working(engine, nothing, queues={"a": 1}) as runner:
        runner.queues.add("mail", 1)
        runner.queues.add("sms", 1)
        paused(engine, "*")
        put(engine, 0, queue="sms")
        resumed(engine, "a")
        probe(engine, "a")

    assert count_states(engine) == {"available": 2, "completed": 1}


def test_a_removed_queue_is_fetched_no_more_and_its_running_jobs_end(engine: Engine) -> None:
    turnstile = Turnstile()
    ids = put(engine, *range(5), queue="mail")
    with working(engine, turnstile, queues={"mail": 2, "a": 1}) as runner:
        turnstile.holds(2)
        runner.queues.remove("mail")
        probe(engine, "a")  # its slot finds a thread, though as many as there are slots are busy
        turnstile.let(2)
        turnstile.holds(0)
        put(engine, 0, queue="mail")
        probe(engine, "a", "a")
        rest = turnstile.running, left(engine, "mail")
        eventually(lambda: row_of(engine, runner) == {"a": 1}, what="the row of the runner to follow")
        eventually(lambda: slot_threads() == 1, what="the threads to end")
        runner.queues.add("mail", 3)
        turnstile.holds(3)
        turnstile.let(10)
        eventually(lambda: set(count_states(engine)) == {"completed"})

    assert rest == (0, 4)
    assert {read_job(engine, job_id)["attempt"] for job_id in ids} == {1}


@pytest.mark.parametrize(("slots", "stay"), [({"a": 1}, [1]), ({"a": 1, "mail": 1}, [1, 2]), ({"mail": 5}, [2, 3])])
def test_what_has_not_begun_and_has_no_slot_any_more_goes_back_with_its_attempt(
    engine: Engine, slots: dict[str, int], stay: list[int]
) -> None:
    ids = [make_job(engine, queue=queue) for queue in ("a", "mail", "mail")]
    stations = Incarnation(Runner(engine, handling(nothing), queues={"mail": 2, "a": 1})._orders)
    threads = stations._held._threads
    threads._made = 3  # which are slow to begin
    with opened(engine) as own:
        stations._held.deliver(fetch(own, slots={"mail": 2, "a": 1}))
    stations._held.resize(slots)
    waiting = threads.take_back()
    stations.completer.step()
    stations.completer.close()

    assert ids == [1, 2, 3]
    assert [row[ID] for row in waiting] == stay
    for job_id in ids:
        row = read_job(engine, job_id)
        left = (row["state"], row["attempt"], row["errors"])
        assert left == (("running", 1, None) if job_id in stay else ("available", 0, None))
        assert (job_id in stations._held) == (job_id in stay)


@pytest.mark.parametrize(("queue", "stay"), [("mail", [1, 3, 4]), ("*", [1, 3]), ("elsewhere", [1, 2, 3, 4])])
def test_a_pause_gives_back_what_was_fetched_ahead(engine: Engine, queue: str, stay: list[int]) -> None:
    ids = [make_job(engine, queue=queue) for queue in ("mail", "mail", "a", "a")]
    stations = Incarnation(Runner(engine, handling(nothing), queues={"mail": 1, "a": 1})._orders)
    stations._held._threads._made = 2  # which are slow to begin
    with opened(engine) as own:
        stations._held.deliver(fetch(own, slots={"mail": 2, "a": 2}))
    stations._controlled("pause", queue, None)
    stations.completer.step()
    stations.completer.close()

    assert ids == [1, 2, 3, 4]
    for job_id in ids:
        row = read_job(engine, job_id)
        assert (row["state"], row["attempt"]) == (("running", 1) if job_id in stay else ("available", 0))
        assert (job_id in stations._held) == (job_id in stay)


def test_what_a_fetch_brings_of_a_removed_queue_goes_back_with_its_attempt(engine: Engine) -> None:
    gone, kept = make_job(engine, queue="mail"), make_job(engine, queue="a")
    gate = Gate()
    runner = Runner(engine, handling(gate), queues={"mail": 1, "a": 1})
    stations = Incarnation(runner._orders)
    with opened(engine) as own:
        rows = fetch(own, slots={"mail": 1, "a": 1})
    stations._held.resize({"a": 1})
    stations._held.deliver(rows)
    stations.completer.step()
    back = read_job(engine, gone)
    gate.wait()
    gate.open()
    eventually(lambda: not stations._held)
    stations.completer.step()
    stations._held.stop()
    stations.completer.close()

    assert (back["state"], back["attempt"], back["errors"]) == ("available", 0, None)
    assert [job.id for job in gate.started] == [kept]
    assert read_job(engine, kept)["state"] == "completed"


def test_slots_change_at_work(engine: Engine) -> None:
    turnstile = Turnstile()
    put(engine, *range(8), queue="mail")
    with working(engine, turnstile, queues={"mail": 1, "a": 1}, poll=SLOW_POLL) as runner:
        turnstile.holds(1)
        runner.queues["mail"] = 4
        turnstile.holds(4)
        eventually(lambda: row_of(engine, runner) == {"mail": 4, "a": 1}, what="the row of the runner to follow")

        runner.queues["mail"] = 2
        running: list[int] = []
        for running_next in (3, 2):
            turnstile.let()
            turnstile.holds(running_next)
            probe(engine, "a")
            running.append(turnstile.running)
        turnstile.let()
        eventually(lambda: left(engine, "mail") == 3, what="the next to start")
        turnstile.holds(2)
        eventually(lambda: slot_threads() == 3, what="the threads to end")
        turnstile.let(10)
        eventually(lambda: set(count_states(engine)) == {"completed"})
        runner.queues["mail"] = 1
        eventually(lambda: slot_threads() == 2, what="an idle thread to end")

    assert running == [3, 2]


def test_changes_outlive_a_stop_and_a_runner_takes_what_was_changed_while_it_stood(engine: Engine) -> None:
    runner = Runner(engine, handling(nothing), queues={"a": 1})
    with runner:
        runner.queues.add("mail", 1)
    runner.queues.add("sms", 1)
    with runner:
        probe(engine, "a", "mail", "sms")
        assert row_of(engine, runner) == {"a": 1, "mail": 1, "sms": 1}
        with pytest.raises(QueueNotFoundError):
            runner.queues.remove("fax")

    assert named(engine) == {"a", "mail", "sms"}


def test_many_threads_may_change_the_queues_under_load_and_no_job_is_lost_or_costs_an_attempt(engine: Engine) -> None:
    names = [f"q{number}" for number in range(4)]
    runs: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        runs.append(job.id)

    for name in names:
        make_jobs(engine, 400, queue=name)
    with working(engine, handler, queues={"a": 1}) as runner:

        def change(name: str) -> None:
            chosen = random.Random(name)
            for _ in range(25):
                runner.queues.add(name, chosen.randint(1, 10))
                runner.queues[name] = chosen.randint(1, 10)
                runner.queues.remove(name)
            runner.queues.add(name, 5)

        threads = [threading.Thread(target=change, args=[name]) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        eventually(lambda: count_states(engine) == {"completed": 1_600}, within=30)
        eventually(lambda: row_of(engine, runner) == dict.fromkeys(names, 5) | {"a": 1})
        eventually(lambda: slot_threads() <= 21, what="the threads to end")

    assert sorted(runs) == sorted(set(runs))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT max(attempt) FROM river_job")).scalar() == 1
