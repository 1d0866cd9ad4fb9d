"""JSON of undeclared type: what ``Any`` takes, and what jsonb refuses. Standard library only."""

from enum import Enum
from types import NoneType
from typing import Any, Final

from sqla_river.codec.shapes import STR, Mismatch, Shape, encode_float, is_dict, is_list, key_name, type_name

MAX_DEPTH: Final = 200
TOO_DEEP: Final = (
    f"nested deeper than {MAX_DEPTH} levels, or holds itself; store it flat, or elsewhere and pass its key"
)
_TOO_LONG: Final = 10**4300  # Python refuses to turn longer ones into text and back (sys.set_int_max_str_digits)


def whole(number: int) -> int:
    if not -_TOO_LONG < number < _TOO_LONG:
        raise Mismatch("an int of more than 4,300 digits cannot be stored; pass it as bytes")
    return int(number)


def text(value: str) -> str:
    if "\0" in value:
        raise Mismatch("holds U+0000, which PostgreSQL cannot store; pass it as bytes")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Mismatch("holds a lone surrogate, which UTF-8 cannot carry; pass it as bytes") from None
    return str.__str__(value)


def plain(value: Any, room: int = MAX_DEPTH) -> Any:
    """A copy of *value*, if it is JSON that PostgreSQL stores and gives back as it was."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Enum):
        raise Mismatch(f"{type_name(value)} has no JSON form where the type is not declared; pass its .value")
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return whole(value)
    if isinstance(value, float):
        return encode_float(value)
    if is_list(value):
        return _plain_list(value, room)
    if is_dict(value):
        return _plain_dict(value, room)
    raise _outsider(value)


def _plain_list(value: list[Any], room: int) -> list[Any]:
    if not room:
        raise Mismatch(TOO_DEEP)
    items: list[Any] = []
    try:
        for item in value:
            items.append(plain(item, room - 1))  # noqa: PERF401 - the length says where it stopped
    except Mismatch as error:
        error.parts.append(len(items))
        raise
    return items


def _plain_dict(value: dict[Any, Any], room: int) -> dict[str, Any]:
    if not room:
        raise Mismatch(TOO_DEEP)
    entries: dict[str, Any] = {}
    key: Any = None
    try:
        for key, item in value.items():
            entries[_plain_key(key)] = plain(item, room - 1)
    except Mismatch as error:
        error.parts.append(key_name(key))
        raise
    return entries


def _outsider(value: object) -> Mismatch:
    name = type_name(value)
    why = "would come back as a list; pass a list" if isinstance(value, tuple) else "has no JSON form; convert it"
    return Mismatch(f"{name} {why}, or declare the type of the field")


def _plain_key(key: Any) -> str:
    try:
        return text(STR.encode(key))
    except Mismatch as error:
        raise Mismatch(f"key: {error.reason}") from None


def by_key(tree: Any) -> Any:
    """*tree* with the keys of its objects in order: equal ones are equal bytes, those that Go writes for a map."""
    if is_dict(tree):
        return {key: by_key(tree[key]) for key in sorted(tree)}
    return [by_key(node) for node in tree] if is_list(tree) else tree


def check_depth(tree: object) -> None:
    """Refuse JSON with more than `MAX_DEPTH` levels, without a recursion of our own."""
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            below += node.values() if isinstance(node, dict) else node
        level = [child for child in below if isinstance(child, dict | list)]
        if not level:
            return
    raise Mismatch(TOO_DEEP)


ANY: Final = Shape(
    "Any",
    lambda value: by_key(plain(value)),
    lambda value: value,
    frozenset({NoneType, bool, int, float, str, list, dict}),
    decode_as_is="True",
    open=True,
)
