"""Putting jobs in: they commit or vanish with the caller's rows, whatever the session and the driver."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, ClassVar, TypeVar, cast

import attrs
import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import Connection, Delete, Engine, MetaData, Update, create_engine, event, func, make_url, select, text
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from sqla_river import (
    InsertOptions,
    Job,
    JobMixin,
    JobState,
    River,
    Unique,
    bulk,
    cancel,
    create_all,
    delete,
    enqueue,
    enqueue_many,
    insert,
    list_jobs,
    store,
)
from sqla_river import asyncio as awaited
from sqla_river.args import JobArgs
from sqla_river.errors import (
    AsyncSessionError,
    EncodeError,
    InvalidOptionError,
    RiverError,
    SessionError,
    WrongDatabaseError,
)
from sqla_river.models import RiverBase
from sqla_river.options import OptionWords
from tests.database import emptied, shared_database, statements_of
from tests.jobs import Ping, SendSMS

T = TypeVar("T")


class Odd:
    """Something that is no JSON, no session and no args."""

    def __repr__(self) -> str:
        return "odd"


ODD = Odd()


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


HOUR = timedelta(hours=1)
FUTURE = datetime(2100, 1, 1, 12, tzinfo=timezone(HOUR))
PAST = datetime(2001, 1, 1, tzinfo=UTC)


@attrs.frozen
class Mixed:
    """Values of every shape, to compare how they are stored."""

    kind: ClassVar[str] = "mixed"
    text: str = "ü 🙂 \\ \" '\t\n\u2028"
    whole: int = 2**70
    part: float = 0.1
    nested: dict[str, list[int | None]] = attrs.field(factory=lambda: {"b": [1, None], "a": []})


def stored(engine: Engine) -> list[dict[str, Any]]:
    """All jobs, by id, as the database shows them; without what must differ."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT to_jsonb(j) - 'id' AS job FROM river_job j ORDER BY id"))
        return [row.job for row in rows]


def count(engine: Engine) -> int:
    return len(stored(engine))


def put(how: str, session: Session, args: JobArgs, **options: Any) -> None:
    """Put one job in, by each of the ways there are."""
    if how == "enqueue":
        enqueue(session, args, **options)
    elif how == "add":
        session.add(Job(args, **options))
    elif how == "core":
        session.flush()
        enqueue(session.connection(), args, **options)
    else:
        enqueue_many(session, [(args, InsertOptions(**options))], returning=how == "numbered")


WAYS = ["enqueue", "add", "core", "many", "numbered"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"queue": "other", "priority": 4, "max_attempts": 1},
    {"tags": ["b", "a", "b"], "metadata": {"a": [1, 2.5, None, True, "\u2028ü"], "b": {}}},
    {"pending": True},
    {"scheduled_at": FUTURE},
    {"scheduled_at": PAST},
    {"scheduled_at": HOUR},
    {"scheduled_at": -HOUR},
    {"scheduled_at": timedelta(0)},
    {"scheduled_at": HOUR, "pending": True},
    {"scheduled_at": PAST, "pending": True},
]


# ---- the same, whichever way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_all_ways_store_the_same_row(engine: Engine, options: dict[str, Any]) -> None:
    with Session(engine) as session:
        for args in (Mixed(), SendSMS("a")):
            for how in WAYS:
                put(how, session, args, **options)
                session.flush()
        session.commit()

    rows = stored(engine)
    assert rows[:5] == [rows[0]] * 5
    assert rows[5:] == [rows[5]] * 5


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(
    ("options", "state", "since_now"),
    [
        ({}, "available", timedelta(0)),
        ({"scheduled_at": timedelta(0)}, "available", timedelta(0)),
        ({"scheduled_at": -HOUR}, "available", -HOUR),
        ({"scheduled_at": HOUR}, "scheduled", HOUR),
        ({"scheduled_at": timedelta(microseconds=1)}, "scheduled", timedelta(microseconds=1)),
        ({"pending": True}, "pending", timedelta(0)),
        ({"pending": True, "scheduled_at": HOUR}, "pending", HOUR),
        ({"pending": False}, "available", timedelta(0)),
    ],
    ids=repr,
)
def test_state_and_time_are_decided_by_the_start_of_the_transaction(
    engine: Engine, how: str, options: dict[str, Any], state: str, since_now: timedelta
) -> None:
    with Session(engine) as session:
        put(how, session, Ping(1), **options)
        session.flush()

        row = session.execute(select(Job.state, Job.scheduled_at - func.now(), Job.created_at - func.now())).one()
        assert tuple(row) == (state, since_now, timedelta(0))


