"""ASGI: a runner inside a FastAPI, Starlette, Litestar or other application on asyncio.

`lifespan` is what these frameworks take as such; `running` is for a lifespan of one's own, or any other coroutine::

    app = FastAPI(lifespan=lifespan(runner))
    app = Litestar(lifespan=[lifespan(runner)])


    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        async with running(runner):
            yield
        await engine.dispose()

Signals stay the server's: it ends the lifespan when it is told to stop. A server with several workers has a runner in
each. In a request, enqueue with ``sqla_river.asyncio`` on its AsyncSession. The runner's own SQL, and plain handlers,
stay in threads of their own; ``async def`` handlers have an event loop of their own, never the server's.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from threading import Thread

from sqla_river.runner import Runner

try:
    from anyio import CancelScope
except ModuleNotFoundError as error:
    if error.name != "anyio":
        raise
    raise ImportError("sqla_river.ext.asgi needs anyio; run pip install 'sqla-river[asgi]'", name="anyio") from error


def lifespan(runner: Runner) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """The lifespan of an application whose process works jobs: *runner* runs between its startup and its shutdown.

    An application whose tables are missing does not start: see `Runner.start`.
    """

    @asynccontextmanager
    async def around(_app: object) -> AsyncGenerator[None]:
        async with running(runner):
            yield

    return around


@asynccontextmanager
async def running(runner: Runner) -> AsyncGenerator[Runner]:
    """*runner*, started, until the block ends; the event loop goes on while it starts (at most 10 s) and stops.

    It stops as by `Runner.stop`: within ``stop_timeout`` + 6 s, however the block was left, and before anything that
    follows. A cancellation is kept until it has stopped; each one that comes while it starts or stops hurries it one
    step on, as a further call of `Runner.stop` would.

    Raises:
        SchemaError, RunnerError, ConfigError: as `Runner.start`.
    """
    try:
        await _in_thread(runner.start, runner.stop)
    except asyncio.CancelledError:
        await _in_thread(runner.stop, runner.stop)
        raise
    try:
        yield runner
    finally:
        await _in_thread(runner.stop, runner.stop)


async def _in_thread(call: Callable[[], object], hurry: Callable[[], object]) -> None:
    """Run *call* in a thread, and wait for its end whatever cancels this task: each time *hurry* is called beside it.

    The threads are made for it: a pool that is busy with requests would hold up a stop.
    """
    with CancelScope(shield=True):  # anyio would cancel again and again, until this task gives in
        threads = [_thread(call)]
        cancelled: asyncio.CancelledError | None = None
        while waiting := [thread for thread in threads if not thread.done()]:
            try:
                await asyncio.wait(waiting)
            except asyncio.CancelledError as error:
                cancelled = error
                threads.append(_thread(hurry))
        for thread in threads:
            thread.result()
        if cancelled is not None:
            raise cancelled


def _thread(call: Callable[[], object]) -> "asyncio.Future[None]":
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            call()
        except BaseException as raised:  # noqa: BLE001 - it is raised where it is waited for
            error = raised
        with suppress(RuntimeError):  # the event loop is closed: a program that was made to end at once
            loop.call_soon_threadsafe(settle, error)

    Thread(target=run, name="sqla_river-asgi").start()
    return done
