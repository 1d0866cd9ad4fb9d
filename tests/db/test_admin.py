"""What each verb of an operator does to one job and to many, in each state, session and race."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast

import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import Engine, Select, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, aliased, scoped_session, sessionmaker

from sqla_river import (
    Job,
    JobMixin,
    JobState,
    River,
    Unique,
    cancel,
    change_priority,
    create_all,
    delete,
    enqueue,
    reschedule,
    retry,
)
from sqla_river import asyncio as awaited
from sqla_river.admin import Changed
from sqla_river.errors import (
    InvalidOptionError,
    JobFinishedError,
    JobNotFoundError,
    JobRunningError,
    UniqueKeyTakenError,
    UniqueRaceError,
)
from sqla_river.statements import (
    CANCEL_JOBS,
    CHANGE_PRIORITY_OF_JOBS,
    DELETE_JOBS,
    PRUNE_COMPLETED,
    RESCHEDULE_JOBS,
    RETRY_JOBS,
)
from sqla_river.states import FINALIZED, mask_of
from tests.database import emptied, shared_database, statements_of
from tests.jobs import Ping
from tests.making import count_states, explain, make_job, make_jobs, opened, read_job, read_jobs, text_of
from tests.racing import Second
from tests.working import HOUR

J: Final = JobState
DAY: Final = timedelta(days=1)
MARKED: Final = {"cancel_attempted_at": "2026-01-01T00:00:00Z", "mine": 1}


def put_off(session: Any, which: Any) -> Any:
    return cast("Any", reschedule)(session, which, scheduled_at=DAY)


def bring_forward(session: Any, which: Any) -> Any:
    return cast("Any", reschedule)(session, which, scheduled_at=-HOUR)


def make_last(session: Any, which: Any) -> Any:
    return cast("Any", change_priority)(session, which, priority=4)


VERBS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "retry": retry,
    "delete": delete,
    "reschedule": put_off,
    "reschedule, due": bring_forward,
    "change_priority": make_last,
}
RUNNING, FINISHED = JobRunningError, JobFinishedError


@dataclass(frozen=True)
class After:
    """What becomes of a job that was in attempt 3 of 3, due an hour ago, or ended a minute ago."""

    state: JobState
    delay: timedelta | None = None
    max_attempts: int = 3
    priority: int = 1


GONE: Final = "gone"
AGAIN: Final = After(J.AVAILABLE, timedelta(0), 4)
EXPECTED: Final[dict[str, dict[JobState, Any]]] = {
    "retry": dict.fromkeys(J, AGAIN) | {J.AVAILABLE: "available", J.RUNNING: RUNNING},
    "delete": dict.fromkeys(J, GONE) | {J.RUNNING: RUNNING},
    "reschedule": {
        J.PENDING: After(J.PENDING, DAY),
        J.AVAILABLE: After(J.SCHEDULED, DAY),
        J.SCHEDULED: After(J.SCHEDULED, DAY),
        J.RETRYABLE: After(J.RETRYABLE, DAY),
        J.RUNNING: RUNNING,
        **dict.fromkeys(FINALIZED, FINISHED),
    },
    "reschedule, due": {
        J.PENDING: After(J.PENDING, -HOUR),
        **dict.fromkeys((J.AVAILABLE, J.SCHEDULED, J.RETRYABLE), After(J.AVAILABLE, -HOUR)),
        J.RUNNING: RUNNING,
        **dict.fromkeys(FINALIZED, FINISHED),
    },
    "change_priority": {
        **{state: After(state, priority=4) for state in J if state not in FINALIZED},
        **dict.fromkeys(FINALIZED, FINISHED),
    },
}


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def one_of_each(engine: Engine) -> dict[JobState, int]:
    return {
        state: make_job(engine, state=state, attempt=3, max_attempts=3, due_in=-HOUR, errors=[{"error": "no"}])
        for state in J
    }


def agrees(row: Any, was: Any, after: After) -> None:
    assert row["state"] == after.state
    assert row["finalized"] is (after.state in FINALIZED)
    assert (row["max_attempts"], row["priority"]) == (after.max_attempts, after.priority)
    if after.delay is None:
        assert row["scheduled_at"] == was["scheduled_at"]
    else:
        assert abs(row["delay"] - after.delay) < timedelta(seconds=30)
    for name in ("kind", "args", "queue", "created_at", "tags", "attempt", "attempted_by", "all_errors", "metadata"):
        assert row[name] == was[name], name


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_one_job_is_changed_as_the_table_says_or_refused_by_name(engine: Engine, verb: str) -> None:
    for state, job_id in one_of_each(engine).items():
        was, before = read_job(engine, job_id), text_of(engine, job_id)
        expected = EXPECTED[verb][state]
        with Session(engine, expire_on_commit=False) as session:
            if isinstance(expected, type):
                refused: type[JobRunningError | JobFinishedError] = expected
                with pytest.raises(refused, match=f"^job {job_id} is {state}") as caught:
                    VERBS[verb](session, job_id)
                assert cast("JobRunningError", caught.value).job_id == job_id
                job = session.get_one(Job, job_id)  # the transaction goes on
            else:
                job = VERBS[verb](session, job_id)
            session.commit()

        assert (type(job), job.id) == (Job, job_id)
        if expected == GONE:
            assert (job.state, job.attempt) == (state, 3)
            assert job not in session
            assert job_id not in [row["id"] for row in read_jobs(engine)]
        elif isinstance(expected, After):
            agrees(read_job(engine, job_id), was, expected)
            assert (job.state, job.priority) == (expected.state, expected.priority)
        else:
            assert text_of(engine, job_id) == before


@pytest.mark.parametrize("verb", VERBS)
def test_many_are_changed_as_the_table_says_and_the_reason_is_given_for_the_others(engine: Engine, verb: str) -> None:
    jobs = one_of_each(engine)
    was = {job_id: (read_job(engine, job_id), text_of(engine, job_id)) for job_id in jobs.values()}

    with Session(engine) as session, session.begin():
        changed = VERBS[verb](session, select(Job).where(Job.attempt == 3))

    reasons = {RUNNING: "running", FINISHED: "finished", "available": "available"}
    expected = {job_id: EXPECTED[verb][state] for state, job_id in jobs.items()}
    left = {job_id: reasons[each] for job_id, each in expected.items() if each in reasons}
    assert changed == Changed(len(jobs) - len(left), left)
    rows = {row["id"]: row for row in read_jobs(engine)}
    for job_id, each in expected.items():
        if each == GONE:
            assert job_id not in rows
        elif isinstance(each, After):
            agrees(rows[job_id], was[job_id][0], each)
        else:
            assert text_of(engine, job_id) == was[job_id][1]


@pytest.mark.parametrize("verb", [*VERBS, "cancel"])
def test_a_job_that_is_not_there_is_reported_and_a_choice_of_none_is_fine(engine: Engine, verb: str) -> None:
    do = cancel if verb == "cancel" else VERBS[verb]
    with Session(engine) as session:
        with pytest.raises(JobNotFoundError, match="job 4711 does not exist"):
            do(session, 4711)
        assert do(session, Job.id < 0) == Changed(0, {})


def test_retry_forgets_a_cancel_and_gives_an_attempt_only_where_none_is_left(engine: Engine) -> None:
    attempts = [(1, 3, 3), (3, 3, 4), (5, 3, 6), (0, 25, 25), (32767, 32767, 32767)]
    with Session(engine, expire_on_commit=False) as session, session.begin():
        for attempt, most, then in attempts:
            job_id = make_job(session, state=J.CANCELLED, attempt=attempt, max_attempts=most, metadata=MARKED)
            job = retry(session, job_id)
            assert (job.max_attempts, job.finalized_at, job.metadata_) == (then, None, {"mine": 1})

        marked = make_job(session, metadata=MARKED)  # as a retry by River leaves it
        odd = make_job(session, state=J.DISCARDED, metadata='["no", "object"]')
        assert retry(session, Job.id.in_([marked, odd])).count == 2
        assert read_job(session, marked)["metadata"] == {"mine": 1}
        assert read_job(session, odd)["metadata"] == ["no", "object"]


def test_a_time_is_one_as_for_enqueue_and_a_bad_one_is_refused_at_the_call(engine: Engine) -> None:
    job_id = make_job(engine, state=J.SCHEDULED)
    at = datetime(2040, 1, 1, tzinfo=UTC)
    with Session(engine) as session:
        assert reschedule(session, job_id, scheduled_at=at).scheduled_at == at
        with pytest.raises(InvalidOptionError, match="scheduled_at must be aware"):
            reschedule(session, job_id, scheduled_at=datetime(2040, 1, 1))  # noqa: DTZ001
        for priority in (0, 5, True, "1", None):
            with pytest.raises(InvalidOptionError, match=r"priority must be 1\.\.4"):
                change_priority(session, job_id, priority=cast("Any", priority))
        assert session.get_one(Job, job_id).scheduled_at == at


class Base(DeclarativeBase):
    pass


class Theirs(JobMixin, Base):
    __river_schema__ = "jobs"


@pytest.mark.parametrize("verb", [*VERBS, "cancel"])
def test_what_chooses_no_jobs_of_the_class_is_refused(engine: Engine, verb: str) -> None:
    """``retry(session, job.queue == "mail")`` with an object in place of the class would retry job 1."""
    job_id = make_job(engine, state=J.RETRYABLE)
    before = text_of(engine, job_id)
    do: Any = cancel if verb == "cancel" else VERBS[verb]
    with Session(engine) as session, session.begin():
        for which in (True, "1", None, [1], select(Theirs), select(aliased(Job)), Theirs.id == 1, Job.id == Theirs.id):
            with pytest.raises(InvalidOptionError, match="expected the id of a job, select"):
                do(session, which)

    assert text_of(engine, job_id) == before


# ---- whose transaction, which session --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_part_of_the_callers_transaction_and_shows_in_its_session(engine: Engine, verb: str) -> None:
    ids = make_jobs(engine, 2, state=J.RETRYABLE, scheduled_at="2040-01-01T00:00:00Z")
    before = [text_of(engine, job_id) for job_id in ids]
    with Session(engine) as session:
        known = [session.get_one(Job, job_id) for job_id in ids]
        VERBS[verb](session, ids[0])
        VERBS[verb](session, Job.id == ids[1])
        if verb == "delete":
            assert not any(job in session for job in known)
            assert session.scalars(select(Job)).all() == []
        else:
            seen = {(job.state, job.priority, job.scheduled_at) for job in known}
            assert len(seen) == 1
            assert seen != {(J.RETRYABLE, 1, read_job(engine, ids[0])["scheduled_at"])}
        session.flush()
        session.rollback()

    assert [text_of(engine, job_id) for job_id in ids] == before


def test_pending_changes_of_the_session_are_flushed_first(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        job = enqueue(session, Ping(1), queue="mail", pending=True)
        assert retry(session, Job.queue == "mail").count == 1
        job.state = J.CANCELLED
        job.finalized_at = datetime.now(UTC)
        assert retry(session, job.id).state == J.AVAILABLE
        assert delete(session, job.id) is job


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["connection", "autocommit", "scoped_session", "psycopg2"])
def test_every_kind_of_session_will_do(engine: Engine, verb: str, kind: str) -> None:
    ids = make_jobs(engine, 2, state=J.RETRYABLE, attempt=3, max_attempts=3, scheduled_at="2040-01-01T00:00:00Z")
    was = read_job(engine, ids[0])
    other = engine
    if kind == "psycopg2":
        other = create_engine(engine.url.set(drivername="postgresql+psycopg2"))
    elif kind == "autocommit":
        other = engine.execution_options(isolation_level="AUTOCOMMIT")
    session: Any = scoped_session(sessionmaker(other)) if kind == "scoped_session" else other.connect()
    job = VERBS[verb](session, ids[0])
    changed = VERBS[verb](session, Job.id == ids[1])
    assert (job.id, changed) == (ids[0], Changed(1, {}))
    if kind != "autocommit":
        session.commit()
    session.close()
    other.dispose()

    rows = read_jobs(engine)
    assert len(rows) == (0 if verb == "delete" else 2)
    for row in rows:
        agrees(row, was, EXPECTED[verb][J.RETRYABLE])


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_awaited(engine: Engine, driver: str) -> None:
    ids = make_jobs(engine, 2, state=J.RETRYABLE)

    async def run() -> None:
        own = create_async_engine(engine.url.set(drivername=f"postgresql+{driver}"))
        async with AsyncSession(own, expire_on_commit=False) as session, session.begin():
            assert (await awaited.reschedule(session, ids[0], scheduled_at=DAY)).state == J.RETRYABLE
            assert (await awaited.change_priority(session, Job.id > 0, priority=3)).count == 2
            assert (await awaited.retry(session, ids[0])).state == J.AVAILABLE
            assert await awaited.retry(session, select(Job)) == Changed(1, {ids[0]: "available"})
            assert (await awaited.delete(session, ids[1])).priority == 3
            with pytest.raises(JobNotFoundError):
                await awaited.delete(session, ids[1])
        await own.dispose()

    asyncio.run(run())
    assert [(row["id"], row["state"]) for row in read_jobs(engine)] == [(ids[0], "available")]


@pytest.mark.parametrize("routing", [False, True])
def test_objects_of_an_async_session_show_at_once_what_was_done_to_many(engine: Engine, routing: bool) -> None:
    ids = make_jobs(engine, 3)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Any:
            return leader.sync_engine if self._flushing or not isinstance(clause, Select) else follower.sync_engine

    async def run() -> list[Any]:
        async with AsyncSession(leader, sync_session_class=Routing if routing else Session) as session:
            jobs = (await session.scalars(select(Job).order_by(Job.id))).all()
            jobs[0].queue = "changed"
            assert (await awaited.cancel(session, Job.id < ids[2])).count == 2
            assert (await awaited.delete(session, Job.id == ids[2])).count == 1
            seen = [(job.state, job.queue, job in session) for job in jobs]
            await session.rollback()
        await leader.dispose()
        await follower.dispose()
        return seen

    leader, follower = create_async_engine(engine.url), create_async_engine(engine.url)
    seen = asyncio.run(run())

    assert seen == [("cancelled", "changed", True), ("cancelled", "default", True), ("available", "default", False)]


def test_in_a_schema_of_its_own_it_is_the_same(empty_url: str) -> None:
    engine = create_engine(empty_url)
    create_all(engine, "jobs")
    create_all(engine)
    decoy = make_job(engine, state=J.DISCARDED)
    river = River(job_class=Theirs)
    with Session(engine) as session, session.begin():
        unique: Any = {"unique": Unique(by_args=True)}
        job = river.enqueue(session, Ping(1), **unique)
        river.cancel(session, job.id)
        holder = river.enqueue(session, Ping(1), **unique)
        with pytest.raises(UniqueKeyTakenError):
            river.retry(session, job.id)
        assert river.delete(session, Theirs.id == holder.id).count == 1
        assert river.retry(session, job.id).state == J.AVAILABLE
        assert river.reschedule(session, job.id, scheduled_at=DAY).state == J.SCHEDULED
        assert river.change_priority(session, select(Theirs), priority=2) == Changed(1, {})
        assert type(river.delete(session, job.id)) is Theirs

    assert read_job(engine, decoy)["state"] == "discarded"
    engine.dispose()


def test_under_zope_it_is_committed(engine: Engine) -> None:
    ids = make_jobs(engine, 2, state=J.DISCARDED)
    manager = transaction.TransactionManager(explicit=True)
    for which in (ids[0], Job.id == ids[1]):
        with Session(engine) as session:
            cast("Any", zope.sqlalchemy).register(session, transaction_manager=manager)
            manager.begin()
            retry(session, cast("Any", which))
            manager.commit()

    assert count_states(engine) == {"available": 2}


# ---- who is told -----------------------------------------------------------------------------------------------------


def told(engine: Engine, verb: Callable[[Session], object]) -> bool:
    """Whether runners are told of queues."""
    with Session(engine) as session, session.begin(), statements_of(engine) as sent:
        verb(session)
    return any("river_insert" in statement for statement in sent)


def test_runners_hear_of_what_is_available_or_soon_due(engine: Engine) -> None:
    near, far = timedelta(seconds=4), timedelta(seconds=60)
    job_id, pending = make_job(engine, state=J.DISCARDED), make_job(engine, state=J.PENDING)

    assert told(engine, lambda session: retry(session, job_id))
    assert not told(engine, lambda session: retry(session, job_id))  # it is available already
    assert not told(engine, lambda session: reschedule(session, job_id, scheduled_at=far))
    assert told(engine, lambda session: reschedule(session, job_id, scheduled_at=near))
    assert told(engine, lambda session: reschedule(session, select(Job), scheduled_at=-far))
    assert not told(engine, lambda session: reschedule(session, pending, scheduled_at=-far))
    assert not told(engine, lambda session: change_priority(session, select(Job), priority=2))
    assert told(engine, lambda session: retry(session, pending))


# ---- many ------------------------------------------------------------------------------------------------------------


def test_many_go_by_the_thousand_one_statement_each(engine: Engine) -> None:
    ids = make_jobs(engine, 2_500, state=J.DISCARDED)
    with Session(engine) as session, session.begin(), statements_of(engine) as sent:
        changed = delete(session, select(Job).order_by(Job.id.desc()).limit(2_400))

    assert (changed.count, len(sent)) == (2_400, 1 + 3)
    assert [row["id"] for row in read_jobs(engine)] == ids[:100]


def test_locked_ones_are_left_and_so_are_those_that_are_gone(engine: Engine) -> None:
    ids = make_jobs(engine, 4, state=J.DISCARDED)
    with engine.begin() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        holder.execute(text("SELECT id FROM river_job WHERE id = :id FOR UPDATE"), {"id": ids[1]})

        def before(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if "SKIP LOCKED" in statement:
                other.exec_driver_sql(f"DELETE FROM river_job WHERE id = {ids[2]}")

        mine = create_engine(engine.url)
        event.listen(mine, "before_cursor_execute", before)
        with Session(mine) as session, session.begin():
            changed = retry(session, Job.state == J.DISCARDED)
        mine.dispose()

    assert changed == Changed(2, {ids[1]: "locked", ids[2]: "gone"})
    assert [row["state"] for row in read_jobs(engine)] == ["available", "discarded", "available"]


# ---- races -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("end", ["completes", "starts", "is deleted", "goes back"])
def test_one_job_is_waited_for_and_judged_by_what_it_became(engine: Engine, verb: str, end: str) -> None:
    """Judged by what it was when the statement began, a job that completes meanwhile would be refused as running."""
    before = J.RETRYABLE if end == "starts" else J.RUNNING
    after = {"completes": J.COMPLETED, "starts": J.RUNNING, "goes back": J.AVAILABLE}.get(end)
    job_id = make_job(engine, state=before, attempt=3, max_attempts=3, due_in=-HOUR)
    with engine.connect() as first:
        if after is None:
            first.exec_driver_sql(f"DELETE FROM river_job WHERE id = {job_id}")
        else:
            finalized = "now()" if after in FINALIZED else "NULL"
            first.exec_driver_sql(
                f"UPDATE river_job SET state = '{after}', finalized_at = {finalized} WHERE id = {job_id}"
            )
        second = Second(engine, lambda session: VERBS[verb](session, job_id).state)
        second.waits(engine)
        first.commit()

    expected = JobNotFoundError if after is None else EXPECTED[verb][after]
    if isinstance(expected, type):
        with pytest.raises(expected):
            second.join()
    else:
        state = second.join()
        assert state == (after if isinstance(expected, str) else expected.state)
        assert [row["state"] for row in read_jobs(engine)] == ([] if expected == GONE else [state])


def test_a_retried_job_is_never_pruned(engine: Engine) -> None:
    """DELETE ... WHERE id IN (SELECT ... state = 'completed') would wait for the retry, and delete what it made."""
    rounds = [
        (f"q{number}", make_job(engine, state=J.COMPLETED, finished_ago=HOUR, queue=f"q{number}"))
        for number in range(80)
    ]
    meet = threading.Barrier(2, timeout=10)

    def prune() -> None:
        with opened(engine) as own:
            for queue, _ in rounds:
                meet.wait()
                own.execute(PRUNE_COMPLETED, {"p_age": timedelta(0), "p_back": None, "p_queue": queue, "p_others": []})

    pruner = threading.Thread(target=prune)
    pruner.start()
    retried: set[int] = set()
    for number, (queue, job_id) in enumerate(rounds):
        with Session(engine) as session, session.begin():
            session.connection()
            meet.wait()
            if number % 2:
                retried |= {job_id} if retry(session, Job.queue == queue).count else set()
                continue
            with suppress(JobNotFoundError):
                retried.add(retry(session, job_id).id)
    pruner.join(30)

    assert {row["id"]: row["state"] for row in read_jobs(engine)} == dict.fromkeys(retried, "available")


def test_two_operators_on_the_same_jobs_neither_wait_nor_deadlock(engine: Engine) -> None:
    make_jobs(engine, 100, state=J.DISCARDED)
    with Session(engine) as first:
        assert change_priority(first, Job.id > 0, priority=2).count == 0  # finished
        assert retry(first, select(Job).where(Job.id <= 60)).count == 60
        with Session(engine) as second, second.begin():
            changed = delete(second, select(Job))
        first.commit()

    assert changed.count == 40
    assert set(changed.left.values()) == {"locked"}
    assert count_states(engine) == {"available": 60}


def test_a_batch_is_found_by_its_ids_in_a_large_table(engine: Engine) -> None:
    with engine.begin() as connection:
        make_jobs(connection, 20_000, state=J.COMPLETED)
        connection.exec_driver_sql("ANALYZE river_job")
    given: dict[str, Any] = {"p_ids": list(range(1, 20_000, 500)), "p_schema": None, "p_priority": 2, "p_due": True}
    given["p_scheduled_at"] = datetime(2040, 1, 1, tzinfo=UTC)
    for statement in (CANCEL_JOBS, RETRY_JOBS, DELETE_JOBS, RESCHEDULE_JOBS, CHANGE_PRIORITY_OF_JOBS):
        for plan in ("generic", "custom"):
            with engine.connect() as connection:
                mode = cast("Any", plan)
                found = explain(connection, None, statement, given, plan=mode, settings={})
            assert found.indexes <= {"river_job_pkey", "river_job_unique_idx"}, found
            assert all(scan["Node Type"] != "Seq Scan" for scan in found.scans("river_job")), found


# ---- unique keys -----------------------------------------------------------------------------------------------------

WAITING: Final = mask_of(frozenset({J.AVAILABLE, J.PENDING, J.RUNNING, J.SCHEDULED}))


def keyed(engine: Any, state: JobState, key: str, **columns: Any) -> int:
    return make_job(engine, state=state, unique_key=key, unique_states=WAITING, **columns)


def test_a_key_that_another_holds_changes_nothing_and_names_the_holder(engine: Engine) -> None:
    done, late = keyed(engine, J.COMPLETED, "k"), keyed(engine, J.RETRYABLE, "k", due_in=HOUR)
    holder = keyed(engine, J.SCHEDULED, "k", due_in=HOUR)
    before = [text_of(engine, job_id) for job_id in (done, late)]
    other = make_job(engine, state=J.DISCARDED)

    with Session(engine) as session, session.begin():
        for verb, job_id in (("retry", done), ("retry", late), ("reschedule, due", late)):
            with pytest.raises(UniqueKeyTakenError, match=f"job {job_id} .* job {holder} holds") as caught:
                VERBS[verb](session, job_id)
            assert (caught.value.job_id, caught.value.holder_id) == (job_id, holder)
        taken = f"key taken by job {holder}"
        assert retry(session, Job.id.in_([done, late, other])) == Changed(1, {done: taken, late: taken})
        assert reschedule(session, Job.id == late, scheduled_at=-HOUR) == Changed(0, {late: taken})
        assert reschedule(session, holder, scheduled_at=-HOUR).state == J.AVAILABLE  # it has the key already

    assert [text_of(engine, job_id) for job_id in (done, late)] == before
    assert read_job(engine, other)["state"] == "available"


def test_of_two_with_one_key_the_first_is_retried(engine: Engine) -> None:
    first, second, third = (keyed(engine, J.DISCARDED, key) for key in ("k", "k", "other"))
    with Session(engine) as session, session.begin():
        changed = retry(session, select(Job))

    assert changed == Changed(2, {second: f"key taken by job {first}"})
    assert [row["state"] for row in read_jobs(engine)] == ["available", "discarded", "available"]
    assert third


@pytest.mark.parametrize("how", ["one", "many"])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_key_that_is_being_taken_is_waited_for(engine: Engine, how: str, end: str) -> None:
    done = keyed(engine, J.DISCARDED, "k")
    with Session(engine) as first:
        holder = keyed(first, J.AVAILABLE, "k")
        which: Any = done if how == "one" else Job.id == done

        def retry_it(session: Session) -> Any:
            return cast("Any", retry)(session, which)

        second = Second(engine, retry_it)
        second.waits(engine)
        getattr(first, end)()

    if end == "rollback":
        second.join()
        assert read_job(engine, done)["state"] == "available"
    elif how == "one":
        with pytest.raises(UniqueKeyTakenError, match=f"job {holder} holds"):
            second.join()
    else:
        assert second.join() == Changed(0, {done: f"key taken by job {holder}"})
    assert len(read_jobs(engine)) == (1 if end == "rollback" else 2)


def test_two_retries_of_one_key_make_one_job_available(engine: Engine) -> None:
    first, second = keyed(engine, J.DISCARDED, "k"), keyed(engine, J.CANCELLED, "k")
    with Session(engine) as session:
        retry(session, first)
        other = Second(engine, lambda session: retry(session, second))
        other.waits(engine)
        session.commit()

    with pytest.raises(UniqueKeyTakenError, match=f"job {first} holds"):
        other.join()
    assert count_states(engine) == {"available": 1, "cancelled": 1}


def test_under_repeatable_read_a_key_of_the_future_is_an_error_by_name_and_the_transaction_goes_on(
    engine: Engine,
) -> None:
    done = keyed(engine, J.DISCARDED, "k")
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        assert session.scalar(select(Job.id)) == done
        keyed(engine, J.AVAILABLE, "k")
        with pytest.raises(UniqueRaceError, match="roll back and do it again"):
            retry(session, done)
        assert session.scalar(select(Job.id)) == done


def test_a_savepoint_of_the_callers_stays_whole(engine: Engine) -> None:
    done, free = keyed(engine, J.DISCARDED, "k"), make_job(engine, state=J.DISCARDED)
    keyed(engine, J.AVAILABLE, "k")
    with Session(engine) as session, session.begin():
        with session.begin_nested() as savepoint:
            retry(session, free)
            with pytest.raises(UniqueKeyTakenError):
                retry(session, done)
            savepoint.rollback()
        job = session.get_one(Job, free)

        assert job.state == J.DISCARDED