@pytest.mark.parametrize("how", WAYS)
def test_times_of_any_zone_are_stored_as_the_same_moment(engine: Engine, how: str) -> None:
    with Session(engine) as session:
        for at in (FUTURE, PAST):
            put(how, session, Ping(1), scheduled_at=at)
            session.flush()
        session.commit()

        rows = session.execute(select(Job.scheduled_at, Job.state).order_by(Job.id)).all()
        assert [tuple(row) for row in rows] == [(FUTURE, "scheduled"), (PAST, "available")]


@pytest.mark.parametrize("how", WAYS)
def test_call_beats_class_and_class_beats_the_defaults(engine: Engine, how: str) -> None:
    with Session(engine) as session:
        put(how, session, SendSMS("a"))
        put(how, session, SendSMS("b"), queue="urgent", tags=[], metadata={"from": "call"}, max_attempts=None)
        session.commit()

        first, second = session.scalars(select(Job).order_by(Job.id)).all()
        assert (first.queue, first.priority, first.max_attempts) == ("notifications", 2, 3)
        assert (first.tags, first.metadata_) == (["sms"], {"from": "class"})
        assert (second.queue, second.priority, second.max_attempts) == ("urgent", 2, 3)
        assert (second.tags, second.metadata_) == ([], {"from": "call"})


@pytest.mark.parametrize("how", WAYS)
def test_the_clock_is_looked_at_once_per_transaction_and_only_if_need_be(engine: Engine, how: str) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        put(how, session, Ping(1))
        session.flush()
        assert not any("SELECT now()" in statement for statement in seen)
        for _ in range(3):
            put(how, session, Ping(1), scheduled_at=HOUR)
            put(how, session, Ping(1), scheduled_at=FUTURE)
            session.flush()
        assert sum("SELECT now()" in statement for statement in seen) == 1
        session.rollback()
        put(how, session, Ping(1), scheduled_at=HOUR)
        session.flush()

        assert sum("SELECT now()" in statement for statement in seen) == 2


