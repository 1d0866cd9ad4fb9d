"""Jobs worked inside of a test's own transaction."""

import asyncio
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, MetaData, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river import (
    Cancel,
    Exponential,
    Job,
    JobContext,
    JobMixin,
    JobState,
    River,
    Runner,
    Snooze,
    Unique,
    Workers,
    cancel,
    create_all,
    enqueue,
    enqueue_many,
)
from sqla_river.asyncio import enqueue as enqueue_async
from sqla_river.errors import ConfigError, DecodeError, EncodeError, InvalidOptionError, RunnerError, TransactionOver
from sqla_river.models import RiverBase
from sqla_river.statements import (
    FETCH_AVAILABLE,
    FETCH_JOB_AT,
    SCHEDULE_DUE,
    SCHEDULE_DUE_AT,
    SETTLE_JOB,
    SETTLE_JOB_AT,
    SETTLE_JOBS,
    SETTLE_JOBS_AT,
)
from sqla_river.testing import assert_enqueued, drain, rolled_back, work_one
from sqla_river.testing import asyncio as awaited
from tests.database import shared_database
from tests.flow import test_transactional as real
from tests.making import Count, Greet, compiled
from tests.working import HOUR, Base, Note, after, handling, nothing

MINUTE = timedelta(minutes=1)


@pytest.fixture(scope="module")
def shared_url(server: str, template: str) -> Iterator[str]:
    for url in shared_database(server, template):
        engine = create_engine(url)
        Base.metadata.create_all(engine)
        engine.dispose()
        yield url


@pytest.fixture(scope="module")
def shared(shared_url: str) -> Iterator[Engine]:
    engine = create_engine(shared_url)
    yield engine
    engine.dispose()


@pytest.fixture
def session(shared: Engine) -> Iterator[Session]:
    with rolled_back(shared) as session:
        yield session


def numbers(worked: list[Any]) -> list[int]:
    return [each.args.number for each in worked]


def raising(_: JobContext[Any]) -> None:
    raise ValueError("no luck")


def needs_a_session(_: JobContext[Any], __: Session) -> None: ...


def only_adds(_: JobContext[Any], session: Session) -> None:
    session.execute(text("SELECT 1"))


def snoozing(_: JobContext[Any]) -> Snooze:
    return Snooze(timedelta(0))


def noted(session: Session) -> list[str]:
    return list(session.scalars(select(Note.words).order_by(Note.id)))


# ---- the statements ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "chosen"),
    [(SCHEDULE_DUE, SCHEDULE_DUE_AT), (SETTLE_JOBS, SETTLE_JOBS_AT), (SETTLE_JOB, SETTLE_JOB_AT)],
    ids=["SCHEDULE_DUE", "SETTLE_JOBS", "SETTLE_JOB"],
)
def test_at_a_chosen_time_the_statement_is_the_runners_own_but_for_the_clock_and_its_patience(
    real: Any, chosen: Any
) -> None:
    clock = "%(p_now)s::TIMESTAMP WITH TIME ZONE"
    assert "now()" in compiled(real)
    assert clock in compiled(chosen)

    own = re.sub(r" AND \(SELECT set_config\(.*?IS NOT NULL", "", compiled(real), flags=re.DOTALL)
    assert compiled(chosen).replace(clock, "now()") == own


def test_one_job_is_fetched_as_a_runner_fetches_many_but_for_suspects() -> None:
    clock, one = "%(p_now)s::TIMESTAMP WITH TIME ZONE", " AND w.id = %(p_id)s::BIGINT"
    many, suspects = re.subn(r" AND \(w\.attempt < 2 OR NOT .*?\)\)\)", one, compiled(FETCH_AVAILABLE), flags=re.DOTALL)
    assert suspects == 1

    assert compiled(FETCH_JOB_AT).replace(clock, "now()") == many


# ---- drain ------------------------------------------------------------------------------


