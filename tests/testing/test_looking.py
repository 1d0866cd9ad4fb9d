"""What tests ask of the jobs that are there."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

import attrs
import pytest
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river import Job, JobMixin, River, enqueue, enqueue_many
from sqla_river.asyncio import enqueue as enqueue_async
from sqla_river.errors import AsyncSessionError, InvalidOptionError, SessionError, WrongDatabaseError
from sqla_river.models import RiverBase
from sqla_river.testing import assert_enqueued, drain, refute_enqueued, rolled_back, work_one
from sqla_river.testing import asyncio as awaited
from tests.database import shared_database
from tests.making import Count, Greet
from tests.working import handling, nothing


@attrs.frozen
class Order:
    """Args whose fields bear the names of options, and a secret."""

    kind: ClassVar[str] = "order"
    id: UUID
    queue: str = "front"
    count: int = 1
    due: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    card: str = attrs.field(default="", metadata={"sqla_river": {"redact": True, "name": "Card"}})


class Mine(JobMixin, RiverBase):
    """The mapping of a River of one's own."""

    metadata = MetaData()


ONE, TWO = UUID(int=1), UUID(int=2)


@pytest.fixture(scope="module")
def shared_url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture(scope="module")
def shared(shared_url: str) -> Iterator[Engine]:
    engine = create_engine(shared_url)
    yield engine
    engine.dispose()


@pytest.fixture
def session(shared: Engine) -> Iterator[Session]:
    with rolled_back(shared) as session:
        yield session


