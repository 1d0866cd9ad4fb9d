"""The hands of an operator while runners work: what they change is done, at once and for good."""

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from sqla_river import Job, JobContext, cancel, change_priority, delete, reschedule, retry
from sqla_river.errors import JobRunningError
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually, make_job, make_jobs, read_job
from tests.working import HOUR, SLOW_POLL, after, errors, handling, is_state, put, settled, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def test_a_cancelled_job_that_is_retried_and_fails_is_tried_again(engine: Engine) -> None:
    """River keeps the mark of the cancel, and the failure would cancel the job once more."""

    def fails(job: JobContext[Count]) -> None:
        job.cancelled.wait(0.01 if job.attempt > 1 else 10)
        raise ValueError(str(job.cancelled.reason))

    (job_id,) = put(engine, 0)
    with working(engine, handling(fails, retry=after(HOUR)), poll=SLOW_POLL):
        eventually(is_state(engine, job_id, "running"))
        with Session(engine) as session, session.begin():
            cancel(session, job_id)
        eventually(is_state(engine, job_id, "cancelled"))
        with Session(engine) as session, session.begin():
            retry(session, job_id)
        eventually(is_state(engine, job_id, "retryable"))

    row = read_job(engine, job_id)
    assert (row["attempt"], errors(row)) == (2, ["ValueError: cancel", "ValueError: None"])
    assert "cancel_attempted_at" not in row["metadata"]


def test_what_is_retried_or_becomes_due_by_hand_starts_at_once(engine: Engine) -> None:
    """Runners are told: their next look would come in minutes."""
    ended = [make_job(engine, state=state) for state in ("completed", "cancelled", "discarded", "pending")]
    later = make_jobs(engine, 3, state="scheduled", due_in=HOUR)
    with working(engine, Gate(opened=True), poll=SLOW_POLL):
        with Session(engine) as session, session.begin():
            for job_id in ended:
                retry(session, job_id)
        eventually(lambda: count_states(engine) == {"completed": 4, "scheduled": 3})
        with Session(engine) as session, session.begin():
            reschedule(session, later[0], scheduled_at=timedelta(0))
            reschedule(session, later[1], scheduled_at=timedelta(seconds=0.3))
            retry(session, Job.id == later[2])
        eventually(lambda: count_states(engine) == {"completed": 7})


def test_a_running_job_is_left_to_its_runner(engine: Engine) -> None:
    gate = Gate()
    (job_id,) = put(engine, 0, max_attempts=1)
    with working(engine, gate):
        gate.wait(1)
        with Session(engine) as session, session.begin():
            for verb in (retry, delete):
                with pytest.raises(JobRunningError):
                    verb(session, job_id)
            assert change_priority(session, job_id, priority=3).state == "running"
            assert delete(session, select(Job)).left == {job_id: "running"}
        gate.open()
        row = settled(engine, job_id)

    assert (row["state"], row["priority"], row["attempt"]) == ("completed", 3, 1)


def test_jobs_start_in_the_order_of_their_new_priority(engine: Engine) -> None:
    first, second, third = make_jobs(engine, 3, priority=2)
    with Session(engine) as session, session.begin():
        change_priority(session, third, priority=1)
        change_priority(session, Job.id == first, priority=4)
    gate = Gate(opened=True)
    with working(engine, gate, slots=1):
        started = [job.id for job in gate.wait(3)]

    assert started == [third, second, first]
