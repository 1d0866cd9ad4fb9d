"""The codec's laws, each with orjson and without."""

import dataclasses
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import cattrs
import pytest

from sqla_river import args as args_module
from sqla_river.args import DEFAULT_CODEC, CattrsCodec, Codec, JobArgs, kind_of, redacted, unique_fields
from sqla_river.errors import DecodeError, EncodeError, RegistrationError

T = TypeVar("T")


def name_of(value: Any) -> str:
    """A name for a case that is the same in every process: pytest-xdist compares them."""
    if isinstance(value, int):
        return ""
    if type(value) in {set, frozenset}:
        return str(sorted(map(str, value)))[:40]
    try:
        return type(value).__name__ if isinstance(value, datetime) else str(value)[:40]
    except Exception:  # noqa: BLE001 - some cases are odd on purpose
        return type(value).__name__


@pytest.fixture(autouse=True, params=["msgspec", "orjson", "stdlib"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFAULT_CODEC, "_quick", {})
    if request.param != "msgspec":
        monkeypatch.setattr(args_module, "quick_decoder", dict[type, Any]().get)
    if request.param == "stdlib":
        monkeypatch.setattr(args_module, "_fast_dumps", None)
        monkeypatch.setattr(args_module, "_fast_loads", None)
    else:
        pytest.importorskip(request.param)


def make(annotation: Any, name: str = "x", **field: Any) -> type[Any]:
    """A frozen class with one field."""
    made = attrs.make_class(
        "Made", {name: attrs.field(type=annotation, **field)}, frozen=True, class_body={"kind": "made"}
    )
    return cast("type[Any]", made)


def through(annotation: Any, value: Any) -> Any:
    cls = make(annotation)
    return DEFAULT_CODEC.decode(cls, DEFAULT_CODEC.encode(cls(value))).x


def image(annotation: Any, value: Any) -> Any:
    return json.loads(DEFAULT_CODEC.encode(make(annotation)(value)))["x"]


def refusal(annotation: Any, value: Any) -> str:
    with pytest.raises(EncodeError) as caught:
        DEFAULT_CODEC.encode(make(annotation)(value))
    assert caught.value.__context__ is None
    return str(caught.value)


def rejection(annotation: Any, raw: str | bytes) -> str:
    with pytest.raises(DecodeError) as caught:
        DEFAULT_CODEC.decode(make(annotation), raw)
    assert caught.value.__context__ is None
    return str(caught.value)


def label(it: Any) -> str:
    name = type(it).__name__
    return name if isinstance(it, int | dict | list | datetime) else ascii(it)[:50]


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Mode(StrEnum):
    FAST = "fast"


class Weight(Enum):
    HEAVY = 1e22


class Access(Flag):
    READ = 1
    WRITE = 2


@attrs.frozen
class Address:
    street: str
    zips: list[int] = attrs.field(factory=list[int])


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


@attrs.frozen
class Cat:
    type: Literal["cat"]
    name: str


@attrs.frozen
class Dog:
    type: Literal["dog"]
    name: str


@attrs.frozen
class Node:
    value: int
    children: "list[Node]" = attrs.field(factory=list["Node"])


@attrs.frozen
class Page(Generic[T]):
    items: list[T]


@attrs.frozen
class SendSMS:
    kind: ClassVar[str] = "send_sms"
    order_id: str
    points: int = 0


UserId = NewType("UserId", int)


def not_negative(_args: object, _field: "attrs.Attribute[int]", value: int) -> None:
    if value < 0:
        raise ValueError("too young")


class Slug(str):
    __slots__ = ()


ROUND_TRIPS: list[tuple[Any, Any]] = [
    (str, "zürich \U0001f600 \\u0000 \u2028"),
    (int, 2**200),
    (int, -(2**63) - 1),
    (int, 2**64),
    (int, 10**4299),
    (bool, True),
    (None, None),
    (float, 1e22),
    (float, 5e-324),
    (float, 3),
    (UUID, UUID(int=5)),
    (Decimal, Decimal("-1.10E+400")),
    (bytes, b"\x00\xff"),
    (timedelta, timedelta.max),
    (timedelta, timedelta(microseconds=-1)),
    (time, time(1, 2, 3, 4)),
    (time, time(1, tzinfo=timezone(timedelta(hours=-3, minutes=-30)))),
    (date, date.min),
    (datetime, datetime(2024, 1, 2, 3, 4, 5, 6, UTC)),
    (datetime, datetime(2024, 7, 2, tzinfo=ZoneInfo("Europe/Zurich"))),
    (datetime, datetime(1890, 7, 2, tzinfo=ZoneInfo("Europe/Zurich"))),
    (Color, Color.RED),
    (Level, Level.HIGH),
    (Mode, Mode.FAST),
    (Weight, Weight.HEAVY),
    (Access, Access.READ | Access.WRITE),
    (Access, Access(0)),
    (list[int], [1, 2]),
    (list, [1, {"b": 1, "a": None}]),
    (Sequence[str], ["a"]),
    (set[str], {"a", "b"}),
    (set[int | str], {1, "a"}),
    (frozenset[UUID], frozenset({UUID(int=1), UUID(int=2)})),
    (AbstractSet[int], {1}),
    (tuple[int, ...], (1, 2)),
    (tuple[int, str], (1, "a")),
    (tuple[()], ()),
    (tuple, (1, "a")),
    (dict[str, float], {"a": 1.5}),
    (dict[int, str], {1: "a", 2**70: "b"}),
    (dict[UUID, int], {UUID(int=1): 1}),
    (dict[Color, int], {Color.RED: 1}),
    (dict[Level, int], {Level.LOW: 1}),
    (Mapping[date, int], {date(2024, 1, 1): 1}),
    (dict, {"b": 1, "a": [None]}),
    (str | None, None),
    (str | None, "a"),
    (int | str | None, "3"),
    (int | float, 3),
    (int | float, 3.5),
    (datetime | None, datetime(2024, 1, 1, tzinfo=UTC)),
    (list[int] | str, [1]),
    (Literal["a", 1, True] | None, True),
    (Literal["a", 1, True], 1),
    (Literal[Color.RED], Color.RED),
    (UserId, 5),
    (Annotated[int, "unit"], 5),
    (Annotated[int, []], 5),
    (Final[int], 5),
    (Slug, Slug("a")),
    (Any, {"b": [1, 2.5, None, True, "x", {"z": 2**70}], "a": 1e22}),
    (object, [1]),
    (Address, Address("x", [1])),
    (Point | None, Point(1)),
    (dict[str, list[Point]], {"a": [Point(1, 2)]}),
    (Cat | Dog, Dog("dog", "rex")),
    (Cat | Dog | None, None),
    (Address | Point, Point(1)),
    (Node, Node(1, [Node(2), Node(3, [Node(4)])])),
    (Page[int], Page([1])),
    (list[Page[Point]], [Page([Point(1)])]),
    (Path, Path("/a")),
]


@pytest.mark.parametrize(("annotation", "value"), ROUND_TRIPS, ids=name_of)
def test_values_come_back_equal(annotation: Any, value: Any) -> None:
    back = through(annotation, value)

    assert back == value
    assert type(back) is (
        float if annotation is float else frozenset if annotation == AbstractSet[int] else type(value)
    )


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (datetime, datetime(2024, 1, 2, 3, 4, 5, 600, UTC), "2024-01-02T03:04:05.000600Z"),
        (datetime, datetime(2024, 1, 2, tzinfo=timezone(timedelta(hours=2))), "2024-01-02T00:00:00+02:00"),
        (date, date(2024, 1, 2), "2024-01-02"),
        (time, time(12, 30), "12:30:00"),
        (timedelta, timedelta(seconds=1, microseconds=1), 1_000_001_000),
        (Decimal, Decimal("1.50"), "1.50"),
        (bytes, b"a", "YQ=="),
        (UUID, UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Color, Color.RED, "red"),
        (set[str], {"c", "a", "b"}, ["a", "b", "c"]),
        (dict[int, int], {1: 2}, {"1": 2}),
        (float, 3, 3.0),
        (bool, True, True),
    ],
)
def test_encodings_are_what_go_reads(annotation: Any, value: Any, expected: Any) -> None:
    assert image(annotation, value) == expected


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, "3", "$.x: expected int, got str"),
        (int, True, "$.x: expected int, got bool"),
        (int, 3.0, "$.x: expected int, got float"),
        (int, Level.LOW, "$.x: expected int, got Level; pass its .value or declare the field as Level"),
        (str, Mode.FAST, "$.x: expected str, got Mode; pass its .value or declare the field as Mode"),
        (Mode, "fast", "$.x: expected Mode, got str"),
        (str, b"a", "$.x: expected str, got bytes"),
        (float, "1", "$.x: expected float, got str"),
        (float, True, "$.x: expected float, got bool"),
        (bool, 1, "$.x: expected bool, got int"),
        (date, datetime(2024, 1, 1, tzinfo=UTC), "$.x: expected date, got datetime; pass value.date()"),
        (list[int], (1,), "$.x: expected list[int], got tuple"),
        (list[int], "ab", "$.x: expected list[int], got str"),
        (list[int], [1, "a"], "$.x[1]: expected int, got str"),
        (dict[str, int], {"a b": "c"}, '$.x["a b"]: expected int, got str'),
        (dict[str, int], {1: 1}, '$.x["1"]: key: expected str, got int'),
        (tuple[int, str], (1,), "$.x: expected tuple[int, str], got 1 items"),
        (tuple[int, str], (1, 2), "$.x[1]: expected str, got int"),
        (Address, Address("a", [1, cast("int", "2")]), "$.x.zips[1]: expected int, got str"),
        (list[Point], [Point(cast("int", None))], "$.x[0].x: expected int, got None; if it comes from a row"),
        (int | str, 1.5, "$.x: expected int | str, got float"),
        (list[int] | str, [1.5], "$.x[0]: expected int, got float"),
        (Literal["a", "b"], "c", "$.x: expected one of 'a', 'b', got str"),
        (Literal[1], True, "$.x: expected 1, got bool"),
        (Literal[1], [], "$.x: expected 1, got list"),
        (Cat | Dog, Point(1), "$.x: expected Cat | Dog, got Point"),
        (datetime, datetime(2024, 1, 1), "$.x: a datetime without a zone"),  # noqa: DTZ001
        (time, time(1, tzinfo=ZoneInfo("Europe/Zurich")), "$.x: a time whose zone depends on the day"),
        (float, float("nan"), "$.x: NaN and infinity have no JSON form"),
        (float | None, float("inf"), "$.x: NaN and infinity have no JSON form"),
        (float, 10**400, "$.x: an int too large for a float"),
        (float, 2**53 + 1, "$.x: an int that a float cannot hold exactly"),
        (Decimal, Decimal("NaN"), "$.x: NaN and infinity have no JSON form"),
        (Any, [float("nan")], "$.x[0]: NaN and infinity"),
        (Any, {"a": {"b": float("-inf")}}, "$.x.a.b: NaN and infinity"),
        (Any, {1: 2}, '$.x["1"]: key: expected str, got int'),
        (Any, datetime.now(UTC), "$.x: datetime has no JSON form"),
        (Any, [(1, 2)], "$.x[0]: tuple would come back as a list"),
        (Any, Mode.FAST, "$.x: Mode has no JSON form where the type is not declared; pass its .value"),
        (Any, ["a\0"], "$.x[0]: holds U+0000"),
        (Any, {"a\0": 1}, "holds U+0000"),
        (Any, "\ud800", "$.x: holds a lone surrogate"),
        (str, "\0", "$.x: holds U+0000"),
        (list[str], ["a", "\ud800"], "$.x[1]: holds a lone surrogate"),
        (dict[str, int], {"\0": 1}, "holds U+0000"),
        (dict[str, int], {"\ud800": 1}, "holds a lone surrogate"),
        (int, 10**4300, "$.x: an int of more than 4,300 digits"),
        (Any, -(10**4300), "$.x: an int of more than 4,300 digits"),
        (dict[int, int], {10**5000: 1}, "an int of more than 4,300 digits"),
    ],
    ids=label,
)
def test_what_does_not_fit_is_refused_with_its_path(annotation: Any, value: Any, message: str) -> None:
    assert message in refusal(annotation, value)


