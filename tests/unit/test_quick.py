"""Decoding in C gives what our own decoder gives: what the constructor makes."""

import functools
import json
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Annotated, Any, ClassVar, Final, Generic, Self, TypeVar, cast

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqla_river import args as args_module
from sqla_river.args import CattrsCodec
from sqla_river.codec.fields import fields_of, has_fields
from sqla_river.codec.quick import quick_decoder
from sqla_river.errors import DecodeError

pytest.importorskip("msgspec")

T = TypeVar("T")


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


@attrs.define
class Slot:
    kind: ClassVar[str] = "slot"
    number: int = 1


class Undecorated(Slot):
    pass


@attrs.define(slots=False)
class Dict:
    kind: ClassVar[str] = "dict"
    number: int = 1


@dataclass
class PlainDict:
    kind: ClassVar[str] = "plain_dict"
    number: int = 1
    text: str = "none"


@dataclass(kw_only=True)
class Keywords:
    text: str
    number: int = 1


@dataclass
class SomeKeywords:
    number: int
    _: KW_ONLY
    text: str = "none"
    share: float


@dataclass
class HandSlots:
    __slots__ = ("number", "text")
    number: int
    text: str


@attrs.frozen
class Bounded:
    number: Annotated[int, "positive"]


@attrs.frozen
class Empty:
    pass


@attrs.frozen(kw_only=True)
class Private:
    _number: int
    __more: int = 2  # pyright: ignore[reportGeneralTypeIssues]
    other: int = attrs.field(alias="_text", default=3)


@attrs.frozen
class GenericBase(Generic[T]):
    number: int


@attrs.frozen
class GenericChild(GenericBase[str]):
    text: str = "none"


FILLED: Final[list[type[Any]]] = [
    Frozen,
    Defined,
    Data,
    Inherits,
    Slot,
    Undecorated,
    HandSlots,
    Bounded,
    Empty,
    Private,
    GenericBase,
    GenericChild,
]
"""Classes that msgspec fills; no constructor is called."""


# ---- classes whose constructor is called --------------------------------------------------------------------------


class AnnotatedAgain(PlainDict):
    number: str = "a"  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleVariableOverride]


class OtherDefault(PlainDict):
    number = 9


class OtherDefaultOfSlot(Slot):
    number = 9


class OtherDefaultInDict(Dict):
    number = 9


@dataclass
class DecoratedAgain(PlainDict):
    number = 9


@dataclass(init=False)
class KeepsInit(PlainDict):
    number: int = 2


class Mixin:
    number: Any = None


@attrs.define(slots=False)
class Mixed(Mixin):
    number: int


@attrs.define
class AttrsOverData(PlainDict):
    share: float = 0.5


@attrs.define
class AttrsAnew(PlainDict):
    number: int  # pyright: ignore[reportGeneralTypeIssues]
    share: float  # pyright: ignore[reportGeneralTypeIssues]


@dataclass
class DataOverAttrs(Slot):
    number: int = 2


@dataclass
class DataOverAttrsMore(Slot):
    text: str = "none"


@attrs.define
class SlotOverDict(Dict):
    text: str = "none"


@attrs.define
class Shadowed:
    number: int = 1


class Property(Shadowed):
    @property
    def number(self) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return 99


class Method(Shadowed):
    def number(self) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return 99


class Tenfold:
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return 5 if instance is None else instance.kept * 10

    def __set__(self, instance: Any, value: Any) -> None:
        instance.kept = value


@dataclass
class Described:
    number: int = cast("int", Tenfold())


@attrs.define
class Answers:
    number: int
    text: str = "none"

    def __getattr__(self, name: str) -> Any:
        return 99


@attrs.define
class Caches:
    number: int

    @functools.cached_property
    def text(self) -> str:
        return "made"


@attrs.define
class OfSelf:
    number: int
    more: int = attrs.Factory(lambda self: self.number + 1, takes_self=True)


@attrs.frozen(slots=False)
class OddDefault:
    number: int = cast("int", attrs.field(default=[]))
    text: str = cast("str", None)


ODD_DEFAULT = OddDefault().number


@attrs.define(on_setattr=attrs.setters.frozen)
class FrozenBySetter:
    number: int


@dataclass(frozen=True)
class FrozenData:
    number: int


class SetsFrozen(FrozenData):
    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError


