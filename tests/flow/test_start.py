"""From the commit to the start of the handler."""

import threading
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_river import Job, JobContext, enqueue, enqueue_many
from tests.making import (
    Count,
    Gate,
    all_are,
    count_states,
    eventually,
    make_job,
    read_jobs,
)
from tests.working import SLOW_POLL, backends, put, working


def test_a_transaction_that_rolls_back_leaves_no_job_and_wakes_nobody(engine: Engine) -> None:
    gate = Gate(opened=True)
    with working(engine, gate, poll=SLOW_POLL), engine.connect() as listening:
        raw: Any = listening.execution_options(isolation_level="AUTOCOMMIT").connection.dbapi_connection
        raw.execute('LISTEN "public.river_insert"')
        with Session(engine) as session:
            enqueue(session, Count(1))
            session.flush()
            session.rollback()
            session.add(Job(Count(2), queue="other"))
            session.flush()
            session.rollback()
        put(engine, 3)  # a commit after the rollback: nothing that was said before it can come later
        heard = [note.payload for note in raw.notifies(timeout=30, stop_after=1)]
        gate.wait()
        raw.execute("UNLISTEN *")

    assert [job.args for job in gate.started] == [Count(3)]
    assert heard == ['{"queue": "default"}']
    assert count_states(engine) == {"completed": 1}


def test_a_savepoint_that_rolls_back_takes_its_job_with_it(engine: Engine) -> None:
    gate = Gate(opened=True)
    with working(engine, gate, poll=SLOW_POLL):
        with Session(engine) as session, session.begin():
            enqueue(session, Count(1))
            with session.begin_nested() as savepoint:
                enqueue(session, Count(2))
                session.flush()
                savepoint.rollback()
        gate.wait()

    assert [job.args for job in gate.started] == [Count(1)]


@pytest.mark.timed
def test_a_committed_job_starts_within_10_ms_on_an_idle_runner(engine: Engine) -> None:
    started: dict[int, float] = {}
    told = threading.Semaphore(0)

    def handler(job: JobContext[Count]) -> None:
        started[job.args.number] = time.perf_counter()
        told.release()

    def measure() -> float:
        latencies: list[float] = []
        for number in range(100):
            with Session(engine) as session:
                enqueue(session, Count(number))
                session.flush()
                began = time.perf_counter()
                session.commit()
            assert told.acquire(timeout=10)
            latencies.append(started[number] - began)
        return sorted(latencies)[94]

    with working(engine, handler, poll=SLOW_POLL):
        # The machine may be busy with other things: one quiet round of three will do.
        best = measure()
        for _ in range(2):
            best = best if best < 0.010 else min(best, measure())

    assert best < 0.010


def test_jobs_run_by_priority_then_time_then_id_under_one_slot(engine: Engine) -> None:
    gate = Gate()
    put(engine, 0)

    with working(engine, gate, 1):
        gate.wait()
        for number, priority in enumerate((3, 1, 4, 2, 1, 3), start=1):
            put(engine, number, priority=priority)
        put(engine, 7, priority=1, scheduled_at=timedelta(hours=-1))
        gate.open()
        jobs = gate.wait(8)

    assert [job.args.number for job in jobs] == [0, 7, 2, 5, 4, 1, 6, 3]


def test_a_delayed_job_starts_when_it_is_due_and_not_before(engine: Engine) -> None:
    delays = [timedelta(seconds=0.3), timedelta(seconds=0.8), timedelta(seconds=0.5)]
    gate = Gate(opened=True)

    with working(engine, gate, slots=1, poll=SLOW_POLL):
        with Session(engine) as session, session.begin():  # all of them count from its start
            for number, delay in enumerate(delays):
                enqueue(session, Count(number), scheduled_at=delay)
        gate.wait(3)

    assert [job.args.number for job in gate.started] == [0, 2, 1]
    late = [row["attempted_at"] - row["scheduled_at"] for row in read_jobs(engine)]
    assert min(late) >= timedelta(0)
    assert min(late) < timedelta(seconds=0.5), late  # the machine may have been busy, not three times


def test_a_job_that_is_due_far_ahead_waits(engine: Engine) -> None:
    gate = Gate(opened=True)
    put(engine, 1, scheduled_at=timedelta(hours=1))

    with working(engine, gate):
        put(engine, 2)
        gate.wait()

    assert [job.args.number for job in gate.started] == [2]
    assert count_states(engine) == {"completed": 1, "scheduled": 1}


def test_a_job_that_nobody_announced_is_found_by_polling(engine: Engine) -> None:
    gate = Gate(opened=True)

    with working(engine, gate, listen=False, poll=timedelta(milliseconds=50)):
        make_job(engine)
        make_job(engine, state="scheduled", due_in=timedelta(seconds=0.1))
        gate.wait(2)

    assert backends(engine, "listen") == 0


def test_pending_jobs_are_left_alone(engine: Engine) -> None:
    gate = Gate(opened=True)
    put(engine, 1, pending=True)

    with working(engine, gate):
        put(engine, 2)
        gate.wait()

    assert count_states(engine) == {"completed": 1, "pending": 1}


def test_a_busy_queue_does_not_wait_for_the_poll_beside_an_idle_one(engine: Engine) -> None:
    gate = Gate(opened=True)
    put(engine, *range(30), queue="busy")

    with working(engine, gate, queues={"busy": 1, "idle": 5}, poll=SLOW_POLL):
        gate.wait(30)

    assert [job.args.number for job in gate.started] == list(range(30))


def test_queues_do_not_take_each_others_slots(engine: Engine) -> None:
    gate = Gate()
    put(engine, *range(5), queue="a")
    put(engine, *range(5), queue="b")

    with working(engine, gate, queues={"a": 2, "b": 3}):
        gate.wait(5)
        running = Counter(job.queue for job in gate.started)
        gate.open()

    assert running == {"a": 2, "b": 3}


def test_two_runners_run_ten_thousand_jobs_once_each(engine: Engine) -> None:
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        ran.append(job.args.number)

    with working(engine, handler, 50), working(engine, handler, 50):  # both, before there is anything to do
        with Session(engine) as session, session.begin():
            enqueue_many(session, (Count(number) for number in range(10_000)))
        eventually(all_are(engine, "completed", 10_000), within=60)

    assert sorted(ran) == list(range(10_000))
    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    assert len({row["token"].partition("/")[0] for row in read_jobs(engine)}) == 2