def test_none_in_a_required_field_names_the_flush() -> None:
    with pytest.raises(EncodeError) as caught:
        DEFAULT_CODEC.encode(SendSMS(cast("str", None)))

    assert str(caught.value) == (
        "$.order_id: expected str, got None; if it comes from a row that is not flushed yet, "
        "call session.flush() first or declare the field as str | None"
    )
    assert caught.value.path == "$.order_id"


@pytest.mark.parametrize(
    "annotation",
    [
        str | UUID,
        date | datetime,
        list[int] | set[int],
        timedelta | int,
        timedelta | float,
        dict[str, int] | Address,
        Literal["a"] | str,  # noqa: PYI051
        Page[int] | Page[str],
    ],
    ids=name_of,
)
def test_a_union_that_json_cannot_tell_apart_is_refused_at_first_use(annotation: Any) -> None:
    assert "JSON" in refusal(annotation, 1)
    assert "JSON" in rejection(annotation, "{}")


def test_twin_classes_in_a_union_are_refused() -> None:
    assert "cannot be told apart in JSON" in refusal(make(int) | make(int), 1)


class Table(TypedDict):
    a: int


class Pair(NamedTuple):
    a: int


class Odd(Enum):
    A = (1, 2)


@pytest.mark.parametrize(
    "annotation",
    [
        Table,
        Pair,
        complex,
        type,
        Odd,
        IPv4Address,
        dict[float, int],
        dict[Any, int],
        dict[str | None, int],
        Literal[b"a"],
        "Nowhere",
    ],
    ids=name_of,
)
def test_a_type_without_json_form_is_refused_with_its_path(annotation: Any) -> None:
    assert refusal(annotation, 1).startswith("$")
    assert rejection(annotation, '{"x": 1}').startswith("$")


