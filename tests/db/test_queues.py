"""The verbs on queues: their rows, what they say on River's control channel, and whose transaction they are part of."""

import asyncio
import json
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session, scoped_session, sessionmaker

from sqla_river import JobMixin, QueueInfo, River, create_all, list_queues, pause, resume, update_queue
from sqla_river import asyncio as awaited
from sqla_river.duties.prune import Clean
from sqla_river.errors import AsyncSessionError, InvalidOptionError, QueueNotFoundError
from sqla_river.fetch import bounds
from sqla_river.rows import JobRow
from tests.database import emptied, shared_database, statements_of
from tests.making import make_fetcher, make_job, opened

Verb = Callable[[Any, str], list[QueueInfo]]


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    for engine in emptied(url):
        yield engine
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_queue"))


def make_queue(engine: Engine, *names: str, paused: bool = False) -> None:
    """Rows that were touched last year."""
    with engine.begin() as connection:
        for name in names:
            connection.execute(
                text(
                    "INSERT INTO river_queue (name, paused_at, created_at, updated_at) "
                    "VALUES (:name, CASE WHEN :paused THEN timestamptz '2025-06-01Z' END, '2025-01-01Z', '2025-01-01Z')"
                ),
                {"name": name, "paused": paused},
            )


def paused(engine: Engine) -> dict[str, bool]:
    with Session(engine) as session:
        return {info.name: info.paused_at is not None for info in list_queues(session)}


