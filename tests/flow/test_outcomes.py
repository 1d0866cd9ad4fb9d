"""What a handler may leave behind besides its end: output, metadata, progress; and jobs that come too late."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import pairwise
from typing import Any, Final

import pytest
from sqlalchemy import Engine, event, text

from sqla_river import Cancel, JobContext, Snooze
from sqla_river.context import LONGEST_OUTPUT
from sqla_river.errors import InvalidOptionError
from tests.database import emptied, shared_database
from tests.making import Count, Gate, all_are, count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.working import HOUR, after, begun, errors, handling, outcome, put, settled, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


# ---- output and metadata


def completes(_: JobContext[Count]) -> None:
    return None


def fails(_: JobContext[Count]) -> None:
    raise ValueError


def snoozes(_: JobContext[Count]) -> Snooze:
    return Snooze(HOUR)


def raises_a_snooze(_: JobContext[Count]) -> None:
    raise Snooze(HOUR)


def cancels(_: JobContext[Count]) -> Cancel:
    return Cancel("enough")


def raises_a_cancel(_: JobContext[Count]) -> None:
    raise Cancel("enough")


ENDS: Final[list[tuple[Callable[[JobContext[Count]], Any], str, int]]] = [
    (completes, "completed", 25),
    (fails, "retryable", 25),
    (fails, "discarded", 1),
    (snoozes, "scheduled", 25),
    (raises_a_snooze, "scheduled", 25),
    (cancels, "cancelled", 25),
    (raises_a_cancel, "cancelled", 25),
]


@pytest.mark.parametrize(("end", "state", "most"), ENDS)
def test_output_and_metadata_are_kept_with_every_outcome(
    engine: Engine, end: Callable[[JobContext[Count]], Any], state: str, most: int
) -> None:
    def handler(job: JobContext[Count]) -> Any:
        job.output([1, {"two": None}])
        job.metadata["step"] = 1
        return end(job)

    job_id = make_job(engine, max_attempts=most, metadata={"before": True, "step": 0})
    with working(engine, handler):
        row = settled(engine, job_id)

    assert row["state"] == state
    kept = {key: value for key, value in row["metadata"].items() if key != "snoozes"}
    assert kept == {"before": True, "step": 1, "output": [1, {"two": None}]}


def test_output_and_metadata_are_kept_when_a_stop_interrupts(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> None:
        job.output("so far")
        job.metadata["step"] = 1
        assert job.cancelled.wait(30)
        raise RuntimeError

    (job_id,) = put(engine, 0)
    with working(engine, handler) as runner:
        begun(runner, 1)
        runner.stop(timedelta(0))

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"], errors(row)) == ("available", 0, [])
    assert row["metadata"] == {"output": "so far", "step": 1}


def test_a_later_output_takes_the_place_of_the_first(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> None:
        job.output(1)
        job.output(2)

    assert outcome(engine, handler)["metadata"] == {"output": 2}


@pytest.mark.parametrize("name", ["output", "progress"])
def test_what_a_handler_assigns_to_a_method_fails_its_attempt_and_says_how_it_is_written(
    engine: Engine, name: str
) -> None:
    def handler(job: JobContext[Count]) -> None:
        setattr(job, name, 5)

    row = outcome(engine, handler)

    assert row["state"] == "retryable"
    assert f"write job.{name}(...)" in errors(row)[0]


def test_output_may_be_one_mebibyte_of_json_and_no_more(engine: Engine) -> None:
    refused: list[InvalidOptionError] = []

    def handler(job: JobContext[Count]) -> None:
        job.output("x" * (LONGEST_OUTPUT - 2))
        for value in ("x" * (LONGEST_OUTPUT - 1), ["é" * (LONGEST_OUTPUT // 6 + 1)], object(), float("inf"), "\0"):
            with pytest.raises(InvalidOptionError) as caught:
                job.output(value)
            refused.append(caught.value)

    row = outcome(engine, handler)

    assert row["state"] == "completed"
    assert len(row["metadata"]["output"]) == LONGEST_OUTPUT - 2
    assert [error.option for error in refused] == ["output"] * 5
    assert f"at most {LONGEST_OUTPUT}" in str(refused[0])


def test_a_value_is_taken_when_it_is_said(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> None:
        numbers = [1]
        job.output(numbers)
        job.metadata["numbers"] = numbers
        numbers.append(2)
        assert job.metadata["numbers"] == [1]

    assert outcome(engine, handler)["metadata"] == {"output": [1], "numbers": [1]}


def test_snoozes_are_counted(engine: Engine) -> None:
    runs: list[int] = []

    def handler(job: JobContext[Count]) -> Snooze | None:
        runs.append(job.attempt)
        return Snooze(timedelta(0)) if len(runs) < 4 else None

    (job_id,) = put(engine, 0)
    with working(engine, handler):
        eventually(all_are(engine, "completed", 1))

    assert runs == [1] * 4
    assert read_job(engine, job_id)["metadata"] == {"snoozes": 3}


def test_the_error_of_this_attempt_is_there_for_the_policy_only(engine: Engine) -> None:
    seen: list[Any] = []

    def retry(job: JobContext[Any]) -> timedelta:
        seen.append((job.attempt, job.error))
        return timedelta(0)

    def handler(job: JobContext[Count]) -> None:
        seen.append(job.error)
        if job.attempt <= 2:
            raise ValueError(job.attempt)

    put(engine, 0)
    with working(engine, handling(handler, retry=retry)):
        eventually(all_are(engine, "completed", 1))

    assert seen[0] is seen[2] is seen[4] is None
    assert [(attempt, repr(error)) for attempt, error in (seen[1], seen[3])] == [
        (1, "ValueError(1)"),
        (2, "ValueError(2)"),
    ]


# ---- expires


@pytest.mark.parametrize("queued", [timedelta(seconds=-1), timedelta(0)])
def test_a_job_fetched_after_its_expiry_is_cancelled_and_not_run(engine: Engine, queued: timedelta) -> None:
    gate = Gate(opened=True)
    (job_id,) = put(engine, 0, expires=timedelta(milliseconds=1))
    eventually(
        lambda: time.time() > float(read_job(engine, job_id)["metadata"]["sqla_river:expires_at"]), what="expiry"
    )

    with working(engine, gate):
        row = settled(engine, job_id)

    assert row["state"] == "cancelled"
    assert errors(row) == ["expired: it was fetched later than its expiry"]
    assert gate.started == []


def expire(engine: Engine, job_id: int) -> None:
    """Let the job be over its expiry."""
    over = text("UPDATE river_job SET metadata = jsonb_set(metadata, '{sqla_river:expires_at}', '0') WHERE id = :id")
    with engine.begin() as connection:
        connection.execute(over, {"id": job_id})


def test_a_job_fetched_before_its_expiry_runs_to_its_end(engine: Engine) -> None:
    gate = Gate()
    (job_id,) = put(engine, 0, expires=HOUR)
    with working(engine, gate):
        gate.wait(1)
        expire(engine, job_id)
        gate.open()
        assert settled(engine, job_id)["state"] == "completed"


def test_a_retry_after_the_expiry_is_not_run(engine: Engine) -> None:
    runs: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        runs.append(job.attempt)
        expire(engine, job.id)
        raise ValueError

    (job_id,) = put(engine, 0, expires=HOUR)
    with working(engine, handling(handler, retry=after(timedelta(0)))):
        eventually(lambda: read_job(engine, job_id)["finalized"], what="the end")

    row = read_job(engine, job_id)
    assert (row["state"], runs, len(errors(row))) == ("cancelled", [1], 2)


# ---- progress


def progress_of(row: Any) -> Any:
    return row["metadata"].get("sqla_river:progress")


def test_progress_is_visible_while_the_job_runs(engine: Engine) -> None:
    go_on = threading.Event()

    def handler(job: JobContext[Count]) -> None:
        job.progress(1, 3)
        job.progress(2, 3, "nearly")
        assert go_on.wait(30)

    (job_id,) = put(engine, 0)
    with working(engine, handler):
        eventually(lambda: progress_of(read_job(engine, job_id)) is not None, what="progress")
        eventually(lambda: progress_of(read_job(engine, job_id))["done"] == 2, what="the last of it")
        row = read_job(engine, job_id)
        go_on.set()

    assert (row["state"], progress_of(row)) == ("running", {"done": 2, "total": 3, "note": "nearly"})


def test_progress_is_written_at_most_once_a_second_and_for_all_jobs_at_once(url: str, engine: Engine) -> None:
    written: list[float] = []
    watched: list[Any] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        if "sqla_river:progress" in statement:
            assert incarnation is not None
            written.append(incarnation.completer._noted_at)
            watched.append(len(parameters["p_ids"]))

    from sqla_river import complete

    own_engines: list[Engine] = []
    over = threading.Event()

    def handler(job: JobContext[Count]) -> None:
        step = 0
        while not over.wait(0.002):
            step += 1
            job.progress(step)

    make_jobs(engine, 4)
    with working(engine, handler, 4) as runner:
        incarnation = runner._incarnation
        assert incarnation is not None
        own: Any = incarnation.completer._own
        event.listen(own.get().engine, "before_cursor_execute", note)
        own_engines.append(own.get().engine)
        eventually(lambda: len(written) >= 3, what="three writings")
        over.set()

    assert complete.NOTE_EVERY == 1.0
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(written))
    assert set(watched[1:]) == {4}
    assert count_states(engine) == {"completed": 4}


def test_progress_that_is_no_json_is_refused_where_it_is_said(engine: Engine) -> None:
    def handler(job: JobContext[Count]) -> None:
        with pytest.raises(InvalidOptionError):
            job.progress(float("nan"))
        with pytest.raises(InvalidOptionError):
            job.progress(1, 2, "\0")
        job.progress(1, None, "long" * 1_000)

    assert outcome(engine, handler)["state"] == "completed"


def test_progress_said_after_the_end_changes_nothing(engine: Engine) -> None:
    said: list[JobContext[Count]] = []
    (job_id,) = put(engine, 0)
    with working(engine, said.append):
        settled(engine, job_id)
        said[0].progress(1)
        make_job(engine)
        eventually(all_are(engine, "completed", 2))

    assert [progress_of(row) for row in read_jobs(engine)] == [None, None]


def test_a_job_is_tried_no_more_often_than_it_may_be_where_judging_it_fails_too(engine: Engine) -> None:
    def handler(job: JobContext[Any]) -> None:
        job.log.info("at work")
        raise RuntimeError("no")

    too_long = "9" * 5_000  # more digits than Python reads, and the log has to be stored beside it
    make_job(engine, max_attempts=1, metadata=f'{{"number": {too_long}}}')
    with working(engine, handler, keep_logs=True):
        eventually(lambda: count_states(engine) == {"discarded": 1})