def failure(*given: Any, **fields: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_enqueued(*given, **fields)
    return str(caught.value)


def test_it_gives_the_job_that_has_these_args_and_options(session: Session) -> None:
    other = enqueue(session, Order(ONE))
    wanted = enqueue(session, Order(TWO), queue="slow", priority=3, tags=["a"], metadata={"by": "me", "at": 1})

    assert assert_enqueued(session, Order) is other
    assert assert_enqueued(session, Order, id=TWO) is wanted
    assert (
        assert_enqueued(session, Order, id=TWO, due=datetime(2026, 1, 1, tzinfo=UTC), priority=3, tags=["a"]) is wanted
    )
    assert assert_enqueued(session, Order, metadata={"by": "me"}, state="available", max_attempts=25) is wanted
    assert assert_enqueued(session, Order(TWO)) is wanted
    assert assert_enqueued(session, Order(TWO), priority=3) is wanted
    refute_enqueued(session, Order, id=TWO, priority=4)
    refute_enqueued(session, Order(TWO, count=2))
    refute_enqueued(session, Count)


def test_options_never_clash_with_fields_of_the_same_name(session: Session) -> None:
    enqueue(session, Order(ONE, queue="back", count=5), queue="slow")

    assert_enqueued(session, Order, {"queue": "slow", "count": 1}, queue="back", count=5)
    refute_enqueued(session, Order, queue="slow")
    refute_enqueued(session, Order, {"queue": "back"})


def test_times_are_asked_for_as_they_were_given(session: Session) -> None:
    at = datetime(2100, 1, 1, tzinfo=UTC)
    later = enqueue(session, Count(1), scheduled_at=timedelta(minutes=30))
    enqueue(session, Count(2), scheduled_at=at)

    assert assert_enqueued(session, Count, scheduled_at=timedelta(minutes=30), state="scheduled") is later
    assert assert_enqueued(session, Count, scheduled_at=at).args == {"number": 2}
    assert "scheduled_at is 0:30:00, wanted 1:00:00" in failure(
        session, Count, number=1, scheduled_at=timedelta(hours=1)
    )


def test_count_is_exact(session: Session) -> None:
    enqueue_many(session, [Count(1), Count(1), Count(2)])

    assert_enqueued(session, Count, count=3)
    assert_enqueued(session, Count, number=1, count=2)
    message = failure(session, Count, number=1, count=3)
    assert message.startswith("expected 3 jobs of kind 'count' with number=1, found 2\n")
    assert "1 more of this kind" in message
    with pytest.raises(InvalidOptionError, match="refute_enqueued"):
        assert_enqueued(session, Count, count=0)
    with pytest.raises(InvalidOptionError, match="assert_enqueued"):
        refute_enqueued(session, Count, count=1)


def test_the_message_shows_the_nearest_jobs_first_and_no_secret(session: Session) -> None:
    assert failure(session, Order, id=ONE) == f"no job of kind 'order' with id={ONE!r}\n  there are no jobs at all"
    far = enqueue(session, Order(TWO, card="4111"), queue="slow")
    near = enqueue(session, Order(ONE, card="4222"))
    enqueue_many(session, [Greet(), Greet(), Count()])

    message = failure(session, Order, {"queue": "default"}, id=ONE, card="4333")
    slow = "card is ***, wanted ***; queue is 'slow', wanted 'default'"

    assert message.splitlines() == [
        f"no job of kind 'order' with id={ONE!r}, card=***, queue='default'",
        "  2 of this kind, the nearest first:",
        f"    job {near.id} (available, queue 'default'): card is ***, wanted ***",
        f"    job {far.id} (available, queue 'slow'): id is {TWO!r}, wanted {ONE!r}; " + slow,
        "  of other kinds: 1 count, 2 greet",
    ]
    assert "4222" not in failure(session, Order(ONE, card="4333"))
    with pytest.raises(
        AssertionError, match=rf"expected no job of kind 'order' with id=.*, found 1:\n    job {near.id} "
    ):
        refute_enqueued(session, Order, id=ONE)


def test_args_that_do_not_fit_their_class_are_shown(session: Session) -> None:
    job = enqueue(session, Count(1))
    session.flush()
    job.args = {"number": "x"}

    assert "its args do not fit Count: $.number: expected int, got str" in failure(session, Count, number=1)


def test_a_keyword_that_means_nothing_is_refused(session: Session) -> None:
    with pytest.raises(InvalidOptionError, match="Count has no field 'nummer'; fields: number; beside them: attempt, "):
        assert_enqueued(session, Count, nummer=1)
    with pytest.raises(InvalidOptionError, match="Count has no field 'number'; fields: none, an instance"):
        assert_enqueued(session, Count(1), number=1)
    with pytest.raises(InvalidOptionError, match="the third argument is a dict"):
        assert_enqueued(session, Count, "slow")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_it_takes_whatever_enqueue_takes(shared: Engine, session: Session) -> None:
    connection = session.connection()
    enqueue(connection, Count(1))
    scoped = scoped_session(sessionmaker(connection, join_transaction_mode="create_savepoint"))
    enqueue(scoped, Count(2))

    assert assert_enqueued(scoped, Count, number=2).id > assert_enqueued(connection, Count, number=1).id
    scoped.remove()
    with pytest.raises(SessionError):
        assert_enqueued(shared, Count)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_another_database_is_refused() -> None:
    with Session(create_engine("sqlite://")) as elsewhere:
        with pytest.raises(WrongDatabaseError):
            assert_enqueued(elsewhere, Count)
        with pytest.raises(WrongDatabaseError):
            drain(elsewhere, handling(nothing))


def test_a_river_of_ones_own_gives_its_own_jobs(session: Session) -> None:
    river = River(job_class=Mine)
    enqueued: object = river.enqueue(session, Count(1))

    assert assert_enqueued(session, Count, number=1, river=river) is enqueued
    other: object = assert_enqueued(session, Count, {"river": river}, number=1)
    assert other is enqueued
    assert isinstance(assert_enqueued(session, Count), Job)


def test_nothing_of_a_rolled_back_session_remains(shared: Engine) -> None:
    with rolled_back(shared) as session:
        enqueue(session, Count(7))
        session.commit()
        session.rollback()
        assert_enqueued(session, Count, number=7)

    with rolled_back(shared) as session:
        refute_enqueued(session, Count)


def test_an_async_session_takes_the_awaited_verbs(shared_url: str) -> None:
    import asyncio

    async def main() -> None:
        engine = create_async_engine(shared_url)
        async with engine.connect() as connection, AsyncSession(connection) as session:
            job = await enqueue_async(session, Count(1))

            assert await awaited.assert_enqueued(session, Count, number=1) is job
            await awaited.refute_enqueued(session, Count, number=2)
            with pytest.raises(AssertionError, match="number is 1, wanted 2"):
                await awaited.assert_enqueued(session, Count, number=2)
            with pytest.raises(AsyncSessionError, match=r"from sqla_river\.testing\.asyncio import assert_enqueued"):
                assert_enqueued(session, Count)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
            with pytest.raises(AsyncSessionError, match=r"import drain"):
                drain(session, handling(nothing))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            await connection.rollback()
        await engine.dispose()
        with Session() as plain, pytest.raises(SessionError, match=r"verbs of sqla_river\.testing"):
            await awaited.drain(plain, handling(nothing))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    asyncio.run(main())
    assert work_one(handling(nothing), Count()).error is None
