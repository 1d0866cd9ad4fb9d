"""Transactional jobs and the connections that they need."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import JobContext
from tests.database import emptied, shared_database
from tests.making import Count, all_are, count_states, eventually, make_jobs, read_jobs
from tests.working import errors, handling, put, settled, working


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def test_jobs_wait_for_a_connection_of_a_small_pool_rather_than_fail(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    small = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    running: list[int] = []
    most: list[int] = []

    def writes(_: JobContext[Count], session: Session) -> None:
        running.append(1)
        most.append(len(running))
        session.execute(text("SELECT pg_sleep(0.1)"))
        running.pop()

    put(engine, *range(6))
    with caplog.at_level(logging.WARNING), working(small, handling(writes, transactional=True), 4):
        eventually(all_are(engine, "completed", 6))
    small.dispose()

    assert max(most) == 1
    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    (warning,) = [record.getMessage() for record in caplog.records if "pool" in record.getMessage()]
    assert "4 slots share a pool of 1 connections" in warning
    assert "pool_size=4" in warning


def test_async_jobs_wait_for_a_connection_of_a_small_pool_rather_than_fail(url: str, engine: Engine) -> None:
    small = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)

    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        await session.execute(text("SELECT pg_sleep(0.1)"))

    put(engine, *range(6))
    with working(engine, handling(handler, transactional=True), 6, async_engine=small):
        eventually(all_are(engine, "completed", 6))

    assert {row["attempt"] for row in read_jobs(engine)} == {1}


def test_a_job_that_waits_for_a_connection_when_the_runner_stops_is_given_back(url: str, engine: Engine) -> None:
    small = create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    runs: list[int] = []

    def handler(job: JobContext[Count], _: Session) -> None:
        runs.append(job.id)

    put(engine, 0)
    held = small.connect()
    with working(small, handling(handler, transactional=True), 1):
        eventually(all_are(engine, "running", 1))
    held.close()
    small.dispose()

    (row,) = read_jobs(engine)
    assert (row["state"], row["attempt"], errors(row), runs) == ("available", 0, [], [])


def _refusing(engine: Engine) -> Callable[[], None]:
    """Let *engine* get no connection until what this returns is called."""
    refused = {True}

    @event.listens_for(engine, "do_connect")
    def refuse(*_: Any) -> None:
        if refused:
            raise psycopg.OperationalError("FATAL:  sorry, too many clients already")

    return refused.clear


def _waits(caplog: pytest.LogCaptureFixture) -> bool:
    return "waits for a connection" in caplog.text


def test_jobs_wait_for_a_server_that_takes_no_more_connections_rather_than_fail(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    users = create_engine(url)
    runs: list[int] = []

    def handler(job: JobContext[Count], _: Session) -> None:
        runs.append(job.id)

    with caplog.at_level(logging.WARNING), working(users, handling(handler, transactional=True)) as runner:
        users.dispose()
        allow = _refusing(users)
        ids = put(engine, *range(10), max_attempts=1)
        eventually(lambda: _waits(caplog))
        assert set(count_states(engine)) <= {"available", "running"}
        assert runs == []
        allow()
        eventually(all_are(engine, "completed", 10))
        assert runner.health().alive
    users.dispose()

    assert sorted(runs) == ids


def test_async_jobs_wait_for_a_server_that_takes_no_more_connections_rather_than_fail(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    users = create_async_engine(url)
    allow = _refusing(users.sync_engine)

    async def handler(_: JobContext[Count], session: AsyncSession) -> None:
        await session.execute(text("SELECT 1"))

    make_jobs(engine, 10, max_attempts=1)
    workers = handling(handler, transactional=True)
    with caplog.at_level(logging.WARNING), working(engine, workers, async_engine=users):
        eventually(lambda: _waits(caplog))
        assert set(count_states(engine)) <= {"available", "running"}
        allow()
        eventually(all_are(engine, "completed", 10))


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_job_that_shows_its_progress_completes_at_any_level(url: str, level: str) -> None:
    users = create_engine(url, isolation_level=level)
    shown: list[bool] = []

    def handler(job: JobContext[Count], session: Session) -> None:
        session.execute(text("SELECT 1 FROM river_job"))
        job.progress(1, 2)
        if level == "READ COMMITTED":
            seen = text("SELECT metadata ? 'sqla_river:progress' FROM river_job WHERE id = :id")
            shown.append(eventually(lambda: bool(session.execute(seen, {"id": job.id}).scalar())) is True)

    (job_id,) = put(users, 0)
    with working(users, handling(handler, transactional=True)):
        row = settled(users, job_id)
    users.dispose()

    assert (row["state"], row["attempt"], errors(row)) == ("completed", 1, [])
    assert shown == ([True] if level == "READ COMMITTED" else [])