def test_under_autocommit_every_delay_counts_from_its_own_now(engine: Engine) -> None:
    """What SQLAlchemy calls a transaction may last for days then."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        first, second = (enqueue(connection, Ping(n), scheduled_at=HOUR) for n in range(2))

        assert first.scheduled_at < second.scheduled_at
    assert count(engine) == 2


def test_args_are_encoded_at_the_call(engine: Engine) -> None:
    @attrs.define
    class Cart:
        kind: ClassVar[str] = "cart"
        items: list[str]

    cart, metadata, tags = Cart(["a"]), {"list": [1]}, ["t"]
    with Session(engine) as session:
        enqueue(session, cart, metadata=metadata, tags=tags)
        cart.items.append("b")
        metadata["list"].append(2)
        tags.append("u")
        session.commit()

        job = session.scalars(select(Job)).one()
        assert (job.args, job.metadata_, job.tags) == ({"items": ["a"]}, {"list": [1]}, ["t"])


def test_enqueue_leaves_the_job_pending_as_add_would(engine: Engine) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        job = enqueue(session, Ping(1))

        assert list(session.new) == [job]
        assert vars(job).get("id") is None
        assert seen == []


def test_on_a_connection_the_job_is_there_at_once_and_detached(engine: Engine) -> None:
    with engine.begin() as connection:
        job = enqueue(connection, Ping(1), scheduled_at=HOUR, metadata={"a": 1})

        assert (job.id, job.state, job.attempt, job.args, job.metadata_) == (1, "scheduled", 0, {"n": 1}, {"a": 1})
        assert job.scheduled_at - job.created_at == HOUR
    with Session(engine) as session:
        session.add(job)
        job.priority = 3
        session.commit()
        assert (job.priority, session.scalars(select(Job)).one()) == (3, job)


# ---- the caller's transaction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
def test_the_job_commits_or_vanishes_with_the_transaction(engine: Engine, how: str) -> None:
    with Session(engine) as session:
        put(how, session, Ping(1))
        session.flush()
        assert count(engine) == 0
        session.rollback()
        assert count(engine) == 0
        put(how, session, Ping(2))
        session.commit()

    assert [row["args"] for row in stored(engine)] == [{"n": 2}]


@pytest.mark.parametrize("how", WAYS)
def test_a_savepoint_rolled_back_takes_its_jobs_and_only_those(engine: Engine, how: str) -> None:
    with Session(engine) as session:
        put(how, session, Ping(1))
        savepoint = session.begin_nested()
        put(how, session, Ping(2), scheduled_at=HOUR)
        savepoint.rollback()
        with session.begin_nested():
            put(how, session, Ping(3))
        session.commit()

    assert [row["args"] for row in stored(engine)] == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("how", WAYS)
def test_nothing_of_ours_commits_or_opens_a_savepoint(engine: Engine, how: str) -> None:
    commits: list[Connection] = []
    event.listen(engine, "commit", commits.append)
    with Session(engine) as session, statements_of(engine) as seen:
        put(how, session, Ping(1), scheduled_at=HOUR)
        put(how, session, Ping(2))
        session.flush()

        assert commits == []
        assert not any("SAVEPOINT" in statement or "COMMIT" in statement for statement in seen)


@pytest.mark.parametrize("how", ["enqueue", "add", "core"])
def test_a_job_is_one_round_trip_its_announcement_included(engine: Engine, how: str) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        put(how, session, Ping(1))
        session.flush()
        put(how, session, Ping(2))
        session.flush()

        assert len(seen) == 2
        assert ["pg_notify" in statement for statement in seen] == [True, how == "core"]  # there it is a parameter


def test_jobs_of_one_flush_follow_the_users_rows(engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Order())
        enqueue(session, Ping(1))
        session.add(Order(id=1))

        with pytest.raises(Exception, match="orders_pkey"):
            session.commit()
        session.rollback()
    assert count(engine) == 0


def test_a_mapper_event_may_enqueue_on_its_connection(engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)

    def placed(_mapper: Any, connection: Connection, order: Order) -> None:
        enqueue(connection, Ping(order.id))

    event.listen(Order, "after_insert", placed)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Order(), Order()])
        session.commit()

    assert [row["args"] for row in stored(engine)] == [{"n": 1}, {"n": 2}]


# ---- every kind of session -------------------------------------------------------------------------------------------


def test_scoped_sessions(engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    enqueue(scoped, Ping(1))
    enqueue_many(scoped, [Ping(2)])
    scoped.commit()
    scoped.remove()

    assert count(engine) == 2


def test_a_session_on_a_connection_under_the_test_harness_leaves_nothing(engine: Engine) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            enqueue(session, Ping(1), scheduled_at=HOUR)
            session.commit()
            enqueue_many(session, [Ping(2)])
            session.rollback()
            session.add(Job(Ping(3)))
            session.commit()
            assert session.scalars(select(Job.args)).all() == [{"n": 1}, {"n": 3}]
        outer.rollback()

    assert count(engine) == 0


@pytest.mark.parametrize("expires", [HOUR, datetime(2040, 1, 1, tzinfo=UTC)], ids=str)
@pytest.mark.parametrize("how", ["add", "merge", "bulk_save_objects"])
def test_a_job_keeps_its_expiry_however_the_session_gets_it(
    engine: Engine, how: str, expires: datetime | timedelta
) -> None:
    with Session(engine) as session, session.begin():
        job = Job(Ping(1), expires=expires, metadata={"a": 1})
        getattr(session, how)([job] if how == "bulk_save_objects" else job)

    (row,) = stored(engine)
    at = datetime.now(UTC) + expires if isinstance(expires, timedelta) else expires
    assert row["metadata"] == {"a": 1, "sqla_river:expires_at": pytest.approx(at.timestamp(), abs=60)}


def test_jobs_go_to_the_engine_that_the_job_class_is_bound_to(engine: Engine) -> None:
    sqlite = create_engine("sqlite://")
    with Session(binds={JobMixin: engine, DeclarativeBase: sqlite}) as session:
        enqueue(session, Ping(1))
        enqueue_many(session, [Ping(2)])
        session.commit()

    assert count(engine) == 2
    sqlite.dispose()


def test_a_session_that_reads_elsewhere_writes_to_the_leader_and_looks_there(url: str, engine: Engine) -> None:
    """SQLAlchemy's recipe of a get_bind, with a follower that refuses to write."""
    follower = create_engine(url, connect_args={"options": "-c default_transaction_read_only=on"})

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> Engine:
            return engine if self._flushing or isinstance(clause, Update | Delete) else follower

    with Routing() as session:
        plain = enqueue(session, Ping(1))
        enqueue_many(session, [Ping(2)])
        unique = [enqueue(session, Ping(3), unique=Unique(by_args=True)) for _ in range(2)]
        assert unique[0] is unique[1]
        assert unique[0] in session
        assert (unique[0].args, unique[0].inserted) == ({"n": 3}, False)
        assert cancel(session, plain.id) is plain
        assert plain.state == "cancelled"
        assert delete(session, plain.id) is plain
        assert plain not in session
        session.commit()
        assert len(list_jobs(session).jobs) == 2
    follower.dispose()

    assert [row["args"]["n"] for row in stored(engine)] == [2, 3]


