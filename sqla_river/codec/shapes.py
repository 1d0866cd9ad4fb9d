"""How values of declared types look in JSON: one `Shape` per type, strict in both directions. Standard library only.

=====================  ==========================================================================================
Python                 JSON
=====================  ==========================================================================================
str, int, bool, None   as they are; an int of any size up to 4,300 digits
float                  number, finite; an int fits where it is exact, and comes back as a float
datetime               RFC 3339 with an offset, ``Z`` for UTC; a naive one is refused
date, time             ISO 8601; a time may be without a zone
timedelta              int: nanoseconds, what Go writes for ``time.Duration``
UUID, Decimal          text
bytes                  text: base64 with padding, what Go writes for ``[]byte``
Enum, Literal          the value
list, tuple            array
set, frozenset         array, sorted, so that equal args are equal bytes
dict                   object, sorted by key, as Go writes a map; keys may be of any type whose JSON is text or an int
Any, object            passed through: None, bool, int, float, str, list, dict
=====================  ==========================================================================================

Digits beyond the microsecond, which Go writes, are cut off when read. ``Any`` is in `plain`, what holds others in
`containers`.
"""

import binascii
import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from types import NoneType
from typing import Any, Final, TypeGuard
from uuid import UUID

_MICROSECOND: Final = timedelta(microseconds=1)


def shown(text: str) -> str:
    """*text* for an error message: one line, no control or direction characters, at most 60 of its characters."""
    cut = text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def type_name(value: object) -> str:
    return "None" if value is None else shown(type(value).__name__)


def key_name(key: object) -> str:
    """A dict's key for an error's path, where it may not be text."""
    if isinstance(key, str):
        return key
    try:
        return shown(repr(key))
    except Exception:  # noqa: BLE001 - an int of 5,000 digits, an object with a broken repr
        return type_name(key)


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_dict(value: object) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