def test_hooks_of_the_converter_serve_unknown_classes() -> None:
    converter = cattrs.Converter()
    converter.register_unstructure_hook(IPv4Address, str)
    converter.register_structure_hook(IPv4Address, lambda value, _: IPv4Address(value))
    codec = CattrsCodec(converter=converter)
    cls = make(IPv4Address | None)

    assert codec.decode(cls, codec.encode(cls(IPv4Address("1.2.3.4")))) == cls(IPv4Address("1.2.3.4"))
    assert codec.decode(cls, codec.encode(cls(None))) == cls(None)
    with pytest.raises(EncodeError, match=r"\$\.x: expected IPv4Address \| None, got str"):
        codec.encode(cls("1.2.3.4"))
    with pytest.raises(DecodeError, match=r"\$\.x: the structure hook of IPv4Address refused it \(AddressValueError\)"):
        codec.decode(cls, '{"x": "no"}')


@pytest.mark.parametrize(
    ("annotation", "raw", "message"),
    [
        (int, '{"x": "3"}', "$.x: expected int, got str"),
        (int, '{"x": true}', "$.x: expected int, got bool"),
        (int, '{"x": 3.0}', "$.x: expected int, got float"),
        (int, '{"x": null}', "$.x: expected int, got None"),
        (int, "{}", "$.x: is missing, and the field has no default"),
        (str, '{"x": 3}', "$.x: expected str, got int"),
        (float, '{"x": "3"}', "$.x: expected float, got str"),
        (float, '{"x": 1' + "0" * 400 + "}", "$.x: a number too large for a float"),
        (float, '{"x": 1e999}', "a number too large for a float"),
        (Any, '{"x": [1e999]}', "a number too large for a float"),
        (UUID, '{"x": "zz"}', "$.x: expected UUID as text, got other text: zz"),
        (UUID, '{"x": 1}', "$.x: expected UUID as text, got int"),
        (Decimal, '{"x": "Infinity"}', "$.x: expected Decimal as text"),
        (bytes, '{"x": "ä"}', "$.x: expected bytes as text"),
        (datetime, '{"x": "2024-01-01T00:00:00"}', "$.x: expected datetime with a zone, got one without"),
        (datetime, '{"x": "0001-99"}', "$.x: expected datetime as text"),
        (timedelta, '{"x": 1' + "0" * 40 + "}", "$.x: more nanoseconds than a timedelta can hold"),
        (Color, '{"x": "green"}', "$.x: expected Color, got another str: 'green'"),
        (Color, '{"x": []}', "$.x: expected Color, got list"),
        (Level, '{"x": true}', "$.x: expected Level, got another bool"),
        (Access, '{"x": 64}', "$.x: expected Access, got another int"),
        (list[int], '{"x": "ab"}', "$.x: expected array, got str"),
        (list[int], '{"x": [1, null]}', "$.x[1]: expected int, got None"),
        (tuple[int, int], '{"x": [1]}', "$.x: expected tuple[int, int], got 1 items"),
        (dict[int, int], '{"x": {"01": 1}}', '$.x["01"]: key: expected int in digits'),
        (dict[str, int], '{"x": []}', "$.x: expected object, got list"),
        (Address, '{"x": {"street": "a", "zips": ["1"]}}', "$.x.zips[0]: expected int, got str"),
        (Cat | Dog, '{"x": {"type": "cow", "name": "a"}}', "$.x: expected object of Cat | Dog, got dict"),
        (Cat | Dog, '{"x": {"type": []}}', "$.x: expected object of Cat | Dog, got dict"),
        (int, "[]", "$: expected object, got list"),
        (int, "null", "$: expected object, got None"),
        (int, "", "$: not JSON"),
        (int, b"\xff", "$: not JSON (UnicodeDecodeError)"),
        (int, "{", "$: not JSON"),
        (int, '{"x": NaN}', "$: not JSON: NaN and infinity"),
        (int, '{"x": ' + "9" * 5000 + "}", "$: not JSON (ValueError)"),
        (int, cast("str", None), "$: not JSON"),
        (int, cast("str", 5), "$: not JSON"),
        (Any, '{"x": ' + "[" * 100_000, "$"),
        (Node, '{"x": ' + '{"value": 1, "children": [' * 900 + "]}" * 900 + "}", "$"),
    ],
    ids=name_of,
)
def test_poison_is_a_decode_error_with_its_path(annotation: Any, raw: str | bytes, message: str) -> None:
    assert message in rejection(annotation, raw)


