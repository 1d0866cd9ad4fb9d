"""ASGI: a runner in the lifespan of an application, and what cancels it."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from litestar import Litestar
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.applications import Starlette

from sqla_river import Runner
from sqla_river.asyncio import enqueue, wait_for
from sqla_river.errors import RunnerError
from sqla_river.ext.asgi import lifespan, running
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually
from tests.working import SLOW_POLL, handling, nothing, put

SOON = timedelta(seconds=60)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    yield from emptied(url)


def made(engine: Engine, handler: Callable[..., Any] = nothing, **settings: Any) -> Runner:
    return Runner(engine, handling(handler), queues={"default": 2}, poll=SLOW_POLL, **settings)


async def served(app: Any, work: Callable[[], Any]) -> list[str]:
    """What *app* says of its lifespan, as a server drives it; *work* is done in between."""
    said: list[str] = []
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    told = asyncio.Event()

    async def send(message: dict[str, Any]) -> None:
        said.append(message["type"])
        told.set()

    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    serving = asyncio.create_task(app(scope, heard.get, send))
    heard.put_nowait({"type": "lifespan.startup"})
    await told.wait()
    if said == ["lifespan.startup.complete"]:
        await work()
        heard.put_nowait({"type": "lifespan.shutdown"})
    await asyncio.wait([serving])
    return said


Lifespan = Callable[[object], AbstractAsyncContextManager[None]]
APPLICATIONS: dict[str, Callable[[Lifespan], Any]] = {
    "fastapi": lambda around: FastAPI(lifespan=around),
    "starlette": lambda around: Starlette(lifespan=around),
    "litestar": lambda around: Litestar(lifespan=[around]),
}


@pytest.mark.parametrize("make", APPLICATIONS.values(), ids=APPLICATIONS)
def test_jobs_of_requests_are_worked_between_startup_and_shutdown(engine: Engine, url: str, make: Any) -> None:
    """Twice: an application may be started again."""
    runner = made(engine)
    app = make(lifespan(runner))

    async def work() -> None:
        assert runner.id is not None
        async_engine = create_async_engine(url)
        async with AsyncSession(async_engine, expire_on_commit=False) as session, session.begin():
            job = await enqueue(session, Count(1))
        assert (await wait_for(async_engine, job.id, timeout=SOON)).state == "completed"
        await async_engine.dispose()

    for _ in range(2):
        assert asyncio.run(served(app, work)) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert runner.id is None


def test_a_lifespan_of_ones_own_may_hold_the_runner(engine: Engine) -> None:
    runner = made(engine)
    order: list[str | None] = []

    @asynccontextmanager
    async def own(_: FastAPI) -> AsyncGenerator[None]:
        async with running(runner) as started:
            assert started is runner
            yield
        order.append(runner.id)

    async def work() -> None:
        order.append(runner.id)

    assert asyncio.run(served(FastAPI(lifespan=own), work)) == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert order[0] is not None
    assert order[1] is None


def test_an_application_whose_tables_are_missing_does_not_start(empty_url: str) -> None:
    engine = create_engine(empty_url)

    async def never() -> None:
        raise AssertionError

    assert asyncio.run(served(Starlette(lifespan=lifespan(made(engine))), never)) == ["lifespan.startup.failed"]
    engine.dispose()


def test_a_runner_that_runs_already_is_refused_and_goes_on(engine: Engine) -> None:
    async def go(runner: Runner) -> None:
        async with running(runner):
            raise AssertionError

    with made(engine) as runner:
        with pytest.raises(RunnerError, match="runs already"):
            asyncio.run(go(runner))
        assert runner.id is not None


def test_a_stop_waits_for_running_jobs_and_the_event_loop_goes_on(engine: Engine) -> None:
    gate = Gate()
    runner = made(engine, gate)

    async def go() -> None:
        async with running(runner):
            put(engine, 1)
            await asyncio.to_thread(gate.wait)
            asyncio.get_running_loop().call_later(0.1, gate.open)  # which only a loop that goes on will do

    asyncio.run(go())
    assert gate.reasons == []
    assert count_states(engine) == {"completed": 1}


def test_cancelling_once_lets_running_jobs_finish(engine: Engine) -> None:
    """It counts as leaving the block; the cancellation comes out when the runner has stopped."""
    gate = Gate()
    runner = made(engine, gate)

    async def block() -> None:
        async with running(runner):
            put(engine, 1)
            await asyncio.Event().wait()

    async def go() -> None:
        task = asyncio.create_task(block())
        await asyncio.to_thread(gate.wait)
        task.cancel()
        await asyncio.sleep(0)
        gate.open()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(go())
    assert runner.id is None
    assert count_states(engine) == {"completed": 1}
    assert gate.reasons == []


def test_cancelling_again_hurries_the_stop(engine: Engine) -> None:
    gate = Gate()
    runner = made(engine, gate, stop_timeout=timedelta(hours=1))

    async def block() -> None:
        async with running(runner):
            put(engine, 1)
            await asyncio.Event().wait()

    async def go() -> None:
        task = asyncio.create_task(block())
        await asyncio.to_thread(gate.wait)
        for _ in range(600):
            task.cancel()
            if (await asyncio.wait([task], timeout=0.05))[0]:
                break
        reasons = gate.reasons[:]
        gate.open()
        await asyncio.wait([task])
        assert task.cancelled()
        assert reasons == ["stop"]

    asyncio.run(go())
    assert count_states(engine) == {"available": 1}


def test_a_cancellation_during_the_start_leaves_nothing_running(engine: Engine) -> None:
    """Also where it comes so early that there is nothing to hurry yet."""
    starting, hurried = threading.Event(), threading.Event()

    class Late(Runner):
        def start(self) -> None:
            starting.set()
            assert hurried.wait(60)
            super().start()

        def stop(self, timeout: timedelta | None = None) -> None:
            super().stop(timeout)
            hurried.set()

    runner = Late(engine, handling(nothing), queues={"default": 1})

    async def block() -> None:
        async with running(runner):
            raise AssertionError

    async def go() -> None:
        task = asyncio.create_task(block())
        await asyncio.to_thread(starting.wait)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(go())
    assert runner.id is None
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "sqla_river-asgi"])


def test_a_scope_of_anyio_that_is_cancelled_waits_for_the_stop_without_hurrying_it(engine: Engine) -> None:
    """Such a scope cancels again on each turn of the event loop."""
    gate = Gate()
    runner = made(engine, gate)

    async def go() -> None:
        with anyio.CancelScope() as scope:
            async with running(runner):
                put(engine, 1)
                await asyncio.to_thread(gate.wait)
                asyncio.get_running_loop().call_later(0.1, gate.open)
                scope.cancel()
                await asyncio.Event().wait()

    asyncio.run(go())
    assert gate.reasons == []
    assert count_states(engine) == {"completed": 1}
