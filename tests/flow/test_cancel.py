"""Cancelling jobs: in every state, as part of the caller's transaction, for good."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, Integer, column, select, text, true, values
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import Cancel, Job, JobContext, JobState, Snooze, cancel
from sqla_river.asyncio import cancel as cancel_async
from sqla_river.choice import Filter
from sqla_river.errors import JobNotFoundError
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually, make_job, make_jobs, read_job, read_jobs, text_of
from tests.working import HOUR, SLOW_POLL, after, begun, errors, handling, put, settled, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def cancel_now(engine: Engine, job_id: int) -> Job:
    with Session(engine, expire_on_commit=False) as session, session.begin():
        return cancel(session, job_id)


# ---- states


@pytest.mark.parametrize("state", ["available", "scheduled", "retryable", "pending"])
def test_a_job_that_does_not_run_is_cancelled_at_once(engine: Engine, state: str) -> None:
    job_id = make_job(engine, state=state, due_in=HOUR if state in {"scheduled", "retryable"} else None)

    job = cancel_now(engine, job_id)

    assert (job.state, job.finalized_at is not None) == (JobState.CANCELLED, True)
    assert "cancel_attempted_at" in job.metadata_
    row = read_job(engine, job_id)
    assert (row["state"], row["finalized"]) == ("cancelled", True)


@pytest.mark.parametrize("state", ["completed", "cancelled", "discarded"])
def test_a_finished_job_is_left_as_it_is(engine: Engine, state: str) -> None:
    job_id = make_job(engine, state=state)
    before = text_of(engine, job_id)

    assert cancel_now(engine, job_id).state == state

    assert text_of(engine, job_id) == before


def test_a_running_job_is_marked_and_not_finished(engine: Engine) -> None:
    job_id = make_job(engine, state="running")

    job = cancel_now(engine, job_id)

    assert (job.state, job.finalized_at) == (JobState.RUNNING, None)
    assert "cancel_attempted_at" in job.metadata_


def test_a_job_that_is_not_there_is_reported(engine: Engine) -> None:
    with Session(engine) as session, pytest.raises(JobNotFoundError) as caught:
        cancel(session, 4711)

    assert caught.value.job_id == 4711


@pytest.mark.parametrize("state", ["available", "running"])
def test_it_is_part_of_the_callers_transaction(engine: Engine, state: str) -> None:
    job_id = make_job(engine, state=state)
    before = text_of(engine, job_id)

    with Session(engine) as session:
        cancel(session, job_id)
        session.rollback()

    assert text_of(engine, job_id) == before


def test_a_rolled_back_cancel_tells_nobody(engine: Engine) -> None:
    gate = Gate()
    (job_id,) = put(engine, 0)
    with working(engine, gate, heartbeat=timedelta(seconds=0.1)):
        (job,) = gate.wait(1)
        with Session(engine) as session:
            cancel(session, job_id)
            session.rollback()
        assert not job.cancelled.wait(0.4)  # some heartbeats
        gate.open()
        assert settled(engine, job_id)["state"] == "completed"


def test_a_connection_will_do(engine: Engine) -> None:
    ids = make_jobs(engine, 2)
    with engine.begin() as connection:
        assert cancel(connection, ids[0]).state == JobState.CANCELLED
        assert cancel(connection, Job.id == ids[1]).count == 1
        with pytest.raises(JobNotFoundError):
            cancel(connection, 4711)

    assert count_states(engine) == {"cancelled": 2}


def test_an_async_session_will_do(engine: Engine) -> None:
    import asyncio

    ids = make_jobs(engine, 3)

    async def run() -> Any:
        own = create_async_engine(engine.url)
        async with AsyncSession(own, expire_on_commit=False) as session, session.begin():
            one = (await cancel_async(session, ids[0])).state
            many = await cancel_async(session, select(Job).where(Job.id > ids[0]))
            with pytest.raises(JobNotFoundError):
                await cancel_async(session, 4711)
        await own.dispose()
        return one, many.count

    assert asyncio.run(run()) == (JobState.CANCELLED, 2)
    assert count_states(engine) == {"cancelled": 3}


# ---- a running job is told


def raises_soon(job: JobContext[Count]) -> None:
    assert job.cancelled.wait(30)
    raise RuntimeError(job.cancelled.reason)


def test_a_running_job_is_told_within_milliseconds(engine: Engine) -> None:
    took: list[float] = []
    with working(engine, raises_soon, poll=SLOW_POLL, heartbeat=timedelta(seconds=10)):
        for _ in range(5):
            (job_id,) = put(engine, 0)
            eventually(lambda: read_job(engine, job_id)["state"] == "running", what="the start")  # noqa: B023
            began = time.monotonic()
            cancel_now(engine, job_id)
            row = eventually(lambda: _finalized(engine, job_id), what="the end")  # noqa: B023
            took.append(time.monotonic() - began)
            assert (row["state"], errors(row)) == ("cancelled", ["RuntimeError: cancel"])

    assert min(took) < 0.5, took  # a heartbeat comes every 10 s only


def _finalized(engine: Engine, job_id: int) -> Any:
    row = read_job(engine, job_id)
    return row if row["finalized"] else None


def test_without_listen_it_is_told_within_one_heartbeat(engine: Engine) -> None:
    took: list[float] = []
    with working(engine, raises_soon, listen=False, heartbeat=timedelta(seconds=0.5), lease=timedelta(seconds=5)):
        for _ in range(3):
            (job_id,) = put(engine, 0)
            eventually(lambda: read_job(engine, job_id)["state"] == "running", what="the start")  # noqa: B023
            began = time.monotonic()
            cancel_now(engine, job_id)
            row = eventually(lambda: _finalized(engine, job_id), what="the end")  # noqa: B023
            took.append(time.monotonic() - began)
            assert row["state"] == "cancelled"

    assert min(took) < 0.5 + 1, took  # the machine may have been busy, not three times


def errs(job: JobContext[Count]) -> None:
    raise ValueError


def snoozes(job: JobContext[Count]) -> Snooze:
    return Snooze(timedelta(0))


def snoozes_long(job: JobContext[Count]) -> Snooze:
    return Snooze(HOUR)


def raises_a_snooze(job: JobContext[Count]) -> None:
    raise Snooze(timedelta(0))


@pytest.mark.parametrize(
    ("end", "delay"),
    [
        (errs, timedelta(0)),
        (errs, timedelta(seconds=1)),
        (errs, HOUR),
        (snoozes, HOUR),
        (snoozes_long, HOUR),
        (raises_a_snooze, HOUR),
    ],
)
@pytest.mark.parametrize("listens", [True, False])
def test_a_cancelled_job_never_runs_again_whatever_its_handler_does(
    engine: Engine, end: Callable[[JobContext[Count]], Any], delay: timedelta, listens: bool
) -> None:
    runs: list[int] = []
    started, go_on = threading.Event(), threading.Event()

    def handler(job: JobContext[Count]) -> Any:
        runs.append(job.attempt)
        started.set()
        assert go_on.wait(30)
        return end(job)

    (job_id,) = put(engine, 0)
    times: dict[str, Any] = {
        "heartbeat": timedelta(seconds=10),
        "lease": timedelta(seconds=30),
    }  # so that it is not told
    with working(engine, handling(handler, retry=after(delay)), listen=listens, **times):
        assert started.wait(30)
        cancel_now(engine, job_id)
        go_on.set()
        row = eventually(lambda: _finalized(engine, job_id), what="the end")
        make_job(engine, args={"number": 1})  # and whatever else there is runs
        eventually(lambda: len(runs) > 1, what="another job")

    assert row["state"] == "cancelled"
    assert read_job(engine, job_id)["state"] == "cancelled"
    assert len(runs) == 2


def test_a_cancelled_job_that_a_stop_interrupts_is_cancelled(engine: Engine) -> None:
    (job_id,) = put(engine, 0)
    with working(engine, raises_soon, listen=False, heartbeat=timedelta(seconds=10)) as runner:
        begun(runner, 1)
        cancel_now(engine, job_id)
        runner.stop(timedelta(0))

    row = read_job(engine, job_id)
    assert (row["state"], row["finalized"], row["attempt"]) == ("cancelled", True, 1)


def test_a_cancelled_job_on_its_last_attempt_is_cancelled_and_not_discarded(engine: Engine) -> None:
    job_id = make_job(engine, max_attempts=1)
    with working(engine, raises_soon):
        eventually(lambda: read_job(engine, job_id)["state"] == "running", what="the start")
        cancel_now(engine, job_id)
        assert eventually(lambda: _finalized(engine, job_id))["state"] == "cancelled"


@pytest.mark.parametrize("asks", [None, Cancel("enough")])
def test_a_handler_that_ends_all_the_same_has_the_last_word(engine: Engine, asks: Cancel | None) -> None:
    def handler(job: JobContext[Count]) -> Cancel | None:
        assert job.cancelled.wait(30)
        return asks

    (job_id,) = put(engine, 0)
    with working(engine, handler):
        eventually(lambda: read_job(engine, job_id)["state"] == "running", what="the start")
        cancel_now(engine, job_id)
        row = eventually(lambda: _finalized(engine, job_id))

    assert row["state"] == ("completed" if asks is None else "cancelled")


# ---- many


@pytest.mark.parametrize("by", ["select", "condition", "joined"])
def test_many_are_cancelled_by_a_filter(engine: Engine, by: str) -> None:
    ours = make_jobs(engine, 1_100, priority=2)
    others = make_jobs(engine, 3)
    done = make_job(engine, priority=2, state="completed")
    running = make_job(engine, priority=2, state="running")
    condition = Job.priority == 2
    which: Filter = condition if by == "condition" else select(Job).where(condition).order_by(Job.created_at)
    if by == "joined":
        twice = values(column("n", Integer), name="twice").data([(1,), (2,)])
        which = select(Job).where(condition).join(twice, true())

    with Session(engine) as session, session.begin():
        changed = cancel(session, which)

    assert changed.count == len(ours) + 1
    assert changed.left == {done: "finished"}
    assert count_states(engine) == {"cancelled": 1_100, "available": len(others), "completed": 1, "running": 1}
    assert "cancel_attempted_at" in read_job(engine, running)["metadata"]


def test_a_limit_of_the_filter_is_kept(engine: Engine) -> None:
    ids = make_jobs(engine, 10)
    with Session(engine) as session, session.begin():
        changed = cancel(session, select(Job).order_by(Job.id.desc()).limit(3))

    assert changed.count == 3
    assert [row["id"] for row in read_jobs(engine) if row["state"] == "cancelled"] == ids[-3:]


def test_locked_rows_are_left_and_said_to_be(engine: Engine) -> None:
    ids = make_jobs(engine, 3)
    with engine.begin() as holder:
        holder.execute(text("SELECT id FROM river_job WHERE id = :id FOR UPDATE"), {"id": ids[1]})
        with Session(engine) as session, session.begin():
            changed = cancel(session, Job.id > 0)

    assert (changed.count, changed.left) == (2, {ids[1]: "locked"})
    assert [row["state"] for row in read_jobs(engine)] == ["cancelled", "available", "cancelled"]


def test_many_is_part_of_the_callers_transaction_and_shows_in_its_session(engine: Engine) -> None:
    ids = make_jobs(engine, 3)
    with Session(engine) as session:
        job = session.get_one(Job, ids[0])
        assert cancel(session, select(Job)).count == 3
        assert job.state == JobState.CANCELLED
        session.rollback()

    assert count_states(engine) == {"available": 3}


def test_nothing_to_cancel_is_fine(engine: Engine) -> None:
    with Session(engine) as session:
        changed = cancel(session, Job.id < 0)

    assert (changed.count, changed.left) == (0, {})


def test_many_running_jobs_are_told(engine: Engine) -> None:
    put(engine, *range(8))
    with working(engine, raises_soon, 8, heartbeat=timedelta(minutes=5), lease=HOUR):  # no beat tells them so
        eventually(lambda: count_states(engine) == {"running": 8}, what="their start")
        with Session(engine) as session, session.begin():
            assert cancel(session, select(Job)).count == 8
        eventually(lambda: count_states(engine) == {"cancelled": 8}, what="their end")


# ---- anybody may notify

FORGED: Final = [
    "",
    "no json",
    "[1, 2",
    "null",
    "[]",
    '"cancel"',
    '{"action": "cancel"}',
    '{"action": "cancel", "job_id": "%(id)s", "queue": "default"}',
    '{"action": "cancel", "job_id": %(id)s, "queue": "default"}',
    '{"action": "cancel", "job_id": true, "queue": "default"}',
    '{"action": "cancel", "job_id": [%(id)s]}',
    '{"action": ["cancel"], "job_id": {"a": 1}, "queue": {"b": []}}',
    '{"action": "cancel", "job_id": 1e400}',
    '{"action": "pause", "queue": "default"}',
    '{"action": "pause", "queue": "*"}',
    '{"action": "resume", "queue": 7}',
    '{"action": "metadata_changed", "metadata": {}, "queue": "default"}',
    "[" * 7_000,
]


def test_forged_control_notifications_change_nothing(engine: Engine) -> None:
    gate = Gate()
    (job_id,) = put(engine, 0)
    with working(engine, gate, poll=SLOW_POLL):
        (job,) = gate.wait(1)
        before = text_of(engine, job_id)
        with engine.begin() as connection:
            schema = connection.execute(text("SELECT current_schema()")).scalar()
            for payload in FORGED:
                said = payload.replace("%(id)s", str(job_id))
                for topic in ("river_control", "river_insert"):
                    connection.execute(
                        text("SELECT pg_notify(:topic, :said)"), {"topic": f"{schema}.{topic}", "said": said}
                    )
        assert not job.cancelled.wait(0.3)
        assert text_of(engine, job_id) == before
        put(engine, 1)  # it still listens, and still works
        gate.wait(2)
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 2}, what="both")


def test_the_control_channel_bears_what_river_would_say(engine: Engine) -> None:
    import psycopg
    from psycopg import sql

    job_id = make_job(engine, state="running", queue='a"b')
    heard: list[Any] = []
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(False), autocommit=True) as own:
        schema = own.execute("SELECT current_schema()").fetchone()
        assert schema is not None
        own.execute(sql.SQL("LISTEN {}").format(sql.Identifier(f"{schema[0]}.river_control")))
        cancel_now(engine, job_id)
        heard.extend(json.loads(notice.payload) for notice in own.notifies(timeout=30, stop_after=1))

    assert heard == [{"action": "cancel", "job_id": job_id, "queue": 'a"b'}]