def test_two_phase_sessions(server: str, engine: Engine) -> None:
    with engine.connect() as connection:
        if connection.execute(text("SHOW max_prepared_transactions")).scalar_one() == "0":
            pytest.skip("the server has max_prepared_transactions = 0")
    with Session(engine, twophase=True) as session:
        enqueue(session, Ping(1), scheduled_at=timedelta(0))
        enqueue_many(session, [Ping(2)])
        session.commit()

    assert count(engine) == 2


def test_psycopg2(url: str, engine: Engine) -> None:
    other = create_engine(make_url(url).set(drivername="postgresql+psycopg2"))
    with Session(other) as session:
        for how in WAYS:
            put(how, session, Mixed(), scheduled_at=HOUR, metadata={"a": 1}, tags=["t"])
            put(how, session, Mixed())
            session.flush()
        session.commit()
    with Session(engine) as session:
        put("enqueue", session, Mixed(), scheduled_at=HOUR, metadata={"a": 1}, tags=["t"])
        session.commit()
    other.dispose()

    rows = [{**row, "created_at": None, "scheduled_at": None} for row in stored(engine)]
    assert rows[:10:2] == [rows[-1]] * 5


@contextmanager
def zoped(engine: Engine) -> Generator[tuple[Session, transaction.TransactionManager]]:
    manager = transaction.TransactionManager(explicit=True)
    session = Session(engine)
    cast("Any", zope.sqlalchemy).register(session, transaction_manager=manager)
    manager.begin()
    yield session, manager
    session.close()


@pytest.mark.parametrize("how", ["enqueue", "add", "many", "numbered"])
def test_under_zope_the_transaction_manager_decides(engine: Engine, how: str) -> None:
    with zoped(engine) as (session, manager):
        put(how, session, Ping(1))
        manager.commit()
        manager.begin()
        put(how, session, Ping(2))
        manager.abort()
        manager.begin()
        put(how, session, Ping(3), scheduled_at=HOUR)
        savepoint = manager.savepoint()
        put(how, session, Ping(4))
        savepoint.rollback()
        manager.commit()

    assert [row["args"] for row in stored(engine)] == [{"n": 1}, {"n": 3}]


@pytest.mark.parametrize("how", ["enqueue", "add", "many", "numbered", "unique"])
def test_under_zope_a_session_that_is_kept_goes_on_after_an_abort(engine: Engine, how: str) -> None:
    manager = transaction.TransactionManager()
    session = Session(engine)
    cast("Any", zope.sqlalchemy).register(session, transaction_manager=manager, keep_session=True)
    for n in range(3):
        if how == "unique":
            enqueue(session, Ping(n), unique=Unique(by_args=True))
        else:
            put(how, session, Ping(n))
        session.flush()
        manager.abort() if n == 0 else manager.commit()
    session.close()

    # What was aborted is there where zope leaves the transaction of a session that it keeps open: that is zope's.
    assert [row["args"] for row in stored(engine)][-2:] == [{"n": 1}, {"n": 2}]


# ---- awaited ---------------------------------------------------------------------------------------------------------


def run(url: str, driver: str, work: Callable[[Any], Awaitable[T]]) -> T:
    async def go() -> T:
        engine = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
        try:
            return await work(engine)
        finally:
            await engine.dispose()

    done = asyncio.run(go())
    gc.collect()
    return done


drivers = pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])


@drivers
def test_async_sessions(url: str, engine: Engine, driver: str) -> None:
    async def work(async_engine: Any) -> None:
        async with AsyncSession(async_engine, expire_on_commit=False) as session:
            job = await awaited.enqueue(session, Mixed(), metadata={"a": 1}, tags=["t"])
            session.add(Job(Mixed(), metadata={"a": 1}, tags=["t"]))
            await session.flush()
            many = await awaited.enqueue_many(
                session, [(Mixed(), InsertOptions(metadata={"a": 1}, tags=["t"]))], returning=True
            )
            assert (job.id, many.count, many.ids) == (1, 1, [3])
            await awaited.enqueue(await session.connection(), Mixed(), metadata={"a": 1}, tags=["t"])
            await session.commit()
            await awaited.enqueue(session, Ping(5))
            await session.flush()
            await session.rollback()
            savepoint = await session.begin_nested()
            await awaited.enqueue_many(session, [Ping(6)])
            await savepoint.rollback()
            await session.commit()

    run(url, driver, work)
    with Session(engine) as session:
        enqueue(session, Mixed(), metadata={"a": 1}, tags=["t"])
        session.commit()

    rows = [{**row, "created_at": None, "scheduled_at": None} for row in stored(engine)]
    assert rows == [rows[-1]] * 5


