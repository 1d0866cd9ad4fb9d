"""Wake-up, the sending side: who is told of which queue, when, and how often."""

import asyncio
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import orjson
import pytest
import transaction
import zope.sqlalchemy
from sqlalchemy import Engine, MetaData, create_engine, make_url, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import InsertOptions, Job, JobMixin, River, create_all, notify
from sqla_river import asyncio as awaited
from sqla_river.config import NotifyMode
from sqla_river.models import RiverBase
from tests.database import emptied, shared_database, statements_of
from tests.hearing import DEFAULT, SMS, Ear, river_with, until
from tests.jobs import Ping, SendSMS
from tests.making import count_states

Put = Callable[[Any, Any], object]


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture(autouse=True)
def _announcers_that_end_soon(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(notify, "_IDLE", 0.1)
    yield
    until(lambda: not notify._announcers)


@pytest.fixture
def ear(url: str, engine: Engine) -> Iterator[Ear]:
    ear = Ear(url)
    yield ear
    ear.connection.close()


@pytest.fixture(scope="module")
def inside() -> River[Any]:
    return river_with(notify="transaction")


@pytest.fixture(scope="module")
def after() -> River[Any]:
    return river_with(notify="after_commit")


def put_by(river: River[Any], how: str) -> Put:
    if how == "enqueue":
        return river.enqueue
    if how == "core":
        return lambda session, args: river.enqueue(session.connection(), args)
    return lambda session, args: river.enqueue_many(session, [args, args])


def visible(engine: Engine) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM river_job")).scalar_one())


ways = pytest.mark.parametrize("how", ["enqueue", "core", "many"])


# ---- inside the transaction ------------------------------------------------------------------------------------------


def test_a_job_of_a_flush_that_failed_is_announced_when_it_is_added_again(engine: Engine, ear: Ear) -> None:
    with Session(engine) as session:
        job, broken = Job(Ping(1)), Job(Ping(2))
        broken.kind = "x" * 1_000  # the table refuses that
        session.add_all([job, broken])
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        session.add(Job(Ping(3)))
        session.flush()
        session.add(job)  # announced by the other: it goes in as it is
        session.commit()

        assert job.attempt == 0
    assert ear.heard() == ['{"queue": "default"}']
    assert count_states(engine) == {"available": 2}


@ways
def test_one_notification_per_transaction_and_queue_and_none_before_the_commit(
    engine: Engine, ear: Ear, inside: River[Any], how: str
) -> None:
    put = put_by(inside, how)
    with Session(engine) as session:
        for _ in range(3):
            put(session, Ping(1))
            put(session, SendSMS("a"))
            session.flush()
        assert ear.heard() == []
        session.commit()
        assert sorted(ear.heard()) == [DEFAULT, SMS]
        put(session, Ping(2))
        session.commit()

    assert ear.heard() == [DEFAULT]


@ways
def test_a_transaction_rolled_back_wakes_nobody(engine: Engine, ear: Ear, inside: River[Any], how: str) -> None:
    with Session(engine) as session:
        put_by(inside, how)(session, Ping(1))
        session.flush()
        session.rollback()

    assert ear.heard() == []


@ways
def test_a_savepoint_rolled_back_takes_its_notification_and_the_queue_is_announced_again(
    engine: Engine, ear: Ear, inside: River[Any], how: str
) -> None:
    put = put_by(inside, how)
    with Session(engine) as session:
        savepoint = session.begin_nested()
        put(session, Ping(1))
        savepoint.rollback()
        put(session, SendSMS("a"))
        session.commit()
        assert ear.heard() == [SMS]

        savepoint = session.begin_nested()
        put(session, Ping(1))
        savepoint.rollback()
        put(session, Ping(2))
        session.commit()
        assert ear.heard() == [DEFAULT]

        with session.begin_nested():
            put(session, Ping(3))
        put(session, Ping(4))
        session.commit()
        assert ear.heard() == [DEFAULT]


def test_two_queues_of_one_flush_are_both_announced(engine: Engine, ear: Ear, inside: River[Any]) -> None:
    with Session(engine) as session:
        session.add_all([inside.job_class(Ping(1)), inside.job_class(SendSMS("a")), inside.job_class(Ping(2))])
        session.commit()

    assert sorted(ear.heard()) == [DEFAULT, SMS]


@ways
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scheduled_at": timedelta(seconds=4)}, True),
        ({"scheduled_at": timedelta(seconds=5)}, True),
        ({"scheduled_at": timedelta(seconds=6)}, False),
        ({"scheduled_at": datetime(2100, 1, 1, tzinfo=UTC)}, False),
        ({"scheduled_at": datetime(2001, 1, 1, tzinfo=UTC)}, True),
        ({"pending": True}, False),
    ],
    ids=repr,
)
def test_only_jobs_that_are_due_within_five_seconds_are_announced(
    engine: Engine, ear: Ear, inside: River[Any], how: str, options: dict[str, Any], told: bool
) -> None:
    with Session(engine) as session:
        if how == "enqueue":
            inside.enqueue(session, Ping(1), **options)
        elif how == "core":
            inside.enqueue(session.connection(), Ping(1), **options)
        else:
            inside.enqueue_many(session, [(Ping(1), InsertOptions(**options))])
        session.commit()

    assert ear.heard() == [DEFAULT] * told