def test_digits_finer_than_a_microsecond_are_cut() -> None:
    assert DEFAULT_CODEC.decode(make(datetime), '{"x": "2024-01-01T00:00:00.123456789Z"}').x.microsecond == 123456
    assert DEFAULT_CODEC.decode(make(timedelta), '{"x": 1999}').x == timedelta(microseconds=1)


def test_unknown_keys_are_ignored_and_defaults_fill_in() -> None:
    assert DEFAULT_CODEC.decode(SendSMS, b'{"order_id": "a", "new": 1}') == SendSMS("a")


def test_an_int_of_any_size_keeps_its_type() -> None:
    back = DEFAULT_CODEC.decode(make(Any), '{"x": [1' + "0" * 22 + ", 1" + "0" * 400 + "]}").x

    assert [type(one) for one in back] == [int, int]


def test_two_hundred_levels_are_the_limit() -> None:
    def nested(levels: int) -> Any:
        value: Any = 1
        for _ in range(levels):
            value = [value]
        return value

    assert through(Any, nested(200)) == nested(200)
    assert "nested deeper than 200 levels" in refusal(Any, nested(201))


def test_what_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    node = Node(1)
    node.children.append(node)

    assert "holds itself" in refusal(Any, loop)
    assert "holds itself" in refusal(Node, node)


