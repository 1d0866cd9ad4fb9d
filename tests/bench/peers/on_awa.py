# pyright: basic, reportMissingImports=false
"""Awa, whose worker is Rust and calls async handlers in Python, with the settings that it has by default."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import awa

from tests.bench.peers.face import SLOTS, Asked, AsyncPeer, Marks


@dataclass
class Measured:
    num: int
    t: int


class OnAwa(AsyncPeer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        # It insists on a host here, also where the query names the folder of the socket.
        self._url = asked.url.replace("@/", "@localhost/", 1)
        self._client = awa.Client(self._url)

    def prepare(self) -> None:
        self._client.migrate()
        self.run(self._activate())

    async def _activate(self) -> None:
        """Start a worker once: the first one switches a new database to the storage that many jobs are put into."""
        async with self.serving(Marks()):
            pass

    def fill(self, numbers: Sequence[int]) -> None:
        self._client.enqueue_many_copy([Measured(number, 0) for number in numbers])

    def put(self, number: int) -> None:
        self._client.insert(Measured(number, 0))

    @asynccontextmanager
    async def serving(self, marks: Marks) -> AsyncGenerator[None]:
        async with awa.AsyncClient(self._url) as client:

            @client.task(Measured)
            async def noop(_job: awa.Job) -> None:
                marks.note()

            await client.start([("default", SLOTS)])
            yield
            await client.shutdown()

    def unfinished(self) -> bool:
        return any(each.available + each.running for each in self._client.queue_stats())

    def close(self) -> None:
        self._client.close()
        super().close()


PEER = OnAwa
