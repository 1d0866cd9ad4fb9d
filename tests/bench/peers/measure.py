"""How a peer is measured, the same for all; `python -m tests.bench.peers.measure MODULE` in the peer's environment."""

import importlib
import json
import sys
import time
from typing import Final

from tests.bench.peers.face import BATCH, Asked, Marks, Peer, asked

PATIENCE: Final = 60.0
"""Seconds in which not one job is done after which a worker is given up."""
PAUSE: Final = 0.02
"""Seconds for which the worker has nothing to do before each job of the idle latency."""

Figures = dict[str, float]


def fill(peer: Peer, asked: Asked) -> Figures:
    """Put many jobs in, in batches; they stay."""
    peer.prepare()
    began = time.perf_counter()
    for first in range(0, asked.jobs, BATCH):
        peer.fill(range(first, min(first + BATCH, asked.jobs)))
    return {"bulk": asked.jobs / (time.perf_counter() - began)}


def work(peer: Peer, asked: Asked) -> Figures:
    """Work the jobs that are there, from the start of the first handler until the last outcome is stored."""
    with peer.working() as marks:
        _wait(marks, 1)
        before, cpu = marks.count(), marks.cpu()
        _wait(marks, asked.jobs)
        _settle(peer)
        ended = time.time()
        after = marks.cpu()
        times = marks.times()
    figures = {"work": (len(times) - 1) / (max(ended, times[-1]) - times[0])}
    if cpu is not None and after is not None and before < len(times):
        figures["cpu"] = (after - cpu) / (len(times) - before) * 1e6
    return figures


def put(peer: Peer, asked: Asked) -> Figures:
    """Put single jobs in, while nobody works; then have them worked, and put in others one by one as each is done."""
    peer.prepare()
    began = time.perf_counter()
    peer.put_all(asked.singles)
    figures = {"single": asked.singles / (time.perf_counter() - began)}
    with peer.working() as marks:
        _wait(marks, asked.singles)
        _settle(peer)
        at: list[float] = []
        for number in range(asked.pings):
            time.sleep(PAUSE)
            at.append(time.time())
            peer.put(asked.singles + number)
            _wait(marks, asked.singles + number + 1, look_every=0.0005)
        starts = marks.times()[asked.singles :]
    waits = sorted((start - began) * 1_000 for start, began in zip(starts, at, strict=True))
    return figures | {"p50": waits[len(waits) // 2], "p95": waits[min(int(len(waits) * 0.95), len(waits) - 1)]}


PHASES: Final = {"fill": fill, "work": work, "put": put}


def _wait(marks: Marks, count: int, look_every: float = 0.002) -> None:
    deadline, seen = time.monotonic() + PATIENCE, 0
    while (done := marks.count()) < count:
        if done > seen:
            deadline, seen = time.monotonic() + PATIENCE, done
        elif time.monotonic() > deadline:
            raise TimeoutError(f"{done} of {count} jobs are done, and no other within {PATIENCE:.0f} s")
        time.sleep(look_every)


def _settle(peer: Peer) -> None:
    deadline = time.monotonic() + PATIENCE
    while peer.unfinished():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the handlers have run, but {PATIENCE:.0f} s later outcomes are not stored")
        time.sleep(0.005)


def main() -> None:
    """Measure what is asked, and print the figures as the last line."""
    peer: Peer = importlib.import_module(f"tests.bench.peers.{sys.argv[1]}").PEER(asked())
    try:
        print(json.dumps(PHASES[asked().phase](peer, asked())))
    finally:
        peer.close()


if __name__ == "__main__":
    main()
