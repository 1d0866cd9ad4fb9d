# pyright: basic, reportMissingImports=false
"""Procrastinate on psycopg, its sync connector to put jobs in, its worker with 10 jobs at a time.

More than about 10 made it slower here.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress

import procrastinate
import psycopg

from tests.bench.peers.face import Asked, AsyncPeer, Marks

CONCURRENCY = 10
UNFINISHED = "SELECT EXISTS (SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing'))"


class Procrastinate(AsyncPeer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=asked.url))
        self._app.open()
        self._noop = self._app.task(name="noop")(noop)
        self._connection = psycopg.connect(asked.url, autocommit=True)

    def prepare(self) -> None:
        self._app.schema_manager.apply_schema()

    def fill(self, numbers: Sequence[int]) -> None:
        self._noop.batch_defer(*[{"num": number, "t": 0} for number in numbers])

    def put(self, number: int) -> None:
        self._noop.defer(num=number, t=0)

    @asynccontextmanager
    async def serving(self, marks: Marks) -> AsyncGenerator[None]:
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self.asked.url))

        @app.task(name="noop")
        async def noop(num: int, t: int) -> None:
            marks.note()

        async with app.open_async():
            worker = asyncio.create_task(app.run_worker_async(concurrency=CONCURRENCY, install_signal_handlers=False))
            yield
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker

    def unfinished(self) -> bool:
        return self._connection.execute(UNFINISHED).fetchone() == (True,)

    def close(self) -> None:
        self._connection.close()
        self._app.close()
        super().close()


def noop(num: int, t: int) -> None:
    """Is known here by its name only; the worker's own is an async function."""


PEER = Procrastinate