def test_jobs_run_in_the_order_of_priority_time_and_id_over_all_queues(session: Session) -> None:
    enqueue(session, Count(4), priority=2, queue="b")
    enqueue(session, Count(2))
    enqueue(session, Count(3), queue="b")
    enqueue(session, Count(1), scheduled_at=-HOUR)
    enqueue(session, Greet())

    worked = drain(session, handling(nothing))

    assert numbers(worked) == [1, 2, 3, 4]
    assert {each.state for each in worked} == {JobState.COMPLETED}
    assert session.scalars(select(Job.state).where(Job.kind == Greet.kind)).one() == JobState.AVAILABLE


def test_objects_of_the_session_show_what_happened(session: Session) -> None:
    job = enqueue(session, Count(1))

    (worked,) = drain(session, workers=handling(nothing))

    assert (worked.id, worked.kind, worked.attempt, worked.error) == (job.id, "count", 1, None)
    assert (job.state, job.attempt) == (JobState.COMPLETED, 1)
    assert job.finalized_at is not None


def test_what_is_for_later_stays_until_the_clock_says_so(session: Session) -> None:
    enqueue(session, Count(1), scheduled_at=30 * MINUTE)
    enqueue(session, Count(2), pending=True)
    workers = handling(nothing)

    assert drain(session, workers) == []
    assert drain(session, workers, now=29 * MINUTE) == []
    assert numbers(drain(session, workers, now=31 * MINUTE)) == [1]
    assert session.scalars(select(Job.state).order_by(Job.id)).all() == [JobState.COMPLETED, JobState.PENDING]


def test_a_retry_waits_for_its_delay_by_the_chosen_clock(session: Session) -> None:
    job = enqueue(session, Count(1), max_attempts=2)
    workers = handling(raising, retry=Exponential(base=10 * MINUTE))
    noon = datetime(2100, 1, 1, 12, tzinfo=UTC)

    (first,) = drain(session, workers, now=noon)

    assert (first.state, first.delay, str(first.error)) == (JobState.RETRYABLE, 10 * MINUTE, "no luck")
    assert job.scheduled_at == noon + 10 * MINUTE
    assert job.errors is not None
    assert job.errors[0]["error"] == "ValueError: no luck"
    assert datetime.fromisoformat(job.errors[0]["at"]) == noon
    assert drain(session, workers, now=noon + 9 * MINUTE) == []
    (second,) = drain(session, workers, now=noon + 10 * MINUTE)
    assert (second.attempt, second.state) == (2, JobState.DISCARDED)
    assert job.finalized_at == noon + 10 * MINUTE


def test_wishes_of_handlers_are_granted(session: Session) -> None:
    def handler(job: JobContext[Count]) -> Snooze | Cancel | None:
        if job.args.number == 1:
            raise Cancel("not wanted")
        return Snooze(HOUR) if job.attempt == 1 and not job.metadata.get("snoozes") else None

    one, two = enqueue(session, Count(1)), enqueue(session, Count(2))
    workers = handling(handler)

    first, second = drain(session, workers)

    assert (first.state, second.state, second.delay) == (JobState.CANCELLED, JobState.SCHEDULED, HOUR)
    assert first.outcome is first.error
    assert isinstance(first.outcome, Cancel)
    assert isinstance(second.outcome, Snooze)
    assert second.error is None
    assert (one.state, two.state, two.attempt) == (JobState.CANCELLED, JobState.SCHEDULED, 0)
    assert drain(session, workers, now=59 * MINUTE) == []
    assert [each.state for each in drain(session, workers, now=61 * MINUTE)] == [JobState.COMPLETED]


def test_jobs_that_handlers_enqueue_run_too(session: Session) -> None:
    workers = Workers()

    @workers.register(Count, transactional=True)
    def chain(job: JobContext[Count], own: Session) -> None:
        if job.args.number:
            enqueue(own, Count(job.args.number - 1))

    enqueue(session, Count(3))

    assert numbers(drain(session, workers)) == [3, 2, 1, 0]


