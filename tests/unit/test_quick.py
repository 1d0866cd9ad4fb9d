"""Decoding in C gives what our own decoder gives, and is left alone where a constructor does more than keep."""

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from typing import Annotated, Any, ClassVar, Final, Self, cast

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqla_river.args import CattrsCodec
from sqla_river.codec.quick import quick_decoder
from sqla_river.errors import DecodeError

FIELDS: Final = ("number", "_number", "share", "text", "flag", "more")
Decoded = tuple[type, dict[str, Any]] | str


@attrs.frozen
class Frozen:
    kind: ClassVar[str] = "frozen"
    number: int
    text: str = "none"
    flag: bool | None = None


@attrs.define(kw_only=True)
class Defined:
    kind: ClassVar[str] = "defined"
    _number: int = attrs.field(default=3)
    share: float
    text: str | None = attrs.field(factory=lambda: "made")


@attrs.frozen(slots=False)
class InDict:
    kind: ClassVar[str] = "in_dict"
    number: int
    share: float | None = 0.5


@dataclass(frozen=True, slots=True)
class Data:
    kind: ClassVar[str] = "data"
    number: int
    text: str = "none"


@dataclass
class PlainData:
    kind: ClassVar[str] = "plain_data"
    number: int
    text: str = field(default_factory=lambda: "made")


@attrs.frozen
class Inherits(Frozen):
    more: int = 1


PLAIN: Final[list[type[Any]]] = [Frozen, Defined, InDict, Data, PlainData, Inherits]


def _noted(cls: type[Any], raw: str, *, quickly: bool) -> Decoded:
    """What comes of *raw*: the instance, taken apart with the types of its values; or what the error says."""
    codec = CattrsCodec()
    if not quickly:
        codec._quick[cls] = None
    try:
        made = cast("object", codec.decode(cls, raw))
    except DecodeError as error:
        return str(error)
    kept = [(name, getattr(made, name)) for name in FIELDS if hasattr(made, name)]
    return type(made), {name: (type(value), repr(value)) for name, value in kept}


numbers: Final = st.integers() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values: Final = st.none() | st.booleans() | numbers | st.text() | st.lists(st.integers(), max_size=2)
keys: Final = st.sampled_from([*FIELDS, "kind", "other"])
documents: Final = st.dictionaries(keys, values, max_size=7).map(json.dumps) | st.text(max_size=20)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(cls=st.sampled_from(PLAIN), raw=documents)
@example(Frozen, '{"number": 1.0}')
@example(Frozen, '{"number": 1e2}')
@example(Frozen, '{"number": true}')
@example(Frozen, '{"number": -0}')
@example(Frozen, '{"number": 1, "number": 2}')
@example(Frozen, '{"number": 18446744073709551616}')
@example(Frozen, '{"number": 1, "text": "\\ud800"}')
@example(Frozen, '{"number": 1, "other": {"number": [2]}} ')
@example(Defined, '{"share": 9007199254740993}')
@example(Defined, '{"share": 1e400}')
@example(Defined, '{"share": 123456789012345678901234567890}')
@example(Defined, '{"share": -0.0}')
@example(InDict, '{"number": 1, "share": NaN}')
@example(Frozen, '{"number": 1' + "0" * 5_000 + "}")
@example(Frozen, '{"number": 1, "other": ' + "[" * 5_000 + "]" * 5_000 + "}")
def test_the_quick_way_gives_what_the_careful_one_gives(cls: type, raw: str) -> None:
    assert _noted(cls, raw, quickly=True) == _noted(cls, raw, quickly=False)


@pytest.mark.parametrize("cls", PLAIN)
def test_a_class_that_only_keeps_plain_values_is_decoded_in_c(cls: type) -> None:
    assert quick_decoder(cls) is not None


# ---- classes that do more ---------------------------------------------------------------------------------------


@attrs.frozen
class Converts:
    number: int = attrs.field(converter=abs)


@attrs.frozen
class Validates:
    number: int = attrs.field(validator=attrs.validators.gt(0))


@attrs.define
class Follows:
    number: int
    twice: int = attrs.field(init=False, default=0)

    def __attrs_post_init__(self) -> None:
        self.twice = 2 * self.number


@attrs.define
class Computes:
    number: int
    twice: int = attrs.field(init=False, default=attrs.Factory(lambda self: 2 * self.number, takes_self=True))


@attrs.define
class Prepares:
    number: int

    def __attrs_pre_init__(self) -> None:
        self.number = 0


@attrs.frozen(cache_hash=True)
class Hashes:
    number: int


@attrs.define(init=False)
class ByHand:
    number: int

    def __init__(self, number: int) -> None:
        self.number = number + 1


@attrs.define(slots=False)
class Sets:
    number: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value + 1)


@attrs.define
class Makes:
    number: int

    def __new__(cls, *_args: Any, **_words: Any) -> Self:
        return object.__new__(cls)


class Meta(type):
    def __call__(cls, *args: Any, **words: Any) -> Any:
        made: Any = super().__call__(*args, **words)
        made.number += 1
        return made


@attrs.define
class Called(metaclass=Meta):
    number: int


@attrs.define
class Abstract(ABC):
    number: int

    @abstractmethod
    def go(self) -> None: ...


@dataclass
class PostInit:
    number: int

    def __post_init__(self) -> None:
        self.number += 1


@dataclass
class DataByHand:
    number: int

    def __init__(self, number: int) -> None:
        self.number = number + 1


@dataclass
class Once:
    number: int
    extra: InitVar[int] = 0


@dataclass
class SetsData:
    number: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value + 1)


@attrs.frozen
class Renamed:
    number: int = attrs.field(metadata={"sqla_river": {"name": "n"}})


@attrs.frozen
class Holds:
    numbers: list[int]


@attrs.frozen
class Either:
    number: int | str


def _wrapped(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **words: Any) -> None:
        init(self, *args, **words)
        self.number += 1

    return wrapper


@attrs.define
class Wrapped:
    number: int


setattr(Wrapped, "__init__", _wrapped(Wrapped.__init__))  # noqa: B010

MORE: Final[list[type[Any]]] = [
    Converts,
    Validates,
    Follows,
    Computes,
    Prepares,
    Hashes,
    ByHand,
    Sets,
    Makes,
    Called,
    Abstract,
    PostInit,
    DataByHand,
    Once,
    SetsData,
    Renamed,
    Holds,
    Either,
    Wrapped,
]


@pytest.mark.parametrize("cls", MORE, ids=lambda cls: cls.__name__)
def test_a_class_that_does_or_holds_more_is_left_to_our_own_decoder(cls: type) -> None:
    assert quick_decoder(cls) is None


@attrs.frozen
class Bounded:
    kind: ClassVar[str] = "bounded"
    number: Annotated[int, "positive"]


def test_what_is_said_about_a_type_does_not_matter() -> None:
    assert CattrsCodec().decode(Bounded, '{"number": -1}') == Bounded(-1)