def test_a_deep_tree_of_a_recursive_class_is_refused() -> None:
    node = Node(1)
    for _ in range(120):
        node = Node(1, [node])

    assert "nested deeper than 200 levels" in refusal(Node, node)


def test_encoding_is_a_copy() -> None:
    items = [1]
    args = make(list[int])(items)
    raw = DEFAULT_CODEC.encode(args)
    items.append(2)

    assert json.loads(raw) == {"x": [1]}


def test_more_than_max_bytes_names_both_sizes() -> None:
    codec = CattrsCodec(max_bytes=20)

    with pytest.raises(EncodeError, match=r"the args take 36 bytes as JSON, more than max_bytes=20"):
        codec.encode(SendSMS("1234567890"))


@attrs.frozen
class Reversed:
    b: Any
    a: Any


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (Any, {"b": 1, "a": [{"d": 1, "c": {"f": 1, "e": 2}}]}, '{"a":[{"c":{"e":2,"f":1},"d":1}],"b":1}'),
        (dict[str, int], {"z": 1, "é": 2, "\U0001f600": 3, "\uffff": 4}, '{"z":1,"é":2,"\uffff":4,"\U0001f600":3}'),
        (dict[int, Any], {9: {"b": 1, "a": 2}, 10: 1}, '{"10":1,"9":{"a":2,"b":1}}'),
        (Reversed, Reversed({"d": 1, "c": 2}, 1), '{"b":{"c":2,"d":1},"a":1}'),
        (dict[str, Reversed], {"x": Reversed(1, 2)}, '{"x":{"b":1,"a":2}}'),
        (set[frozenset[str]], {frozenset("ba"), frozenset("a")}, '[["a","b"],["a"]]'),
    ],
    ids=["Any", "text", "numbers", "fields", "fields in a mapping", "sets"],
)
def test_keys_of_mappings_are_sorted_and_fields_are_not(kind: Any, value: Any, text: str) -> None:
    """As Go writes them; so equal args are equal bytes, of which a unique key is made."""
    assert DEFAULT_CODEC.encode(make(kind)(value)).decode() == f'{{"x":{text}}}'


