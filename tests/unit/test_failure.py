import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_river.failure import LONGEST, attempt_error, storable


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001
        return caught


def said(error: BaseException) -> tuple[str, str]:
    """What is kept of *error*: checked to be storable and bounded."""
    kept = attempt_error(3, raised(error))
    assert kept.attempt == 3
    for text in (kept.error, kept.trace):
        assert "\0" not in text
        json.dumps(text, ensure_ascii=False).encode()  # no lone surrogate
    assert len(kept.error.encode()) + len(kept.trace.encode()) <= LONGEST
    return kept.error, kept.trace


def test_an_error_is_its_type_and_text_and_where_it_was_raised() -> None:
    message, trace = said(ValueError("no such order"))

    assert message == "ValueError: no such order"
    assert "in raised" in trace


def test_an_error_without_text_is_its_type() -> None:
    assert said(KeyboardInterrupt())[0] == "KeyboardInterrupt"


@pytest.mark.parametrize("also", [RuntimeError("twice"), SystemExit(1), KeyboardInterrupt()], ids=repr)
def test_an_error_whose_text_raises_is_still_told(also: BaseException) -> None:
    class Evil(Exception):
        def __str__(self) -> str:
            raise also

    message, _ = said(Evil())

    assert message.startswith("Evil: ")


def test_an_error_whose_text_is_no_text_is_still_told() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            return 7  # type: ignore[return-value]  # noqa: PLE0307

    assert said(Odd())[0].startswith("Odd: ")


@pytest.mark.parametrize("character", ["x", "\0", "\udc80", "ä", "🙂", "\n"], ids=ascii)
def test_fifty_megabytes_are_cut_quickly(character: str) -> None:
    began = time.thread_time()  # of this thread alone: others share the machine

    message, trace = said(ValueError(character * (50_000_000 // len(character.encode("utf-8", "surrogatepass")))))

    assert message.endswith("...")
    assert "in raised" in trace
    assert time.thread_time() - began < 5


def test_a_long_trace_keeps_its_end() -> None:
    def deep(n: int) -> None:
        if n == 0:
            raise ValueError("the bottom")
        deep(n - 1)

    with pytest.raises(ValueError, match="the bottom") as caught:
        deep(500)
    _, trace = said(caught.value)

    assert trace.rstrip().endswith("ValueError: the bottom")


def test_an_error_that_causes_itself_is_told() -> None:
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one

    assert said(one)[0] == "ValueError: one"


def test_ten_thousand_causes_are_told() -> None:
    error: Exception = ValueError("0")
    for n in range(1, 10_000):
        cause, error = error, ValueError(str(n))
        error.__cause__ = cause

    assert said(error)[0] == "ValueError: 9999"


def test_a_recursion_error_is_told() -> None:
    def forever() -> None:
        forever()

    with pytest.raises(RecursionError) as caught:
        forever()

    assert said(caught.value)[0].startswith("RecursionError: ")


def test_a_group_of_errors_is_told() -> None:
    inner = ExceptionGroup("inner", [KeyError(n) for n in range(1000)])

    _, trace = said(ExceptionGroup("outer", [inner]))

    assert "KeyError" in trace


def test_broken_syntax_errors_are_told() -> None:
    error = SyntaxError("odd", ("file", "line", object(), 3))  # type: ignore[arg-type]

    assert said(error)[0].startswith("SyntaxError")


@given(st.text(st.characters(codec=None)), st.integers(3, 50))
def test_storable_text_fits_and_comes_through_utf8(text: str, longest: int) -> None:
    kept = storable(text, longest)

    assert len(kept.encode()) <= longest
    assert "\0" not in kept
    if text.isascii() and "\0" not in text and len(text) <= longest:
        assert kept == text
