"""How much is fetched beyond the free slots."""

import pytest

from sqla_river.fetch.ahead import AHEAD, FIRST, LATE, MOST, WINDOW, Ahead


def _after(rate: float, seconds: float = 0.2, every: float = 0.005) -> tuple[Ahead, float]:
    """What is known after slots came free at *rate* for so long, counted every so often."""
    ahead, now = Ahead(), 100.0
    for _ in range(round(seconds / every)):
        now += every
        ahead.freed({"a": round(rate * every)}, now)
    return ahead, now


def test_as_many_wait_as_will_have_begun_in_a_little_while() -> None:
    ahead, _ = _after(20_000)

    assert ahead.of("a", 100) == pytest.approx(20_000 * AHEAD, rel=0.1)
    assert ahead.of("b", 1) == 0


def test_jobs_that_outlast_that_while_are_never_fetched_ahead() -> None:
    ahead, _ = _after(1_000)

    assert ahead.of("a", round(1_000 * AHEAD) + 3) == 0
    assert ahead.of("a", 10) > 0


def test_nobody_has_more_than_two_fetches_waiting() -> None:
    ahead, _ = _after(1_000_000)

    assert ahead.of("a", 100) == MOST


def test_what_was_known_before_a_pause_counts_no_more() -> None:
    ahead, now = _after(20_000)
    ahead.freed({}, now + 1)

    assert ahead.of("a", 100) == 0


def test_after_a_rest_a_turn_of_half_the_slots_says_enough() -> None:
    ahead, now = _after(20_000)
    ahead.freed({}, now + 60)
    ahead.begun(now + 120)
    ahead.freed({"a": 50, "b": FIRST - 1}, now + 120 + WINDOW / 4)

    assert ahead.of("a", 100) == pytest.approx(50 / (WINDOW / 4) * AHEAD, abs=1)
    assert ahead.of("a", 101) == 0
    assert ahead.of("b", 1) == 0


def test_jobs_that_begin_while_others_are_counted_do_not_hide_those() -> None:
    ahead = Ahead()
    for step in range(40):
        ahead.begun(100 + step * WINDOW / 4)
        ahead.freed({"a": 100}, 100 + (step + 1) * WINDOW / 4)

    assert ahead.of("a", 100) == pytest.approx(min(100 / (WINDOW / 4) * AHEAD, MOST), rel=0.1)


def test_jobs_wait_too_long_once_no_slot_comes_free() -> None:
    ahead, now = _after(20_000)

    assert ahead.late(["a"], now + LATE * 0.9) == []
    assert ahead.of("a", 100) > 0
    assert ahead.late(["a"], now + LATE * 1.1) == ["a"]
    assert ahead.of("a", 100) == 0
