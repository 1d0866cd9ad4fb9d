"""A whole Runner against a real server: what it promises to whoever deploys it."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

import sqla_river
from sqla_river import Cancel, Exponential, Job, JobContext, Runner, Snooze, Workers, create_all, enqueue, enqueue_many
from sqla_river.embedded import EmbeddedPostgres, StopMode
from sqla_river.errors import ConfigError, InvalidOptionError, RunnerError, WrongDatabaseError
from sqla_river.live import MAX_SLOTS
from sqla_river.workers import Retry
from tests.making import (
    Count,
    Gate,
    Greet,
    all_are,
    count_states,
    eventually,
    make_job,
    make_jobs,
    read_job,
    read_jobs,
)

ROOT: Final = Path(sqla_river.__file__).parent.parent
SLOW_POLL: Final = timedelta(minutes=5)
"""So that nothing is found by polling: what starts was announced, or was due."""
Handler = Callable[[JobContext[Count]], Any]


def handling(handler: Handler, **settings: Any) -> Workers:
    """Workers that give every `Count` to *handler*, whatever it returns."""
    workers = Workers()
    workers.register(Count, **settings)(handler)
    return workers


@contextmanager
def working(engine: Engine, workers: Workers | Handler, slots: int = 4, **settings: Any) -> Generator[Runner]:
    """A started runner of the queue ``default``."""
    if not isinstance(workers, Workers):
        workers = handling(workers)
    settings = {"queues": {"default": slots}, "stop_timeout": timedelta(seconds=3), **settings}
    with Runner(engine, workers, **settings) as runner:
        yield runner


def put(engine: Engine, *numbers: int, **options: Any) -> None:
    """Enqueue a `Count` for each number, in one transaction."""
    with Session(engine) as session, session.begin():
        for number in numbers:
            enqueue(session, Count(number), **options)


def backends(engine: Engine, role: str = "%", *, kill: bool = False) -> int:
    """How many connections runners have for *role*; killed if asked for, and gone when this returns."""
    what = "pg_terminate_backend(pid, 5000)" if kill else "pid"
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                f"SELECT {what} FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name LIKE :name AND pid <> pg_backend_pid()"
            ),
            {"name": f"sqla\\_river:{role}:%"},
        )
        return len(rows.all())


def nothing(_: JobContext[Count]) -> None:
    return None


# ---- start and stop -----------------------------------------------------------------


def test_a_job_enqueued_before_the_start_is_worked(engine: Engine) -> None:
    gate = Gate(opened=True)
    put(engine, 7)

    with working(engine, gate):
        (job,) = gate.wait()

    assert (job.args, job.attempt, job.kind, job.queue) == (Count(7), 1, "count", "default")
    assert count_states(engine) == {"completed": 1}


def test_leaving_the_block_returns_after_every_result_is_written(engine: Engine) -> None:
    gate = Gate()
    put(engine, *range(20))

    with working(engine, gate, 20):
        gate.wait(20)
        gate.open()

    assert count_states(engine) == {"completed": 20}


def test_a_stopped_runner_can_be_started_again_under_a_new_id(engine: Engine) -> None:
    gate = Gate(opened=True)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    ids: list[str | None] = []
    for number in range(2):
        put(engine, number)
        runner.start()
        ids.append(runner.id)
        gate.wait(number + 1)
        runner.stop()

    assert len(set(ids)) == 2
    assert runner.id is None
    assert [row["token"].partition("/")[0] for row in read_jobs(engine)] == ids


def test_a_runner_that_runs_cannot_be_started_again(engine: Engine) -> None:
    with working(engine, nothing) as runner, pytest.raises(RunnerError, match="runs already; stop"):
        runner.start()


def test_construction_opens_and_starts_nothing() -> None:
    engine = create_engine("postgresql+psycopg://nobody@192.0.2.1/nowhere")
    threads = threading.active_count()

    Runner(engine, Workers(), queues={"default": 1})

    assert threading.active_count() == threads
    assert "Connections in pool: 0" in engine.pool.status()


def test_two_runners_in_one_process_have_different_ids(engine: Engine) -> None:
    workers = handling(nothing)

    with working(engine, workers) as one, working(engine, workers) as other:
        ids = one.id, other.id
        with engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT id FROM river_runner").scalars().all()

    assert len(set(ids)) == 2
    assert set(rows) == set(ids)


def test_a_runner_is_on_the_list_while_it_works(engine: Engine) -> None:
    def rows(table: str) -> list[Any]:
        with engine.connect() as connection:
            return list(connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY 1").mappings())

    with working(engine, nothing, queues={"a": 3, "b": 40}) as runner:
        (row,) = rows("river_runner")
        queues = rows("river_queue")
        beat = row["heartbeat_at"]
        assert row["id"] == runner.id

    assert dict(zip(row["queues"], row["slots"], strict=True)) == {"a": 3, "b": 40}
    assert beat >= row["started_at"]
    assert [queue["name"] for queue in queues] == ["a", "b"]
    assert eventually(lambda: rows("river_runner") == [], what="the row to go")


def test_the_heartbeat_goes_on(engine: Engine) -> None:
    def beat() -> Any:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT max(heartbeat_at) FROM river_runner").scalar_one()

    with working(engine, nothing, heartbeat=timedelta(milliseconds=100)):
        first = beat()
        assert eventually(lambda: beat() > first, what="the next beat")


def test_a_queue_that_others_made_is_touched_and_keeps_what_it_says(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO river_queue (name, metadata, paused_at, created_at, updated_at) "
            "VALUES ('default', '{\"a\": 1}', '2026-01-01', '2026-01-01', '2026-01-01')"
        )

    with working(engine, nothing), engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT *, now() - updated_at AS age FROM river_queue").mappings().one()

    assert row["metadata"] == {"a": 1}
    assert row["paused_at"] is not None
    assert row["age"] < timedelta(minutes=1)
    assert row["created_at"].year == row["paused_at"].year == 2026


def test_own_connections_have_names_and_bounds_and_leave_the_pool_to_handlers(engine: Engine) -> None:
    make_job(engine)
    with working(engine, nothing):
        eventually(all_are(engine, "completed", 1))
        checked_out = engine.pool.status()
        with engine.connect() as connection:
            names = connection.exec_driver_sql(
                "SELECT split_part(application_name, ':', 2) FROM pg_stat_activity "
                "WHERE application_name LIKE 'sqla\\_river:%%' AND datname = current_database()"
            ).scalars()
            roles = set(names)

    assert {"fetch", "complete", "heartbeat", "listen"} <= roles
    assert "Current Checked out connections: 0" in checked_out
    assert eventually(lambda: backends(engine) == 0, what="its connections to be closed")


def test_handlers_may_hold_the_whole_pool(url: str) -> None:
    engine = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=5)

    def handler(_: JobContext[Count]) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(0.01)")

    make_jobs(engine, 20)
    with working(engine, handler, 2):
        eventually(all_are(engine, "completed", 20))
    engine.dispose()


def test_a_heartbeat_reconnects_while_handlers_hold_the_whole_pool(url: str, engine: Engine) -> None:
    narrow = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=0.2)
    gate = Gate()

    def handler(job: JobContext[Count]) -> None:
        with narrow.connect():
            gate(job)

    def beat() -> Any:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT max(heartbeat_at) FROM river_runner").scalar_one()

    make_jobs(engine, 2)
    with working(narrow, handler, 2, heartbeat=timedelta(milliseconds=100)):
        gate.wait(2)
        assert backends(engine, "heartbeat", kill=True) == 1
        killed_at = beat()
        try:
            assert eventually(lambda: beat() > killed_at, within=5, what="a beat after the kill")
        finally:
            gate.open()
    narrow.dispose()


# ---- enqueue and start --------------------------------------------------------------


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
        heard = [note.payload for note in raw.notifies(timeout=5, stop_after=1)]
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

    with working(engine, gate, poll=SLOW_POLL):
        for number, delay in enumerate(delays):
            put(engine, number, scheduled_at=delay)
        gate.wait(3)

    assert [job.args.number for job in gate.started] == [0, 2, 1]
    for row in read_jobs(engine):
        late = row["attempted_at"] - row["scheduled_at"]
        assert timedelta(0) <= late < timedelta(seconds=0.5)


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

    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(10_000)))

    with working(engine, handler, 50), working(engine, handler, 50):
        eventually(all_are(engine, "completed", 10_000), within=60)

    assert sorted(ran) == list(range(10_000))
    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    assert len({row["token"].partition("/")[0] for row in read_jobs(engine)}) == 2


# ---- what came of it ----------------------------------------------------------------


def failing(_: JobContext[Count]) -> None:
    raise ValueError("no such luck")


def outcome(engine: Engine, handler: Handler, *, attempt: int = 0, max_attempts: int = 25, **settings: Any) -> Any:
    """The row of one job after one more attempt."""
    job_id = make_job(engine, attempt=attempt, max_attempts=max_attempts)

    def ended() -> Any:
        row = read_job(engine, job_id)
        return None if row["state"] in {"available", "running"} else row

    with working(engine, handling(handler, **settings)):
        return eventually(ended, what="an outcome")


def _waits(row: Any) -> timedelta:
    """From the end of the attempt until the next: the former is not stored, so from its start."""
    waits: timedelta = row["scheduled_at"] - row["attempted_at"]
    return waits


@pytest.mark.parametrize(("attempt", "minutes"), [(0, 1), (1, 2), (2, 4), (3, 8), (10, 30), (32_000, 30)])
def test_retry_times_follow_the_policy_of_the_worker(engine: Engine, attempt: int, minutes: int) -> None:
    policy = Exponential(timedelta(minutes=1), factor=2, max=timedelta(minutes=30))

    row = outcome(engine, failing, attempt=attempt, max_attempts=32_767, retry=policy)

    assert row["state"] == "retryable"
    assert timedelta(minutes=minutes) <= _waits(row) < timedelta(minutes=minutes, seconds=10)
    assert row["attempt"] == attempt + 1


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 1), (2, 16), (5, 625), (24, 24**4)])
def test_retry_times_follow_rivers_policy_unless_said_otherwise(engine: Engine, attempt: int, seconds: int) -> None:
    row = outcome(engine, failing, attempt=attempt - 1)

    assert 0.9 * seconds <= _waits(row).total_seconds() <= 1.1 * seconds + 5


def test_a_runner_may_have_a_policy_for_workers_that_have_none(engine: Engine) -> None:
    job_id = make_job(engine)

    with working(engine, failing, retry=Exponential(timedelta(hours=5))):
        eventually(lambda: read_job(engine, job_id)["state"] == "retryable", what="the failure")

    assert timedelta(hours=5) <= _waits(read_job(engine, job_id)) < timedelta(hours=5, seconds=10)


def test_a_failed_job_is_tried_again_when_its_time_has_come(engine: Engine) -> None:
    attempts: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        attempts.append(job.attempt)
        if job.attempt < 3:
            raise ValueError

    put(engine, 1)
    workers = handling(handler, retry=Exponential(timedelta(milliseconds=100)))
    with working(engine, workers, poll=SLOW_POLL):
        eventually(all_are(engine, "completed", 1))

    assert attempts == [1, 2, 3]
    (row,) = read_jobs(engine)
    assert [error["attempt"] for error in row["all_errors"]] == [1, 2]
    assert len(row["attempted_by"]) == 3


def test_the_last_failure_discards(engine: Engine) -> None:
    row = outcome(engine, failing, attempt=2, max_attempts=3)

    assert (row["state"], row["attempt"]) == ("discarded", 3)
    (error,) = row["all_errors"]
    assert error["error"] == "ValueError: no such luck"
    assert error["attempt"] == 3
    assert "in failing" in error["trace"]
    assert "no such luck" in error["trace"]


def test_a_retry_callable_is_asked_with_the_error(engine: Engine) -> None:
    seen: list[Any] = []

    def retry(job: JobContext[Any]) -> timedelta:
        seen.append((job.attempt, job.args, job.error))
        return timedelta(minutes=20)

    row = outcome(engine, failing, attempt=4, retry=retry)

    ((attempt, args, error),) = seen
    assert (attempt, args) == (5, Count())
    assert isinstance(error, ValueError)
    assert timedelta(minutes=20) <= _waits(row) < timedelta(minutes=20, seconds=10)


def test_a_retry_callable_may_cancel(engine: Engine) -> None:
    row = outcome(engine, failing, retry=_gives(Cancel("it will never work")))

    assert row["state"] == "cancelled"
    assert "it will never work" in row["all_errors"][0]["error"]
    assert "no such luck" in row["all_errors"][0]["trace"]


def _raises(error: type[BaseException]) -> Callable[[JobContext[Any]], timedelta]:
    def retry(_: JobContext[Any]) -> timedelta:
        raise error("the policy is broken")

    return retry


def _gives(answer: Any) -> Callable[[JobContext[Any]], Any]:
    return lambda _: answer


@pytest.mark.parametrize(
    "retry",
    [
        _raises(ZeroDivisionError),
        _raises(SystemExit),
        _raises(KeyboardInterrupt),
        _gives(None),
        _gives("soon"),
        _gives(5),
    ],
    ids=["raises", "exits", "interrupts", "None", "a word", "a number"],
)
def test_a_broken_policy_neither_loses_the_error_nor_the_slot(engine: Engine, retry: Retry) -> None:
    row = outcome(engine, failing, retry=retry)

    assert row["state"] == "retryable"
    assert 0 < _waits(row).total_seconds() < 10
    assert "no such luck" in row["all_errors"][0]["error"]


@pytest.mark.parametrize(
    ("delay", "waits"),
    [(timedelta(days=-1), timedelta(0)), (timedelta.max, timedelta(days=36_500))],
    ids=["negative", "for ever"],
)
def test_a_policy_beyond_all_bounds_is_bounded(engine: Engine, delay: timedelta, waits: timedelta) -> None:
    row = outcome(engine, failing, retry=_gives(delay))

    assert waits <= _waits(row) < waits + timedelta(seconds=10)


class Evil(BaseException):
    """An error that cannot be shown."""

    def __str__(self) -> str:
        raise Evil

    __repr__ = __str__


class Long(Exception):
    def __str__(self) -> str:
        return "x" * 10_000_000


def _cyclic() -> BaseException:
    error = ValueError("cyclic")
    error.__cause__ = error
    return error


ERRORS: Final[dict[str, Callable[[], BaseException]]] = {
    "Exception": lambda: Exception("plain"),
    "BaseException": lambda: BaseException("base"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "StopIteration": StopIteration,
    "MemoryError": MemoryError,
    "RecursionError": RecursionError,
    "Evil": Evil,
    "NUL": lambda: ValueError("\0 \ud800 \udfff"),
    "Long": Long,
    "cyclic": _cyclic,
    "group": lambda: ExceptionGroup("many", [ValueError(str(number)) for number in range(500)]),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff" * 100_000, 0, 1, "no"),
}


def test_no_exception_of_a_handler_costs_a_slot(engine: Engine) -> None:
    names = list(ERRORS)
    workers = Workers()

    @workers.register(Count)
    def fail(job: JobContext[Count]) -> None:
        error = ERRORS[names[job.args.number]]()
        raise error

    gate = Gate(opened=True)
    workers.register(Greet)(gate)
    put(engine, *range(len(names)))
    with working(engine, workers, 2):
        eventually(all_are(engine, "retryable", len(names)))
        with Session(engine) as session, session.begin():
            for _ in range(10):
                enqueue(session, Greet())
        gate.wait(10)

    failed = [row for row in read_jobs(engine) if row["kind"] == "count"]
    for name, row in zip(names, failed, strict=True):
        (error,) = row["all_errors"]
        assert error["error"].startswith(type(ERRORS[name]()).__name__), name
        assert len(error["error"] + error["trace"]) < 20_000


GARBAGE: Final[list[Any]] = [
    0,
    False,
    True,
    "done",
    {},
    [],
    object(),
    Snooze,
    Cancel,
    NotImplemented,
    ValueError("no"),
    timedelta(1),
    iter(()),
]


def test_a_handler_that_returns_anything_else_has_failed(engine: Engine) -> None:
    put(engine, *range(len(GARBAGE)))

    with working(engine, lambda job: GARBAGE[job.args.number], 2):
        eventually(all_are(engine, "retryable", len(GARBAGE)))

    for row in read_jobs(engine):
        assert "returns None, Snooze(...) or Cancel(...)" in row["all_errors"][0]["error"]


@pytest.mark.parametrize("how", ["returned", "raised"])
def test_a_snooze_gives_the_attempt_back(engine: Engine, how: str) -> None:
    def handler(_: JobContext[Count]) -> Snooze:
        if how == "raised":
            raise Snooze(timedelta(hours=1))
        return Snooze(timedelta(hours=1))

    row = outcome(engine, handler, attempt=24)

    assert (row["state"], row["attempt"], row["all_errors"]) == ("scheduled", 24, None)
    assert timedelta(hours=1) <= _waits(row) < timedelta(hours=1, seconds=10)
    assert row["metadata"] == {"snoozes": 1}


@pytest.mark.parametrize("how", ["returned", "raised"])
def test_a_cancel_ends_the_job(engine: Engine, how: str) -> None:
    def handler(_: JobContext[Count]) -> Cancel:
        if how == "raised":
            raise Cancel("not wanted")
        return Cancel("not wanted")

    row = outcome(engine, handler)

    assert row["state"] == "cancelled"
    assert row["finalized_at"] is not None
    assert "not wanted" in row["all_errors"][0]["error"]


def test_unknown_kinds_stay_available_and_unburnt(engine: Engine) -> None:
    unknown = make_job(engine, kind="of_a_newer_deploy")
    make_jobs(engine, 3)

    with working(engine, nothing):
        eventually(lambda: count_states(engine) == {"available": 1, "completed": 3}, what="the known ones")

    row = read_job(engine, unknown)
    assert (row["state"], row["attempt"], row["attempted_by"]) == ("available", 0, None)


def test_args_that_no_longer_decode_fail_the_attempt_and_say_why(engine: Engine) -> None:
    gate = Gate(opened=True)
    broken = make_job(engine, args={"number": "seven"})
    fine = make_job(engine, args={"number": 7, "since_dropped": True})

    with working(engine, gate):
        eventually(lambda: read_job(engine, broken)["state"] == "retryable", what="the broken one")
        eventually(lambda: read_job(engine, fine)["state"] == "completed", what="the other one")

    assert [job.args for job in gate.started] == [Count(7)]
    assert "DecodeError: $.number" in read_job(engine, broken)["all_errors"][0]["error"]
    assert read_job(engine, broken)["args"] == {"number": "seven"}


def test_args_that_never_decode_are_discarded_at_last(engine: Engine) -> None:
    broken = make_job(engine, args=[], attempt=2, max_attempts=3)

    with working(engine, nothing):
        eventually(lambda: read_job(engine, broken)["state"] == "discarded", what="the broken one")


@pytest.mark.parametrize("whose", ["worker", "runner"])
def test_a_timeout_is_told_to_the_handler(engine: Engine, whose: str) -> None:
    gate = Gate()
    timeout = timedelta(milliseconds=100)
    job_id = make_job(engine)

    workers = handling(gate, timeout=timeout if whose == "worker" else None)
    with working(engine, workers, timeout=timeout if whose == "runner" else None):
        eventually(lambda: read_job(engine, job_id)["state"] == "retryable", what="the timeout")

    assert gate.reasons == ["timeout"]
    assert read_job(engine, job_id)["attempt"] == 1


def test_a_handler_that_returns_after_its_timeout_has_completed(engine: Engine) -> None:
    reasons: list[Any] = []

    def handler(job: JobContext[Count]) -> None:
        assert job.cancelled.reason is None
        assert job.cancelled.wait(10)
        reasons.append(job.cancelled.reason)

    row = outcome(engine, handler, timeout=timedelta(milliseconds=50))

    assert reasons == ["timeout"]
    assert row["state"] == "completed"


def test_timeouts_are_kept_in_their_order(engine: Engine) -> None:
    ended: list[int] = []

    workers = Workers()

    @workers.register(Count, timeout=timedelta(seconds=0.5))
    def slow(job: JobContext[Count]) -> None:
        job.cancelled.wait(10)
        ended.append(1)

    @workers.register(Greet, timeout=timedelta(seconds=0.1))
    def quick(job: JobContext[Greet]) -> None:
        job.cancelled.wait(10)
        ended.append(0)

    make_job(engine)
    make_job(engine, kind="greet", args={"name": "x"})
    with working(engine, workers):
        eventually(all_are(engine, "completed", 2))

    assert ended == [0, 1]


def test_metadata_is_read_and_stored_with_the_outcome(engine: Engine) -> None:
    seen: list[Any] = []

    def handler(job: JobContext[Count]) -> None:
        seen.append(dict(job.metadata))
        job.metadata["step"] = job.metadata.get("step", 0) + 1
        if job.attempt == 1:
            raise ValueError

    make_job(engine, metadata={"mine": True})
    with working(engine, handling(handler, retry=Exponential(timedelta(0)))):
        eventually(all_are(engine, "completed", 1))

    assert seen == [{"mine": True}, {"mine": True, "step": 1}]
    assert read_jobs(engine)[0]["metadata"] == {"mine": True, "step": 2}


def test_metadata_that_cannot_be_stored_is_refused_where_it_is_assigned(engine: Engine) -> None:
    refused: list[str] = []

    def handler(job: JobContext[Count]) -> None:
        for key, value in (("river:x", 1), ("x", float("nan")), ("x", "\0"), ("x", object()), ("x", {1: 2})):
            with pytest.raises(InvalidOptionError) as caught:
                job.metadata[key] = value
            refused.append(caught.value.option)

    row = outcome(engine, handler)

    assert refused == ["metadata"] * 5
    assert (row["state"], row["metadata"]) == ("completed", {})


# ---- stop ---------------------------------------------------------------------------


def test_running_jobs_may_finish_within_the_stop_timeout(engine: Engine) -> None:
    gate = Gate()
    make_jobs(engine, 3)
    with working(engine, gate) as runner:
        gate.wait(3)
        stopping = threading.Thread(target=runner.stop, args=(timedelta(seconds=30),))
        stopping.start()
        put(engine, 99)
        gate.open()
        stopping.join(10)

        assert not stopping.is_alive()

    assert gate.reasons == []
    assert count_states(engine) == {"completed": 3, "available": 1}


def test_jobs_that_a_stop_interrupts_get_their_attempt_back(engine: Engine) -> None:
    gate = Gate()
    make_jobs(engine, 3)

    with working(engine, gate) as runner:
        gate.wait(3)
        runner.stop(timedelta(0))

    assert gate.reasons == ["stop"] * 3
    for row in read_jobs(engine):
        assert (row["state"], row["attempt"], row["all_errors"]) == ("available", 0, None)


def test_three_restarts_do_not_discard(engine: Engine) -> None:
    job_id = make_job(engine, max_attempts=1)
    for _ in range(3):
        gate = Gate()
        with working(engine, gate) as runner:
            gate.wait()
            runner.stop(timedelta(0))

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"]) == ("available", 0)


def test_a_job_given_back_starts_elsewhere_at_once(engine: Engine) -> None:
    leaving, staying = Gate(), Gate(opened=True)
    make_job(engine)
    with working(engine, leaving) as runner:
        leaving.wait()
        with working(engine, staying, poll=SLOW_POLL):
            runner.stop(timedelta(0))
            staying.wait()

    assert count_states(engine) == {"completed": 1}


def test_a_stop_before_the_start_does_nothing(engine: Engine) -> None:
    Runner(engine, Workers(), queues={"default": 1}).stop()


def test_a_second_stop_from_another_thread_hurries_the_first(engine: Engine) -> None:
    gate = Gate()
    make_job(engine)

    with working(engine, gate) as runner:
        gate.wait()
        began = time.monotonic()
        first = threading.Thread(target=runner.stop, args=(timedelta(seconds=60),))
        first.start()
        eventually(lambda: _is_stopping(runner), what="the first stop to begin")
        runner.stop()
        first.join(10)

    assert not first.is_alive()
    assert time.monotonic() - began < 10
    assert gate.reasons == ["stop"]
    assert count_states(engine) == {"available": 1}


def _is_stopping(runner: Runner) -> bool:
    incarnation = runner._incarnation
    return incarnation is None or incarnation.stopping


def test_many_stops_at_once_all_return(engine: Engine) -> None:
    with working(engine, nothing) as runner:
        threads = [threading.Thread(target=runner.stop) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)

    assert not any(thread.is_alive() for thread in threads)


def test_a_stop_from_inside_a_handler_is_bounded(engine: Engine) -> None:
    ended = threading.Event()

    def handler(_: JobContext[Count]) -> None:
        runner.stop(timedelta(0))
        ended.set()

    make_job(engine)
    with working(engine, handler) as runner:
        assert ended.wait(8)


@contextmanager
def silent_server() -> Generator[str]:
    """The URL of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"postgresql+psycopg://nobody@127.0.0.1:{listening.getsockname()[1]}/none"


