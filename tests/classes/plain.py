"""Classes that are nothing but their fields."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Any, ClassVar, Final, Generic, TypeVar

import attrs

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
