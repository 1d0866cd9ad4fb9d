"""Many jobs at once: what COPY must keep of an INSERT's behaviour, whoever's connection it goes by."""

import asyncio
from collections.abc import Iterator

import attrs
import pytest
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from sqla_river import InsertOptions, Unique, create_all, enqueue, enqueue_many
from sqla_river import asyncio as awaited
from tests.database import emptied, shared_database
from tests.jobs import Ping
from tests.making import Greet, count_states


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