def test_a_drain_that_would_never_end_does(session: Session) -> None:
    enqueue(session, Count(1))

    with pytest.raises(RunnerError, match=r"5 attempts were made.*<job \d+ count attempt 1: scheduled>"):
        drain(session, handling(snoozing), limit=5)


def test_a_transactional_handler_works_in_a_savepoint(session: Session) -> None:
    def handler(job: JobContext[Count], own: Session) -> None:
        own.add(Note(words=f"note {job.args.number}"))
        own.flush()
        if job.args.number == 3:
            own.rollback()
        own.commit()
        if job.args.number == 2:
            raise ValueError("after all")

    session.add(Note(words="before"))
    enqueue_many(session, [Count(1), Count(2), Count(3)])

    one, two, three = drain(session, handling(handler, transactional=True))

    assert noted(session) == ["before", "note 1"]
    assert (one.state, two.state, three.state) == (JobState.COMPLETED, JobState.RETRYABLE, JobState.RETRYABLE)
    assert isinstance(three.error, TransactionOver)


@pytest.mark.parametrize("writes", [*real.SETTLING, real.rolls_back, real.rolls_back_and_goes_on])
def test_what_a_transactional_handler_does_comes_to_the_same_as_in_a_runner(
    session: Session, writes: Callable[[Session], object]
) -> None:
    enqueue(session, Count(1))

    (worked,) = drain(session, real.transactional(writes))

    settles = writes in real.SETTLING
    assert worked.state == (JobState.COMPLETED if settles else JobState.RETRYABLE)
    assert noted(session) == (["written"] if settles else [])


def test_expired_undecodable_and_paused_jobs_are_met_as_a_runner_meets_them(session: Session) -> None:
    enqueue(session, Count(1), expires=MINUTE)
    broken = enqueue(session, Count(2), scheduled_at=-MINUTE)
    enqueue(session, Count(3), queue="paused")
    session.flush()
    broken.args = {"number": "x"}
    session.execute(text("INSERT INTO river_queue (name, updated_at, paused_at) VALUES ('paused', now(), now())"))

    undecoded, expired = drain(session, handling(nothing), now=2 * MINUTE)

    assert (undecoded.state, undecoded.job, undecoded.args) == (JobState.RETRYABLE, None, None)
    assert isinstance(undecoded.error, DecodeError)
    assert (expired.state, expired.args) == (JobState.CANCELLED, None)


def test_a_job_that_killed_its_runners_runs_too(session: Session) -> None:
    enqueue(session, Count(1))
    suspect = enqueue(session, Count(2))
    session.flush()
    suspect.attempt = 2
    session.flush()
    session.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (:id, 2, 0)"), {"id": suspect.id})

    worked = drain(session, handling(nothing))

    assert [(each.args.number, each.state) for each in worked] == [(1, JobState.COMPLETED), (2, JobState.COMPLETED)]


def test_a_job_cancelled_or_deleted_by_its_own_handler(session: Session) -> None:
    def handler(job: JobContext[Count]) -> None:
        if job.args.number == 1:
            cancel(session, job.id)
            raise ValueError
        session.delete(session.get_one(Job, job.id))
        session.flush()

    enqueue_many(session, [Count(1), Count(2)])

    first, second = drain(session, handling(handler))

    assert (first.state, second.state) == (JobState.CANCELLED, None)


def test_async_handlers_run_also_under_a_running_loop(session: Session) -> None:
    async def handler(job: JobContext[Count]) -> Cancel | None:
        await asyncio.sleep(0)
        job.output(job.args.number)
        return Cancel("enough") if job.args.number == 2 else None

    enqueue(session, Count(1))
    assert [(each.output, each.outcome) for each in drain(session, handling(handler))] == [(1, None)]
    enqueue(session, Count(2))

    async def under_a_loop() -> list[Any]:
        return drain(session, handling(handler))

    (worked,) = asyncio.run(under_a_loop())
    assert (worked.output, str(worked.outcome)) == (2, "enough")