@pytest.mark.parametrize("away", ["refused", "silent"])
def test_start_and_stop_are_bounded_while_the_database_is_away(away: str) -> None:
    with contextlib.ExitStack() as stack:
        url = (
            stack.enter_context(silent_server())
            if away == "silent"
            else "postgresql+psycopg://nobody@/none?host=/nonexistent"
        )
        runner = Runner(create_engine(url), handling(nothing), queues={"default": 1})
        began = time.monotonic()
        starting = threading.Thread(target=runner.start)
        starting.start()
        eventually(lambda: runner.id is not None, what="the start to begin")
        runner.stop(timedelta(0))
        starting.join(1)
        took = time.monotonic() - began

    assert not starting.is_alive()
    assert took < 8


def test_a_runner_that_was_started_without_a_database_works_once_it_is_there() -> None:
    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        make_job(engine)
        engine.dispose()
        postgres.stop_server()
        gate = Gate(opened=True)
        runner = Runner(engine, handling(gate), queues={"default": 1})
        starting = threading.Thread(target=runner.start)
        starting.start()
        eventually(lambda: runner.id is not None, what="the start to begin")
        postgres.start_server()
        gate.wait(within=20)
        starting.join(10)
        runner.stop()
        engine.dispose()


# ---- the database goes and comes ----------------------------------------------------


