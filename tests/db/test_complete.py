"""Completing: batches, and what happens to a batch in which something is wrong."""

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, Literal

import pytest
from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.exc import OperationalError

from sqla_river import complete, states
from sqla_river.complete import LARGEST_BACKLOG, LARGEST_BATCH, Completer, complete_parameters, settle_parameters
from sqla_river.context import JobContext
from sqla_river.rows import ID, Fetched, Result
from sqla_river.statements import COMPLETE_JOBS, NOTE_PROGRESS, NOTIFY_QUEUES, SELECT_HELD, SETTLE_JOBS
from sqla_river.states import AttemptError, JobState
from sqla_river.store import OwnConnection
from sqla_river.workers import Workers
from tests.making import (
    Count,
    Plan,
    count_statements,
    count_states,
    ended,
    eventually,
    explain,
    fetch,
    make_completer,
    make_executor,
    make_jobs,
    opened,
    own_settings,
    read_job,
    read_jobs,
    result,
)

SECOND: Final = timedelta(seconds=1)
ERROR: Final = AttemptError(1, "ValueError: no", "")


class _Told:
    """A completer whose thread is the test, and what it told."""

    def __init__(self, own: OwnConnection) -> None:
        self.written: list[tuple[int, JobState]] = []
        self.woken = 0
        self.relieved = 0
        self.completer = Completer(
            own, wake=self._wake, completed=self._complete, written=self._write, relieved=self._relieve
        )

    def _wake(self) -> None:
        self.woken += 1

    def _complete(self, rows: Sequence[Fetched]) -> None:
        self.written += [(each[ID], JobState.COMPLETED) for each in rows]

    def _write(self, results: Sequence[Result], states: Sequence[JobState]) -> None:
        self.written += [(each.job.id, state) for each, state in zip(results, states, strict=True)]

    def _relieve(self) -> None:
        self.relieved += 1


# ---- batches ------------------------------------------------------------------------


def test_a_batch_is_one_statement(engine: Engine) -> None:
    jobs = make_jobs(engine, 200, state=JobState.RUNNING)

    with opened(engine) as own:
        told = _Told(own)
        own.get()
        for job_id in jobs:
            told.completer.put(result(job_id, states.completed()))
        with count_statements(engine) as sent:
            told.completer.step()

    assert len(sent) == 1
    assert sorted(told.written) == [(job_id, JobState.COMPLETED) for job_id in jobs]
    assert count_states(engine) == {"completed": 200}


def test_a_batch_has_a_bound(engine: Engine) -> None:
    jobs = make_jobs(engine, LARGEST_BATCH + 10, state=JobState.RUNNING)

    with opened(engine) as own:
        told = _Told(own)
        for job_id in jobs:
            told.completer.put(result(job_id, states.completed()))
        pause = told.completer.step()
        first = len(told.written)
        told.completer.step()

    assert (first, pause) == (LARGEST_BATCH, 0.0)
    assert len(told.written) == LARGEST_BATCH + 10


def test_putting_a_result_wakes_the_loop(engine: Engine) -> None:
    with opened(engine) as own:
        told = _Told(own)
        told.completer.put(result(1, states.completed()))

    assert told.woken == 1


def test_ten_thousand_unwritten_results_stop_the_fetch_until_they_are_fewer(engine: Engine) -> None:
    with opened(engine) as own:
        told = _Told(own)
        for number in range(LARGEST_BACKLOG - 1):
            told.completer.put(result(number + 1, states.completed()))
        before = told.completer.ready
        told.completer.put(result(LARGEST_BACKLOG, states.completed()))
        full = told.completer.ready
        told.completer.step()

    assert (before, full) == (True, False)
    assert told.completer.ready
    assert told.relieved == 1
    assert told.completer.stale == LARGEST_BATCH