def test_the_channel_is_that_of_the_schema_the_jobs_stand_in(url: str, engine: Engine) -> None:
    mine: Any = type("InJobs", (JobMixin, RiverBase), {"metadata": MetaData(), "__river_schema__": "jobs"})
    create_all(engine, "jobs")
    ears = [Ear(url, f"{schema}.river_insert") for schema in ("jobs", "public", "elsewhere")]
    with Session(engine) as session:
        River.of(mine).enqueue(session, Ping(1))
        session.commit()
    assert [ear.heard() for ear in ears] == [[DEFAULT], [], []]

    with engine.begin() as connection:
        connection.execute(text("SET LOCAL search_path TO jobs"))
        River.of(mine).enqueue(connection, Ping(2))
    assert [ear.heard() for ear in ears] == [[DEFAULT], [], []]
    for ear in ears:
        ear.connection.close()


def test_the_search_path_names_the_channel_of_a_class_without_a_schema(
    url: str, engine: Engine, inside: River[Any]
) -> None:
    create_all(engine, "tenant")
    ear = Ear(url, "tenant.river_insert")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL search_path TO tenant"))
        inside.enqueue(connection, Ping(1))

    assert ear.heard() == [DEFAULT]
    ear.connection.close()


@pytest.mark.parametrize("mode", ["transaction", "after_commit", "off"])
def test_two_phase_transactions_commit(engine: Engine, ear: Ear, mode: NotifyMode) -> None:
    """PostgreSQL refuses to PREPARE what has executed NOTIFY; inside of one, nothing is announced, and runners poll."""
    with engine.connect() as connection:
        if connection.execute(text("SHOW max_prepared_transactions")).scalar_one() == "0":
            pytest.skip("the server has max_prepared_transactions = 0")
    river = river_with(notify=mode)
    with Session(engine, twophase=True) as session:
        river.enqueue(session, Ping(1))
        river.enqueue_many(session, [Ping(2)])
        session.commit()

    if mode == "after_commit":
        assert ear.next() == DEFAULT
    assert ear.heard() == []


def test_the_mode_off_says_nothing(engine: Engine, ear: Ear) -> None:
    river = river_with(notify="off")
    with Session(engine) as session:
        for how in ("enqueue", "core", "many"):
            put_by(river, how)(session, Ping(1))
        session.commit()

    assert ear.heard() == []


def test_a_job_whose_statement_was_never_sent_has_announced_nothing(url: str, ear: Ear, inside: River[Any]) -> None:
    def serialize(value: object) -> bytes:
        return orjson.dumps(value)  # which refuses 2**70

    other = create_engine(url, json_serializer=serialize)
    with other.begin() as connection:
        with pytest.raises(TypeError):
            inside.enqueue(connection, Ping(2**70))
        inside.enqueue(connection, Ping(1))
    other.dispose()

    assert ear.heard() == [DEFAULT]


def test_what_a_connection_puts_in_first_is_announced_by_its_commit(
    engine: Engine, ear: Ear, inside: River[Any]
) -> None:
    with engine.connect() as connection:
        inside.enqueue_many(connection, [Ping(1)])
        assert ear.heard() == []
        connection.commit()

    assert ear.heard() == [DEFAULT]