def test_a_listener_that_lost_its_connection_listens_again(engine: Engine) -> None:
    gate = Gate(opened=True)

    with working(engine, gate, poll=SLOW_POLL):
        for number in range(3):
            assert backends(engine, "listen", kill=True) == 1
            put(engine, number)  # said while nobody listens, or after: it starts either way
            gate.wait(number + 1)
            eventually(lambda: backends(engine, "listen") == 1, what="a new connection")

    assert count_states(engine) == {"completed": 3}


@pytest.mark.parametrize("role", ["fetch", "complete", "heartbeat"])
def test_a_station_that_lost_its_connection_goes_on(engine: Engine, role: str) -> None:
    gate = Gate(opened=True)

    put(engine, 0)
    with working(engine, gate, heartbeat=timedelta(milliseconds=100)):
        for number in range(3):
            eventually(all_are(engine, "completed", number + 1))
            eventually(lambda: backends(engine, role, kill=True) == 1, what=f"a connection to {role}")
            put(engine, number + 1)
        eventually(all_are(engine, "completed", 4))


def test_a_runner_whose_connections_are_killed_under_load_runs_every_job_once(engine: Engine) -> None:
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        ran.append(job.args.number)
        time.sleep(0.001)

    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(3_000)))

    with working(engine, handler, 10) as runner:
        for milestone in (100, 500, 900, 1_300, 1_700, 2_100):
            eventually(lambda least=milestone: len(ran) >= least, within=30, what=f"{milestone} runs")  # type: ignore[misc]
            backends(engine, kill=True)
        eventually(all_are(engine, "completed", 3_000), within=40)
        stale = runner.stale

    assert Counter(ran) == Counter(range(3_000))
    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    assert stale == 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_runner_goes_on_when_postgresql_was_restarted_under_it(mode: StopMode) -> None:
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        ran.append(job.args.number)
        time.sleep(0.001)

    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        with Session(engine) as session, session.begin():
            enqueue_many(session, (Count(number) for number in range(2_000)))
        with working(engine, handler, 10):
            for milestone in (200, 1_000):
                eventually(lambda least=milestone: len(ran) >= least, within=30, what=f"{milestone} runs")  # type: ignore[misc]
                postgres.restart(mode)
            engine.dispose()
            eventually(all_are(engine, "completed", 2_000), within=40)
            put(engine, 2_000)
            eventually(all_are(engine, "completed", 2_001))
        assert {row["attempt"] for row in read_jobs(engine)} == {1}
        engine.dispose()

    assert Counter(ran) == Counter(range(2_001))


