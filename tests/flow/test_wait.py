"""Waiting for the end of a job."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqla_river import Job, create_all, enqueue, wait_for
from sqla_river.asyncio import enqueue as enqueue_async
from sqla_river.asyncio import wait_for as wait_for_async
from sqla_river.errors import AsyncSessionError, JobNotFoundError, UncommittedJobError, WaitTimeoutError
from sqla_river.wait import Look, finished_here
from tests.database import emptied, shared_database
from tests.making import Count, Gate, eventually, make_job, read_job
from tests.working import is_state, nothing, put, working

SOON = timedelta(seconds=0.2)
LONG = timedelta(seconds=30)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def by_engine(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    return wait_for(engine, job_id, timeout=timeout)


def by_session(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    with Session(engine) as session:
        return wait_for(session, job_id, timeout=timeout)


def by_connection(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    with engine.connect() as connection:
        return wait_for(connection, job_id, timeout=timeout)


def _awaited(engine: Engine, wait: Callable[[Any], Any]) -> Job:
    async def run() -> Job:
        own = create_async_engine(engine.url)
        try:
            job: Job = await wait(own)
            return job
        finally:
            await own.dispose()

    return asyncio.run(run())


def by_async_engine(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    return _awaited(engine, lambda own: wait_for_async(own, job_id, timeout=timeout))


def by_async_session(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    async def wait(own: Any) -> Job:
        async with AsyncSession(own) as session:
            return await wait_for_async(session, job_id, timeout=timeout)

    return _awaited(engine, wait)


def by_async_connection(engine: Engine, job_id: int, timeout: timedelta) -> Job:
    async def wait(own: Any) -> Job:
        async with own.connect() as connection:
            return await wait_for_async(connection, job_id, timeout=timeout)

    return _awaited(engine, wait)


WAYS = pytest.mark.parametrize(
    "wait", [by_engine, by_session, by_connection, by_async_engine, by_async_session, by_async_connection]
)
Wait = Callable[[Engine, int, timedelta], Job]


@WAYS
@pytest.mark.parametrize("state", ["completed", "cancelled", "discarded"])
def test_a_finished_job_is_returned_as_it_stands(engine: Engine, wait: Wait, state: str) -> None:
    job_id = make_job(engine, state=state, metadata={"output": 7})

    job = wait(engine, job_id, LONG)

    assert (job.id, job.state, job.metadata_) == (job_id, state, {"output": 7})


@WAYS
def test_it_waits_for_the_end_and_not_for_the_start(engine: Engine, wait: Wait) -> None:
    gate = Gate()
    (job_id,) = put(engine, 3)
    ended: list[Job] = []
    with working(engine, gate):
        waiting = threading.Thread(target=lambda: ended.append(wait(engine, job_id, LONG)))
        waiting.start()
        gate.wait(1)
        waiting.join(0.1)
        assert ended == []
        gate.open()
        waiting.join(30)

    assert [(job.state, job.args) for job in ended] == [("completed", {"number": 3})]


@WAYS
def test_a_job_that_does_not_end_in_time_is_reported_and_goes_on(engine: Engine, wait: Wait) -> None:
    job_id = make_job(engine, state="retryable")
    began = time.monotonic()

    with pytest.raises(WaitTimeoutError, match=f"job {job_id} is not finished after 0:00:00.2") as caught:
        wait(engine, job_id, SOON)

    assert isinstance(caught.value, TimeoutError)
    assert time.monotonic() - began >= 0.2
    assert read_job(engine, job_id)["state"] == "retryable"


@WAYS
def test_a_job_that_is_not_there_is_reported(engine: Engine, wait: Wait) -> None:
    with pytest.raises(JobNotFoundError) as caught:
        wait(engine, 4711, LONG)

    assert caught.value.job_id == 4711


@WAYS
def test_a_job_that_is_deleted_meanwhile_is_reported(engine: Engine, wait: Wait) -> None:
    job_id = make_job(engine)
    raised: list[BaseException] = []

    def waits() -> None:
        try:
            wait(engine, job_id, LONG)
        except Exception as error:  # noqa: BLE001 - whatever it is
            raised.append(error)

    waiting = threading.Thread(target=waits)
    waiting.start()
    eventually(lambda: _looked(engine), what="a first look")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM river_job"))
    waiting.join(30)

    assert [type(error) for error in raised] == [JobNotFoundError]


def _looked(engine: Engine) -> bool:
    from sqla_river.wait import _waiting

    return bool(_waiting)


def test_an_uncommitted_job_of_its_own_session_raises_at_once(engine: Engine) -> None:
    with Session(engine) as session:
        job = enqueue(session, Count())
        session.flush()
        with pytest.raises(UncommittedJobError) as caught:
            wait_for(session, job.id, timeout=LONG)
        assert caught.value.job_id == job.id
    with engine.connect() as connection:
        job = enqueue(connection, Count())
        with pytest.raises(UncommittedJobError):
            wait_for(connection, job.id, timeout=LONG)


def test_an_uncommitted_job_of_its_own_async_session_raises_at_once(engine: Engine) -> None:
    async def wait(own: Any) -> Job:
        async with AsyncSession(own) as session:
            job = await enqueue_async(session, Count())
            await session.flush()
            return await wait_for_async(session, job.id, timeout=LONG)

    with pytest.raises(UncommittedJobError):
        _awaited(engine, wait)


def test_a_job_that_this_process_finishes_is_known_without_a_look(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_river.wait.FIRST_LOOK", 60.0)
    monkeypatch.setattr("sqla_river.wait.LONGEST_PAUSE", 60.0)
    for wait in (by_engine, by_async_engine):
        gate = Gate()
        (job_id,) = put(engine, 0)
        ended: list[Any] = []
        with working(engine, gate):
            gate.wait(1)
            waiting = threading.Thread(target=lambda: ended.append(wait(engine, job_id, timedelta(seconds=60))))  # noqa: B023
            waiting.start()
            eventually(lambda: _looked(engine), what="a first look")
            gate.open()
            waiting.join(30)
        assert len(ended) == 1


def test_a_wait_whose_event_loop_is_closed_hurts_no_runner(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    paused = threading.Event()

    def pause(_: Look) -> float:
        paused.set()
        return 60.0

    monkeypatch.setattr(Look, "pause", pause)
    (waited_for,) = put(engine, 1)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _loop, _what: None)  # of a wait that is meant never to end
    own = create_async_engine(engine.url)
    waiting = loop.create_task(wait_for_async(own, waited_for))
    while not paused.is_set():
        loop.run_until_complete(asyncio.sleep(0.005))
    loop.run_until_complete(own.dispose())
    loop.close()
    with working(engine, nothing) as runner:
        eventually(is_state(engine, waited_for, "completed"))
        (other,) = put(engine, 2)
        eventually(is_state(engine, other, "completed"))
        assert runner.health().ready
    waiting.get_coro().close()


def test_one_that_cannot_be_told_keeps_no_other_from_hearing() -> None:
    heard = threading.Event()

    def fails() -> None:
        raise ValueError

    with Look(1, None, fails), Look(1, None, heard.set):
        finished_here([1])

    assert heard.is_set()


def test_a_wait_may_end_in_the_thread_that_tells_another() -> None:
    """As the garbage collector ends one whose loop is gone: anywhere, so also between two of its steps."""
    heard = threading.Event()
    abandoned = Look(1, None, lambda: None)

    def ids() -> Iterator[int]:
        abandoned.__exit__()
        yield 2

    def tells() -> None:
        abandoned.__enter__()
        with Look(2, None, heard.set):
            finished_here(ids())

    threading.Thread(target=tells, daemon=True).start()

    assert heard.wait(30)


@pytest.mark.parametrize("mapped", ["engine", "connection"])
def test_a_connection_with_a_map_waits_for_the_job_of_its_schema(empty_url: str, mapped: str) -> None:
    plain = create_engine(empty_url)
    create_all(plain)
    create_all(plain, "jobs")
    options: Any = {"schema_translate_map": {None: "jobs"}}
    own = plain.execution_options(**options) if mapped == "engine" else plain
    with own.connect() as connection:
        if mapped == "connection":
            connection.execution_options(**options)
        job = enqueue(connection, Count(7))
        connection.execute(text("UPDATE jobs.river_job SET state = 'completed', finalized_at = now()"))
        connection.commit()
        assert wait_for(connection, job.id, timeout=LONG).args == {"number": 7}

    async def run() -> Job:
        engine = create_async_engine(empty_url)
        async with engine.connect() as found:
            mapped_too = await found.execution_options(**options)
            waited = await wait_for_async(mapped_too, job.id, timeout=LONG)
        await engine.dispose()
        return waited

    assert asyncio.run(run()).args == {"number": 7}
    plain.dispose()


def test_a_plain_wait_refuses_an_async_session(engine: Engine) -> None:
    with pytest.raises(AsyncSessionError):
        wait_for(AsyncSession(create_async_engine(engine.url)), 1)  # type: ignore[arg-type]


def test_a_wait_leaves_nothing_behind(engine: Engine) -> None:
    own = create_engine(engine.url)
    with pytest.raises(WaitTimeoutError):
        wait_for(own, make_job(engine), timeout=SOON)

    assert not _looked(engine)
    assert own.pool.checkedout() == 0  # type: ignore[attr-defined]
    own.dispose()