# ---- under AUTOCOMMIT ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["engine", "connection", "session"])
def autocommitting(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Session]:
    """A Session each of whose statements is committed by itself, by each of the ways to have one."""
    if request.param == "engine":
        with Session(engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
            yield session
    elif request.param == "connection":
        with (
            engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection,
            Session(connection) as session,
        ):
            yield session
    else:
        with Session(engine) as session:
            session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            yield session


@ways
@pytest.mark.parametrize("mode", ["transaction", "after_commit"])
def test_under_autocommit_each_statement_is_announced(
    autocommitting: Session, engine: Engine, ear: Ear, how: str, mode: NotifyMode
) -> None:
    put = put_by(river_with(notify=mode), how)
    for n in range(3):
        put(autocommitting, Ping(n))
        put(autocommitting, SendSMS("a"))
        autocommitting.flush()

        assert sorted([ear.next(), ear.next()]) == [DEFAULT, SMS]
        assert visible(engine) == (n + 1) * (4 if how == "many" else 2)
    assert ear.heard() == []


def test_under_autocommit_a_flush_is_announced_once_when_all_its_jobs_are_there(
    autocommitting: Session, engine: Engine, ear: Ear, inside: River[Any]
) -> None:
    for n in range(2):
        with statements_of(engine) as seen:
            autocommitting.add_all([inside.job_class(each) for each in (Ping(1), SendSMS("a"), Ping(2), Ping(3))])
            autocommitting.flush()

        assert [statement.split()[0] for statement in seen] == ["INSERT", "SELECT", "SELECT"]
        assert sorted(ear.heard()) == [DEFAULT, SMS], n


def test_under_autocommit_a_flush_that_failed_leaves_nothing_to_wait_for(
    autocommitting: Session, ear: Ear, inside: River[Any]
) -> None:
    job, broken = inside.job_class(Ping(1)), inside.job_class(Ping(2))
    broken.kind = "x" * 1_000  # the table refuses that
    autocommitting.add_all([job, broken])
    with pytest.raises(IntegrityError):
        autocommitting.flush()
    autocommitting.rollback()
    assert ear.heard() == []
    autocommitting.add(job)
    autocommitting.commit()

    assert ear.heard() == [DEFAULT]


# ---- after the commit ------------------------------------------------------------------------------------------------


@ways
def test_after_a_commit_the_job_is_there_when_its_queue_is_heard(
    engine: Engine, ear: Ear, after: River[Any], how: str
) -> None:
    with Session(engine) as session:
        put_by(after, how)(session, Ping(1))
        session.flush()
        assert ear.heard() == []
        session.commit()

    assert ear.next() == DEFAULT
    assert visible(engine) > 0
    assert ear.heard() == []


def test_after_a_commit_each_queue_is_announced_once(engine: Engine, ear: Ear, after: River[Any]) -> None:
    with Session(engine) as session:
        after.enqueue_many(session, [Ping(1), SendSMS("a"), Ping(2), SendSMS("b")])
        after.enqueue(session, Ping(3))
        session.commit()

    assert sorted([ear.next(), ear.next()]) == [DEFAULT, SMS]
    assert ear.heard() == []


def _then_told(session: Session, after: River[Any], ear: Ear) -> None:
    """Nothing has been said so far; the next commit is heard, and it alone."""
    assert ear.heard() == []
    after.enqueue(session, SendSMS("last"))
    session.commit()
    assert ear.next() == SMS
    assert ear.heard() == []


def test_after_a_rollback_nothing_is_announced(engine: Engine, ear: Ear, after: River[Any]) -> None:
    with Session(engine) as session:
        after.enqueue(session, Ping(1))
        session.flush()
        session.rollback()
        _then_told(session, after, ear)


def test_a_savepoint_released_and_the_outer_rolled_back_announces_nothing(
    engine: Engine, ear: Ear, after: River[Any]
) -> None:
    with Session(engine) as session:
        with session.begin_nested():
            after.enqueue(session, Ping(1))
        session.rollback()
        _then_told(session, after, ear)


def test_the_test_harness_rolled_back_announces_nothing(engine: Engine, ear: Ear, after: River[Any]) -> None:
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            after.enqueue(session, Ping(1))
            session.commit()
        outer.rollback()
    with Session(engine) as session:
        _then_told(session, after, ear)


def test_a_session_on_a_connection_is_announced_at_the_connections_commit(
    engine: Engine, ear: Ear, after: River[Any]
) -> None:
    with engine.begin() as connection:
        with Session(connection) as session:
            after.enqueue(session, Ping(1))
            session.commit()
        assert ear.heard() == []

    assert ear.next() == DEFAULT


def test_an_engine_with_options_is_announced_once(engine: Engine, ear: Ear, after: River[Any]) -> None:
    with Session(engine) as session:
        after.enqueue(session, Ping(0))
        session.commit()
    assert ear.next() == DEFAULT
    with Session(engine.execution_options(logging_token="x")) as session:
        after.enqueue(session, Ping(1))
        session.commit()

    assert ear.next() == DEFAULT
    assert ear.heard() == []


def test_under_zope_the_commit_is_announced_and_the_abort_is_not(engine: Engine, ear: Ear, after: River[Any]) -> None:
    manager = transaction.TransactionManager(explicit=True)
    with Session(engine) as session:
        cast("Any", zope.sqlalchemy).register(session, transaction_manager=manager)
        manager.begin()
        after.enqueue_many(session, [Ping(1)])
        manager.abort()
        assert ear.heard() == []
        manager.begin()
        after.enqueue_many(session, [SendSMS("a")])
        manager.commit()

        assert ear.next() == SMS
        assert ear.heard() == []


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_commits_of_an_async_engine_are_announced(url: str, ear: Ear, after: River[Any], driver: str) -> None:
    async def go() -> None:
        other = create_async_engine(make_url(url).set(drivername=f"postgresql+{driver}"))
        async with AsyncSession(other) as session:
            await awaited.awaited(after.enqueue)(session, Ping(1))
            await session.commit()
        await other.dispose()

    asyncio.run(go())

    assert ear.next() == DEFAULT


def test_commits_of_a_psycopg2_engine_are_announced(url: str, ear: Ear, after: River[Any]) -> None:
    other = create_engine(make_url(url).set(drivername="postgresql+psycopg2"))
    with Session(other) as session:
        after.enqueue(session, Ping(1))
        session.commit()
    other.dispose()

    assert ear.next() == DEFAULT


def test_the_last_job_of_a_burst_is_announced_after_its_commit_and_soon(
    engine: Engine, ear: Ear, after: River[Any]
) -> None:
    """No leading edge: whatever came while the announcer paused goes with its next announcement."""
    with Session(engine) as session:
        for n in range(200):
            after.enqueue(session, Ping(n))
            session.commit()
        after.enqueue(session, SendSMS("last"))
        session.commit()
    committed = time.monotonic()
    announcements = 1
    while ear.next() != SMS:
        announcements += 1

    assert time.monotonic() - committed < 1  # 10 ms, on a machine that has nothing else to do
    assert visible(engine) == 201
    assert announcements < 200


def test_many_threads_at_once_are_all_announced(engine: Engine, ear: Ear, after: River[Any]) -> None:
    def work(name: str) -> None:
        with Session(engine) as session:
            for n in range(20):
                after.enqueue(session, Ping(n), queue=name)
                session.commit()
            after.enqueue(session, Ping(99), queue=f"last_{name}")
            session.commit()

    threads = [threading.Thread(target=work, args=(f"q{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    missing = {f'{{"queue": "last_q{n}"}}' for n in range(4)}
    while missing:
        missing.discard(ear.next())


def test_an_announcement_that_fails_costs_a_poll_and_not_the_next_announcement(
    engine: Engine, ear: Ear, after: River[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_IDLE", 60.0)  # it does not go by itself before it is killed
    with Session(engine) as session:
        after.enqueue(session, Ping(1))
        session.commit()
        assert ear.next() == DEFAULT
        killed = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'sqla_river:announce' AND datname = current_database()"
        )
        assert session.execute(killed).scalars().all() == [True]
        monkeypatch.setattr(notify, "_IDLE", 0.1)
        session.commit()
        after.enqueue(session, Ping(2))
        session.commit()
        after.enqueue(session, SendSMS("a"))
        until(lambda: any("runners find the jobs at their next poll" in record.message for record in caplog.records))
        session.commit()

    assert ear.next() == SMS


def test_what_is_remembered_of_a_transaction_goes_with_it(
    engine: Engine, ear: Ear, inside: River[Any], after: River[Any]
) -> None:
    for river in (inside, after):
        with Session(engine) as session:
            river.enqueue(session, Ping(1))
            session.commit()
            river.enqueue(session, Ping(1))
            session.flush()
            session.rollback()
            with session.begin_nested() as savepoint:
                river.enqueue(session, Ping(1))
                session.flush()
                savepoint.rollback()
        ear.next()
    del session, savepoint
    gc.collect()

    assert (len(notify._told), len(notify._marked)) == (0, 0)


def test_an_announcer_with_nothing_to_say_goes_and_another_comes(engine: Engine, ear: Ear, after: River[Any]) -> None:
    for _ in range(3):
        with Session(engine) as session:
            after.enqueue(session, Ping(1))
            session.commit()
        assert ear.next() == DEFAULT
        until(lambda: not any(thread.name == "sqla_river-announce" for thread in threading.enumerate()))

    assert notify._announcers == {}


def test_an_announcer_takes_no_connection_of_the_users_pool(url: str, ear: Ear, after: River[Any]) -> None:
    small = create_engine(url, pool_size=1, max_overflow=0)
    with Session(small) as session:
        after.enqueue(session, Ping(1))
        session.commit()
        session.connection()  # the only one
        assert ear.next() == DEFAULT
        assert ear.heard() == []
    small.dispose()


def test_a_forked_child_announces_by_a_connection_of_its_own(engine: Engine, ear: Ear, after: River[Any]) -> None:
    def announced(args: Any) -> None:
        with Session(engine) as session:
            after.enqueue(session, args)
            session.commit()

    announced(Ping(1))
    assert ear.next() == DEFAULT
    held, let_go = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 and later: this process has threads
        child = os.fork()
    if child == 0:
        try:
            os.close(let_go)
            engine.dispose(close=False)
            announced(SendSMS("child"))
            os.read(held, 1)
        finally:
            os._exit(0)

    assert ear.next() == SMS
    os.close(let_go)
    os.waitpid(child, 0)
    os.close(held)
    announced(Ping(2))
    assert ear.next() == DEFAULT