def test_a_stop_waits_for_a_database_that_is_on_its_way_back() -> None:
    gate = Gate()
    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        make_jobs(engine, 5)
        runner = Runner(engine, handling(gate), queues={"default": 5}, stop_timeout=timedelta(seconds=20))
        runner.start()
        gate.wait(5)
        postgres.stop_server()
        gate.open()
        stopping = threading.Thread(target=runner.stop)
        stopping.start()
        stopping.join(2)  # as long as a restart takes; no signal says that a stop has given up
        postgres.start_server()
        stopping.join(25)
        engine.dispose()

        assert not stopping.is_alive()
        assert count_states(engine) == {"completed": 5}
        engine.dispose()


def test_a_row_that_somebody_has_locked_delays_its_own_job_only(engine: Engine) -> None:
    gate = Gate()
    locked, *_ = make_jobs(engine, 10)

    with working(engine, gate, 10):
        gate.wait(10)
        with engine.begin() as theirs:
            theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
            gate.open()
            eventually(lambda: count_states(engine) == {"completed": 9, "running": 1}, what="all but one")
            put(engine, 1)
            eventually(lambda: count_states(engine) == {"completed": 10, "running": 1}, what="a new one")
        eventually(all_are(engine, "completed", 11))


def test_a_runner_listens_in_a_process_with_many_open_files(engine: Engine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1_500:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_500), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_100)]
    gate = Gate(opened=True)
    try:
        with working(engine, gate, poll=SLOW_POLL), engine.connect() as connection:
            find = text("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'sqla\\_river:listen:%'")
            before = connection.execute(find).scalars().all()
            for number in range(20):
                put(engine, number)
                gate.wait(number + 1)
            after = connection.execute(find).scalars().all()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert len(before) == 1
    assert after == before