@drivers
def test_async_times(url: str, engine: Engine, driver: str) -> None:
    async def work(async_engine: Any) -> None:
        async with AsyncSession(async_engine) as session, session.begin():
            for when in (HOUR, FUTURE, PAST):
                await awaited.enqueue(session, Ping(1), scheduled_at=when)
                await awaited.enqueue_many(session, [(Ping(1), InsertOptions(scheduled_at=when))])
                await session.flush()

    run(url, driver, work)

    rows = stored(engine)
    assert rows[::2] == rows[1::2]
    assert [row["state"] for row in rows[::2]] == ["scheduled", "scheduled", "available"]


@drivers
def test_async_scoped_sessions_and_connections(url: str, engine: Engine, driver: str) -> None:
    async def work(async_engine: Any) -> None:
        scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
        await awaited.enqueue(scoped, Ping(1))
        await awaited.enqueue_many(scoped, [Ping(2)])
        await scoped.commit()
        await scoped.remove()
        async with async_engine.begin() as connection:
            await awaited.enqueue(connection, Ping(3))
            await awaited.enqueue_many(connection, [Ping(4)])
        async with async_engine.connect() as connection:
            await awaited.enqueue(connection, Ping(5))
            await awaited.enqueue_many(connection, [Ping(6)])

    run(url, driver, work)

    assert [row["args"]["n"] for row in stored(engine)] == [1, 2, 3, 4]


def test_async_many_as_the_first_operation_of_a_transaction_does_not_commit_by_itself(url: str, engine: Engine) -> None:
    async def work(async_engine: Any) -> None:
        async with AsyncSession(async_engine) as session:
            await awaited.enqueue_many(session, [Ping(1)])
            await session.rollback()

    run(url, "asyncpg", work)

    assert count(engine) == 0


def test_the_plain_verbs_refuse_async_sessions_and_the_awaited_ones_plain_ones(url: str, engine: Engine) -> None:
    async def work(async_engine: Any) -> None:
        class Mine(AsyncSession): ...

        scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
        async with Mine(async_engine) as session, async_engine.connect() as connection:
            refused: list[Any] = [session, scoped, connection, async_engine]
            for wrong in refused:
                with pytest.raises(AsyncSessionError, match=r"from sqla_river\.asyncio import enqueue.* AsyncRiver\("):
                    enqueue(wrong, Ping(1))
                with pytest.raises(AsyncSessionError):
                    enqueue_many(wrong, [Ping(1)])
        await scoped.remove()
        with Session(engine) as plain:
            refused = [plain, scoped_session(sessionmaker(engine)), engine, None]
            for wrong in refused:
                with pytest.raises(SessionError, match="plain ones take the verbs of sqla_river"):
                    await awaited.enqueue(wrong, Ping(1))

    run(url, "psycopg", work)

    assert count(engine) == 0


# ---- bad input: the right error, at the call, and the session goes on ------------------------------------------------


class Bad:
    """An args class whose JSON is what a test wants."""

    kind: ClassVar[str] = "bad"

    def __init__(self, value: Any) -> None:
        self.value = value


@attrs.frozen
class Loose:
    kind: ClassVar[str] = "loose"
    value: Any


@attrs.frozen
class Strict:
    kind: ClassVar[str] = "strict"
    order_id: int


@attrs.frozen
class WrongKind:
    kind: ClassVar[str] = "two words"


@attrs.frozen
class LongKind:
    kind: ClassVar[str] = "k" * 128


