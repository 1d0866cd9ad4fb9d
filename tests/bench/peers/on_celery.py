# pyright: basic, reportMissingImports=false
"""Celery on Redis: `celery worker` as it is, one process per core, results ignored."""

import os
from collections.abc import Sequence

from celery import Celery

from tests.bench.peers.face import ASKED, CommandPeer, asked, mark

app = Celery("bench", broker=asked().url if ASKED in os.environ else None)
app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False)


@app.task
def noop(num: int, t: int) -> None:
    mark()


class OnCelery(CommandPeer):
    def fill(self, numbers: Sequence[int]) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            for number in numbers:
                noop.apply_async(kwargs={"num": number, "t": 0}, producer=producer)

    def put(self, number: int) -> None:
        noop.delay(num=number, t=0)

    def command(self) -> list[str]:
        return [self.program("celery"), "--app", __name__, "worker", "--loglevel", "WARNING"]


PEER = OnCelery