# ---- real processes -----------------------------------------------------------------

PROGRAM: Final = """
import logging, sys, threading, time
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

url, manner, stop_timeout = sys.argv[1:]
logging.basicConfig(level=logging.INFO)
workers = Workers()

@workers.register(Count)
def work(job):
    if manner == "quick":
        time.sleep(0.002)
        return
    sys.stdout.write("begun\\n")
    sys.stdout.flush()
    if manner == "polite":
        job.cancelled.wait()
        raise RuntimeError("told to stop")
    elif manner == "slow":
        time.sleep(0.5)
    else:
        threading.Event().wait()

Runner(create_engine(url), workers, queues={"default": 8}, stop_timeout=timedelta(seconds=float(stop_timeout))).run()
print("done", flush=True)
"""
Manner = Literal["quick", "polite", "slow", "deaf"]


@contextmanager
def process(url: str, manner: Manner, stop_timeout: float) -> Generator["subprocess.Popen[str]"]:
    """A process of its own in which a runner runs."""
    command = [sys.executable, "-c", PROGRAM, url, manner, str(stop_timeout)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        watchdog = threading.Timer(60, running.kill)
        watchdog.start()
        try:
            yield running
        finally:
            watchdog.cancel()
            running.kill()


def has_begun(running: "subprocess.Popen[str]", jobs: int) -> None:
    """Wait until the handlers of so many jobs run."""
    assert running.stdout is not None
    read: list[str] = []
    while read.count("begun\n") < jobs:
        read.append(running.stdout.readline())
        assert read[-1], "".join(read)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_stops_the_process_and_leaves_nothing_running(
    url: str, engine: Engine, number: signal.Signals
) -> None:
    make_jobs(engine, 5_000)

    with process(url, "quick", 20) as running:
        eventually(lambda: count_states(engine).get("completed", 0) >= 200, within=30, what="some work")
        running.send_signal(number)
        output, _ = running.communicate(timeout=20)

    assert running.returncode == 0, output
    assert output.endswith("done\n")
    assert set(count_states(engine)) == {"completed", "available"}
    assert {row["attempt"] for row in read_jobs(engine) if row["state"] == "available"} == {0}
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT id FROM river_runner").all() == []


def test_running_jobs_finish_before_a_process_ends(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "slow", 20) as running:
        has_begun(running, 8)
        running.terminate()
        output, _ = running.communicate(timeout=20)

    assert running.returncode == 0, output
    assert count_states(engine) == {"completed": 8}


def test_a_second_signal_interrupts_the_running_jobs(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "polite", 60) as running:
        has_begun(running, 8)
        running.terminate()
        eventually(lambda: backends(engine, "fetch") == 0, what="the fetch to end")
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=10)

    assert running.returncode == 0, output
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_handlers_that_ignore_everything_are_left_behind(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "deaf", 0.2) as running:
        has_begun(running, 8)
        began = time.monotonic()
        running.terminate()
        output, _ = running.communicate(timeout=20)
        took = time.monotonic() - began

    assert running.returncode == 0, output
    assert took < 0.2 + 6 + 1
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_a_third_signal_leaves_them_behind_at_once(url: str, engine: Engine) -> None:
    make_jobs(engine, 8)

    with process(url, "deaf", 60) as running:
        has_begun(running, 8)
        running.terminate()
        eventually(lambda: backends(engine, "fetch") == 0, what="the fetch to end")
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        running.send_signal(signal.SIGINT)  # another one: two of a kind may be taken as one
        output, _ = running.communicate(timeout=20)
        took = time.monotonic() - began

    assert running.returncode == 0, output
    assert took < 4
    assert {(row["state"], row["attempt"]) for row in read_jobs(engine)} == {("available", 0)}