BAD_OPTIONS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (InvalidOptionError, "naive", {"scheduled_at": datetime(2100, 1, 1)}),  # noqa: DTZ001
    (InvalidOptionError, "scheduled_at", {"scheduled_at": "tomorrow"}),
    (InvalidOptionError, "scheduled_at", {"scheduled_at": 60}),
    (InvalidOptionError, "scheduled_at", {"scheduled_at": timedelta.max}),
    (InvalidOptionError, r"priority must be 1\.\.4 \(1 runs first\), got 0", {"priority": 0}),
    (InvalidOptionError, "got 5", {"priority": 5}),
    (InvalidOptionError, "got True", {"priority": True}),
    (InvalidOptionError, "got '1'", {"priority": "1"}),
    (InvalidOptionError, "max_attempts", {"max_attempts": 0}),
    (InvalidOptionError, "max_attempts", {"max_attempts": 2**15}),
    (InvalidOptionError, "queue", {"queue": ""}),
    (InvalidOptionError, "queue", {"queue": "Über"}),
    (InvalidOptionError, "queue", {"queue": "q" * 65}),
    (InvalidOptionError, "tag", {"tags": "sms"}),
    (InvalidOptionError, "tag", {"tags": ["a,b"]}),
    (InvalidOptionError, "metadata", {"metadata": []}),
    (InvalidOptionError, "metadata", {"metadata": {"a": float("nan")}}),
    (InvalidOptionError, "metadata", {"metadata": {"a": "\0"}}),
    (InvalidOptionError, "metadata", {"metadata": {"a": "\ud800"}}),
    (InvalidOptionError, "metadata", {"metadata": {"a": ODD}}),
    (InvalidOptionError, "pending", {"pending": 1}),
    (TypeError, "prioritty", {"prioritty": 1}),
]
BAD_ARGS: list[tuple[type[Exception], str, Any]] = [
    (EncodeError, r"\$(\[0\])?\.value", Loose(float("nan"))),
    (EncodeError, r"\$(\[0\])?\.value", Loose(float("-inf"))),
    (EncodeError, r"U\+0000", Loose("a\0b")),
    (EncodeError, "surrogate", Loose(["\ud800"])),
    (EncodeError, "key: expected str, got int", Loose({1: 2})),
    (EncodeError, r"\$(\[0\])?\.value", Loose(ODD)),
    (EncodeError, "1048576", Loose("x" * 1_048_577)),
    (EncodeError, r"\$(\[0\])?\.order_id: expected int, got None.*session\.flush\(\)", Strict(cast("int", None))),
    (EncodeError, r"\$(\[0\])?\.order_id: expected int, got str", Strict(cast("int", "7"))),
    (EncodeError, "write Ping", Ping),
    (EncodeError, "kind", "ping"),
    (EncodeError, "kind", None),
    (EncodeError, "Bad", Bad(1)),
    (InvalidOptionError, "kind must be", WrongKind()),
    (InvalidOptionError, "kind must be", LongKind()),
]


@contextmanager
def nothing_lost(engine: Engine) -> Generator[Session]:
    """A session with work of the user's in it, which must commit after what happens in the block."""
    with Session(engine) as session:
        session.add(Job(Ping(1)))
        session.flush()
        session.add(Job(Ping(2)))
        yield session
        assert session.is_active
        session.add(Job(Ping(3)))
        session.commit()
    assert [row["args"] for row in stored(engine)] == [{"n": 1}, {"n": 2}, {"n": 3}]


def ways_to_refuse(session: Session, args: Any, options: dict[str, Any]) -> Iterable[Callable[[], object]]:
    yield lambda: enqueue(session, args, **options)
    yield lambda: Job(args, **options)
    yield lambda: enqueue(session.connection(), args, **options)
    yield lambda: enqueue_many(session, [(args, InsertOptions(**options))])


@pytest.mark.parametrize(("error", "match", "options"), BAD_OPTIONS, ids=lambda case: repr(case)[:40])
def test_bad_options_are_refused_at_the_call(
    engine: Engine, error: type[Exception], match: str, options: dict[str, Any]
) -> None:
    with nothing_lost(engine) as session:
        for refuse in ways_to_refuse(session, Ping(9), options):
            with statements_of(engine) as seen, pytest.raises(error, match=match):
                refuse()
            assert not any("INSERT" in statement and "unnest" in statement for statement in seen)


@pytest.mark.parametrize(("error", "match", "args"), BAD_ARGS, ids=lambda case: repr(case)[:40])
def test_bad_args_are_refused_at_the_call(engine: Engine, error: type[Exception], match: str, args: Any) -> None:
    assert issubclass(error, RiverError)
    with nothing_lost(engine) as session:
        for refuse in ways_to_refuse(session, args, {}):
            with pytest.raises(error, match=match):
                refuse()


def test_another_database_is_refused_at_the_call_and_its_session_goes_on() -> None:
    sqlite = create_engine("sqlite://")
    with Session(sqlite) as session:
        for refuse in (
            lambda: enqueue(session, Ping(1)),
            lambda: enqueue(session.connection(), Ping(1)),
            lambda: enqueue_many(session, [Ping(1)]),
            lambda: enqueue_many(session.connection(), []),
        ):
            with pytest.raises(WrongDatabaseError, match=r"needs postgresql\+psycopg, .* 'sqlite\+pysqlite'"):
                refuse()
        assert session.scalars(select(1)).all() == [1]
        session.add(Job(Ping(1)))
        with pytest.raises(WrongDatabaseError):
            session.flush()
    sqlite.dispose()


