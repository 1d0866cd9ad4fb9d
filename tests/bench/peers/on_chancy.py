# pyright: basic, reportMissingImports=false
"""Chancy with its executor for async jobs, and eager polling, which is meant for queues that are kept full."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import psycopg
from chancy import Chancy, Queue, Worker, job

from tests.bench.peers.face import SLOTS, Asked, AsyncPeer, Marks

UNFINISHED = "SELECT EXISTS (SELECT FROM chancy_jobs WHERE state IN ('pending', 'running', 'retrying'))"
QUIET = logging.getLogger("chancy")

noted = Marks()


@job(queue="default")
async def noop(*, num: int, t: int) -> None:
    noted.note()


class OnChancy(AsyncPeer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        QUIET.setLevel(logging.WARNING)
        self._chancy = Chancy(asked.url, log=QUIET)
        self._connection = psycopg.connect(asked.url, autocommit=True)

    def prepare(self) -> None:
        self.run(self._prepare())

    async def _prepare(self) -> None:
        queue = Queue("default", concurrency=SLOTS, executor=Chancy.Executor.Async, eager_polling=True)
        async with Chancy(self.asked.url, log=QUIET) as chancy:
            await chancy.migrate()
            await chancy.declare(queue)

    def fill(self, numbers: Sequence[int]) -> None:
        jobs = [noop.job.with_kwargs(num=number, t=0) for number in numbers]
        for _ in self._chancy.sync_push_many(jobs, batch_size=len(jobs)):
            pass

    def put(self, number: int) -> None:
        self._chancy.sync_push(noop.job.with_kwargs(num=number, t=0))

    @asynccontextmanager
    async def serving(self, marks: Marks) -> AsyncGenerator[None]:
        global noted  # noqa: PLW0603 - a job of Chancy is a function that can be imported
        noted = marks
        async with (
            Chancy(self.asked.url, log=QUIET) as chancy,
            Worker(chancy, register_signal_handlers=False),
        ):
            yield

    def unfinished(self) -> bool:
        return self._connection.execute(UNFINISHED).fetchone() == (True,)

    def close(self) -> None:
        self._connection.close()
        super().close()


PEER = OnChancy