def test_signals_can_be_taken_in_the_main_thread_only(engine: Engine) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            Runner(engine, Workers(), queues={"default": 1}).run()
        except RunnerError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)

    assert "main thread" in str(failures[0])


def test_run_gives_the_signals_back(engine: Engine) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    gate = Gate(opened=True)
    put(engine, 1)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    def end() -> None:
        gate.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    runner.run()
    ending.join()

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert runner.id is None


def test_what_is_asked_of_a_run_is_as_far_as_it_goes_however_often(engine: Engine) -> None:
    gate = Gate()
    job_id = make_job(engine)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    def end() -> None:
        gate.wait()
        for _ in range(3):
            runner.ask(2)

    ending = threading.Thread(target=end)
    ending.start()
    runner.run()
    ending.join()

    assert gate.reasons == ["stop"]
    assert (read_job(engine, job_id)["state"], read_job(engine, job_id)["attempt"]) == ("available", 0)


# ---- settings -----------------------------------------------------------------------

NOWHERE: Final = "postgresql+psycopg://nobody@192.0.2.1/nowhere"
ZERO: Final = timedelta(0)


def make_runner(**settings: Any) -> Runner:
    return Runner(create_engine(NOWHERE), Workers(), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queues": {}}, "queues is empty"),
        ({"queues": {"a": 0}}, "queue 'a' must have 1..10000 slots, got 0"),
        ({"queues": {"a": MAX_SLOTS + 1}}, f"got {MAX_SLOTS + 1}"),
        ({"queues": {"a": True}}, "got True"),
        ({"queues": {"a": 1.5}}, "got 1.5"),
        ({"queues": {"a": "5"}}, "got '5'"),
        ({"timeout": ZERO}, "timeout must be more than zero, got 0:00:00"),
        ({"timeout": -timedelta(seconds=1)}, "timeout must be more than zero"),
        ({"poll": ZERO}, "poll must be 1 ms to 5 minutes, got 0:00:00"),
        ({"poll": timedelta(hours=1)}, "got 1:00:00"),
        ({"heartbeat": timedelta(milliseconds=1)}, "heartbeat must be at least 100 ms, got 0:00:00.001000"),
        ({"heartbeat": timedelta(seconds=15)}, "lease=0:00:30 with heartbeat=0:00:15"),
        ({"lease": timedelta(seconds=14)}, "lease=0:00:14 with heartbeat=0:00:05"),
        ({"stop_timeout": -timedelta(seconds=1)}, "stop_timeout must not be negative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_their_values(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_runner(**{"queues": {"default": 1}, **settings})

    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["", "Upper", "a b", "a" * 65, "*", "a__b", "ä"])
def test_queues_that_river_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(InvalidOptionError, match="queue must be"):
        Runner(create_engine(NOWHERE), Workers(), queues={name: 1})


@pytest.mark.parametrize(
    ("make", "url"),
    [
        (create_engine, "sqlite://"),
        (create_engine, "postgresql+psycopg2://nobody@192.0.2.1/nowhere"),
        (create_async_engine, "postgresql+asyncpg://nobody@192.0.2.1/nowhere"),
        (create_async_engine, NOWHERE),
    ],
    ids=["sqlite", "psycopg2", "asyncpg", "async psycopg"],
)
def test_an_engine_that_cannot_serve_a_runner_is_refused(make: Callable[[str], Any], url: str) -> None:
    with pytest.raises(WrongDatabaseError, match="psycopg"):
        Runner(make(url), Workers(), queues={"default": 1})