@dataclass
class PartlyByHand:
    number: int
    text: str = "none"

    def __init__(self, number: int, text: str = "by hand") -> None:
        self.number, self.text = number, text


@attrs.define
class Borrows:
    number: int


@attrs.define
class Lender:
    number: int

    def __attrs_post_init__(self) -> None:
        self.number += 1


@attrs.define
class Owner:
    number: int


class BorrowsBelow(Owner):
    pass


class FollowsBelow(Owner):
    def __attrs_post_init__(self) -> None:
        self.number = 0


class Dies(Owner):
    def __del__(self) -> None:
        assert self.number is not None


setattr(Borrows, "__init__", Lender.__init__)  # noqa: B010
setattr(BorrowsBelow, "__init__", Lender.__init__)  # noqa: B010


@attrs.define
class WrappedExactly:
    number: int


def _executed_wrapper(init: Any) -> Any:
    """What hides best: by its name, that of its code and its parameters it is the constructor."""
    names = {"init": init, "wraps": functools.wraps}
    exec("@wraps(init)\ndef __init__(self, number):\n    init(self, number + 1)", names)
    return names["__init__"]


setattr(WrappedExactly, "__init__", _executed_wrapper(WrappedExactly.__init__))  # noqa: B010


def _executed() -> type[Any]:
    module = types.ModuleType("executed")
    sys.modules["executed"] = module
    exec(
        """
from dataclasses import dataclass
@dataclass(slots=True)
class Executed:
    number: int
    def __init__(self, number: int) -> None: self.number = number + 1
""",
        vars(module),
    )
    return cast("type[Any]", vars(module)["Executed"])


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
class SetsData:
    number: int

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value + 1)


@attrs.frozen
class Renamed:
    number: int = attrs.field(metadata={"sqla_river": {"name": "n"}})


CALLED: Final[list[type[Any]]] = [
    InDict,
    PlainData,
    Dict,
    PlainDict,
    Keywords,
    SomeKeywords,
    AnnotatedAgain,
    OtherDefault,
    OtherDefaultOfSlot,
    OtherDefaultInDict,
    DecoratedAgain,
    KeepsInit,
    Mixed,
    AttrsOverData,
    AttrsAnew,
    DataOverAttrs,
    SlotOverDict,
    Property,
    Method,
    Described,
    Answers,
    Caches,
    OfSelf,
    OddDefault,
    FrozenBySetter,
    SetsFrozen,
    PartlyByHand,
    Borrows,
    BorrowsBelow,
    FollowsBelow,
    Dies,
    WrappedExactly,
    _executed(),
    Converts,
    Validates,
    Follows,
    Computes,
    Prepares,
    Hashes,
    ByHand,
    Sets,
    Abstract,
    PostInit,
    DataByHand,
    SetsData,
    Renamed,
]


# ---- classes left to our own decoder ------------------------------------------------------------------------------


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


class ExactMeta(type):
    def __call__(cls, number: int) -> Any:
        made: Any = super().__call__(number + 1)
        return made


@attrs.define
class CalledExactly(metaclass=ExactMeta):
    number: int


@dataclass
class AsksForAll:
    number: int = 1

    def __init__(self, number: int) -> None:
        self.number = number


@dataclass
class Once:
    number: int
    extra: InitVar[int] = 0


@attrs.define
class Raised(Exception):
    number: int


@dataclass
class TakesAll:
    number: int

    def __init__(self, **words: Any) -> None:
        self.number = words["number"] + 1


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


class Adds:
    """A wrapper that is no function, and shows the code of the one it wraps."""

    def __init__(self, init: Any) -> None:
        self.init = init
        self.__code__ = init.__code__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self

        def call(number: int) -> None:
            self.init(instance, number)
            instance.number += 1

        return call


@attrs.define
class WrappedByObject:
    number: int


setattr(WrappedByObject, "__init__", Adds(WrappedByObject.__init__))  # noqa: B010

LEFT: Final[list[type[Any]]] = [
    CalledExactly,
    AsksForAll,
    DataOverAttrsMore,
    Makes,
    Called,
    Once,
    Raised,
    TakesAll,
    Holds,
    Either,
    Wrapped,
    WrappedByObject,
]

CLASSES: Final = [*FILLED, *CALLED, *LEFT]


# ---- laws -----------------------------------------------------------------------------------------------------------

