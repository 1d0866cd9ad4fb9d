# pyright: basic, reportMissingImports=false
"""PgQueuer on asyncpg and uvloop, as its own command runs it, with batches of 100: its default of 10 is slower."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from tests.bench.peers.face import SLOTS, Asked, AsyncPeer, Marks

UNFINISHED = "SELECT EXISTS (SELECT FROM pgqueuer)"


class OnPgQueuer(AsyncPeer):
    new_loop = staticmethod(uvloop.new_event_loop)

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._connection = self.run(asyncpg.connect(asked.url))
        self._queries = Queries(AsyncpgDriver(self._connection))

    def prepare(self) -> None:
        self.run(self._queries.install())

    def fill(self, numbers: Sequence[int]) -> None:
        count = len(numbers)
        self.run(self._queries.enqueue(["noop"] * count, [_payload(number) for number in numbers], [0] * count))

    def put(self, number: int) -> None:
        self.run(self._queries.enqueue("noop", _payload(number)))

    @asynccontextmanager
    async def serving(self, marks: Marks) -> AsyncGenerator[None]:
        connection = await asyncpg.connect(self.asked.url)
        pgqueuer = PgQueuer(AsyncpgDriver(connection))

        @pgqueuer.entrypoint("noop")
        async def noop(job: Job) -> None:
            json.loads(job.payload or b"")
            marks.note()

        worker = asyncio.create_task(pgqueuer.run(batch_size=SLOTS))
        yield
        pgqueuer.shutdown.set()
        await worker
        await connection.close()

    def unfinished(self) -> bool:
        return bool(self.run(self._connection.fetchval(UNFINISHED)))

    def close(self) -> None:
        self.run(self._connection.close())
        super().close()


def _payload(number: int) -> bytes:
    return json.dumps({"num": number, "t": 0}).encode()


PEER = OnPgQueuer
