from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_river.errors import InvalidOptionError
from sqla_river.policy import LONGEST_RETRY, RIVER_POLICY, Exponential

attempts = st.integers(1, 2**31)


@pytest.mark.parametrize("attempt", range(1, 16))
def test_one_minute_doubling_is_exact(attempt: int) -> None:
    policy = Exponential(base=timedelta(minutes=1), factor=2)

    assert policy.delay(attempt) == timedelta(minutes=2 ** (attempt - 1))


@pytest.mark.parametrize("attempt", range(1, 9))
def test_thirty_seconds_times_four_is_exact(attempt: int) -> None:
    policy = Exponential(base=timedelta(seconds=30), factor=4)

    assert policy.delay(attempt) == timedelta(seconds=30 * 4 ** (attempt - 1))


@given(base=st.timedeltas(timedelta(0), timedelta(days=60)), factor=st.integers(1, 1000), attempt=st.integers(1, 200))
def test_whole_factors_are_exact_up_to_the_cap(base: timedelta, factor: int, attempt: int) -> None:
    exact = base // timedelta(microseconds=1) * factor ** (attempt - 1)

    delay = Exponential(base=base, factor=factor).delay(attempt)

    assert delay // timedelta(microseconds=1) == min(exact, LONGEST_RETRY // timedelta(microseconds=1))


@given(
    base=st.timedeltas(timedelta(0)),
    factor=st.floats(1, 1e308),
    longest=st.timedeltas(timedelta(0)),
    jitter=st.floats(0, 1),
    attempt=attempts,
)
def test_no_attempt_overflows_and_none_passes_the_cap(
    base: timedelta, factor: float, longest: timedelta, jitter: float, attempt: int
) -> None:
    delay = Exponential(base=base, factor=factor, max=longest, jitter=jitter).delay(attempt)

    assert timedelta(0) <= delay <= longest


@given(attempt=st.integers(-5, 0))
def test_an_attempt_below_one_counts_as_the_first(attempt: int) -> None:
    assert Exponential(base=timedelta(seconds=7)).delay(attempt) == timedelta(seconds=7)


@given(attempt=st.integers(1, 30))
def test_jitter_spreads_both_ways_by_its_fraction(attempt: int) -> None:
    policy = Exponential(base=timedelta(seconds=100), factor=1, jitter=0.5)

    delays = [policy.delay(attempt) for _ in range(100)]

    assert all(timedelta(seconds=50) <= delay <= timedelta(seconds=150) for delay in delays)
    assert min(delays) < timedelta(seconds=100) < max(delays)


@given(attempt=attempts)
def test_rivers_policy_is_the_fourth_power_within_ten_percent(attempt: int) -> None:
    cap = LONGEST_RETRY.total_seconds()

    seconds = RIVER_POLICY.delay(attempt).total_seconds()

    assert min(cap, attempt**4) * 0.9 - 1e-5 <= seconds <= min(cap, attempt**4 * 1.1 + 1e-5)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("base", {"base": timedelta(seconds=-1)}),
        ("base", {"base": 60}),
        ("max", {"base": timedelta(seconds=1), "max": timedelta(seconds=-1)}),
        ("max", {"base": timedelta(seconds=1), "max": None}),
        ("factor", {"base": timedelta(seconds=1), "factor": 0.5}),
        ("factor", {"base": timedelta(seconds=1), "factor": float("nan")}),
        ("factor", {"base": timedelta(seconds=1), "factor": float("inf")}),
        ("factor", {"base": timedelta(seconds=1), "factor": "2"}),
        ("jitter", {"base": timedelta(seconds=1), "jitter": -0.1}),
        ("jitter", {"base": timedelta(seconds=1), "jitter": 1.1}),
        ("jitter", {"base": timedelta(seconds=1), "jitter": float("nan")}),
        ("jitter", {"base": timedelta(seconds=1), "jitter": None}),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_by_name(field: str, words: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError) as refused:
        Exponential(**words)

    assert refused.value.option == field
