"""Many jobs at once: what COPY must keep of an INSERT's behaviour, whoever's connection it goes by."""

import asyncio
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_river import asyncio as awaited
from sqla_river import enqueue_many
from tests.database import emptied, shared_database
from tests.jobs import Ping
from tests.making import count_states


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
