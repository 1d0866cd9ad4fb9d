"""The unique key: River's own vectors, byte for byte, and the combinations that are refused."""

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sqla_river.errors import InvalidOptionError
from sqla_river.states import JobState, mask_of
from sqla_river.unique import Unique, go_json
from tests.river_vectors import VECTORS, unique_of


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_the_key_is_that_of_river(vector: dict[str, Any]) -> None:
    unique, marked = unique_of(vector)
    at = datetime.fromisoformat(vector["now"])

    kind, args, queue = str(vector["kind"]), str(vector["encoded_args"]).encode(), str(vector["queue"])
    assert unique.text_of(kind, args, queue, at, marked) == vector["prehash"]
    assert unique.key_of(kind, args, queue, at, marked).hex() == vector["key_hex"]
    assert int(mask_of(unique.states), 2) == vector["bitmask"]


WRITTEN: list[tuple[Any, str]] = [
    (1.0, "1"),
    (0.1, "0.1"),
    (1e20, "100000000000000000000"),
    (1e21, "1e+21"),
    (1e-6, "0.000001"),
    (1e-7, "1e-7"),
    (-2.5e-9, "-2.5e-9"),
    (5e-324, "5e-324"),
    (1.2345678901234568e-05, "0.000012345678901234568"),
    (-9.999e-5, "-0.00009999"),
    (1e16, "10000000000000000"),
    (1.2345678901234567e20, "123456789012345670000"),
    (-1.7976931348623157e308, "-1.7976931348623157e+308"),
    (0.0, "0"),
    (-0.0, "-0"),
    ('<a & "b">\u2028\t\x01\x7f', '"\\u003ca \\u0026 \\"b\\"\\u003e\\u2028\\t\\u0001\x7f"'),
    ([True, None, {"b": 1, "a": []}], '[true,null,{"b":1,"a":[]}]'),
]


@pytest.mark.parametrize(("value", "text"), WRITTEN)
def test_values_are_written_as_go_writes_them(value: object, text: str) -> None:
    assert go_json(value) == text


NUMBERS: Final = st.floats(allow_nan=False, allow_infinity=False).filter(bool)
SMALL: Final = st.floats(1e-7, 1e-3)


@given(one=NUMBERS | SMALL, other=NUMBERS | SMALL)
def test_floats_are_written_alike_only_if_they_are_equal(one: float, other: float) -> None:
    assert float(go_json(one)) == one
    assert (go_json(one) == go_json(other)) is (one == other)


def enough(number: float, digits: int) -> bool:
    """Whether a decimal number of that many digits gives `number` back: the next one below it, or the next above."""
    near = (Context(prec=digits, rounding=way).plus(Decimal(number)) for way in (ROUND_FLOOR, ROUND_CEILING))
    return any(float(each) == number for each in near)


# The nearest of its 16 digits ends in ..062, and is another float: below a power of two floats are twice as close.
@example(2.0**-24)
@given(NUMBERS | SMALL)
def test_a_float_is_written_in_as_few_digits_as_give_it_back(number: float) -> None:
    """With an exponent only below 1e-6 and from 1e21, and then without zeros before it: Go's encoding/json."""
    text = go_json(number)
    digits = text.partition("e")[0].lstrip("-").replace(".", "").strip("0")

    assert len(digits) == next(n for n in range(1, 18) if enough(number, n))
    assert ("e" in text) is not (1e-6 <= abs(number) < 1e21)
    assert re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*[1-9])?(e[+-][1-9]\d*)?", text)


def test_the_order_of_keys_makes_no_difference_and_their_values_do() -> None:
    unique = Unique(by_args=True)
    at = datetime(2026, 3, 4, tzinfo=UTC)

    assert unique.key_of("k", b'{"a":1,"b":2}', "q", at) == unique.key_of("k", b'{"b":2,"a":1}', "q", at)
    assert unique.key_of("k", b'{"a":1}', "q", at) != unique.key_of("k", b'{"a":2}', "q", at)


def test_a_period_ends_where_the_next_begins() -> None:
    unique = Unique(by_period=timedelta(hours=1))
    keys = [
        unique.key_of("k", b"{}", "q", datetime(2026, 3, 4, hour, minute, tzinfo=UTC))
        for hour, minute in ((5, 0), (5, 59), (6, 0))
    ]

    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exclude_kind": True},
        {"by_period": timedelta(milliseconds=999)},
        {"by_args": "name"},
        {"by_args": [1]},
        {"by_state": [JobState.AVAILABLE]},
        {"key": ""},
        {"key": "payment-1", "by_queue": True},
    ],
    ids=str,
)
def test_wrong_combinations_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match=re.compile("unique|by_", re.IGNORECASE)):
        Unique(**options)


def test_the_vectors_are_all_there() -> None:
    assert len(VECTORS) == 13
    assert json.dumps(VECTORS)