@contextmanager
def channel(url: str, schema: str = "public") -> Generator[Callable[[], list[Any]]]:
    """What is said on the control channel of *schema*, from here on, up to a last word of the test's own."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as listening:
        listening.execute(sql.SQL("LISTEN {}").format(sql.Identifier(f"{schema}.river_control")))

        def said() -> list[Any]:
            listening.execute("SELECT pg_notify(%s, 'last')", [f"{schema}.river_control"])
            heard: list[Any] = []
            for notification in listening.notifies(timeout=20):
                if notification.payload == "last":
                    return heard
                heard.append(json.loads(notification.payload))
            raise AssertionError(heard)

        yield said


def update_to_nothing(session: Session, queue: str) -> QueueInfo:
    return update_queue(session, queue, metadata={})


# ---- pause and resume


def test_pause_and_resume_write_the_row_and_say_so_once(engine: Engine, url: str) -> None:
    make_queue(engine, "mail", "other")

    with channel(url) as said:
        with Session(engine) as session, session.begin():
            (at_first,) = pause(session, "mail")
            again = pause(session, "mail")
        told_of_pause = said()
        states = paused(engine)
        with Session(engine) as session, session.begin(), statements_of(engine) as sent:
            (resumed,) = resume(session, "mail")
        told_of_resume = said()

    assert at_first.name == "mail"
    assert at_first.created_at == datetime(2025, 1, 1, tzinfo=UTC)
    assert at_first.paused_at == at_first.updated_at
    assert at_first.updated_at > datetime(2025, 1, 1, tzinfo=UTC)
    assert again == [at_first]
    assert states == {"mail": True, "other": False}
    assert told_of_pause == [{"action": "pause", "queue": "mail"}]
    assert (resumed.paused_at, resumed.metadata) == (None, {})
    assert told_of_resume == [{"action": "resume", "queue": "mail"}]
    assert len(sent) == 1


def test_a_queue_that_is_paused_keeps_its_time_and_one_that_is_not_its_touch(engine: Engine) -> None:
    make_queue(engine, "a", paused=True)
    make_queue(engine, "b")
    with Session(engine) as session, session.begin():
        (a,), (b,) = pause(session, "a"), resume(session, "b")

    assert (a.paused_at, a.updated_at) == (datetime(2025, 6, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC))
    assert (b.paused_at, b.updated_at) == (None, datetime(2025, 1, 1, tzinfo=UTC))


def test_every_queue_is_paused_and_resumed_by_a_star_with_one_word(engine: Engine, url: str) -> None:
    make_queue(engine, "c", "a")
    make_queue(engine, "b", paused=True)

    with channel(url) as said, Session(engine) as session:
        changed = pause(session, "*")
        session.commit()
        after_pause = paused(engine)
        back = resume(session, "*")
        session.commit()
        told = said()

    assert [info.name for info in changed] == [info.name for info in back] == ["a", "b", "c"]
    assert after_pause == {"a": True, "b": True, "c": True}
    assert paused(engine) == {"a": False, "b": False, "c": False}
    assert told == [{"action": "pause", "queue": "*"}, {"action": "resume", "queue": "*"}]


def test_a_star_on_no_queues_changes_nothing(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        assert pause(session, "*") == resume(session, "*") == list_queues(session) == []


def test_a_queue_that_nobody_has_worked_can_be_paused_in_advance(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        (info,) = pause(session, "of_the_next_release")

    assert info.paused_at == info.created_at == info.updated_at
    assert paused(engine) == {"of_the_next_release": True}


@pytest.mark.parametrize("verb", [resume, update_to_nothing])
def test_what_is_not_there_is_said_and_the_session_goes_on(engine: Engine, url: str, verb: Any) -> None:
    make_queue(engine, "mail")
    with channel(url) as said, Session(engine) as session, session.begin():
        pause(session, "mail")
        with pytest.raises(QueueNotFoundError, match="queue 'mial' has no row") as caught:
            verb(session, "mial")
        session.flush()
        session.commit()
        told = said()

    assert isinstance(caught.value, LookupError)
    assert caught.value.queue == "mial"
    assert told == [{"action": "pause", "queue": "mail"}]
    assert paused(engine) == {"mail": True}


BAD_NAMES: list[Any] = [
    "", "**", "A", "a b", "a\nb", "a\0b", 'a"b', "a'b", "a%sb", "a;b", "\x1b[31m", "\u202e", "ä", "a-", "-", "a" * 65,
    "a" * 10_000, None, 7, ["a"],
]  # fmt: skip


@pytest.mark.parametrize("verb", [pause, resume, update_to_nothing], ids=["p", "r", "u"])
def test_a_bad_name_is_refused_before_anything_is_sent(engine: Engine, verb: Any) -> None:
    with Session(engine) as session, statements_of(engine) as sent:
        for name in BAD_NAMES:
            with pytest.raises(InvalidOptionError, match="queue"):
                verb(session, name)

    assert sent == []


# ---- list, metadata


def test_queues_are_listed_by_name_with_times_in_utc(engine: Engine) -> None:
    make_queue(engine, "b", paused=True)
    make_queue(engine, "a")
    with engine.connect() as connection:
        connection.execute(text("SET TimeZone = 'Asia/Tokyo'"))
        with statements_of(engine) as sent:
            infos = list_queues(connection)

    year = datetime(2025, 1, 1, tzinfo=UTC)
    assert infos == [
        QueueInfo("a", None, {}, year, year),
        QueueInfo("b", datetime(2025, 6, 1, tzinfo=UTC), {}, year, year),
    ]
    assert infos[0].created_at.tzinfo is UTC
    assert len(sent) == 1


def test_metadata_is_replaced_and_rivers_clients_are_told(engine: Engine, url: str) -> None:
    make_queue(engine, "mail")
    given = {"concurrency": {"global": 7}, "grüße": ["\"%'", None, 1.5]}

    with channel(url) as said:
        with Session(engine) as session, session.begin():
            update_queue(session, "mail", metadata={"old": True})
            info = update_queue(session, "mail", metadata=given)
        told = said()

    assert info.metadata == given
    assert info.updated_at > info.created_at
    with Session(engine) as session:
        assert list_queues(session) == [info]
    assert told == [
        {"action": "metadata_changed", "metadata": {"old": True}, "queue": "mail"},
        {"action": "metadata_changed", "metadata": given, "queue": "mail"},
    ]


def test_metadata_that_a_notification_cannot_carry_is_refused_before_it_aborts_the_transaction(engine: Engine) -> None:
    name = "a" * 64
    make_queue(engine, name)
    with Session(engine) as session, session.begin():
        largest = {"x": "ä" * 3_895}
        assert len(json.dumps(largest, ensure_ascii=False, separators=(",", ":")).encode()) == 7_798
        assert update_queue(session, name, metadata=largest).metadata == largest
        with pytest.raises(InvalidOptionError, match="at most 7,800 bytes of JSON, got 7,802"):
            update_queue(session, name, metadata={"x": "ä" * 3_897})
        for refused in ({"x": float("nan")}, {"x": "\0"}, {"x": object()}, [1], None):
            with pytest.raises(InvalidOptionError, match="metadata"):
                update_queue(session, name, metadata=refused)  # type: ignore[arg-type]
        assert list_queues(session)[0].metadata == largest


# ---- whose transaction


def test_a_pause_is_part_of_the_callers_transaction(engine: Engine, url: str) -> None:
    make_queue(engine, "mail")
    with channel(url) as said, Session(engine) as session:
        pause(session, "mail")
        pause(session, "new")
        session.rollback()
        with session.begin_nested() as savepoint:
            pause(session, "mail")
            savepoint.rollback()
        session.commit()
        told = said()

    assert paused(engine) == {"mail": False}
    assert told == []


def test_any_session_or_connection_will_do(engine: Engine, url: str) -> None:
    with engine.begin() as connection:
        pause(connection, "a")
    scoped = scoped_session(sessionmaker(engine))
    pause(scoped, "b")
    scoped.commit()
    scoped.remove()

    async def by_awaiting() -> list[QueueInfo]:
        asynchronous = create_async_engine(url)
        async with AsyncSession(asynchronous) as session, session.begin():
            with pytest.raises(AsyncSessionError):
                pause(session, "c")  # type: ignore[arg-type]
            await awaited.pause(session, "c")
            await awaited.resume(session, "b")
            await awaited.update_queue(session, "a", metadata={"n": 1})
            found = await awaited.list_queues(session)
        await asynchronous.dispose()
        return found

    found = asyncio.run(by_awaiting())

    assert [(info.name, info.paused_at is not None) for info in found] == [("a", True), ("b", False), ("c", True)]
    assert found[0].metadata == {"n": 1}


@pytest.mark.parametrize("driver", ["psycopg2", "asyncpg"])
def test_other_drivers_will_do(engine: Engine, url: str, driver: str) -> None:
    make_queue(engine, "b")
    where = make_url(url).set(drivername=f"postgresql+{driver}")

    def act(connection: Connection) -> None:
        pause(connection, "a")
        pause(connection, "*")
        resume(connection, "a")
        update_queue(connection, "a", metadata={"n": 1})

    async def act_async() -> None:
        asynchronous = create_async_engine(where)
        async with asynchronous.begin() as connection:
            await connection.run_sync(act)
        await asynchronous.dispose()

    with channel(url) as said:
        if driver == "asyncpg":
            asyncio.run(act_async())
        else:
            other = create_engine(where)
            with other.begin() as connection:
                act(connection)
            other.dispose()
        told = said()

    assert paused(engine) == {"a": False, "b": True}
    assert [(each["action"], each["queue"]) for each in told] == [
        ("pause", "a"),
        ("pause", "*"),
        ("resume", "a"),
        ("metadata_changed", "a"),
    ]


def test_a_two_phase_transaction_pauses_without_a_word(engine: Engine, url: str) -> None:
    make_queue(engine, "mail")
    with channel(url) as said:
        with Session(engine, twophase=True) as session:
            pause(session, "mail")
            update_queue(session, "mail", metadata={"n": 1})
            session.prepare()
            session.commit()
        told = said()

    assert paused(engine) == {"mail": True}
    assert told == []


def test_a_class_in_a_schema_of_its_own_has_queues_of_its_own(engine: Engine, url: str) -> None:
    class Base(DeclarativeBase):
        pass

    class TheirJob(JobMixin, Base):
        __river_schema__ = "jobs"

    river = River(job_class=TheirJob)
    create_all(engine, "jobs")
    try:
        with channel(url, "jobs") as said, Session(engine) as session:
            river.pause(session, "mail")
            session.commit()
            told = said()
            assert [info.name for info in river.list_queues(session)] == ["mail"]
            assert list_queues(session) == []
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA jobs CASCADE"))

    assert told == [{"action": "pause", "queue": "mail"}]


# ---- beside others


def _says_nothing(*_: object) -> None: ...


@pytest.mark.parametrize("how", ["resumed", "added again"])
def test_what_waited_long_is_found_at_once_though_the_fetch_went_by_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Scans that found little give a bound, behind which the next ones begin for a while."""
    monkeypatch.setattr(bounds, "WASTEFUL", 0.0)
    monkeypatch.setattr(bounds, "LONGEST", 300.0)
    monkeypatch.setattr(bounds.Bounds, "tried", _says_nothing)  # whatever the clock says of this machine
    make_job(engine, due_in=timedelta(minutes=-1))
    delivered: list[JobRow] = []
    with opened(engine) as own, Session(engine) as session:
        fetcher = make_fetcher(own, delivered, poll=300.0)
        pause(session, "default")
        session.commit()
        fetcher.step()
        fetcher.heard("default", pid=1)
        fetcher.step()
        resume(session, "default")
        session.commit()
        fetcher.heard("default", pid=1)
        fetcher.step()
        passed_by = not delivered
        if how == "resumed":
            fetcher.resumed("default")
        else:
            fetcher.resize({"other": 1})
            fetcher.step()
            fetcher.resize({"default": 1, "other": 1})
        fetcher.step()

    assert passed_by
    assert len(delivered) == 1


def test_stars_and_names_at_once_never_deadlock(engine: Engine) -> None:
    names = [f"q{number:02}" for number in range(20)]
    make_queue(engine, *names)
    failed: list[BaseException] = []

    def act(verb: Verb, which: list[str]) -> None:
        try:
            for name in which:
                with Session(engine) as session, session.begin():
                    verb(session, name)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    acts: list[tuple[Verb, list[str]]] = [(pause, ["*"] * 30), (resume, ["*"] * 30), (pause, names), (resume, names)]
    threads = [threading.Thread(target=act, args=each) for each in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert failed == []


@pytest.mark.parametrize("how", ["in advance", "of old"])
def test_a_paused_queue_is_never_cleaned(engine: Engine, how: Literal["in advance", "of old"]) -> None:
    if how == "of old":
        make_queue(engine, "mail")
    make_queue(engine, "idle")
    with Session(engine) as session, session.begin():
        pause(session, "mail")
    with engine.begin() as connection:
        connection.execute(text("UPDATE river_queue SET updated_at = now() - interval '2 years'"))

    with opened(engine) as own:
        Clean().do(own)

    assert paused(engine) == {"mail": True}
