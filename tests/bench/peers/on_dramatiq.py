# pyright: basic, reportMissingImports=false
"""Dramatiq on Redis or RabbitMQ: `dramatiq` as it is, one process per core with 8 threads each.

On RabbitMQ it waits until the broker has the message, as the others do; that is off by default.
"""

from collections.abc import Sequence

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker

from tests.bench.peers.face import CommandPeer, asked, mark

if asked().variant == "rabbitmq":
    dramatiq.set_broker(RabbitmqBroker(url=asked().url, confirm_delivery=True))
else:
    dramatiq.set_broker(RedisBroker(url=asked().url))


@dramatiq.actor
def noop(num: int, t: int) -> None:
    mark()


class OnDramatiq(CommandPeer):
    def fill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            noop.send(num=number, t=0)

    def put(self, number: int) -> None:
        noop.send(num=number, t=0)

    def command(self) -> list[str]:
        return [self.program("dramatiq"), __name__]

    def close(self) -> None:
        dramatiq.get_broker().close()


PEER = OnDramatiq
