"""What came of an attempt: handlers that return, raise, ask for more time, or leave garbage."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqla_river import Cancel, Exponential, JobContext, Snooze, Workers, enqueue
from sqla_river.errors import InvalidOptionError
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
from tests.working import SLOW_POLL, handling, nothing, put, working

Handler = Callable[[JobContext[Count]], Any]


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


def _failed_once(engine: Engine, *, attempt: int = 0, **settings: Any) -> Any:
    """The row of one job after one more attempt, which fails; the next, which may come before the row is read, waits
    for the end of the runner.
    """
    job_id = make_job(engine, attempt=attempt)
    gate = Gate()

    def handler(job: JobContext[Count]) -> None:
        if job.attempt > attempt + 1:
            gate(job)
        failing(job)

    with working(engine, handling(handler, **settings)):
        eventually(lambda: read_job(engine, job_id)["all_errors"], what="the failure")
        row = read_job(engine, job_id)
        gate.open()
    return row


def _waited(row: Any) -> timedelta:
    """`_waits` after `_failed_once`: from the start of the attempt that failed."""
    waited: timedelta = row["scheduled_at"] - datetime.fromisoformat(row["all_errors"][0]["at"])
    return waited


@pytest.mark.parametrize(("attempt", "minutes"), [(0, 1), (1, 2), (2, 4), (3, 8), (10, 30), (32_000, 30)])
def test_retry_times_follow_the_policy_of_the_worker(engine: Engine, attempt: int, minutes: int) -> None:
    policy = Exponential(timedelta(minutes=1), factor=2, max=timedelta(minutes=30))

    row = outcome(engine, failing, attempt=attempt, max_attempts=32_767, retry=policy)

    assert row["state"] == "retryable"
    assert timedelta(minutes=minutes) <= _waits(row) < timedelta(minutes=minutes, seconds=10)
    assert row["attempt"] == attempt + 1


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 1), (2, 16), (5, 625), (24, 24**4)])
def test_retry_times_follow_rivers_policy_unless_said_otherwise(engine: Engine, attempt: int, seconds: int) -> None:
    row = _failed_once(engine, attempt=attempt - 1)

    assert 0.9 * seconds <= _waited(row).total_seconds() <= 1.1 * seconds + 5


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
    row = _failed_once(engine, retry=retry)

    assert row["state"] in {"retryable", "available", "running"}
    assert 0 < _waited(row).total_seconds() < 10
    assert "no such luck" in row["all_errors"][0]["error"]


@pytest.mark.parametrize(
    ("delay", "waits"),
    [(timedelta(days=-1), timedelta(0)), (timedelta.max, timedelta(days=36_500))],
    ids=["negative", "for ever"],
)
def test_a_policy_beyond_all_bounds_is_bounded(engine: Engine, delay: timedelta, waits: timedelta) -> None:
    row = _failed_once(engine, retry=_gives(delay))

    assert waits <= _waited(row) < waits + timedelta(seconds=10)


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
    def gives(job: JobContext[Count]) -> Any:
        return GARBAGE[job.args.number]

    put(engine, *range(len(GARBAGE)))
    with working(engine, gives, 2):
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
