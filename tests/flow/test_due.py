"""Jobs that start when they are due, through a whole Runner."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import attrs
import pytest
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from sqla_river import (
    Exponential,
    InsertOptions,
    Job,
    Runner,
    Snooze,
    Unique,
    Workers,
    enqueue,
    enqueue_many,
    notify,
    rows,
    unique,
)
from sqla_river.context import JobContext
from sqla_river.rows import ANNOUNCED_AHEAD
from tests.making import Count, eventually, make_jobs, read_job, read_jobs
from tests.working import put

SLOW_POLL: Final = timedelta(minutes=5)
"""So that nothing is found by polling."""


@contextmanager
def noting(engine: Engine, answer: Any = None, **settings: Any) -> Generator[list[tuple[int, datetime]]]:
    """A runner, and when each attempt began; *answer* is what the handler does the first time."""
    began: list[tuple[int, datetime]] = []
    workers = Workers()

    def work(job: JobContext[Count]) -> Any:
        began.append((job.id, datetime.now(UTC)))
        if answer is not None and [job_id for job_id, _ in began].count(job.id) == 1:
            return answer()
        return None

    workers.register(Count, **settings)(work)
    with Runner(engine, workers, queues={"default": 10}, poll=SLOW_POLL, stop_timeout=timedelta(seconds=3)):
        yield began


def _has(began: list[Any], count: int) -> bool:
    return len(began) == count


def _is_past(moment: datetime) -> bool:
    return datetime.now(UTC) > moment


def _late(engine: Engine) -> float:
    """Seconds, at the 95th percentile, that fifty jobs begin after their time."""
    with noting(engine) as began:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            jobs = [
                enqueue(session, Count(number), scheduled_at=timedelta(seconds=0.3 + 1.2 * number / 50))
                for number in range(50)
            ]
        due = {job.id: job.scheduled_at for job in jobs}
        eventually(lambda: len(began) == 50, within=20, what="the jobs")
    late = sorted((at - due[job_id]).total_seconds() for job_id, at in began)
    assert late[0] >= -0.001  # none before its time
    return late[int(len(late) * 0.95)]


@pytest.mark.timed
def test_scheduled_jobs_start_within_100_ms_of_their_time_beside_many_that_are_due_later(engine: Engine) -> None:
    make_jobs(engine, 20_000, state="scheduled", due_in=timedelta(days=1))

    assert min(_late(engine) for _ in range(3)) < 0.1  # the machine may have been busy, not three times


def _one(session: Session, number: int, delay: timedelta) -> None:
    enqueue(session, Count(number), scheduled_at=delay)


def _many(session: Session, number: int, delay: timedelta) -> None:
    enqueue_many(session, [(Count(number), InsertOptions(scheduled_at=delay))])


def _core(session: Session, number: int, delay: timedelta) -> None:
    enqueue(session.connection(), Count(number), scheduled_at=delay)


def _unique(session: Session, number: int, delay: timedelta) -> None:
    enqueue(session, Count(number), scheduled_at=delay, unique=Unique(by_args=True))


@pytest.mark.parametrize("ahead", [ANNOUNCED_AHEAD, timedelta(0)], ids=["due soon", "due later"])
@pytest.mark.parametrize("put", [_one, _many, _core, _unique])
@pytest.mark.parametrize("mode", ["transaction", "after_commit"])
def test_a_job_whose_transaction_commits_after_its_time_starts_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ahead: timedelta, put: Any, mode: Any
) -> None:
    """Also one that was not due soon when it was put in, and so was not announced then."""
    monkeypatch.setattr(rows, "ANNOUNCED_AHEAD", ahead)
    monkeypatch.setattr(notify, "ANNOUNCED_AHEAD", ahead)
    monkeypatch.setattr(notify, "_IDLE", 0.1)
    monkeypatch.setattr(Job, "__river__", attrs.evolve(Job.__river__, notify=mode))
    late: list[timedelta] = []
    with noting(engine) as began, Session(engine) as session:
        for number in range(3):
            with session.begin():
                session.execute(text("SELECT pg_sleep(0.05)"))  # the delay counts from the start of the transaction
                put(session, number, timedelta(milliseconds=100))
                session.flush()
                at = session.scalars(select(func.max(Job.scheduled_at))).one()
                eventually(partial(_is_past, at + timedelta(seconds=0.2)), what="its time")
                assert len(began) == number
            committed = datetime.now(UTC)
            eventually(partial(_has, began, number + 1), what="the start")  # the poll is five minutes away
            late.append(began[-1][1] - committed)
    assert min(late) < timedelta(seconds=1), late  # the machine may have been busy, not three times


@pytest.mark.parametrize("how", ["retry", "snooze"])
def test_a_retry_and_a_snooze_start_on_time(engine: Engine, how: str) -> None:
    delay = timedelta(seconds=0.3)

    def answer() -> Any:
        if how == "snooze":
            return Snooze(delay)
        raise RuntimeError("the first time")

    late: list[float] = []
    with (
        noting(engine, answer, retry=Exponential(base=delay, factor=1)) as began,
        Session(engine, expire_on_commit=False) as session,
    ):
        for number in range(3):
            with session.begin():
                job = enqueue(session, Count(number))
            eventually(partial(_has, began, 2 * number + 1), what="the first attempt")
            eventually(partial(_has, began, 2 * number + 2), what="the second attempt")
            due = read_job(engine, job.id)["scheduled_at"]
            late.append((began[-1][1] - due).total_seconds())

    assert min(late) >= -0.001
    assert min(late) < 0.1
    assert {row["state"] for row in read_jobs(engine)} == {"completed"}


def test_a_job_that_nobody_announced_starts_within_a_poll_of_its_time(engine: Engine) -> None:
    workers = Workers()
    began: list[float] = []
    workers.register(Count)(lambda job: began.append(time.monotonic()))
    late: list[float] = []

    with Runner(engine, workers, queues={"default": 1}, poll=timedelta(seconds=0.3), listen=False):
        for number in range(3):
            before = time.monotonic()
            make_jobs(engine, 1, state="scheduled", due_in=timedelta(seconds=0.5))
            made = time.monotonic()
            eventually(partial(_has, began, number + 1))
            assert began[-1] - before > 0.499
            late.append(began[-1] - made - 0.5)

    assert min(late) < 0.3 * 1.1 + 1, late  # the machine may have been busy, not three times


ALWAYS_BUT_RETRYABLE: Final = Unique(key="k", by_state=unique.ALWAYS)


def test_a_key_that_an_open_transaction_is_about_to_take_holds_up_only_the_job_that_waits_for_it(
    engine: Engine,
) -> None:
    with Session(engine) as session, session.begin():
        enqueue(session, Count(0), unique=ALWAYS_BUT_RETRYABLE)
        another = Unique(key="another", by_state=unique.ALWAYS)
        enqueue(session, Count(1), unique=another)
    waits, free = [row["id"] for row in read_jobs(engine)]
    with engine.begin() as connection:
        connection.execute(text("UPDATE river_job SET state = 'retryable', scheduled_at = now()"))
    others = make_jobs(engine, 10, state="scheduled", due_in=timedelta(0))
    with Session(engine) as open_, noting(engine) as began:
        enqueue(open_, Count(2), unique=ALWAYS_BUT_RETRYABLE)
        open_.flush()
        available = make_jobs(engine, 1)
        eventually(partial(_has, began, 12), what="all but one to begin")
        put(engine, 3, scheduled_at=timedelta(seconds=1))
        eventually(partial(_has, began, 13), what="what comes due later")
        started = {job_id for job_id, _ in began}
        open_.rollback()
        eventually(partial(_has, began, 14), what="the last one, when the key is free")

    assert started >= {free, *others, *available}
    assert began[-1][0] == waits


def test_a_due_job_that_somebody_has_locked_delays_no_other(engine: Engine) -> None:
    with noting(engine) as began:
        (locked,) = put(engine, 1, scheduled_at=timedelta(seconds=2))
        with engine.begin() as theirs:
            theirs.execute(text("SELECT 1 FROM river_job WHERE id = :id FOR UPDATE"), {"id": locked})
            (other,) = put(engine, 2, scheduled_at=timedelta(seconds=5.5))  # the timer looks but seldom by then
            eventually(partial(_has, began, 1))
        row = read_job(engine, other)
        eventually(partial(_has, began, 2))

    assert [job_id for job_id, _ in began] == [other, locked]
    assert row["attempted_at"] - row["scheduled_at"] < timedelta(seconds=1)
