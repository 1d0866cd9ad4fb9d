"""Who looks first, of a fleet that hears of one job."""

from collections import Counter

import pytest

from sqla_river.fetch.wakeups import Wakeups

POLL = 1.0


def _fleet(size: int) -> list[Wakeups]:
    places = [1_000_003 * number % 4_000_000_007 - 2_000_000_000 for number in range(size)]
    fleet = [Wakeups(POLL) for _ in places]
    for place, wakeups in zip(places, fleet, strict=True):
        wakeups.place, wakeups.peers = place, {"default": places}
    return fleet


def _looks(fleet: list[Wakeups], pid: int, seconds: float) -> Counter[str]:
    """How many look within *seconds*, and how many of them would look twice."""
    looks: Counter[str] = Counter()
    for wakeups in fleet:
        wakeups.heard("default", pid)
        for now in (0.0, seconds):
            woken, twice = wakeups.take(["default"], now)
            looks.update(once=len(woken), twice=len(twice))
    return looks


@pytest.mark.parametrize("pid", [1, 77, 4_711, 2_000_000])
def test_of_fifty_runners_three_look_at_once_and_one_of_them_twice(pid: int) -> None:
    assert _looks(_fleet(50), pid, 0.05) == {"once": 3, "twice": 1}


def test_all_look_within_one_poll() -> None:
    assert _looks(_fleet(200), 5, POLL)["once"] == 200


def test_another_backend_wakes_others_first() -> None:
    fleet = _fleet(50)
    first: Counter[int] = Counter()
    for pid in range(1, 401):
        for number, wakeups in enumerate(fleet):
            wakeups.heard("default", pid)
            first[number] += len(wakeups.take(["default"], float(pid))[1])

    assert sum(first.values()) == 400
    assert len(first) > 40
    assert max(first.values()) < 40


def test_a_runner_that_knows_no_other_looks_at_once() -> None:
    wakeups = Wakeups(POLL)
    wakeups.heard("default", 5)

    assert wakeups.take(["default"], 0.0) == ({"default"}, {"default"})


@pytest.mark.parametrize(
    ("queue", "woken"), [(None, {"default", "other"}), ("other", {"other"}), ("unknown", set[str]())]
)
def test_what_was_not_announced_by_a_backend_is_looked_at_at_once(queue: str | None, woken: set[str]) -> None:
    wakeups = _fleet(50)[7]
    wakeups.heard(queue, 0)

    assert wakeups.take(["default", "other"], 0.0) == (woken, woken)


def test_a_look_that_was_put_off_serves_what_is_announced_meanwhile() -> None:
    last = max(_fleet(50), key=lambda wakeups: wakeups._rank("default", 9))
    for number in range(20):
        last.heard("default", 9)
        assert last.take(["default"], number * 0.01).queues == set()
    at = last.wait(0.0)

    assert 0.5 < at < 1.0
    assert last.take(["default"], at).queues == {"default"}
    assert last.wait(at) == float("inf")