class Mismatch(Exception):  # noqa: N818 - args.py turns it into an error, with the path from the top
    """A value does not fit its type.

    Args:
        reason: never shows a value, only types.
        detail: goes on where the reason ends, and may show a value; left out where something is redacted.
        none_for: the type that None was given for.
    """

    def __init__(self, reason: str, detail: str = "", none_for: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.none_for = none_for
        self.parts: list[str | int] = []
        """Keys and positions that lead to the value, the innermost first."""


def wrong(expected: str, value: object) -> Mismatch:
    return Mismatch(f"expected {expected}, got {type_name(value)}", none_for=expected if value is None else "")


@dataclass(slots=True, eq=False)
class Shape:
    """One type, both ways.

    ``encode`` gives what JSON can hold and raises `Mismatch` for a value of another type; ``decode`` is its inverse.
    """

    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    json: frozenset[type] = frozenset()
    """The Python types of the JSON values that ``encode`` gives; empty while a recursive type is being built."""
    python: type | None = None
    """Values of exactly this type can only belong here."""
    encode_as_is: str = ""
    """A condition on ``{0}``, in Python, under which the value needs no call; generated code inlines it."""
    decode_as_is: str = ""
    inner: list["Shape"] = field(default_factory=list["Shape"])
    open: bool = False
    """Whether a number stays what JSON made of it (``Any``), so that parsing must be exact."""


def _native(kind: type, convert: Callable[[Any], Any]) -> Shape:
    """Str or int. A subclass is passed on as its base; an Enum only fits its own type, and True is no number."""
    name = kind.__name__

    def encode(value: Any) -> Any:
        if type(value) is kind:
            return value
        if isinstance(value, Enum) and isinstance(value, kind):
            raise Mismatch(
                f"expected {name}, got {type_name(value)}; pass its .value or declare the field as {type_name(value)}"
            )
        if isinstance(value, kind) and not isinstance(value, bool):
            return convert(value)
        raise wrong(name, value)

    def decode(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise wrong(name, value)

    as_is = f"type({{0}}) is {name}"
    return Shape(name, encode, decode, frozenset({kind}), kind, as_is, as_is)


def _singleton(name: str, kind: type, as_is: str) -> Shape:
    def check(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise wrong(name, value)

    return Shape(name, check, check, frozenset({kind}), kind, as_is, as_is)


def encode_float(value: Any) -> float:
    if isinstance(value, bool | Enum) or not isinstance(value, int | float):
        raise wrong("float", value)
    try:
        number = float.__float__(value) if isinstance(value, float) else float(int(value))
    except OverflowError:
        raise Mismatch("an int too large for a float; declare the field as int") from None
    if not math.isfinite(number):
        raise Mismatch("NaN and infinity have no JSON form; declare the field as float | None and pass None")
    if number != value:
        raise Mismatch("an int that a float cannot hold exactly; declare the field as int")
    return number


def _decode_float(value: Any) -> float:
    if type(value) not in {float, int}:
        raise wrong("float", value)
    try:
        number = float(value)  # jsonb gives 1e22 back as an int
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Mismatch("a number too large for a float")
    return number


def _textual(kind: type, write: Callable[[Any], str], read: Callable[[str], Any]) -> Shape:
    """A type whose JSON is text."""
    name = kind.__name__

    def encode(value: Any) -> str:
        if isinstance(value, kind):
            return write(value)
        raise wrong(name, value)

    def decode(value: Any) -> Any:
        if type(value) is not str:
            raise wrong(f"{name} as text", value)
        try:
            return read(value)
        except (ValueError, ArithmeticError):
            raise Mismatch(f"expected {name} as text, got other text", f": {shown(value)}") from None

    return Shape(name, encode, decode, frozenset({str}), kind)


def _write_datetime(value: datetime) -> str:
    offset = value.utcoffset()
    if offset is None:
        raise Mismatch(
            "a datetime without a zone is another moment on every machine; write datetime.now(UTC), "
            "or value.replace(tzinfo=UTC) if it is UTC"
        )
    if offset.seconds % 60 or offset.microseconds:  # local mean time; RFC 3339 knows hours and minutes only
        try:
            value = value.astimezone(UTC)
        except OverflowError:
            raise Mismatch("a datetime that UTC cannot hold") from None
    text = datetime.isoformat(value)
    return f"{text[:-6]}Z" if text.endswith("+00:00") else text


def _read_datetime(text: str) -> datetime:
    value = datetime.fromisoformat(text)
    if value.tzinfo is None:
        raise Mismatch("expected datetime with a zone, got one without")
    return value


def _write_date(value: date) -> str:
    if isinstance(value, datetime):
        raise Mismatch("expected date, got datetime; pass value.date()")
    return date.isoformat(value)


def _write_time(value: time) -> str:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise Mismatch(
            "a time whose zone depends on the day has no JSON form; pass a datetime, or a time without a zone"
        )
    return time.isoformat(value)


def _write_decimal(value: Decimal) -> str:
    if not value.is_finite():
        raise Mismatch("NaN and infinity have no JSON form; declare the field as Decimal | None and pass None")
    return Decimal.__str__(value)


def _read_decimal(text: str) -> Decimal:
    value = Decimal(text)
    if not value.is_finite():
        raise ValueError(text)
    return value


def _encode_timedelta(value: Any) -> int:
    if not isinstance(value, timedelta):
        raise wrong("timedelta", value)
    return value // _MICROSECOND * 1000


def _decode_timedelta(value: Any) -> timedelta:
    if type(value) is not int:
        raise wrong("timedelta as nanoseconds", value)
    try:
        return timedelta(microseconds=value // 1000)
    except OverflowError:
        raise Mismatch("more nanoseconds than a timedelta can hold") from None


STR: Final = _native(str, str.__str__)
INT: Final = _native(int, int.__int__)
NONE: Final = _singleton("None", NoneType, "{0} is None")
SCALARS: Final[dict[Any, Shape]] = {
    str: STR,
    int: INT,
    bool: _singleton("bool", bool, "type({0}) is bool"),
    None: NONE,
    NoneType: NONE,
    # x - x is 0 for all floats but NaN and the infinities
    float: Shape(
        "float",
        encode_float,
        _decode_float,
        frozenset({float}),
        float,
        "type({0}) is float and {0} - {0} == 0",
        "type({0}) is float and {0} - {0} == 0",
    ),
    datetime: _textual(datetime, _write_datetime, _read_datetime),
    date: _textual(date, _write_date, date.fromisoformat),
    time: _textual(time, _write_time, time.fromisoformat),
    timedelta: Shape("timedelta", _encode_timedelta, _decode_timedelta, frozenset({int}), timedelta),
    UUID: _textual(UUID, UUID.__str__, UUID),
    Decimal: _textual(Decimal, _write_decimal, _read_decimal),
    bytes: _textual(
        bytes, lambda value: b64encode(value).decode("ascii"), lambda text: binascii.a2b_base64(text, strict_mode=True)
    ),
}
"""The types that look the same in every class."""


def derived(kind: type, base: Shape) -> Shape:
    """A subclass of str, int, float and the like: its base's JSON, and its own constructor on the way back."""

    def encode(value: Any) -> Any:
        if not isinstance(value, kind):
            raise wrong(kind.__name__, value)
        return base.encode(value)

    def decode(value: Any) -> Any:
        return kind(base.decode(value))

    return Shape(kind.__name__, encode, decode, base.json, kind)


def enum(kind: type[Enum]) -> Shape:
    """An Enum as its value. The values must be text, numbers or None."""
    return _constants(kind.__name__, [(member, member.value) for member in kind], kind)


def literal(values: Sequence[object]) -> Shape:
    name = ", ".join(repr(value) if isinstance(value, str | int) else str(value) for value in values)
    pairs = [(value, value.value if isinstance(value, Enum) else value) for value in values]
    return _constants(f"one of {shown(name)}" if len(values) > 1 else shown(name), pairs, None)


def _constants(name: str, pairs: list[tuple[Any, Any]], kind: type[Enum] | None) -> Shape:
    # True == 1 == 1.0, so the type is part of the key.
    images: dict[tuple[Any, Any], Any] = {(type(value), value): image for value, image in pairs}
    values: dict[tuple[Any, Any], Any] = {(type(image), image): value for value, image in pairs}
    json: frozenset[type] = frozenset(one for one, _ in values)
    if not json <= {str, int, float, bool, NoneType} or any(
        image - image != 0 for one, image in values if one is float
    ):
        raise Mismatch(f"{name} has values that JSON cannot hold; give them text or int values")
    if len(values) < len(images):
        raise Mismatch(f"{name} has two values that look the same in JSON; declare one of them")
    for value, image in pairs:
        if type(image) is float:
            values.setdefault((int, image), value)  # jsonb gives 1e22 back as an int

    def encode(value: Any) -> Any:
        if kind is not None and isinstance(value, kind):
            return value.value
        try:
            return images[type(value), value]
        except (KeyError, TypeError):
            raise wrong(name, value) from None

    def decode(value: Any) -> Any:
        if type(value) not in {str, int, float, bool, NoneType}:
            raise wrong(name, value)
        member = values.get((_type(value), value), pairs)
        if member is not pairs:
            return member
        try:
            return called(value)
        except (ValueError, TypeError):
            raise Mismatch(f"expected {name}, got another {type_name(value)}", f": {shown(repr(value))}") from None

    called = _caller(kind, json)
    return Shape(name, encode, decode, frozenset({int}) if kind and issubclass(kind, Flag) else json, kind)


def _type(value: object) -> type:
    return type(value)


def _caller(kind: type[Enum] | None, json: frozenset[type]) -> Callable[[Any], Any]:
    """What to do with values that no member has: flags combine, and ``_missing_`` may know."""

    def call(value: Any) -> Any:
        if kind is None or type(value) not in (json or {int}):
            raise ValueError
        member = kind(value)
        if isinstance(member, Flag) and value > member.value:
            raise ValueError  # bits that no member has: before Python 3.11.4 a plain Flag drops them without a word
        return member

    return call