def test_a_fetch_that_was_stopped_while_a_batch_was_being_written_goes_on_after_it(engine: Engine) -> None:
    (job_id,) = make_jobs(engine, state=JobState.RUNNING)
    full: list[bool] = []
    relieved: list[bool] = []

    def written(_: object) -> None:  # not forgotten yet: meanwhile the slots go on
        for number in range(LARGEST_BACKLOG - 1):
            completer.put(result(number + 2, states.completed()))
        full.append(not completer.ready)

    with opened(engine) as own:
        completer = Completer(
            own,
            wake=lambda: None,
            completed=written,
            written=lambda _results, _states: None,
            relieved=lambda: relieved.append(completer.ready),
        )
        completer.put(ended(job_id, None))
        completer.step()

    assert (full, relieved) == ([True], [True])


def test_a_step_with_nothing_to_do_asks_nothing(engine: Engine) -> None:
    with opened(engine) as own:
        told = _Told(own)
        own.get()
        with count_statements(engine) as sent:
            pause = told.completer.step()

    assert sent == []
    assert pause > 60


# ---- rows that others hold ----------------------------------------------------------


@pytest.mark.parametrize(
    "transition",
    [None, states.completed(), states.errored(ERROR, SECOND)],
    ids=["just completed", "completed", "errored"],
)
def test_a_row_locked_by_an_open_transaction_delays_that_job_alone(
    engine: Engine, transition: states.Transition | None
) -> None:
    locked, *free = make_jobs(engine, 50, state=JobState.RUNNING)

    with opened(engine, lock_timeout="1s") as own:
        told = _Told(own)
        with engine.begin() as theirs:
            theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
            for job_id in (locked, *free):
                told.completer.put(ended(job_id, transition))
            pause = told.completer.step()
            while_locked = {job_id for job_id, _ in told.written}, told.completer.backlog, told.completer.stale
            told.completer.step()
        eventually(lambda: (told.completer.step(), told.completer.backlog == 0)[1], what="the locked one")

    assert while_locked == (set(free), 1, 0)
    assert 0 < pause <= 0.1
    assert read_job(engine, locked)["state"] == (transition or states.completed()).state
    assert told.completer.stale == 0


def test_what_is_tried_again_counts_as_unwritten_until_it_is_written(engine: Engine) -> None:
    (job_id,) = make_jobs(engine, state=JobState.RUNNING)
    unwritten: list[int] = []

    with opened(engine) as own:
        completer = make_completer(own, lambda _id, _state: unwritten.append(completer.backlog))
        with engine.begin() as theirs:
            theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {job_id} FOR UPDATE")
            completer.put(result(job_id, states.completed()))
            completer.step()
        eventually(lambda: (completer.step(), unwritten != [])[1], what="the second try")

    assert unwritten == [1]
    assert completer.backlog == 0


def test_what_is_put_while_a_row_is_locked_is_written_at_once(engine: Engine) -> None:
    locked, later = make_jobs(engine, 2, state=JobState.RUNNING)

    with opened(engine) as own, engine.begin() as theirs:
        told = _Told(own)
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
        told.completer.put(result(locked, states.completed()))
        told.completer.step()
        told.completer.put(result(later, states.completed()))
        told.completer.step()

        assert read_job(engine, later)["state"] == "completed"
        assert told.completer.ready


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ("attempted_by = ARRAY['test/1', 'thief/1']", "running"),
        ("state = 'cancelled', finalized_at = now()", "cancelled"),
        ("metadata = '{\"cancel_attempted_at\": 1}'", "completed"),
    ],
    ids=["stolen", "ended", "marked"],
)
def test_a_row_that_changes_while_its_batch_is_being_written_is_judged_as_it_is_then(
    engine: Engine, change: str, state: str
) -> None:
    first, second = make_jobs(engine, 2, state=JobState.RUNNING)
    with engine.begin() as connection:  # the first row is written for as long as this lock is held
        connection.exec_driver_sql(
            "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF old.id = {first} THEN PERFORM pg_advisory_xact_lock(4711); END IF; RETURN new; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER wait BEFORE UPDATE ON river_job FOR EACH ROW EXECUTE FUNCTION wait()"
        )

    with opened(engine) as own, engine.connect() as theirs:
        told = _Told(own)
        theirs.exec_driver_sql("SELECT pg_advisory_lock(4711)")
        for job_id in (first, second):
            told.completer.put(ended(job_id, None))
        writing = threading.Thread(target=told.completer.step)
        writing.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        eventually(lambda: theirs.exec_driver_sql(waiting).scalar_one() == 1, what="the completer")
        theirs.exec_driver_sql(f"UPDATE river_job SET {change} WHERE id = {second}")
        theirs.commit()
        theirs.exec_driver_sql("SELECT pg_advisory_unlock(4711)")
        theirs.commit()
        writing.join(30)

    assert read_job(engine, first)["state"] == "completed"
    assert read_job(engine, second)["state"] == state
    assert told.completer.stale == (state == "running")
    assert told.completer.backlog == 0


