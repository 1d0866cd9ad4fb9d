"""Sidekiq on Redis: one process of `sidekiq` as it is, with 10 threads, and a process of Ruby that puts jobs in."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.bench.peers.face import Asked, CommandPeer

RUBY: Final = str(Path(__file__).with_suffix(".rb"))


class OnSidekiq(CommandPeer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._client = subprocess.Popen(["ruby", RUBY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._tell("put", 0, 0)  # until it is there

    def fill(self, numbers: Sequence[int]) -> None:
        self._tell("fill", numbers[0], len(numbers))

    def put(self, number: int) -> None:
        self._tell("put", number, 1)

    def put_all(self, count: int) -> None:
        self._tell("put", 0, count)

    def command(self) -> list[str]:
        return ["sidekiq", "--require", RUBY]

    def close(self) -> None:
        self._client.communicate()

    def _tell(self, verb: str, first: int, count: int) -> None:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        print(verb, first, count, file=self._client.stdin, flush=True)
        if self._client.stdout.readline() != "done\n":
            raise RuntimeError("the Ruby process that puts jobs in has ended; its words are above")


PEER = OnSidekiq