QUICK: Final = CattrsCodec()
CAREFUL: Final = CattrsCodec()
NAMES: Final = ("number", "_number", "share", "text", "_text", "flag", "more", "n", "other", "_Private__more")
Decoded = tuple[type, list[tuple[str, type, str]], list[tuple[str, type, str]]] | str


def _noted(codec: CattrsCodec, cls: type[Any], raw: str) -> Decoded:
    """What comes of *raw*: its class, its fields, and what its ``__dict__`` holds, in order; or what the error says."""
    if codec is CAREFUL:
        codec._quick[cls] = None
    try:
        made = cast("object", codec.decode(cls, raw))
    except DecodeError as error:
        return str(error)
    fields = [(one.name, getattr(made, one.name, "not set")) for one in fields_of(cls)]
    held = list(vars(made).items()) if type(made).__dictoffset__ else []
    return type(made), _shown(fields), _shown(held)


def _shown(pairs: Iterable[tuple[str, object]]) -> list[tuple[str, type, str]]:
    return [(name, type(value), repr(value)) for name, value in pairs]


def _name_of(cls: type) -> str:
    return cls.__name__


numbers: Final = st.integers(-9, 9) | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values: Final = st.none() | st.booleans() | numbers | st.text() | st.lists(st.integers(), max_size=2)
fitting: Final[dict[str, st.SearchStrategy[Any]]] = {
    "number": st.integers(),
    "_number": st.integers(),
    "share": st.floats(-1, 1),
    "text": st.text(),
    "flag": st.booleans(),
    "more": st.integers(),
}


def _document(pairs: list[tuple[str, Any]]) -> str:
    """An object of these keys, in order, and some of them twice."""
    return "{" + ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs) + "}"


pairs: Final = st.sampled_from([*NAMES, "kind", "unknown"]).flatmap(
    lambda key: st.tuples(st.just(key), fitting.get(key, values) | values)
)
right: Final = st.fixed_dictionaries({}, optional=fitting).flatmap(lambda tree: st.permutations(list(tree.items())))
documents: Final = (right | st.lists(pairs, max_size=7)).map(_document) | st.text(max_size=20)


@settings(max_examples=1_000, deadline=None, derandomize=True, database=None)
@given(cls=st.sampled_from(CLASSES), raw=documents)
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
@example(PlainDict, '{"text": "a", "number": 2}')
@example(PlainDict, '{"text": "a"}')
@example(Mixed, "{}")
@example(AttrsAnew, '{"text": "a", "share": 1, "number": 2}')
def test_the_quick_way_gives_what_the_careful_one_gives(cls: type, raw: str) -> None:
    assert _noted(QUICK, cls, raw) == _noted(CAREFUL, cls, raw)


@pytest.mark.parametrize("cls", CLASSES, ids=_name_of)
@pytest.mark.parametrize(
    "raw",
    [
        "{}",
        '{"number": 3}',
        '{"text": "a", "number": 3}',
        '{"text": "a"}',
        '{"share": 1, "text": "a", "number": 3, "flag": null, "more": 2}',
        '{"number": 3, "number": 4, "text": "a", "unknown": 2}',
        '{"number": null, "text": null}',
        '{"number": "3", "text": "a"}',
        '{"n": 3, "_text": 4, "_number": 5, "_Private__more": 6, "other": 7, "share": 8}',
    ],
)
def test_each_class_is_decoded_as_its_constructor_makes_it(cls: type, raw: str) -> None:
    assert _noted(QUICK, cls, raw) == _noted(CAREFUL, cls, raw)


def test_a_default_is_the_very_object_of_the_constructor() -> None:
    assert QUICK.decode(cast("type[Any]", OddDefault), "{}").number is ODD_DEFAULT


MAKERS: Final[list[Callable[[type], type]]] = [
    attrs.define,
    attrs.frozen,
    attrs.define(kw_only=True),
    attrs.define(slots=False),
    attrs.frozen(slots=False),
    attrs.define(init=False),
    attrs.define(cache_hash=True, frozen=True),
    dataclass,
    dataclass(frozen=True),
    dataclass(slots=True),
    dataclass(frozen=True, slots=True),
    dataclass(kw_only=True),
    dataclass(init=False),
    lambda cls: cls,
]
TYPES: Final[dict[str, Any]] = {"number": int, "text": str | None, "share": float, "flag": bool, "more": int}
DEFAULTS: Final[dict[str, Any]] = {"number": 5, "text": None, "share": 0.25, "flag": True, "more": 6}