def test_a_connection_will_do(session: Session) -> None:
    connection = session.connection()
    enqueue(connection, Count(1))

    assert numbers(drain(connection, handling(nothing))) == [1]


def test_jobs_of_a_schema_of_their_own(engine: Engine) -> None:
    class InSchema(JobMixin, RiverBase):
        __river_schema__ = "jobs"
        metadata = MetaData()

    create_all(engine, "jobs")
    river = River(job_class=InSchema)
    with rolled_back(engine) as session:
        river.enqueue(session, Count(1), scheduled_at=HOUR)
        enqueue(session, Count(2))

        assert numbers(drain(session, handling(nothing, transactional=False), now=2 * HOUR, river=river)) == [1]
        assert_enqueued(session, Count, number=1, state="completed", river=river)
        assert_enqueued(session, Count, number=2, state="available")
        worked = work_one(handling(only_adds, transactional=True), Count(3), session=session, river=river)
        assert_enqueued(session, Count, number=3, state="completed", river=river)
    assert worked.state == JobState.COMPLETED


def test_a_runner_brings_its_settings(session: Session, shared: Engine) -> None:
    seen: list[str] = []

    class Loud:
        def work(self, job: JobContext[Any], call_next: Any, /) -> Any:
            seen.append(job.kind)
            return call_next(job)

    class Named(Session):
        pass

    def handler(job: JobContext[Count], own: Session) -> None:
        assert isinstance(own, Named)
        assert scoped() is own
        raise ValueError

    scoped = scoped_session(sessionmaker(session.connection(), class_=Named))
    theirs = scoped()
    runner = Runner(
        shared,
        handling(handler, transactional=True),
        queues={"default": 1},
        retry=after(HOUR),
        middleware=[Loud()],
        sessions=scoped,
        on_error=lambda _job, _error: seen.append("error"),
    )
    enqueue(session, Count(1))

    (worked,) = drain(session, runner)

    assert (type(worked.error), worked.state, worked.delay) == (ValueError, JobState.RETRYABLE, HOUR)
    assert seen == ["count", "error"]
    assert scoped() is theirs
    scoped.remove()


# ---- an AsyncSession --------------------------------------------------------------------


def test_an_async_session_works_handlers_of_every_colour(shared_url: str) -> None:
    workers = Workers()

    @workers.register(Count, transactional=True)
    async def note(job: JobContext[Count], own: AsyncSession) -> None:
        own.add(Note(words=f"note {job.args.number}"))
        await own.commit()
        if job.args.number == 2:
            raise ValueError

    @workers.register(Greet, transactional=True)
    def greet(job: JobContext[Greet], own: Session) -> None:
        own.add(Note(words=f"hello {job.args.name}"))

    async def main() -> None:
        engine = create_async_engine(shared_url)
        async with engine.connect() as connection, AsyncSession(connection) as session:
            job = await enqueue_async(session, Count(1))
            await enqueue_async(session, Count(2))
            await enqueue_async(session, Greet())

            worked = await awaited.drain(session, workers)

            assert [each.state for each in worked] == [JobState.COMPLETED, JobState.RETRYABLE, JobState.COMPLETED]
            assert job.state == JobState.COMPLETED  # no lazy load, which would need await
            assert await session.run_sync(noted) == ["note 1", "hello you"]

            one = await awaited.work_one(workers, Count(3), session=session, attempt=2)
            assert (one.attempt, one.state) == (2, JobState.COMPLETED)
            assert await session.run_sync(noted) == ["note 1", "hello you", "note 3"]
            await connection.rollback()
        await engine.dispose()

        async def quick(job: JobContext[Count]) -> None:
            job.output(job.args.number)

        assert (await awaited.work_one(handling(quick), Count(5))).output == 5

    asyncio.run(main())