def test_a_session_without_an_engine_is_sqlalchemys_error() -> None:
    with Session() as session, pytest.raises(UnboundExecutionError):
        enqueue(session, Ping(1))


@pytest.mark.parametrize("wrong", [None, "session", ODD, Session, Ping(1)], ids=repr)
def test_what_is_no_session_is_refused(engine: Engine, wrong: Any) -> None:
    for call in (lambda: enqueue(wrong, Ping(1)), lambda: enqueue_many(wrong, [Ping(1)])):
        with pytest.raises(SessionError, match=r"write 'with Session\(engine\) as session'"):
            call()
    with pytest.raises(SessionError, match="got Engine"):
        enqueue(cast("Any", engine), Ping(1))


# ---- many ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insert, "BLOCK_ROWS", 3)


def test_many_say_how_many_and_give_ids_only_if_asked(engine: Engine) -> None:
    with Session(engine) as session:
        plain = enqueue_many(session, [Ping(1), Ping(2)])
        numbered = enqueue_many(session, (Ping(n) for n in range(3)), returning=True)

    assert (plain.count, plain.skipped, plain.ids) == (2, 0, None)
    assert (numbered.count, numbered.skipped) == (3, 0)
    assert len(set(numbered.ids or [])) == 3


@pytest.mark.usefixtures("small_blocks")
def test_ids_are_in_input_order(engine: Engine) -> None:
    with Session(engine) as session:
        ids = enqueue_many(session, [Ping(n) for n in range(10)], returning=True).ids
        session.commit()

        stored_ids = session.scalars(select(Job.id).order_by(Job.args["n"].as_integer())).all()
        assert ids == stored_ids == sorted(stored_ids)


def test_many_of_nothing(engine: Engine) -> None:
    with Session(engine) as session, statements_of(engine) as seen:
        assert enqueue_many(session, []).count == 0
        assert enqueue_many(session, iter(()), returning=True).ids == []
        assert seen == []


def test_many_take_options_by_item(engine: Engine) -> None:
    items: list[JobArgs | tuple[JobArgs, InsertOptions]] = [
        Ping(1),
        (Ping(2), InsertOptions(queue="slow", priority=4)),
        (SendSMS("x"), InsertOptions(tags=["now"])),
        SendSMS("y"),
    ]
    with Session(engine) as session:
        enqueue_many(session, items)
        session.commit()

    assert [(row["queue"], row["priority"], row["tags"]) for row in stored(engine)] == [
        ("default", 1, []),
        ("slow", 4, []),
        ("notifications", 2, ["now"]),
        ("notifications", 2, ["sms"]),
    ]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (Strict(cast("int", "x")), EncodeError, r"^\$\[4\]\.order_id: expected int, got str$"),
        (WrongKind(), InvalidOptionError, "^item 4: kind must be"),
        ("ping", EncodeError, r"^\$\[4\]"),
        (None, EncodeError, r"^\$\[4\]"),
        ((Ping(1), {"priority": 1}), InvalidOptionError, r"^item 4: options must be InsertOptions\(\.\.\.\)"),
        ((Ping(1), None), InvalidOptionError, r"^item 4: options must be InsertOptions\(\.\.\.\)"),
        ((Ping(1),), EncodeError, r"^\$\[4\]"),
        ((Ping(1), InsertOptions(), 3), EncodeError, r"^\$\[4\]"),
    ],
    ids=repr,
)
def test_an_error_names_the_position_and_the_session_goes_on(
    engine: Engine, bad: Any, error: type[Exception], match: str
) -> None:
    with Session(engine) as session:
        enqueue_many(session, [Ping(0)])
        with pytest.raises(error, match=match):
            enqueue_many(session, [Ping(1), Ping(2), Ping(3), Ping(4), bad, Ping(6)])
        session.add(Job(Ping(7)))
        session.commit()

    # The first block had been sent: whoever wants all or nothing has a savepoint or a rollback for it.
    assert [row["args"]["n"] for row in stored(engine)] == [0, 1, 2, 3, 7]


@pytest.mark.usefixtures("small_blocks")
def test_the_iterable_may_use_the_same_session(engine: Engine) -> None:
    with Session(engine) as session:
        enqueue_many(session, [Ping(n) for n in range(5)])

        def items() -> Iterator[Ping]:
            for n in session.scalars(select(Job.args["n"].as_integer()).order_by(Job.id)):
                session.add(Job(Ping(100 + n)))
                assert session.scalars(select(func.count()).select_from(Job)).one() > 0
                yield Ping(10 + n)

        assert enqueue_many(session, items()).count == 5
        session.commit()

    assert sorted(row["args"]["n"] for row in stored(engine)) == [
        0,
        1,
        2,
        3,
        4,
        10,
        11,
        12,
        13,
        14,
        100,
        101,
        102,
        103,
        104,
    ]


