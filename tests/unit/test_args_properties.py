"""Whatever fits its declared type comes back equal; whatever does not is refused with a typed error."""

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Optional, cast
from uuid import UUID

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sqla_river.args import DEFAULT_CODEC, CattrsCodec
from sqla_river.errors import DecodeError, EncodeError

modest = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    derandomize=True,
    database=None,
)


class Side(Enum):
    LEFT = "left"
    RIGHT = 2


Typed = tuple[Any, st.SearchStrategy[Any]]
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
floats = st.floats(allow_nan=False, allow_infinity=False)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
keys: list[Typed] = [(str, text), (int, st.integers()), (UUID, st.uuids()), (date, st.dates())]
# Where no type says that it is a float, jsonb's whole number without an exponent may be another number.
untyped_floats = floats.filter(lambda number: abs(number) < 2**53 or number == int(Decimal(repr(number))))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | untyped_floats | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=10,
)
leaves: list[Typed] = [
    *keys,
    (bool, st.booleans()),
    (float, floats),
    (Decimal, decimals),
    (bytes, st.binary()),
    (timedelta, st.timedeltas()),
    (time, st.times()),
    (datetime, st.datetimes(timezones=st.just(UTC))),
    (Side, st.sampled_from(Side)),
    (Any, plain),
]


def bigger(typed: Typed) -> st.SearchStrategy[Typed]:
    kind, values = typed
    makers: list[Any] = [list, tuple, dict, Optional]  # mypy takes list[kind] for an annotation
    lists, tuples, dicts, optional = makers
    options: list[st.SearchStrategy[Typed]] = [
        st.just((lists[kind], st.lists(values, max_size=4))),
        st.just((tuples[kind, ...], st.lists(values, max_size=4).map(tuple))),
        st.just((optional[kind], st.none() | values)),
        st.sampled_from(keys).map(lambda key: (dicts[key[0], kind], st.dictionaries(key[1], values, max_size=4))),
        st.just(record({"a": typed, "b": (int, st.integers())})),
    ]
    return st.one_of(options)


def record(fields: dict[str, Typed]) -> Typed:
    cls: Any = attrs.make_class(
        "Record", {name: attrs.field(type=kind) for name, (kind, _) in fields.items()}, class_body={"kind": "record"}
    )
    return cls, st.builds(cls, **{name: values for name, (_, values) in fields.items()})


types = st.recursive(st.sampled_from(leaves), lambda inner: inner.flatmap(bigger), max_leaves=4)


@modest
@given(st.data())
def test_values_of_declared_types_round_trip(data: st.DataObject) -> None:
    cls, values = record({name: data.draw(types) for name in ("x", "y")})
    args = data.draw(values)
    raw = DEFAULT_CODEC.encode(args)

    assert DEFAULT_CODEC.decode(cls, raw) == args
    assert DEFAULT_CODEC.decode(cls, jsonb(raw)) == args


def jsonb(raw: bytes) -> str:
    """What jsonb makes of it: other key order, other spacing, and whole numbers without an exponent."""
    tree = json.loads(raw, parse_float=lambda digits: int(Decimal(digits)) if "e+" in digits else float(digits))
    return json.dumps(tree, sort_keys=True, indent=1)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.datetimes()
    | st.decimals(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.integers() | st.text() | st.none(), inner)
    ),
    max_leaves=8,
)


@modest
@given(st.data(), anything)
def test_any_value_is_refused_typed_or_comes_back_equal(data: st.DataObject, value: Any) -> None:
    cls: Any = record({"x": data.draw(types)})[0]
    try:
        raw = DEFAULT_CODEC.encode(cls(value))
    except EncodeError:
        return

    assert DEFAULT_CODEC.decode(cls, raw) == cls(value)


@modest
@given(st.data(), plain | st.text() | st.binary())
def test_any_row_decodes_or_raises_decode_error(data: st.DataObject, row: Any) -> None:
    cls: Any = record({"x": data.draw(types)})[0]
    raw = row if isinstance(row, str | bytes) else json.dumps({"x": row})
    try:
        args = DEFAULT_CODEC.decode(cls, raw)
    except DecodeError:
        return

    assert isinstance(args, cast("type[Any]", cls))


@modest
@given(st.sets(text), st.randoms(use_true_random=False))
def test_equal_sets_are_equal_bytes(values: set[str], random: Any) -> None:
    cls: Any = attrs.make_class("Sets", {"x": attrs.field(type=set[str])}, class_body={"kind": "sets"})
    shuffled = list(values)
    random.shuffle(shuffled)

    assert CattrsCodec().encode(cls(values)) == CattrsCodec().encode(cls(set(shuffled)))
