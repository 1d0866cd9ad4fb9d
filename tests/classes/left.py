"""Classes that are left to our own decoder."""

import functools
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from typing import Any, Final, Self

import attrs

from tests.classes.called import DataOverAttrsMore


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
