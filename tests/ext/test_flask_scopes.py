"""FlaskRiver(session=...): each job has a session of its own, also where the app's go by thread."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from flask import Flask, current_app
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqla_river import Job, JobContext, enqueue
from sqla_river.ext.flask import FlaskRiver
from sqla_river.testing import drain
from tests.database import emptied, shared_database
from tests.making import Count, Greet, all_are, eventually
from tests.working import after, is_state, put, settled

LATER = after(timedelta(hours=1))


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


@pytest.fixture
def app() -> Flask:
    return Flask("plain")


def greet(engine: Engine) -> int:
    with Session(engine) as session, session.begin():
        job = enqueue(session, Greet())
        session.flush()
        return job.id


def priority(engine: Engine, job_id: int) -> int:
    with Session(engine) as session:
        return session.get_one(Job, job_id).priority


def everywhere() -> str:
    return "the one scope there is"


@pytest.mark.parametrize("scope", [None, threading.get_ident, everywhere])
def test_the_end_of_an_async_job_leaves_the_work_of_another_alone(
    app: Flask, engine: Engine, scope: Callable[[], Any] | None
) -> None:
    scoped = scoped_session(sessionmaker(engine), scopefunc=scope)
    river = FlaskRiver(app, session=scoped)
    (row,) = put(engine, 0, scheduled_at=timedelta(hours=1))
    seen: list[Any] = []

    @river.workers.register(Count)
    async def slow(job: JobContext[Count]) -> None:
        session = scoped()
        scoped.get_one(Job, row).priority = 4
        scoped.flush()
        await asyncio.to_thread(eventually, is_state(engine, greet(engine), "completed"))
        seen.append(scoped() is session)
        scoped.commit()

    @river.workers.register(Greet)
    async def quick(job: JobContext[Greet]) -> None:
        seen.append(scoped.registry.has())
        scoped()

    (job_id,) = put(engine, 1)
    with river.runner():
        settled(engine, job_id)

    assert seen == [False, True]
    assert priority(engine, row) == 4
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("colour", ["plain", "async"])
def test_the_error_handler_leaves_its_session_to_nobody(app: Flask, engine: Engine, colour: str) -> None:
    scoped = scoped_session(sessionmaker(engine))
    seen: list[Any] = []

    def on_error(job: JobContext[Any], error: BaseException) -> None:
        seen.append((current_app.name, scoped.registry.has()))
        scoped.execute(text("SELECT 1"))

    def fails(job: JobContext[Count]) -> None:
        raise ValueError

    async def fails_later(job: JobContext[Count]) -> None:
        raise ValueError

    app.config["SQLA_RIVER_ON_ERROR"] = on_error
    river = FlaskRiver(app, session=scoped, queues={"default": 1})
    if colour == "plain":
        river.workers.register(Count, retry=LATER)(fails)
    else:
        river.workers.register(Count, retry=LATER)(fails_later)
    put(engine, 1, 2)
    with river.runner():
        eventually(all_are(engine, "retryable", 2))

        assert seen == [("plain", False)] * 2
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_what_a_retry_policy_opens_is_closed_with_the_next_job(app: Flask, engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    river = FlaskRiver(app, session=scoped, queues={"default": 1})
    seen: list[Any] = []

    def asks(job: JobContext[Any]) -> timedelta:
        scoped.execute(text("SELECT 1"))
        return timedelta(hours=1)

    @river.workers.register(Count, retry=asks)
    def count(job: JobContext[Count]) -> None:
        seen.append(scoped.registry.has())
        if job.args.number == 1:
            raise ValueError

    (first,) = put(engine, 1)
    with river.runner():
        settled(engine, first)
        (second,) = put(engine, 2)
        settled(engine, second)

    assert seen == [False, False]
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_a_thread_that_a_handler_makes_has_another_session(app: Flask, engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    river = FlaskRiver(app, session=scoped)
    seen: list[Any] = []

    @river.workers.register(Count)
    async def count(job: JobContext[Count]) -> None:
        here = scoped()
        seen.append(await asyncio.to_thread(scoped) is here)

    (job_id,) = put(engine, 1)
    with river.runner():
        settled(engine, job_id)

    assert seen == [False]


def test_the_sessions_of_requests_go_on_by_thread(app: Flask, engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))
    river = FlaskRiver(app, session=scoped)
    before = scoped()
    river.runner()
    river.runner()
    there: list[Any] = []
    thread = threading.Thread(target=lambda: there.append(scoped()))
    thread.start()
    thread.join()

    assert scoped() is before
    assert there[0] is not before
    scoped.remove()
    assert scoped() is not before


def test_draining_keeps_the_session_of_the_test_when_the_error_handler_is_asked(app: Flask, engine: Engine) -> None:
    scoped = scoped_session(sessionmaker(engine))

    def on_error(job: JobContext[Any], error: BaseException) -> None:
        scoped.execute(text("SELECT 1"))

    app.config["SQLA_RIVER_ON_ERROR"] = on_error
    river = FlaskRiver(app, session=scoped)

    @river.workers.register(Count)
    def fails(job: JobContext[Count]) -> None:
        raise ValueError

    river.enqueue(Count(1))
    (done,) = drain(scoped, river.runner())

    assert done.state == "retryable"
    assert [job.kind for job in scoped.query(Job)] == ["count"]
    scoped.remove()