def test_a_plain_session_refuses_handlers_that_need_an_async_one(session: Session) -> None:
    async def handler(_: JobContext[Count], __: AsyncSession) -> None: ...

    workers = handling(handler, transactional=True)
    job = enqueue(session, Count(1))

    with pytest.raises(ConfigError, match=r"sqla_river\.testing\.asyncio"):
        drain(session, workers)
    with pytest.raises(ConfigError, match=r"sqla_river\.testing\.asyncio"):
        work_one(workers, Count(1), session=session)
    assert job.state == JobState.AVAILABLE


# ---- work_one ---------------------------------------------------------------------------


def test_one_handler_without_a_database() -> None:
    def handler(job: JobContext[Count]) -> Snooze | None:
        job.metadata["seen"] = job.metadata["by"]
        job.output({"attempt": job.attempt, "queue": job.queue})
        job.progress(1, 2, "half")
        return Snooze(MINUTE) if job.args.number else None

    worked = work_one(handling(handler), Count(0), attempt=3, queue="slow", metadata={"by": "me"})

    assert (worked.id, worked.state, worked.error, worked.args) == (1, JobState.COMPLETED, None, Count(0))
    assert worked.output == {"attempt": 3, "queue": "slow"}
    assert worked.metadata == {"by": "me", "seen": "me", "output": worked.output}
    assert worked.progress == {"done": 1, "total": 2, "note": "half"}
    assert (worked.job is not None) is True
    snoozed = work_one(handling(handler), Count(1), metadata={"by": "me"})
    assert (snoozed.state, snoozed.delay) == (JobState.SCHEDULED, MINUTE)


def test_one_failure_without_a_database() -> None:
    workers = handling(raising, retry=after(HOUR))

    first = work_one(workers, Count())
    last = work_one(workers, Count(), attempt=2, max_attempts=2)

    assert (first.state, first.delay, type(first.error)) == (JobState.RETRYABLE, HOUR, ValueError)
    assert (last.state, last.delay) == (JobState.DISCARDED, None)
    assert repr(last) == "<job 1 count attempt 2: discarded (ValueError: no luck)>"


def test_one_job_is_encoded_and_decoded_on_the_way() -> None:
    sent = Count(1)
    seen = work_one(handling(nothing), sent).args

    assert seen == sent
    assert seen is not sent
    with pytest.raises(EncodeError, match=r"\$\.number: expected int, got str"):
        work_one(handling(nothing), Count("x"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidOptionError, match="priority"):
        work_one(handling(nothing), Count(), priority=5)


def test_one_job_in_the_database_whatever_its_time_and_key(session: Session) -> None:
    enqueue(session, Count(1), unique=Unique(by_args=True))

    def handler(job: JobContext[Count], own: Session) -> None:
        own.add(Note(words="one"))
        job.output("done")

    workers = handling(handler, transactional=True)
    worked = work_one(
        workers, Count(1), session=session, attempt=2, unique=Unique(by_args=True), scheduled_at=HOUR, pending=True
    )

    job = session.get_one(Job, worked.id)
    assert (worked.state, worked.attempt, worked.output) == (JobState.COMPLETED, 2, "done")
    assert (job.state, job.attempt, job.metadata_["output"]) == (JobState.COMPLETED, 2, "done")
    assert noted(session) == ["one"]
    assert session.scalars(select(Job.state).where(Job.id != job.id)).all() == [JobState.AVAILABLE]


def test_what_one_job_needs_is_said() -> None:
    with pytest.raises(ConfigError, match="kind 'greet' has no worker here; known kinds: 'count'"):
        work_one(handling(nothing), Greet())
    with pytest.raises(ConfigError, match="worked in a transaction; pass session="):
        work_one(handling(needs_a_session, transactional=True), Count())
    with pytest.raises(ConfigError, match=r"attempt must be 1\.\.2, the job's max_attempts, got 3"):
        work_one(handling(nothing), Count(), attempt=3, max_attempts=2)
