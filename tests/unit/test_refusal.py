"""Halving: what is refused stands alone, and how many statements that takes."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError

from sqla_river.refusal import in_parts, is_refusal


class _Refused(Exception):
    def __init__(self, sqlstate: str | None) -> None:
        self.sqlstate = sqlstate


def _error(code: str | None) -> DBAPIError:
    return DBAPIError("UPDATE", None, _Refused(code))


@given(st.integers(1, 300), st.sets(st.integers(0, 299), max_size=300))
def test_all_but_the_refused_are_written_once_in_order_in_at_most_twice_as_many_statements(
    count: int, bad: set[int]
) -> None:
    items = range(count)
    refused: list[int] = []
    sent = 0

    def write(part: Sequence[int]) -> Sequence[int]:
        nonlocal sent
        sent += 1
        if bad & set(part):
            raise _error("23514")
        return part

    written = [item for rows in in_parts([items], write, lambda item, _: refused.append(item)) for item in rows]

    assert written == [item for item in items if item not in bad]
    assert refused == [item for item in items if item in bad]
    assert sent <= 2 * count - 1
    if len(refused) == 1:
        assert sent <= 2 * count.bit_length() + 1


def test_whoever_asks_has_a_look_after_every_statement_and_stops_when_he_likes() -> None:
    sent: list[Sequence[int]] = []

    def write(part: Sequence[int]) -> Sequence[Any]:
        sent.append(part)
        raise _error("23514")

    parts = in_parts([[1, 2, 3, 4]], write, lambda item, error: None)

    assert [next(parts), next(parts)] == [(), ()]
    assert sent == [[1, 2, 3, 4], [1, 2]]


@pytest.mark.parametrize("code", [None, "08006", "25006", "53100", "53200", "57P01", "57P03"])
def test_what_is_no_rows_fault_is_not_tried_in_parts(code: str | None) -> None:
    assert not is_refusal(_error(code))
    assert not is_refusal(_Refused(code))


@pytest.mark.parametrize("code", ["23514", "P0001", "XX001", "58P01", "57014", "55P03", "54000"])
def test_what_one_row_may_meet_is_a_refusal_also_as_the_drivers_own_error(code: str) -> None:
    assert is_refusal(_error(code))
    assert is_refusal(_Refused(code))