@pytest.mark.usefixtures("small_blocks")
def test_an_iterable_that_raises_leaves_the_session_usable(engine: Engine) -> None:
    def items() -> Iterator[Ping]:
        yield from (Ping(n) for n in range(4))
        raise LookupError("no more")

    with Session(engine) as session:
        savepoint = session.begin_nested()
        with pytest.raises(LookupError, match="no more"):
            enqueue_many(session, items())
        savepoint.rollback()
        enqueue_many(session, [Ping(9)])
        session.commit()

    assert [row["args"]["n"] for row in stored(engine)] == [9]


def test_blocks_are_bounded_in_rows_and_bytes_and_taken_as_they_come(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    taken = 0
    insert_rows = bulk.insert_rows

    def counting(connection: Any, schema: Any, rows: Any, **words: Any) -> Any:
        sent.append(len(rows))
        return insert_rows(connection, schema, rows, **words)

    def items() -> Iterator[Loose]:
        nonlocal taken
        for n in range(10):
            assert taken - sum(sent) < 4
            taken += 1
            yield Loose("x" if n < 8 else "x" * 1000)

    monkeypatch.setattr(bulk, "insert_rows", counting)
    monkeypatch.setattr(insert, "BLOCK_ROWS", 4)
    monkeypatch.setattr(insert, "BLOCK_BYTES", 1000)
    with Session(engine) as session:
        enqueue_many(session, items())

    assert sent == [4, 4, 1, 1]


def test_pending_rows_of_the_session_go_first(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Job(Ping(1)))
        enqueue_many(session, [Ping(2)])
        session.commit()

    assert [row["args"]["n"] for row in stored(engine)] == [1, 2]


def test_many_of_a_class_of_ones_own(engine: Engine) -> None:
    class Base(DeclarativeBase): ...

    class Mine(JobMixin, Base): ...

    river = River(job_class=Mine, defaults=InsertOptions(queue="mine"), notify="off")
    with Session(engine) as session, statements_of(engine) as seen:
        job = river.enqueue(session, Ping(1))
        river.enqueue_many(session, [Ping(2)])
        session.commit()

        assert isinstance(job, Mine)
        assert not any("pg_notify" in statement for statement in seen)
    assert [row["queue"] for row in stored(engine)] == ["mine", "mine"]


def test_a_river_of_ones_own_has_its_verbs_awaited_too(empty_url: str) -> None:
    class Mine(JobMixin, RiverBase):
        metadata = MetaData()
        __river_schema__ = "jobs"

    own = create_engine(empty_url)
    create_all(own)
    create_all(own, "jobs")
    river = awaited.AsyncRiver(River(job_class=Mine, defaults=InsertOptions(queue="mine")))

    async def work(async_engine: Any) -> tuple[Any, ...]:
        async with AsyncSession(async_engine, expire_on_commit=False) as session:
            job = await river.enqueue(session, Ping(1))
            await session.commit()
            cancelled = await river.cancel(session, job.id)
            await session.commit()
            listed = (await river.list_jobs(session)).jobs
            return job, cancelled, *listed, await river.wait_for(session, job.id)

    found = run(empty_url, "psycopg", work)

    assert [type(job) for job in found] == [Mine] * 4
    assert [(job.queue, job.state) for job in found] == [("mine", "cancelled")] * 4
    with own.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM river_job")) == 0
    own.dispose()


def test_what_is_remembered_of_a_transaction_goes_with_it(engine: Engine) -> None:
    for _ in range(3):
        with Session(engine) as session:
            enqueue(session, Ping(1), scheduled_at=HOUR)
            session.commit()
    gc.collect()

    assert len(store._now) == 0


def test_options_are_typed_words() -> None:
    assert set(OptionWords.__annotations__) == {field.name for field in attrs.fields(InsertOptions)}


def test_the_states_of_new_jobs_are_all_there_are(engine: Engine) -> None:
    with Session(engine) as session:
        jobs = [enqueue(session, Ping(1), **options) for options in OPTIONS]
        session.flush()

        assert {job.state for job in jobs} == {JobState.AVAILABLE, JobState.SCHEDULED, JobState.PENDING}
        assert all(job.state is not JobState.AVAILABLE or job.scheduled_at <= job.created_at for job in jobs)
