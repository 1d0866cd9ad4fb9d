"""Lists, tuples, sets, dicts and unions of shapes. Standard library only."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, cast

from sqla_river.codec.plain import whole
from sqla_river.codec.shapes import INT, NONE, Mismatch, Shape, is_dict, is_list, key_name, wrong


def array(
    name: str, accepts: type | tuple[type, ...], make: Callable[[list[Any]], Any], item: Shape, *, ordered: bool = True
) -> Shape:
    """list, tuple[X, ...], set, frozenset."""
    encode_item, decode_item = item.encode, item.decode
    name = f"{name}[{item.name}{', ...' if make is tuple else ''}]"

    def encode(value: Any) -> list[Any]:
        if not isinstance(value, accepts):
            raise wrong(name, value)
        out = _each(encode_item, cast("Iterable[Any]", value))
        return out if ordered else sorted(out, key=set_order)

    def decode(value: Any) -> Any:
        if not is_list(value):
            raise wrong("array", value)
        return make(_each(decode_item, value))

    python = accepts if isinstance(accepts, type) else None
    return Shape(name, encode, decode, frozenset({list}), python, inner=[item])


def _each(turn: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    out: list[Any] = []
    try:
        for item in items:
            out.append(turn(item))  # noqa: PERF401 - the length says where it stopped
    except Mismatch as error:
        error.parts.append(len(out))
        raise
    return out


def set_order(image: Any) -> tuple[str, Any]:
    """By what to sort the JSON of a set's items, of whatever types."""
    return type(image).__name__, image if type(image) in {str, int, float} else repr(image)


def _is_tuple(value: object) -> TypeGuard[tuple[Any, ...]]:
    return isinstance(value, tuple)


def fixed(items: Sequence[Shape]) -> Shape:
    """tuple[X, Y]."""
    name = f"tuple[{', '.join(item.name for item in items) or '()'}]"

    def through(turns: list[Callable[[Any], Any]], values: Sequence[Any]) -> list[Any]:
        if len(values) != len(turns):
            raise Mismatch(f"expected {name}, got {len(values)} items")
        pending = iter(turns)

        def turn(value: Any) -> Any:
            return next(pending)(value)

        return _each(turn, values)

    encoders, decoders = [item.encode for item in items], [item.decode for item in items]

    def encode(value: Any) -> list[Any]:
        if not _is_tuple(value):
            raise wrong(name, value)
        return through(encoders, value)

    def decode(value: Any) -> tuple[Any, ...]:
        if not is_list(value):
            raise wrong("array", value)
        return tuple(through(decoders, value))

    return Shape(name, encode, decode, frozenset({list}), tuple, inner=list(items))


def mapping(key: Shape, item: Shape) -> Shape:
    """dict[K, V], where K is text or an int in JSON."""
    if key.open or len(key.json) != 1 or not key.json <= {str, int}:
        raise Mismatch(f"dict keys of type {key.name} cannot be JSON keys; use str, int, UUID, date or an Enum of text")
    name = f"dict[{key.name}, {item.name}]"
    key_in, key_out = (key.encode, key.decode) if str in key.json else _digits(key)
    encode_item, decode_item = item.encode, item.decode

    def encode(value: Any) -> dict[str, Any]:
        if not is_dict(value):
            raise wrong(name, value)
        return dict(sorted(_entries(value, key_in, encode_item).items()))

    def decode(value: Any) -> dict[Any, Any]:
        if not is_dict(value):
            raise wrong("object", value)
        return _entries(value, key_out, decode_item)

    return Shape(name, encode, decode, frozenset({dict}), dict, inner=[key, item])


def _entries(entries: dict[Any, Any], turn_key: Callable[[Any], Any], turn: Callable[[Any], Any]) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    key: Any = None
    try:
        for key, item in entries.items():
            try:
                new = turn_key(key)
            except Mismatch as error:
                error.reason = f"key: {error.reason}"
                error.none_for = ""
                raise
            out[new] = turn(item)
    except Mismatch as error:
        error.parts.append(key_name(key))
        raise
    return out


def _digits(key: Shape) -> tuple[Callable[[Any], str], Callable[[str], Any]]:
    def decode(text: str) -> Any:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or str(number) != text:
            raise Mismatch(f"expected {key.name} in digits")
        return key.decode(number)

    def encode(value: Any) -> str:
        return str(whole(key.encode(value)))

    return encode, decode


def union(members: Sequence[Shape]) -> Shape:
    """X | Y. The JSON must tell which; two members that both look like text, say, are refused."""
    members = sorted(dict.fromkeys(members), key=lambda member: member is NONE)
    name = " | ".join(member.name for member in members)
    decoders: dict[type, Shape] = {}
    for member in members:
        # A float may come back as an int (1e22 does), and an int field may stand beside it: 2 == 2.0.
        for kind in member.json | ({int} if float in member.json and INT not in members else set[type]()):
            if kind in decoders:
                raise Mismatch(
                    f"{decoders[kind].name} and {member.name} look the same in JSON, so the union cannot be read back; "
                    "use an attrs class for each"
                )
            decoders[kind] = member
        if not member.json:
            raise Mismatch(f"{member.name} stands in its own union; name it inside a list or dict only")
    encoders = {member.python: member.encode for member in members if member.python is not None}
    read = {kind: member.decode for kind, member in decoders.items()}

    def encode(value: object) -> Any:
        exact = encoders.get(type(value))
        if exact is not None:
            return exact(value)
        for member in members:
            try:
                return member.encode(value)
            except Mismatch as error:
                if error.parts:  # it is this one, and something inside it is wrong
                    raise
        raise wrong(name, value)

    def decode(value: object) -> Any:
        one = read.get(type(value))
        if one is None:
            raise wrong(name, value)
        return one(value)

    return Shape(
        name,
        encode,
        decode,
        frozenset(decoders),
        encode_as_is=" or ".join(f"({m.encode_as_is})" for m in members if m.encode_as_is),
        decode_as_is=" or ".join(f"({m.decode_as_is})" for m in members if m.decode_as_is),
        inner=list(members),
        open=INT in members and float in decoders,
    )
