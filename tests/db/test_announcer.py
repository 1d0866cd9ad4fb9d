"""The announcer of ``notify="after_commit"``: it harms no commit, and is heard whatever the engine and the program."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import River, create_all, notify
from sqla_river import asyncio as awaited
from tests.database import emptied, shared_database
from tests.hearing import DEFAULT, SMS, Ear, river_with, until
from tests.jobs import Ping, SendSMS
from tests.making import count_states

MISSED = "could not announce queues ['default']; runners find the jobs at their next poll"


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture(autouse=True)
def _announcers_that_end_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(notify, "_IDLE", 0.1)
    yield
    until(lambda: not notify._announcers)


@pytest.fixture
def ear(url: str, engine: Engine) -> Iterator[Ear]:
    ear = Ear(url)
    yield ear
    ear.connection.close()


@pytest.fixture(scope="module")
def after() -> River[Any]:
    return river_with(notify="after_commit")


# ---- without a thread ------------------------------------------------------------------------------------------------


def test_where_no_thread_can_be_made_commits_go_on_and_a_later_one_is_announced(
    engine: Engine, ear: Ear, after: River[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as scarcity:
        scarcity.setattr(threading.Thread, "start", refuse)
        for n in range(2):
            with Session(engine) as session, session.begin():
                after.enqueue(session, Ping(n))
    assert count_states(engine) == {"available": 2}
    assert [record.message for record in caplog.records] == [f"{MISSED}: RuntimeError: can't start new thread"]

    with Session(engine) as session, session.begin():
        after.enqueue(session, SendSMS("a"))
    assert ear.next() == SMS


def test_an_announcer_that_breaks_is_followed_by_another(
    engine: Engine, ear: Ear, after: River[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Engine) -> Any:
        raise LookupError("no such pool")

    with monkeypatch.context() as broken:
        broken.setattr(notify, "_connection_like", refuse)
        with Session(engine) as session, session.begin():
            after.enqueue(session, Ping(1))
        until(lambda: not notify._announcers)
    until(lambda: bool(caplog.records))
    assert [record.message for record in caplog.records] == [f"{MISSED}: LookupError: no such pool"]

    with Session(engine) as session, session.begin():
        after.enqueue(session, SendSMS("a"))
    assert ear.next() == SMS


# ---- the end of the program ------------------------------------------------------------------------------------------


_PROGRAM = """
import asyncio, os, sys, time
sys.path[:0] = {path!r}
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqla_river import River, notify
from sqla_river.asyncio import awaited
from tests.jobs import Ping

river = River(notify="after_commit")
engine = create_engine({url!r})

def put():
    with Session(engine) as session, session.begin():
        river.enqueue(session, Ping(1))

async def put_async():
    async with AsyncSession(create_async_engine({url!r})) as session, session.begin():
        await awaited(river.enqueue)(session, Ping(1))

{rest}
"""


def _ran(url: str, rest: str) -> str:
    program = _PROGRAM.format(path=sys.path, url=url, rest=rest)
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("rest", ["put()", "asyncio.run(put_async())", "import atexit; atexit.register(put)"])
def test_a_short_program_is_heard_before_it_ends(url: str, engine: Engine, ear: Ear, rest: str) -> None:
    _ran(url, rest)

    assert ear.heard() == [DEFAULT]


def test_a_program_that_ends_waits_a_second_at_most(url: str, engine: Engine) -> None:
    took = _ran(
        url,
        """
import atexit
atexit.unregister(notify._drain)
def timed():
    begun = time.monotonic()
    notify._drain()
    print(time.monotonic() - begun)
atexit.register(timed)
notify._connection_like = lambda engine: time.sleep(60)
put()
""",
    )

    assert 0.5 < float(took) < 5


def test_a_forked_child_does_not_wait_for_the_announcers_of_its_parent(url: str, engine: Engine, ear: Ear) -> None:
    took = _ran(
        url,
        """
notify._connection_like = lambda engine: time.sleep(60)
notify._LAST_WORDS = 30
put()
child = os.fork()
begun = time.monotonic()
if child:
    os.waitpid(child, 0)
    print(time.monotonic() - begun, flush=True)
    os._exit(0)
""",
    )

    assert float(took) < 10


# ---- async engines ---------------------------------------------------------------------------------------------------


def _committed(after: River[Any], url: Any, **words: Any) -> None:
    async def go() -> None:
        engine = create_async_engine(url, **words)
        async with AsyncSession(engine) as session, session.begin():
            await awaited.awaited(after.enqueue)(session, Ping(1))
        await engine.dispose()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("psycopg", {"options": "-c search_path=jobs"}),
        ("asyncpg", {"server_settings": {"search_path": "jobs"}, "ssl": False}),
    ],
)
def test_the_announcer_of_an_async_engine_connects_as_that_does(
    empty_url: str, after: River[Any], driver: str, words: dict[str, Any]
) -> None:
    plain = create_engine(empty_url)
    create_all(plain, "jobs")
    plain.dispose()
    ear = Ear(empty_url, "jobs.river_insert")
    _committed(after, make_url(empty_url).set(drivername=f"postgresql+{driver}"), connect_args=words)

    assert ear.next() == DEFAULT
    ear.connection.close()


def test_what_only_asyncpg_knows_may_stand_in_the_url(url: str, ear: Ear, after: River[Any]) -> None:
    asyncpg = make_url(url).set(drivername="postgresql+asyncpg").update_query_dict({"ssl": "disable"})
    _committed(after, asyncpg)

    assert ear.next() == DEFAULT


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
def test_an_async_announcer_whose_connection_breaks_takes_another(
    url: str,
    engine: Engine,
    ear: Ear,
    after: River[Any],
    driver: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notify, "_IDLE", 60.0)  # it does not go by itself before it is killed

    async def go() -> None:
        other = create_async_engine(
            make_url(url).set(drivername=f"postgresql+{driver}"), connect_args=_named(driver, "to_be_killed")
        )
        async with AsyncSession(other) as session:
            await awaited.awaited(after.enqueue)(session, Ping(1))
            await session.commit()
            assert await asyncio.to_thread(ear.next) == DEFAULT
            mine = await session.scalar(text("SELECT pg_backend_pid()"))
            killed = text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'to_be_killed' AND pid <> :mine"
            )
            assert (await session.scalars(killed, {"mine": mine})).all() == [True]
            monkeypatch.setattr(notify, "_IDLE", 0.1)
            await session.commit()
            await awaited.awaited(after.enqueue)(session, Ping(2))
            await session.commit()
            await awaited.awaited(after.enqueue)(session, SendSMS("a"))
            await asyncio.to_thread(until, lambda: any("next poll" in record.message for record in caplog.records))
            await session.commit()
        await other.dispose()

    asyncio.run(go())

    assert ear.next() == SMS


def _named(driver: str, name: str) -> dict[str, Any]:
    return {"application_name": name} if driver == "psycopg" else {"server_settings": {"application_name": name}}