@attrs.frozen
class Marked:
    kind: ClassVar[str] = "marked"
    user: str = attrs.field(metadata={"sqla_river": {"name": "userId", "unique": True}})
    token: Any = attrs.field(default=None, metadata={"sqla_river": {"redact": True}})
    note: str = attrs.field(default="", validator=attrs.validators.max_len(5))


def test_a_field_can_have_another_json_key() -> None:
    assert json.loads(DEFAULT_CODEC.encode(Marked("a")))["userId"] == "a"
    assert DEFAULT_CODEC.decode(Marked, '{"userId": "b"}') == Marked("b")
    with pytest.raises(DecodeError, match=r"\$\.userId: expected str"):
        DEFAULT_CODEC.decode(Marked, '{"userId": 1}')


@pytest.mark.parametrize(
    "token",
    [{"hunter2": float("nan")}, {"a": {"hunter2": {1}}}, ["\0hunter2"], {"hunter2\0": 1}, {"hunter2": 10**5000}],
    ids=name_of,
)
def test_redacted_values_stay_out_of_encode_errors(token: Any) -> None:
    with pytest.raises(EncodeError) as caught:
        DEFAULT_CODEC.encode(Marked("a", token))

    assert str(caught.value).startswith("$.token: ")
    assert "hunter2" not in str(caught.value)


def test_redacted_values_stay_out_of_decode_errors() -> None:
    @attrs.frozen
    class Login:
        kind: ClassVar[str] = "login"
        password: str = attrs.field(
            validator=attrs.validators.matches_re("x"), metadata={"sqla_river": {"redact": True}}
        )
        mode: Literal["a"] = "a"

        def __attrs_post_init__(self) -> None:
            if self.password == "xhunter2":
                raise ValueError(f"bad password {self.password}")

    for raw in ('{"password": "hunter2"}', '{"password": "xhunter2"}', '{"password": "x", "mode": "hunter2"}'):
        with pytest.raises(DecodeError) as caught:
            DEFAULT_CODEC.decode(Login, raw)
        assert "hunter2" not in str(caught.value)
        assert "hunter2" not in repr(caught.value.__context__)


def test_redacted_gives_keys_at_any_depth() -> None:
    @dataclasses.dataclass
    class Inner:
        pin: str = dataclasses.field(metadata={"sqla_river": {"redact": True, "name": "PIN"}})

    cls = make(list[Inner] | None)

    assert redacted(Marked) == {"token"}
    assert redacted(cls) == {"PIN"}
    assert redacted(SendSMS) == frozenset()
    assert redacted(cast("type[JobArgs]", SimpleNamespace)) == frozenset()


def test_unique_fields_follow_river() -> None:
    @attrs.frozen
    class Inner:
        a: int = attrs.field(metadata={"sqla_river": {"unique": True}})
        b: int

    @dataclasses.dataclass
    class Outer:
        kind: ClassVar[str] = "outer"
        z: str = dataclasses.field(metadata={"sqla_river": {"unique": True, "name": "Z"}})
        inner: Inner = dataclasses.field(metadata={"sqla_river": {"unique": True}})
        maybe: Inner | None
        many: list[Inner]
        whole: Point = dataclasses.field(metadata={"sqla_river": {"unique": True}})
        again: "Outer | None" = None

    assert unique_fields(Outer) == ["Z", "inner.a", "maybe.a", "whole"]
    assert unique_fields(Marked) == ["userId"]
    assert unique_fields(SendSMS) == []


@pytest.mark.parametrize(
    "marks", [{"redacted": True}, {"name": ""}, {"name": 1}, {"redact": 1}, ["unique"], {"unique": True, "name": "a.b"}]
)
def test_a_mistaken_mark_is_refused(marks: Any) -> None:
    cls = make(int, metadata={"sqla_river": marks})

    with pytest.raises(RegistrationError, match=r"metadata|path"):
        redacted(cls)
    with pytest.raises(EncodeError, match=r"metadata|path"):
        DEFAULT_CODEC.encode(cls(1))


