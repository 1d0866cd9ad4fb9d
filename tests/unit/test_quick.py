"""Decoding in C gives what our own decoder gives: what the constructor makes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sqla_river import args as args_module
from sqla_river.args import CattrsCodec
from sqla_river.codec.fields import fields_of, has_fields
from sqla_river.codec.quick import quick_decoder
from sqla_river.errors import DecodeError
from tests.classes.called import CALLED, ODD_DEFAULT, AttrsAnew, Mixed, OddDefault
from tests.classes.left import LEFT
from tests.classes.plain import FILLED, Defined, Frozen, InDict, PlainDict

pytest.importorskip("msgspec")

CLASSES: Final = [*FILLED, *CALLED, *LEFT]
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