def _seven(*_any: object) -> int:
    return 7


MIXINS: Final[list[type]] = [
    type("Nothing", (), {}),
    type("NoSlots", (), {"__slots__": ()}),
    type("Attribute", (), {"text": "mixed in"}),
    type("Slots", (), {"__slots__": ("text",)}),
    type("Shadow", (), {"number": property(_seven)}),
    type("Getter", (), {"__getattr__": _seven}),
]
declared: Final = st.dictionaries(st.sampled_from([*TYPES]), st.booleans(), max_size=4)
layers: Final = st.lists(
    st.tuples(st.sampled_from(MAKERS), declared, st.sampled_from(MIXINS) | st.none(), st.booleans()),
    min_size=1,
    max_size=3,
)


def _grown(layers: list[tuple[Callable[[type], type], dict[str, bool], type | None, bool]]) -> type | None:
    """A class derived from one derived from one; None where that cannot be."""
    bases: list[type] = []
    try:
        for maker, declared, mixin, first in layers:
            if mixin is not None:
                bases.insert(0 if first else len(bases), mixin)
            body: dict[str, Any] = {"__annotations__": {name: TYPES[name] for name in declared}}
            body |= {name: DEFAULTS[name] for name, has_default in declared.items() if has_default}
            bases = [maker(type("Grown", tuple(bases), body))]
    except (TypeError, ValueError):  # frozen from not frozen, no default after a default, slots that collide
        return None
    return bases[0] if has_fields(bases[0]) else None


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(cls=layers.map(_grown).filter(bool), raws=st.lists(documents, min_size=1, max_size=6))
def test_a_class_of_any_descent_is_decoded_as_its_constructor_makes_it(cls: type, raws: list[str]) -> None:
    quick, careful = CattrsCodec(), CattrsCodec()
    careful._quick[cls] = None

    for raw in ["{}", '{"flag": true, "text": "a", "more": 1, "share": 2.5, "number": 3}', *raws]:
        assert _noted(quick, cls, raw) == _noted(careful, cls, raw)


# ---- which way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", FILLED, ids=_name_of)
def test_a_class_that_only_fills_slots_is_filled_in_c(cls: type) -> None:
    decode = quick_decoder(cls)

    assert decode is not None
    assert not hasattr(decode, "__code__")


@pytest.mark.parametrize("cls", CALLED, ids=_name_of)
def test_any_other_constructor_of_plain_fields_is_called(cls: type) -> None:
    assert hasattr(quick_decoder(cls), "__code__")


@pytest.mark.parametrize("cls", LEFT, ids=_name_of)
def test_what_does_or_holds_more_is_left_to_our_own_decoder(cls: type) -> None:
    assert quick_decoder(cls) is None


@pytest.mark.parametrize("cls", [Frozen, PlainDict], ids=_name_of)
@pytest.mark.parametrize("prepared", [True, False])
def test_what_is_quick_is_so_from_the_first_decode_on(
    cls: type[Any], prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str | bytes] = []

    def recorded(cls: type) -> Callable[[str | bytes], Any]:
        decode = quick_decoder(cls)
        assert decode is not None

        def recording(raw: str | bytes) -> Any:
            decoded.append(raw)
            return decode(raw)

        return recording

    monkeypatch.setattr(args_module, "quick_decoder", recorded)
    codec = CattrsCodec()
    if prepared:
        codec.prepare(cls)
    monkeypatch.setattr(args_module, "_load", None)  # the careful way fails

    assert [codec.decode(cls, raw) for raw in ('{"number": 1}', b'{"number": 2}')] == [cls(1), cls(2)]
    assert decoded == ['{"number": 1}', b'{"number": 2}']


@pytest.mark.parametrize("cls", [Frozen, PlainDict], ids=_name_of)
@pytest.mark.parametrize("value", ["1e400", "9" * 5_000])
def test_under_a_key_that_no_field_has_a_number_may_be_too_large(cls: type[Any], value: str) -> None:
    raw = f'{{"number": 1, "unknown": {value}}}'

    assert QUICK.decode(cls, raw) == cls(1)
    assert "too large" in str(_noted(CAREFUL, cls, raw)) or "not JSON" in str(_noted(CAREFUL, cls, raw))