def test_two_fields_with_one_key_are_refused() -> None:
    cls = attrs.make_class("Twice", {"a": attrs.field(), "b": attrs.field(metadata={"sqla_river": {"name": "a"}})})

    with pytest.raises(EncodeError, match="two fields with the JSON key 'a'"):
        DEFAULT_CODEC.encode(cast("Any", cls)(1, 2))


def test_a_validator_s_message_is_cut_to_its_first_argument() -> None:
    @attrs.frozen
    class Mail:
        kind: ClassVar[str] = "mail"
        to: str = attrs.field(
            validator=attrs.validators.matches_re(r".+@.+"), metadata={"sqla_river": {"name": "recipient"}}
        )
        age: int = attrs.field(default=1, validator=not_negative)

    with pytest.raises(DecodeError) as caught:
        DEFAULT_CODEC.decode(Mail, '{"recipient": "x"}')
    assert str(caught.value) == "$.recipient: Mail refused it (ValueError): 'recipient".replace(
        "'recipient", "'to' must match regex '.+@.+' ('x' doesn't)"
    )
    with pytest.raises(DecodeError, match=r"^\$\.age: Mail refused it \(ValueError\): too young$"):
        DEFAULT_CODEC.decode(Mail, '{"recipient": "x@y", "age": -1}')


def test_long_and_unprintable_values_are_shortened_and_escaped() -> None:
    message = rejection(Color, json.dumps({"x": "a\x1b[31m\u202e" + "b" * 500}))

    assert len(message) < 150
    assert message.isprintable()
    assert len(refusal(dict[str, int], {"k" * 5000: "a"})) < 150


def test_subclasses_pass_as_their_base_but_records_do_not() -> None:
    class Word(str):
        __slots__ = ()

    class Real(float):
        __slots__ = ()

    @attrs.frozen
    class Villa(Address):
        rooms: int = 1

    assert type(through(str, Word("a"))) is str
    assert through(float, Real(1.5)) == 1.5
    assert through(Any, {Word("a"): [Word("b"), Real(1.5)]}) == {"a": ["b", 1.5]}
    assert "got its subclass Villa" in refusal(Address, Villa("a"))


@pytest.mark.parametrize("frozen", [True, False])
def test_dataclasses_and_classes_made_at_run_time_work(frozen: bool) -> None:
    made: Any = dataclasses.make_dataclass("Made", ["x", ("y", "list[int]")], frozen=frozen, namespace={"kind": "made"})
    untyped: Any = attrs.make_class("Untyped", ["x"], frozen=frozen, class_body={"kind": "untyped"})

    assert DEFAULT_CODEC.decode(made, DEFAULT_CODEC.encode(made(1, [2]))) == made(1, [2])
    assert DEFAULT_CODEC.decode(untyped, DEFAULT_CODEC.encode(untyped([1, "a"]))) == untyped([1, "a"])


def test_private_keyword_only_computed_and_empty_classes_work() -> None:
    @attrs.frozen(kw_only=True)
    class Private:
        kind: ClassVar[str] = "private"
        _secret: int
        double: int = attrs.field(init=False, default=2)

    @attrs.frozen
    class Empty:
        kind: ClassVar[str] = "empty"

    args = cast("Any", Private)(secret=1)

    assert DEFAULT_CODEC.encode(args) == b'{"_secret":1}'
    assert DEFAULT_CODEC.decode(Private, b'{"_secret":1}') == args
    assert DEFAULT_CODEC.decode(Empty, DEFAULT_CODEC.encode(Empty())) == Empty()


def test_only_the_types_of_fields_must_resolve() -> None:
    @attrs.frozen
    class Later:
        kind: ClassVar[str] = "later"
        options: ClassVar["Nowhere"] = None  # type: ignore[name-defined]  # noqa: F821  # pyright: ignore[reportUndefinedVariable, reportUnknownVariableType]
        at: "date"

    assert DEFAULT_CODEC.decode(Later, DEFAULT_CODEC.encode(Later(date.min))) == Later(date.min)
    with pytest.raises(EncodeError, match=r"the type of field 'x' of Made cannot be resolved"):
        DEFAULT_CODEC.encode(make("Nowhere")(1))


