"""Many jobs at once: what COPY must keep of an INSERT's behaviour, whoever's connection it goes by."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar, Final, NamedTuple

import attrs
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from sqla_river import InsertOptions, Unique, create_all, enqueue, enqueue_many, insert
from sqla_river import asyncio as awaited
from sqla_river.rows import InsertRow
from tests.database import emptied, shared_database
from tests.hearing import river_with
from tests.jobs import Ping
from tests.making import Greet, count_states, read_jobs


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


# ---- the caller's transaction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_the_first_that_a_connection_does_is_in_its_transaction(engine: Engine, end: str) -> None:
    with engine.connect() as connection:
        enqueue_many(connection, [Ping(1)])
        assert connection.in_transaction()
        getattr(connection, end)()

    assert count_states(engine) == ({"available": 1} if end == "commit" else {})


def test_the_first_that_an_async_connection_does_is_in_its_transaction(url: str, engine: Engine) -> None:
    async def go() -> None:
        other = create_async_engine(url)
        async with other.connect() as connection:
            await awaited.enqueue_many(connection, [Ping(1)])
            await connection.commit()
        await other.dispose()

    asyncio.run(go())

    assert count_states(engine) == {"available": 1}


def test_after_the_first_no_other_transaction_can_be_begun(engine: Engine) -> None:
    with engine.connect() as connection:
        enqueue_many(connection, [Ping(1)])
        with pytest.raises(InvalidRequestError):
            connection.begin()


# ---- text ------------------------------------------------------------------------------------------------------------


TEXTS = ["é", "€ 日本", "a 🙂 \\u00e9 \\", "plain"]


def _put_all_ways(engine: Engine, words: list[str]) -> None:
    with Session(engine) as session, session.begin():
        for word in words:
            said = InsertOptions(metadata={"a": word}, tags=["x"])
            enqueue(session, Greet(word), metadata={"a": word}, tags=["x"])
            session.flush()
            enqueue_many(session, [(Greet(word), said)])
            enqueue_many(session, [(Greet(word), said)], returning=True)
            enqueue_many(session, [(Greet(word), attrs.evolve(said, unique=Unique(key=word)))])


def _texts(engine: Engine) -> list[tuple[str, str]]:
    """Args and metadata as the server has them; psycopg reads JSON as UTF-8, whatever its connection speaks."""
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT args ->> 'name', metadata ->> 'a' FROM river_job ORDER BY id"))
        return [(name, said) for name, said in rows]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "UTF8"])
def test_text_is_stored_as_it_is_whatever_the_client_encoding(
    url: str, engine: Engine, driver: str, encoding: str
) -> None:
    other = create_engine(
        make_url(url).set(drivername=f"postgresql+{driver}"), connect_args={"client_encoding": encoding}
    )
    _put_all_ways(other, TEXTS)
    other.dispose()

    assert _texts(engine) == [(word, word) for word in TEXTS for _ in range(4)]


def test_text_is_stored_as_it_is_in_a_database_of_another_encoding(server: str) -> None:
    """There a client speaks the encoding of the database, unless it says otherwise."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(
            text("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        )
    latin = create_engine(make_url(server).set(database="latin"))
    create_all(latin)
    _put_all_ways(latin, ["é"])
    found = _texts(latin)
    latin.dispose()
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE latin WITH (FORCE)"))
    admin.dispose()

    assert found == [("é", "é")] * 4


# ---- what is put in --------------------------------------------------------------------------------------------------


class Marking:
    """Middleware that hands on tags as a list."""

    def insert(self, rows: Sequence[InsertRow], call_next: Any) -> Sequence[InsertRow]:
        marked: Sequence[InsertRow] = call_next([row._replace(tags=[*row.tags, "marked"]) for row in rows])
        return marked


class Pair(NamedTuple):
    """Args of two fields that are a tuple as well."""

    a: int
    b: int


Pair.kind = "pair"  # type: ignore[attr-defined]


class PairCodec:
    def encode(self, args: Any) -> bytes:
        return json.dumps(args._asdict()).encode()

    def decode(self, args_type: Any, raw: Any) -> Any:
        return args_type(**json.loads(raw))


def test_tags_that_middleware_makes_a_list_of_are_stored(engine: Engine) -> None:
    river = river_with(middleware=[Marking()])
    with Session(engine) as session, session.begin():
        river.enqueue_many(session, [Ping(1), (Ping(2), InsertOptions(tags=["a"])), Ping(3)])

    assert [row["tags"] for row in read_jobs(engine)] == [["marked"], ["a", "marked"], ["marked"]]


def test_args_that_are_a_tuple_of_two_are_no_args_with_options(engine: Engine) -> None:
    river = river_with(codec=PairCodec())
    pair: Any = Pair(1, 2)
    with Session(engine) as session, session.begin():
        river.enqueue_many(session, [pair, (pair, InsertOptions(queue="other"))])

    assert [(row["args"], row["queue"]) for row in read_jobs(engine)] == [
        ({"a": 1, "b": 2}, "default"),
        ({"a": 1, "b": 2}, "other"),
    ]


@attrs.frozen
class Said:
    """Whatever the caller's context says."""

    kind: ClassVar[str] = "said"


class SaidCodec:
    """A codec that goes by what a ContextVar of the caller's holds."""

    def encode(self, args: object) -> bytes:
        return json.dumps({"said": SAID.get()}).encode()

    def decode(self, args_type: type[Any], text: str) -> Any:
        raise NotImplementedError


SAID: Final = ContextVar[str]("SAID")


@pytest.mark.parametrize("kind", [list, iter])
def test_all_blocks_are_encoded_in_the_context_of_the_caller(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: Callable[[list[Said]], Any]
) -> None:
    monkeypatch.setattr(insert, "BLOCK_ROWS", 3)
    token = SAID.set("here")
    with Session(engine) as session, session.begin():
        river_with(codec=SaidCodec()).enqueue_many(session, kind([Said()] * 8))
    SAID.reset(token)

    assert [row["args"] for row in read_jobs(engine)] == [{"said": "here"}] * 8


@pytest.mark.parametrize("options", [{"metadata": {"note": "x" * 2**20}}, {"tags": ["x" * 255] * 4_200}], ids=list)
def test_a_block_is_bounded_by_all_that_is_sent(engine: Engine, options: dict[str, Any]) -> None:
    def items(session: Session) -> Iterator[tuple[Ping, InsertOptions]]:
        for n in range(12):
            stored.append(session.execute(text("SELECT count(*) FROM river_job")).scalar_one())
            yield Ping(n), InsertOptions(**options)

    stored: list[int] = []
    with Session(engine) as session:
        assert enqueue_many(session, items(session)).count == 12

    assert stored == [0] * 8 + [8] * 4


# ---- connections that are lost ---------------------------------------------------------------------------------------


def test_a_server_that_ended_all_connections_fails_one_call(engine: Engine, url: str) -> None:
    other = create_engine(url)
    connections = [other.connect() for _ in range(3)]
    pids = [each.execute(text("SELECT pg_backend_pid()")).scalar_one() for each in connections]
    for each in connections:
        each.close()
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_terminate_backend(pid, 10000) FROM unnest(:pids) pid"), {"pids": pids})

    with Session(other) as session, pytest.raises(DBAPIError) as failed:
        enqueue_many(session, [Ping(0)])
    with Session(other) as session, session.begin():
        enqueue_many(session, [Ping(1)])
    other.dispose()

    assert failed.value.connection_invalidated
    assert [row["args"]["n"] for row in read_jobs(engine)] == [1]


# ---- the thread that encodes ahead -----------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that are started from here on; three rows are a block."""
    names: list[str] = []
    start = threading.Thread.start

    def noting(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noting)
    monkeypatch.setattr(insert, "BLOCK_ROWS", 3)
    return names


@pytest.mark.parametrize(("jobs", "threads"), [(0, 0), (1, 0), (3, 0), (4, 1), (9, 1)])
def test_a_thread_is_made_only_where_there_is_a_second_block(
    engine: Engine, started: list[str], jobs: int, threads: int
) -> None:
    with Session(engine) as session, session.begin():
        enqueue_many(session, [Ping(n) for n in range(jobs)])

    assert [row["args"]["n"] for row in read_jobs(engine)] == list(range(jobs))
    assert len(started) == threads


@pytest.mark.parametrize("jobs", [1, 3, 4, 9])
def test_many_need_no_thread_where_none_can_be_made(engine: Engine, monkeypatch: pytest.MonkeyPatch, jobs: int) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(insert, "BLOCK_ROWS", 3)
    with Session(engine) as session, session.begin():
        enqueue_many(session, [Ping(n) for n in range(jobs)])

    assert [row["args"]["n"] for row in read_jobs(engine)] == list(range(jobs))


def test_many_can_be_put_in_while_the_program_ends(url: str, engine: Engine) -> None:
    program = f"""
import atexit, sys
sys.path[:0] = {sys.path!r}
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from sqla_river import enqueue_many, insert
from tests.hearing import river_with
from tests.jobs import Ping

engine = create_engine({url!r})
insert.BLOCK_ROWS = 3

def last() -> None:
    with Session(engine) as session, session.begin():
        enqueue_many(session, [Ping(n) for n in range(4)])

atexit.register(last)
"""
    subprocess.run([sys.executable, "-c", program], check=True)

    assert count_states(engine) == {"available": 4}