def test_a_row_that_somebody_had_locked_is_written_at_once(engine: Engine) -> None:
    """Its lock can be seen for as long as the row is not written again, though it is none any more."""
    jobs = make_jobs(engine, 3, state=JobState.RUNNING)
    with engine.begin() as theirs:
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {jobs[1]} FOR KEY SHARE")

    with opened(engine) as own:
        told = _Told(own)
        for job_id in jobs:
            told.completer.put(ended(job_id, None))
        told.completer.step()

    assert sorted(told.written) == [(job_id, JobState.COMPLETED) for job_id in jobs]
    assert (told.completer.backlog, told.completer.stale) == (0, 0)


def test_two_writers_of_the_same_rows_never_deadlock(engine: Engine) -> None:
    jobs = make_jobs(engine, 300, state=JobState.RUNNING)
    failures: list[BaseException] = []

    def write(ids: list[int]) -> None:
        try:
            with opened(engine) as own:
                for _ in range(10):
                    own.execute(COMPLETE_JOBS, complete_parameters([(each, "test/1") for each in ids]))
                    own.execute(
                        SETTLE_JOBS, settle_parameters([(each, "test/1", states.interrupted()) for each in ids])
                    )
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=write, args=(ids,)) for ids in (jobs, jobs[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert failures == []


# ---- poison -------------------------------------------------------------------------


def _trap(engine: Engine, is_: Literal["=", "<>"], job_id: int, code: str) -> None:
    """Let every update of that job, or of every other, fail, as a trigger, a check or a limit would."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION trap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF old.id "
            f"{is_} {job_id} THEN RAISE EXCEPTION 'trapped' USING ERRCODE = '{code}'; END IF; RETURN new; END $$"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER trap BEFORE UPDATE ON river_job FOR EACH ROW EXECUTE FUNCTION trap()"
        )


@pytest.mark.parametrize(
    "transition",
    [None, states.completed(), states.errored(ERROR, SECOND)],
    ids=["just completed", "completed", "errored"],
)
@pytest.mark.parametrize("code", ["22P02", "23514", "42501", "P0001", "54000", "0A000", "21000"])
def test_a_result_that_postgresql_refuses_fails_alone(
    engine: Engine, transition: states.Transition | None, code: str
) -> None:
    jobs = make_jobs(engine, 30, state=JobState.RUNNING)
    _trap(engine, "=", jobs[11], code)

    with opened(engine) as own:
        told = _Told(own)
        for job_id in jobs:
            told.completer.put(ended(job_id, transition))
        told.completer.step()

    assert {job_id for job_id, _ in told.written} == set(jobs) - {jobs[11]}
    assert told.completer.stale == 0


def test_a_refused_result_is_tried_again(engine: Engine) -> None:
    job_id, *_ = make_jobs(engine, 3, state=JobState.RUNNING)
    _trap(engine, "=", job_id, "23514")

    with opened(engine) as own:
        told = _Told(own)
        told.completer.put(result(job_id, states.completed()))
        told.completer.step()
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER trap ON river_job")
        eventually(lambda: (told.completer.step(), told.completer.backlog == 0)[1], what="the refused one")

    assert read_job(engine, job_id)["state"] == "completed"


def test_outcomes_that_postgresql_refuses_stop_the_fetch_until_they_are_fewer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(complete, "LARGEST_BACKLOG", 20)
    *refused, healthy = make_jobs(engine, 20, state=JobState.RUNNING)
    _trap(engine, "<>", healthy, "P0001")

    with opened(engine) as own:
        told = _Told(own)
        for job_id in refused:
            told.completer.put(ended(job_id, None))
        told.completer.step()
        few = told.completer.ready
        told.completer.put(ended(healthy, None))
        many = told.completer.ready
        told.completer.step()
        written, again = list(told.written), told.completer.ready
        told.completer.put(ended(0, None))  # of a job that is gone
        while_refused = told.completer.ready, told.relieved
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER trap ON river_job")
        eventually(lambda: (told.completer.step(), told.completer.backlog == 0)[1], what="the refused ones")

    assert (few, many) == (True, False)
    assert (written, again) == ([(healthy, JobState.COMPLETED)], True)
    assert while_refused == (False, 1)
    assert told.completer.ready
    assert told.relieved == 2
    assert len(told.written) == 20


def _mutated(value: object) -> Callable[[JobContext[Count]], None]:
    def handler(job: JobContext[Count]) -> None:
        kept: list[object] = []
        job.metadata["kept"] = kept
        kept.append(value)

    return handler


def _assigned(value: object) -> Callable[[JobContext[Count]], None]:
    def handler(job: JobContext[Count]) -> None:
        job.metadata["kept"] = value

    return handler


CYCLE: Final[list[object]] = []
CYCLE.append(CYCLE)
UNSTORABLE: Final = {
    "an int of 5,000 digits": _assigned(10**5_000),
    "a mapping that is no dict": _assigned(MappingProxyType({"a": 1})),
    "an object put in later": _mutated(object()),
    "NaN put in later": _mutated(float("nan")),
    "NUL put in later": _mutated("\0"),
    "half a surrogate pair put in later": _mutated("\ud800"),
    "a cycle put in later": _mutated(CYCLE),
}


@pytest.mark.parametrize("handler", UNSTORABLE.values(), ids=UNSTORABLE)
def test_metadata_that_cannot_be_stored_fails_its_own_job_only(
    engine: Engine, handler: Callable[[JobContext[Count]], None]
) -> None:
    poison, *healthy = make_jobs(engine, 20)

    def work(job: JobContext[Count]) -> None:
        if job.id == poison:
            handler(job)
        else:
            job.metadata["fine"] = True

    workers = Workers()
    workers.register(Count)(work)
    executor = make_executor(workers)
    with opened(engine) as own:
        told = _Told(own)
        for row in fetch(own):
            told.completer.put(executor.execute(row) or row)
        for _ in range(5):
            told.completer.step()

    assert {row["id"] for row in read_jobs(engine) if row["state"] == "completed"} >= set(healthy)
    # It failed, or was stored without what cannot be stored; but it does not run for ever.
    assert read_job(engine, poison)["state"] in {"retryable", "completed"}
    assert told.completer.backlog == 0


# ---- the database is away -----------------------------------------------------------


class _LossyConnection(OwnConnection):
    """Executes, and loses the reply, as often as *lose* says."""

    lose = 1
    before = False

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        if not self.lose or statement is SELECT_HELD:
            return super().execute(statement, parameters)
        self.lose -= 1
        if not self.before:
            super().execute(statement, parameters)
        self.close()
        raise OperationalError(
            "lost", {}, Exception("server closed the connection unexpectedly"), connection_invalidated=True
        )


MIXED: Final = (
    None,
    states.completed(),
    states.completed('{"seen": 1}'),
    states.errored(ERROR, SECOND),
    states.discarded(ERROR),
    states.snoozed(SECOND),
    states.cancelled(ERROR),
    states.interrupted(),
)


@pytest.mark.parametrize("before", [True, False], ids=["request", "reply"])
@pytest.mark.parametrize("lose", [1, 2, 3])
def test_a_lost_connection_loses_no_result_and_writes_none_twice(engine: Engine, lose: int, before: bool) -> None:
    jobs = make_jobs(engine, 5 * len(MIXED), state=JobState.RUNNING, attempt=3)
    own = _LossyConnection(engine, None, "test", {})
    own.lose, own.before = lose, before
    told = _Told(own)
    for number, job_id in enumerate(jobs):
        told.completer.put(ended(job_id, MIXED[number % len(MIXED)]))

    for _ in range(lose):
        with pytest.raises(OperationalError):
            told.completer.step()
    told.completer.step()
    own.close()

    assert told.completer.backlog == 0
    assert told.completer.stale == 0
    assert sorted(job_id for job_id, _ in told.written) == jobs
    for number, job_id in enumerate(jobs):
        transition, row = MIXED[number % len(MIXED)] or states.completed(), read_job(engine, job_id)
        assert row["state"] == transition.state
        assert row["attempt"] == 3 - transition.attempt_back
        assert len(row["all_errors"] or []) == (transition.error is not None)
        assert row["metadata"].get("snoozes", 0) == transition.snoozed


class _LostLater(OwnConnection):
    """Loses its connection, once, when the outcome of `last` is to be written alone."""

    last = 0

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        if statement is SETTLE_JOBS and parameters["p_ids"] == [self.last]:
            self.last = 0
            self.raw.close()
        return super().execute(statement, parameters)


@pytest.mark.parametrize("retried", [False, True], ids=["first try", "second try"])
def test_what_was_put_aside_before_the_connection_was_lost_is_written_and_told_once(
    engine: Engine, retried: bool
) -> None:
    jobs = locked, stale, trapped, last = make_jobs(engine, 4, state=JobState.RUNNING)
    own = _LostLater(engine, None, "test")
    told = _Told(own)

    with engine.connect() as theirs:
        if retried:  # all of them are put aside together
            theirs.exec_driver_sql("SELECT 1 FROM river_job FOR UPDATE")
        for job_id in jobs:
            told.completer.put(result(job_id, states.discarded(ERROR)))
        if retried:
            told.completer.step()
            theirs.rollback()
        theirs.exec_driver_sql(f"UPDATE river_job SET attempted_by = '{{thief/1}}' WHERE id = {stale}")
        theirs.commit()
        _trap(engine, "=", trapped, "23514")
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
        own.last = last
        with pytest.raises(OperationalError):
            eventually(lambda: (told.completer.step(), False)[1], what="the loss")
        lost = told.completer.backlog, told.completer.stale, list(told.written)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER trap ON river_job")
    eventually(lambda: (told.completer.step(), told.completer.backlog == 0)[1], what="the others")
    own.close()

    assert lost == (4, 0, [])
    assert sorted(told.written) == [(job_id, JobState.DISCARDED) for job_id in (locked, trapped, last)]
    assert told.completer.stale == 1


class _Meddled(OwnConnection):
    """Has something happen, once, just before it executes *statement*; it may lose the connection."""

    statement: Executable | None = None
    happens: Callable[[], None]

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        if statement is self.statement:
            self.statement = None
            self.happens()
        return super().execute(statement, parameters)


THEFT: Final = "UPDATE river_job SET state = 'running', attempted_by = '{thief/1}'"


def _change(engine: Engine, sql: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(sql)


@pytest.mark.parametrize("lost_at", [SELECT_HELD, SETTLE_JOBS], ids=["SELECT_HELD", "SETTLE_JOBS"])
def test_what_was_written_before_the_connection_was_lost_is_told_once_whatever_becomes_of_its_job(
    engine: Engine, lost_at: Executable
) -> None:
    done, back, late = make_jobs(engine, 3, state=JobState.RUNNING)
    _change(engine, f"UPDATE river_job SET attempted_by = '{{thief/1}}' WHERE id = {late}")

    def happens() -> None:
        _change(engine, f"DELETE FROM river_job WHERE id = {done}")
        if lost_at is SELECT_HELD:
            _change(engine, f"{THEFT} WHERE id = {back}")
        own.raw.close()

    own = _Meddled(engine, None, "test")
    own.statement, own.happens = lost_at, happens
    told = _Told(own)
    for job_id, transition in ((done, None), (back, states.interrupted()), (late, states.interrupted())):
        told.completer.put(ended(job_id, transition))
    with pytest.raises(OperationalError):
        told.completer.step()
    told.completer.step()
    own.close()

    assert sorted(told.written) == [(done, JobState.COMPLETED), (back, JobState.AVAILABLE)]
    assert (told.completer.stale, told.completer.backlog) == (1, 0)


def test_a_killed_connection_is_replaced(engine: Engine) -> None:
    jobs = make_jobs(engine, 10, state=JobState.RUNNING)

    with opened(engine) as own:
        told = _Told(own)
        pid = own.get().connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 5000)")
        for job_id in jobs:
            told.completer.put(result(job_id, states.completed()))
        with pytest.raises(OperationalError):
            told.completer.step()
        told.completer.step()

    assert count_states(engine) == {"completed": 10}


def test_a_flush_ends_at_its_deadline_and_says_what_is_left(engine: Engine) -> None:
    own = _LossyConnection(engine, None, "test", {})
    own.lose, own.before = 1_000_000, True
    told = _Told(own)
    for number in range(3):
        told.completer.put(result(number + 1, states.completed()))

    began = time.monotonic()
    told.completer.flush(lambda: began + 0.3)
    took = time.monotonic() - began

    assert told.completer.backlog == 3
    assert took < 5


# ---- wake-up ------------------------------------------------------------------------


@contextmanager
def _listening(engine: Engine) -> Generator[Callable[[], list[str]]]:
    """What hears the next wake-up."""
    with engine.connect() as listening:
        raw: Any = listening.execution_options(isolation_level="AUTOCOMMIT").connection.dbapi_connection
        raw.execute('LISTEN "public.river_insert"')
        yield lambda: [note.payload for note in raw.notifies(timeout=30, stop_after=1)]
        raw.execute("UNLISTEN *")


def test_jobs_given_back_are_announced(engine: Engine) -> None:
    jobs = make_jobs(engine, 4, state=JobState.RUNNING, queue="q")

    with opened(engine) as own, _listening(engine) as hear:
        told = _Told(own)
        for job_id in jobs:
            told.completer.put(result(job_id, states.interrupted(), queue="q"))
        told.completer.step()
        heard = hear()

    assert heard == ['{"queue": "q"}']


def test_a_connection_lost_before_the_wake_up_makes_no_outcome_late_and_loses_no_wake_up(engine: Engine) -> None:
    (job_id,) = make_jobs(engine, state=JobState.RUNNING, queue="q")

    def happens() -> None:
        _change(engine, THEFT)
        own.raw.close()

    own = _Meddled(engine, None, "test")
    own.statement, own.happens = NOTIFY_QUEUES, happens
    told = _Told(own)

    with _listening(engine) as hear:
        told.completer.put(result(job_id, states.interrupted(), queue="q"))
        told.completer.flush(lambda: math.inf)
        heard = hear()
    own.close()

    assert told.written == [(job_id, JobState.AVAILABLE)]
    assert told.completer.stale == 0
    assert heard == ['{"queue": "q"}']


def test_a_wake_up_that_the_server_has_no_room_for_keeps_no_outcome_from_being_written_and_told(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make_jobs(engine, 2, state=JobState.RUNNING)
    _change(
        engine,
        "CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000'; END $$",
    )

    own = _Meddled(engine, None, "test", {"search_path": "public, pg_catalog"})
    own.statement, own.happens = NOTIFY_QUEUES, lambda: _change(engine, f"{THEFT} WHERE id = {first}")
    told = _Told(own)

    told.completer.put(result(first, states.interrupted()))
    told.completer.put(result(second, states.discarded(ERROR)))
    told.completer.step()
    own.close()

    assert sorted(told.written) == [(first, JobState.AVAILABLE), (second, JobState.DISCARDED)]
    assert (told.completer.backlog, told.completer.stale) == (0, 0)
    assert "could not announce the queues ['default']" in caplog.text


# ---- plans --------------------------------------------------------------------------

PlanMode = Literal["generic", "custom"]
SETTINGS: Final = {name: value for name, value in own_settings("complete").items() if name != "plan_cache_mode"}
SETTLED: Final = [transition for transition in MIXED if transition is not None]
IDS: Final = list(range(1_000_020, 1_002_001, 20))
STATEMENTS: Final[dict[str, tuple[Executable, dict[str, Any]]]] = {
    "COMPLETE_JOBS": (COMPLETE_JOBS, complete_parameters([(each, "test/1") for each in IDS])),
    "SETTLE_JOBS": (SETTLE_JOBS, settle_parameters([(each, "test/1", SETTLED[each % len(SETTLED)]) for each in IDS])),
    "NOTE_PROGRESS": (
        NOTE_PROGRESS,
        {"p_ids": IDS, "p_tokens": ["test/1"] * len(IDS), "p_notes": ["{}"] * len(IDS)},
    ),
    "SELECT_HELD": (SELECT_HELD, {"p_ids": IDS, "p_tokens": ["test/1"] * len(IDS)}),
}


def _add_finished(connection: Connection) -> None:
    connection.exec_driver_sql(
        "INSERT INTO river_job (kind, args, state, finalized_at) "
        "SELECT 'count', '{}', 'completed', now() FROM generate_series(1, 20000)"
    )


def _add_running(connection: Connection) -> None:
    connection.exec_driver_sql(
        "INSERT INTO river_job (id, kind, args, state, attempt, attempted_by) "
        "SELECT n, 'count', '{}', 'running', 1, '{test/1}' FROM generate_series(1000001, 1002000) n"
    )


def _check(plan: Plan) -> None:
    assert plan.indexes == {"river_job_pkey"}, plan
    assert "Seq Scan" not in {scan["Node Type"] for scan in plan.scans("river_job")}, plan
    assert (plan.removed("Join Filter"), plan.removed("Filter")) == (0, 0), plan
    read = {round(scan["Actual Rows"] * scan["Actual Loops"]) for scan in plan.scans("river_job")}
    assert read == {len(IDS)}, plan


@pytest.mark.parametrize("mode", ["generic", "custom"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_batch_reads_the_rows_it_writes_and_no_others(engine: Engine, name: str, mode: PlanMode) -> None:
    statement, parameters = STATEMENTS[name]
    with engine.connect() as connection:
        _add_finished(connection)
        _add_running(connection)
        connection.exec_driver_sql("ANALYZE river_job")

        plan = explain(connection, None, statement, parameters, plan=mode, settings=SETTINGS)

    _check(plan)


@pytest.mark.parametrize("mode", ["generic", "custom"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_so_it_does_under_statistics_that_saw_no_running_job(engine: Engine, name: str, mode: PlanMode) -> None:
    statement, parameters = STATEMENTS[name]
    with engine.connect() as connection:
        _add_finished(connection)
        connection.exec_driver_sql("ANALYZE river_job")

        plan = explain(
            connection,
            None,
            statement,
            parameters,
            plan=mode,
            settings=SETTINGS,
            before=lambda: _add_running(connection),
        )

    _check(plan)


@pytest.mark.parametrize("name", STATEMENTS)
def test_so_it_does_under_a_plan_that_was_made_for_an_empty_table(engine: Engine, name: str) -> None:
    statement, parameters = STATEMENTS[name]
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE river_job")

        def fill() -> None:
            _add_finished(connection)
            _add_running(connection)

        plan = explain(connection, None, statement, parameters, plan="generic", settings=SETTINGS, before=fill)

    _check(plan)