def test_a_long_path_is_shortened() -> None:
    value: Any = float("nan")
    for n in range(100):
        value = {f"key{n}": value}

    assert len(refusal(Any, value)) < 250


def test_a_class_in_a_function_may_name_itself() -> None:
    @attrs.frozen
    class Chain:
        kind: ClassVar[str] = "chain"
        next: "Chain | None" = None

    assert DEFAULT_CODEC.decode(Chain, DEFAULT_CODEC.encode(Chain(Chain()))) == Chain(Chain())


def test_a_constructor_that_wants_more_is_refused_before_enqueueing() -> None:
    @dataclasses.dataclass
    class Wanting:
        kind: ClassVar[str] = "wanting"
        a: int
        b: dataclasses.InitVar[int]

    with pytest.raises(EncodeError, match="the constructor of Wanting and its fields differ in 'b'"):
        DEFAULT_CODEC.encode(Wanting(1, 2))


def test_a_field_that_is_not_set_is_refused() -> None:
    args = SendSMS("a")
    object.__delattr__(args, "points")

    with pytest.raises(EncodeError, match=r"^\$\.points: is not set$"):
        DEFAULT_CODEC.encode(args)


def test_a_class_without_fields_is_refused() -> None:
    class Bare:
        kind: ClassVar[str] = "bare"

    with pytest.raises(EncodeError, match=r"class Bare has no fields; decorate it"):
        DEFAULT_CODEC.encode(Bare())
    with pytest.raises(DecodeError, match=r"class Bare has no fields"):
        DEFAULT_CODEC.decode(Bare, "{}")


def test_kind_of_takes_a_class_or_an_instance() -> None:
    assert kind_of(SendSMS) == kind_of(SendSMS("a")) == "send_sms"


@pytest.mark.parametrize("kind", [None, 3, "", b"a"])
def test_a_class_without_kind_is_refused_with_the_way_out(kind: Any) -> None:
    cls = type("Nameless", (), {"kind": kind})

    with pytest.raises(RegistrationError, match=r"write 'kind: ClassVar\[str\] = \"send_sms\"' in the class body"):
        kind_of(cls)
    with pytest.raises(EncodeError, match=r"class Nameless"):
        kind_of(cls())


def test_a_kind_that_is_a_field_is_refused() -> None:
    with pytest.raises(RegistrationError, match="is a field or property"):
        kind_of(attrs.make_class("F", {"kind": attrs.field(type=str)}, slots=True))


def test_many_threads_compile_one_class_once() -> None:
    codec = CattrsCodec()
    start = threading.Barrier(8)
    plans: list[int] = []

    def run() -> None:
        start.wait()
        plans.append(id(codec.plan(SendSMS)))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(plans)) == 1


def test_the_default_codec_is_a_codec() -> None:
    codec: Codec = DEFAULT_CODEC

    assert isinstance(codec, CattrsCodec)


@attrs.define(init=False)
class Hidden:
    """Its constructor, written by hand, has a default that its signature does not show."""

    kind: ClassVar[str] = "hidden"
    x: int
    y: int = 5

    def __init__(self, x: int, **more: int) -> None:
        self.x = x
        self.y = more.get("y", 7)


@attrs.frozen
class Made:
    kind: ClassVar[str] = "made"
    x: int = 3
    y: list[int] = attrs.field(factory=lambda: [1])


def test_a_key_that_is_not_there_leaves_its_default_to_the_constructor() -> None:
    codec = CattrsCodec()

    assert (codec.decode(Hidden, b'{"x": 1}').y, codec.decode(Hidden, b'{"x": 1, "y": 2}').y) == (7, 2)
    assert (codec.decode(Made, b"{}"), codec.decode(Made, b'{"y": [2]}')) == (Made(3, [1]), Made(3, [2]))
    assert codec.decode(Made, b"{}").y is not codec.decode(Made, b"{}").y


@pytest.mark.skipif(sys.version_info < (3, 12), reason="'type' statement")
def test_recursive_type_aliases_work() -> None:
    names: dict[str, Any] = {}
    exec("type Tree = dict[str, Tree] | int", names)

    assert through(names["Tree"], {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert "$.x.a: expected" in refusal(names["Tree"], {"a": "b"})
