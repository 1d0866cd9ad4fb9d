"""Secrets of args: taken out of any text, in each spelling that Python or JSON gives them."""

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import attrs
import pytest

from sqla_river.args import DEFAULT_CODEC
from sqla_river.context import JobContext
from sqla_river.redact import hider, shown_args
from sqla_river.rows import JobRow

SECRET: dict[str, Any] = {"sqla_river": {"redact": True}}


class Colour(Enum):
    RED = "scarlet-red"


@attrs.frozen
class Card:
    number: str = attrs.field(metadata=SECRET)
    owner: str = "Ann"


@dataclass(frozen=True)
class Pay:
    kind: ClassVar[str] = "pay"
    order: int
    card: Card
    cards: list[Card] = field(default_factory=list[Card])
    pin: int = field(default=0, metadata=SECRET)
    raw: bytes = field(default=b"", metadata=SECRET)
    words: dict[str, list[str]] = field(default_factory=dict[str, list[str]], metadata=SECRET)
    colour: Colour = field(default=Colour.RED, metadata=SECRET)
    flag: bool = field(default=True, metadata=SECRET)
    text: str = field(default="", metadata={"sqla_river": {"redact": True, "name": "txt"}})


def job_of(args: Pay) -> JobContext[Pay]:
    raw = DEFAULT_CODEC.encode(args).decode()
    return JobContext(JobRow(1, 0.0, 1, "default", "pay", 1, 25, raw, "{}", None, "r/1"), args)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (Pay(1, Card("4111-1111")), "no card 4111-1111"),
        (Pay(1, Card("a"), [Card("4222-2222")]), "in a list: 4222-2222!"),
        (Pay(1, Card("a\nb'c\"d€")), repr("a\nb'c\"d€") + json.dumps("a\nb'c\"d€")),
        (Pay(1, Card("-----BEGIN-----\nMIIEvQIBADAN\n-----END-----")), "  | MIIEvQIBADAN"),
        (Pay(1, Card("x"), pin=12345), "pin=12345"),
        (Pay(1, Card("x"), pin=7), "pin 7, not 17"),
        (Pay(1, Card("x"), raw=b"\xffhidden"), repr(b"\xffhidden")),
        (Pay(1, Card("x"), raw=b"hidden-too"), "hidden-too"),
        (Pay(1, Card("x"), words={"key-word": ["value-word"]}), "{'key-word': ['value-word']}"),
        (Pay(1, Card("x"), colour=Colour.RED), "it is scarlet-red, Colour.RED"),
        (Pay(1, Card("x"), text="longer-secret"), "txt: longer-secret"),
    ],
)
def test_the_value_of_a_redacted_field_is_hidden_in_any_text(args: Pay, shown: str) -> None:
    job = job_of(args)
    hidden = job.redact(shown)

    assert "***" in hidden
    for secret in (
        "4111",
        "4222",
        "b'c",
        r"b\'c",
        "MIIE",
        "12345",
        "hidden",
        "key-word",
        "value-word",
        "scarlet",
        "longer",
    ):
        assert secret not in hidden
    assert job.redact("order 1 of Ann, 17 True None") == "order 1 of Ann, 17 True None"


def test_a_short_secret_is_hidden_only_where_it_stands_alone() -> None:
    assert job_of(Pay(1, Card("x"), pin=7)).redact("pin 7, not 17 or box x") == "pin ***, not 17 or box ***"


def test_args_that_do_not_decode_have_their_secrets_hidden_too() -> None:
    hide = hider(
        Pay, '{"card": {"number": "4111-1111"}, "pin": "not-a-number", "order": [{"txt": {"deep": "est-text"}}]}'
    )

    assert hide is not None
    assert hide("4111-1111 not-a-number est-text") == "*** *** ***"
    assert hider(Pay, "no JSON") is None


def test_a_class_without_secrets_costs_nothing() -> None:
    @attrs.frozen
    class Open:
        kind: ClassVar[str] = "open"
        name: str = "x"

    assert hider(Open, '{"name": "x"}', Open()) is None


def test_args_are_shown_with_their_secrets_masked() -> None:
    raw = DEFAULT_CODEC.encode(Pay(1, Card("4111"), [Card("4222")], pin=99, text="t")).decode()

    shown = shown_args(Pay, raw)
    assert json.loads(shown)["card"] == {"number": "***", "owner": "Ann"}
    assert json.loads(shown)["order"] == 1
    for secret in ("4111", "4222", "99", "scarlet"):
        assert secret not in shown
    assert shown_args(Pay, "{") == "***"


def test_a_row_and_a_job_never_show_args() -> None:
    job = job_of(Pay(1, Card("4111")))

    assert "4111" not in repr(job) + repr(job.row)
