"""Unique jobs: who holds a key, who comes second, and that no race makes two rows or a deadlock."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from sqla_river import InsertOptions, Job, JobState, Unique, enqueue, enqueue_many
from sqla_river.errors import UniqueNeedsEnqueueError
from sqla_river.states import FINALIZED
from tests.database import emptied, shared_database
from tests.jobs import Ping
from tests.racing import Second

BY_ARGS = Unique(by_args=True)


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    yield from emptied(shared)


def put(engine: Engine, number: int = 1, **options: Any) -> tuple[int, bool]:
    with Session(engine) as session, session.begin():
        given: Any = {"unique": BY_ARGS, **options}
        job = enqueue(session, Ping(number), **given)
        return job.id, job.inserted


def jobs_in(engine: Engine) -> list[int]:
    with Session(engine) as session:
        return list(session.scalars(select(Job.id).order_by(Job.id)))


def move(engine: Engine, job_id: int, state: JobState) -> None:
    with engine.begin() as connection:
        finalized = datetime.now(UTC) if state in FINALIZED else None
        connection.execute(update(Job).where(Job.id == job_id).values(state=state, finalized_at=finalized))


def test_the_second_of_a_key_is_the_first(engine: Engine) -> None:
    first, second, other = put(engine), put(engine), put(engine, 2)

    assert first[1] is True
    assert second == (first[0], False)
    assert other[1] is True
    assert jobs_in(engine) == [first[0], other[0]]


@pytest.mark.parametrize("state", list(JobState))
def test_a_key_is_held_in_the_states_of_the_mask_only(engine: Engine, state: JobState) -> None:
    first, _ = put(engine)
    move(engine, first, state)

    again, new = put(engine)
    assert new is (state in {JobState.CANCELLED, JobState.DISCARDED})
    assert (again == first) is not new


def test_the_row_that_holds_the_key_is_neither_locked_nor_rewritten(engine: Engine) -> None:
    put(engine)
    with Session(engine) as session, session.begin():
        before = session.execute(text("SELECT xmin::text, ctid::text FROM river_job")).one()
        enqueue(session, Ping(1), unique=BY_ARGS)

        with engine.begin() as other:
            other.execute(text("SELECT 1 FROM river_job FOR UPDATE NOWAIT"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT xmin::text, ctid::text FROM river_job")).one() == before


def test_the_unit_of_work_refuses_a_unique_job() -> None:
    with pytest.raises(UniqueNeedsEnqueueError, match="enqueue"):
        Job(Ping(1), unique=BY_ARGS)


def test_a_key_of_ones_own_repeats_an_enqueue_safely(engine: Engine) -> None:
    key = Unique(key="payment-4711")

    assert put(engine, 1, unique=key)[1] is True
    assert put(engine, 2, unique=key)[1] is False


def test_jobs_of_different_periods_are_different(engine: Engine) -> None:
    hourly = Unique(by_period=timedelta(hours=1))
    at = datetime(2040, 1, 1, 12, 30, tzinfo=UTC)

    assert [put(engine, 1, unique=hourly, scheduled_at=at + timedelta(minutes=m))[1] for m in (0, 29, 30)] == [
        True,
        False,
        True,
    ]


def test_many_keep_uniqueness_among_themselves_and_against_what_is_there(engine: Engine) -> None:
    held, _ = put(engine, 1)
    unique = InsertOptions(unique=BY_ARGS)
    with Session(engine) as session, session.begin():
        items: list[Any] = [(Ping(1), unique), (Ping(2), unique), Ping(2), (Ping(2), unique), (Ping(3), unique)]
        inserted = enqueue_many(session, items, returning=True)

    assert (inserted.count, inserted.skipped) == (3, 2)
    assert inserted.ids is not None
    assert [job_id is not None for job_id in inserted.ids] == [False, True, True, False, True]
    assert jobs_in(engine) == sorted([held, *(job_id for job_id in inserted.ids if job_id is not None)])


def test_it_joins_the_transaction(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue(session, Ping(1), unique=BY_ARGS)
        session.rollback()

    assert jobs_in(engine) == []
    assert put(engine)[1] is True


def enqueue_one(session: Session) -> tuple[int, bool]:
    job = enqueue(session, Ping(1), unique=BY_ARGS)
    return job.id, job.inserted


def test_the_second_waits_for_the_first_and_takes_its_row(engine: Engine) -> None:
    with Session(engine) as session:
        first, _ = enqueue_one(session)
        second = Second(engine, enqueue_one)
        second.waits(engine)
        session.commit()
    second.thread.join(10)

    assert second.outcome == (first, False)
    assert jobs_in(engine) == [first]


def test_the_second_takes_the_key_when_the_first_rolls_back(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue_one(session)
        second = Second(engine, enqueue_one)
        second.waits(engine)
        session.rollback()
    second.thread.join(10)

    assert second.outcome[1] is True
    assert len(jobs_in(engine)) == 1


def test_crossing_keys_in_bulk_do_not_deadlock(engine: Engine) -> None:
    unique = InsertOptions(unique=BY_ARGS)

    def both(order: list[int]) -> Callable[[Session], int]:
        return lambda session: enqueue_many(session, [(Ping(number), unique) for number in order]).count

    for _ in range(10):
        seconds = [Second(engine, both([1, 2])), Second(engine, both([2, 1]))]
        for second in seconds:
            second.thread.join(10)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_job"))

        assert [second.error for second in seconds] == [None, None]
        assert sorted(second.outcome for second in seconds) == [0, 2]


def test_repeatable_read_fails_as_postgresql_says_and_makes_no_second_row(engine: Engine) -> None:
    def after_a_look(session: Session) -> tuple[int, bool]:
        session.execute(text("SELECT 1 FROM river_job"))
        looked.set()
        go.wait(10)
        return enqueue_one(session)

    looked, go = threading.Event(), threading.Event()
    second = Second(engine, after_a_look, "REPEATABLE READ")
    assert looked.wait(10)
    put(engine)
    go.set()
    second.thread.join(10)

    assert isinstance(second.error, OperationalError | DBAPIError)
    assert len(jobs_in(engine)) == 1


def test_it_works_in_a_schema_of_its_own(empty_url: str) -> None:
    from sqlalchemy.orm import DeclarativeBase

    from sqla_river import JobMixin, River, create_all

    class Base(DeclarativeBase):
        pass

    class Mine(JobMixin, Base):
        __river_schema__ = "jobs"

    engine = create_engine(empty_url)
    create_all(engine, "jobs")
    river = River(job_class=Mine)
    with Session(engine) as session, session.begin():
        outcomes = [river.enqueue(session, Ping(1), unique=BY_ARGS).inserted for _ in range(2)]
        assert session.scalars(select(Mine)).one().unique_states == BY_ARGS.states
    engine.dispose()

    assert outcomes[1] is False
