"""Classes whose constructor is called with what msgspec read."""

import functools
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final, cast

import attrs

from tests.classes.plain import Dict, InDict, Keywords, PlainData, PlainDict, Slot, SomeKeywords


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
