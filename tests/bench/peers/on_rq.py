# pyright: basic, reportMissingImports=false
"""RQ on Redis: one `rq worker` as it is, which forks for each job."""

from collections.abc import Sequence

from redis import Redis
from rq import Queue

from tests.bench.peers.face import Asked, CommandPeer, mark


def noop(num: int, t: int) -> None:
    mark()


class OnRQ(CommandPeer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._queue = Queue(connection=Redis.from_url(asked.url))

    def fill(self, numbers: Sequence[int]) -> None:
        self._queue.enqueue_many([Queue.prepare_data(noop, kwargs={"num": number, "t": 0}) for number in numbers])

    def put(self, number: int) -> None:
        self._queue.enqueue(noop, num=number, t=0)

    def command(self) -> list[str]:
        return [self.program("rq"), "worker", "--url", self.asked.url, "--quiet"]


PEER = OnRQ
