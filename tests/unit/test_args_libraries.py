"""pydantic models and msgspec Structs as args classes: each of both, where they can be written alike."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final
from uuid import UUID

import msgspec
import pydantic
import pytest

from sqla_river import args as args_module
from sqla_river.args import DEFAULT_CODEC, CattrsCodec, redacted, unique_fields
from sqla_river.config import Settings
from sqla_river.errors import DecodeError, EncodeError, RegistrationError
from sqla_river.options import InsertOptions
from sqla_river.unique import Unique

SOME_ID = UUID("6a35b2e1-7e2b-4b9e-9d5d-6f2c1b8d3a10")


@pytest.fixture(autouse=True, params=["orjson", "stdlib"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stdlib":
        monkeypatch.setattr(args_module, "_fast_dumps", None)
        monkeypatch.setattr(args_module, "_fast_loads", None)


class PersonModel(pydantic.BaseModel):
    age: int
    name: str = ""


class Model(pydantic.BaseModel):
    kind: ClassVar[str] = "model"
    options: ClassVar[InsertOptions] = InsertOptions(queue="slow", max_attempts=3)
    user: PersonModel
    friends: list[PersonModel] = []
    by_number: dict[int, Decimal] = {}
    at: datetime | None = None
    day: date | None = None
    id: UUID | None = None
    pause: timedelta = timedelta(0)
    tags: frozenset[str] = frozenset()
    pair: tuple[int, str] = (0, "")
    ratio: float | None = None
    anything: Any = None


class PersonStruct(msgspec.Struct):
    age: int
    name: str = ""


class Struct(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "struct"
    options: ClassVar[InsertOptions] = InsertOptions(queue="slow", max_attempts=3)
    user: PersonStruct
    friends: list[PersonStruct] = []
    by_number: dict[int, Decimal] = {}
    at: datetime | None = None
    day: date | None = None
    id: UUID | None = None
    pause: timedelta = timedelta(0)
    tags: frozenset[str] = frozenset()
    pair: tuple[int, str] = (0, "")
    ratio: float | None = None
    anything: Any = None


BOTH = pytest.mark.parametrize(
    ("cls", "person"), [(Model, PersonModel), (Struct, PersonStruct)], ids=["model", "struct"]
)


def refusal(args: Any) -> EncodeError:
    with pytest.raises(EncodeError) as caught:
        DEFAULT_CODEC.encode(args)
    assert caught.value.__context__ is None
    return caught.value


def rejection(cls: Any, raw: str) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        DEFAULT_CODEC.decode(cls, raw)
    assert caught.value.__context__ is None
    return caught.value


@BOTH
def test_what_is_enqueued_comes_back(cls: Any, person: Any) -> None:
    sent = cls(
        user=person(age=3, name="Ann \U0001f600"),
        friends=[person(age=10**30)],
        by_number={7: Decimal("1.10")},
        at=datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        day=date(2026, 1, 2),
        id=SOME_ID,
        pause=timedelta(seconds=1.5),
        tags=frozenset({"a", "b"}),
        pair=(1, "x"),
        ratio=1e22,
        anything={"deep": [1, 2.5, None, True, "\\u0000"]},
    )

    raw = DEFAULT_CODEC.encode(sent)

    assert DEFAULT_CODEC.decode(cls, raw) == sent
    assert json.loads(raw)["user"] == {"age": 3, "name": "Ann \U0001f600"}


@BOTH
def test_a_float_that_jsonb_gives_back_as_an_int_is_a_float_again(cls: Any, person: Any) -> None:
    back = DEFAULT_CODEC.decode(cls, '{"user": {"age": 1}, "ratio": 10000000000000000000000}')

    assert type(back.ratio) is float
    assert back.ratio == 1e22


@BOTH
def test_class_options_count(cls: Any, person: Any) -> None:
    row = Settings().one(cls(user=person(age=1)))

    assert (row.kind, row.queue, row.max_attempts) == (cls.kind, "slow", 3)


@BOTH
def test_unknown_keys_are_ignored_and_missing_ones_take_their_default(cls: Any, person: Any) -> None:
    assert DEFAULT_CODEC.decode(cls, '{"user": {"age": 1, "new": 2}, "newer": 3}') == cls(user=person(age=1))


@BOTH
@pytest.mark.parametrize(
    ("raw", "path", "words"),
    [
        ('{"user": {"age": "x"}}', "$.user.age", "int"),
        ('{"user": {"age": 1}, "friends": [{"age": 1}, {}]}', "$.friends[1]", "missing"),
        ("{}", "$", "missing"),
        ('{"user":', "$", "not JSON"),
        ("[]", "$", ""),
    ],
)
def test_what_no_longer_fits_is_named_by_its_path(cls: Any, person: Any, raw: str, path: str, words: str) -> None:
    error = rejection(cls, raw)

    assert error.path.startswith(path)
    assert words in str(error)


@BOTH
@pytest.mark.parametrize(
    ("field", "value", "path", "words"),
    [
        ("anything", [math.nan], "$.anything", "NaN and infinity"),
        ("ratio", math.inf, "$.ratio", "NaN and infinity"),
        ("anything", {"a": "x\0"}, "$.anything.a", "U+0000"),
        ("anything", ["\ud800"], "$.anything[0]", "lone surrogate"),
        ("anything", object(), "$", "object"),
        ("anything", (1,), "$.anything", "would come back as list"),
    ],
)
def test_what_jsonb_cannot_hold_is_refused_with_its_path(
    cls: Any, person: Any, field: str, value: Any, path: str, words: str
) -> None:
    error = refusal(cls(user=person(age=1), **{field: value}))

    assert error.path.startswith(path)
    assert words in str(error)


def test_values_that_nobody_validated_are_refused_when_enqueueing() -> None:
    assert refusal(Struct(user=PersonStruct(age="x"))).path == "$.user.age"  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert refusal(Model.model_construct(user=PersonModel.model_construct(age="x"))).path == "$.user.age"
    coerced = refusal(Model.model_construct(user=PersonModel.model_construct(age="5")))
    assert str(coerced).startswith("$.user.age: is str and would come back as int")


@BOTH
def test_size_and_depth_are_bounded(cls: Any, person: Any) -> None:
    with pytest.raises(EncodeError, match="max_bytes=100"):
        CattrsCodec(max_bytes=100).encode(cls(user=person(age=1), anything="x" * 100))
    ring: list[Any] = []
    ring.append(ring)
    assert "holds itself" in str(refusal(cls(user=person(age=1), anything=ring))) or "Circular" in str(
        refusal(cls(user=person(age=1), anything=ring))
    )


# ---- what pydantic alone has ------------------------------------------------------------


class Secret(pydantic.BaseModel):
    kind: ClassVar[str] = "secret"
    user: str = ""
    password: pydantic.SecretStr


class OpenSecret(Secret):
    kind: ClassVar[str] = "open_secret"

    @pydantic.field_serializer("password", when_used="json")
    def _reveal(self, password: pydantic.SecretStr) -> str:
        return password.get_secret_value()


def test_a_secret_that_would_be_stored_as_its_mask_is_refused() -> None:
    error = refusal(Secret(password=pydantic.SecretStr("sesame")))

    assert error.path == "$.password"
    assert "field_serializer" in str(error)
    assert "sesame" not in str(error)


def test_a_secret_with_a_serializer_travels_and_is_redacted() -> None:
    sent = OpenSecret(password=pydantic.SecretStr("sesame"))

    assert DEFAULT_CODEC.decode(OpenSecret, DEFAULT_CODEC.encode(sent)) == sent
    assert redacted(OpenSecret) == {"password"}


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)
    kind: ClassVar[str] = "strict"
    day: date
    id: UUID
    pair: tuple[int, ...]

    @pydantic.computed_field
    def year(self) -> int:
        return self.day.year


def test_a_strict_model_is_read_as_json_where_text_is_a_date() -> None:
    sent = Strict(day=date(2026, 1, 2), id=SOME_ID, pair=(1, 2))

    raw = DEFAULT_CODEC.encode(sent)

    assert DEFAULT_CODEC.decode(Strict, raw) == sent
    assert "year" not in json.loads(raw)  # the model forbids keys that are no fields
    assert rejection(Strict, raw.decode().replace("[1,2]", '["1"]')).path == "$.pair[0]"


class Aliased(pydantic.BaseModel):
    kind: ClassVar[str] = "aliased"
    order_id: int = pydantic.Field(alias="orderId", json_schema_extra={"sqla_river": {"unique": True}})
    note: str = pydantic.Field(default="", json_schema_extra={"sqla_river": {"redact": True}})


class OneWay(pydantic.BaseModel):
    kind: ClassVar[str] = "one_way"
    order_id: int = pydantic.Field(validation_alias="orderId")


def test_the_alias_is_the_json_key() -> None:
    sent = Aliased(orderId=7)

    assert json.loads(DEFAULT_CODEC.encode(sent)) == {"orderId": 7, "note": ""}
    assert DEFAULT_CODEC.decode(Aliased, '{"orderId": 7}') == sent
    assert unique_fields(Aliased) == ["orderId"]
    assert redacted(Aliased) == {"note"}


def test_a_model_that_does_not_read_what_it_writes_is_refused_when_enqueueing() -> None:
    error = refusal(OneWay.model_validate({"orderId": 7}))

    assert error.path == "$.orderId"
    assert "missing" in str(error)


class Excluding(pydantic.BaseModel):
    kind: ClassVar[str] = "excluding"
    kept: int = 0
    lost: int = pydantic.Field(default=0, exclude=True)


def test_a_field_that_is_left_out_may_hold_nothing_but_its_default() -> None:
    DEFAULT_CODEC.encode(Excluding(kept=1))

    assert refusal(Excluding(lost=1)).path == "$.lost"


class Serialized(pydantic.BaseModel):
    kind: ClassVar[str] = "serialized"
    secret: str = pydantic.Field(default="", json_schema_extra={"sqla_river": {"redact": True}})
    positive: int = 1

    @pydantic.field_validator("positive")
    @classmethod
    def _check(cls, value: int) -> int:
        if value < 0:
            raise ValueError(f"{value} is below zero")
        return value


def test_a_validators_own_words_are_told_unless_something_is_redacted() -> None:
    class Plain(Serialized):
        secret: str = ""

    assert rejection(Plain, '{"positive": -5}').path == "$.positive"
    assert "-5 is below zero" in str(rejection(Plain, '{"positive": -5}'))
    assert "-5" not in str(rejection(Serialized, '{"positive": -5}'))


def test_a_root_model_that_is_no_object_is_refused() -> None:
    class Root(pydantic.RootModel[list[int]]):
        kind: ClassVar[str] = "root"

    assert "no object in JSON" in str(refusal(Root([1])))


SECRET: dict[str, Any] = {"sqla_river": {"redact": True}}


def test_a_mark_inside_a_union_or_list_counts() -> None:
    class InModel(pydantic.BaseModel):
        kind: ClassVar[str] = "in_model"
        a: Annotated[str, pydantic.Field(json_schema_extra=SECRET)] | None = None
        b: list[Annotated[str, pydantic.Field(json_schema_extra=SECRET)]] = []
        c: list[pydantic.SecretStr] | None = None
        d: str = ""

    class InStruct(msgspec.Struct):
        kind: ClassVar[str] = "in_struct"
        a: Annotated[str, msgspec.Meta(extra=SECRET)] | None = None
        b: list[Annotated[str, msgspec.Meta(extra=SECRET)]] = []
        d: str = ""

    assert redacted(InModel) == {"a", "b", "c"}
    assert redacted(InStruct) == {"a", "b"}


def test_marks_of_a_model_are_checked() -> None:
    class Named(pydantic.BaseModel):
        kind: ClassVar[str] = "named"
        x: int = pydantic.Field(default=0, json_schema_extra={"sqla_river": {"name": "y"}})

    class Misspelt(pydantic.BaseModel):
        kind: ClassVar[str] = "misspelt"
        x: int = pydantic.Field(default=0, json_schema_extra={"sqla_river": {"redacted": True}})

    with pytest.raises(RegistrationError, match="use an alias"):
        redacted(Named)
    with pytest.raises(RegistrationError, match="'name', 'redact', 'unique'"):
        redacted(Misspelt)


# ---- what msgspec alone has -------------------------------------------------------------


class Renamed(msgspec.Struct, rename="camel", omit_defaults=True):
    kind: ClassVar[str] = "renamed"
    order_id: Annotated[int, msgspec.Meta(extra={"sqla_river": {"unique": True}}, gt=0)]
    api_key: Annotated[str, msgspec.Meta(extra={"sqla_river": {"redact": True}}, max_length=3)] = ""


def test_renamed_fields_and_marks_of_a_struct() -> None:
    assert DEFAULT_CODEC.encode(Renamed(7)) == b'{"orderId":7}'
    assert DEFAULT_CODEC.decode(Renamed, '{"orderId": 7}') == Renamed(7)
    assert unique_fields(Renamed) == ["orderId"]
    assert redacted(Renamed) == {"apiKey"}


def test_constraints_of_a_struct_are_checked_when_enqueueing() -> None:
    assert refusal(Renamed(0)).path == "$.orderId"
    assert refusal(Renamed(1, "long")).path == "$.apiKey"


def test_a_struct_that_is_an_array_is_refused() -> None:
    class Array(msgspec.Struct, array_like=True):
        kind: ClassVar[str] = "array"
        x: int = 0

    assert "no object in JSON" in str(refusal(Array()))


def test_a_struct_that_msgspec_cannot_read_is_refused() -> None:
    class Both(msgspec.Struct):
        kind: ClassVar[str] = "both"
        x: str | date = ""

    assert "msgspec cannot read Both" in str(refusal(Both()))


def test_a_struct_without_equality_is_compared_field_by_field() -> None:
    class Unequal(msgspec.Struct, eq=False):
        kind: ClassVar[str] = "unequal"
        x: Any = 0

    DEFAULT_CODEC.encode(Unequal(1))
    assert refusal(Unequal((1,))).path == "$.x"


# ---- both -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    b: Any
    a: Any


class Holding(pydantic.BaseModel, extra="allow"):
    kind: ClassVar[str] = "holding"
    z: Any = None
    model: "Holding | None" = pydantic.Field(default=None, serialization_alias="other", validation_alias="other")
    tags: set[str] = set()
    by_number: dict[int, set[str]] = {}
    rows: list[Inner] = []
    rooted: pydantic.RootModel[dict[str, int]] | None = None


class Held(msgspec.Struct, tag="held", rename="camel"):
    kind: ClassVar[str] = "held"
    z: Any = None
    other_one: "Held | None" = None
    tags: set[str] = set()
    by_number: dict[int, set[str]] = {}
    rows: list[Inner] = []


WORDS: Final = ("ape", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


def test_equal_models_are_equal_bytes_and_their_fields_keep_their_order() -> None:
    def made(words: Sequence[str]) -> Holding:
        mapping = dict.fromkeys(words, 1)
        given: Any = {word: {"n": mapping} for word in words}
        inner = Inner(mapping, 1)
        tags: Any = {9: words, 10: ()} if words[0] == "ape" else {10: (), 9: words}
        one: Any = {"z": [mapping], "tags": words, "by_number": tags, "rows": [inner], "rooted": mapping, **given}
        return Holding(other=Holding(**one))  # type: ignore[call-arg]

    one, other = made(WORDS), made(WORDS[::-1])
    assert one == other
    raw = DEFAULT_CODEC.encode(one)

    assert raw == DEFAULT_CODEC.encode(other)
    held = json.loads(raw)["other"]
    assert [*held] == ["z", "other", "tags", "by_number", "rows", "rooted", *WORDS]
    assert [*held["by_number"]] == ["10", "9"]
    assert [*held["rows"][0]] == ["b", "a"]
    for sorted_too in (held["z"][0], held["tags"], held["by_number"]["9"], held["rows"][0]["b"], held["rooted"]):
        assert [*sorted_too] == [*WORDS]


def test_equal_structs_are_equal_bytes_and_their_fields_keep_their_order() -> None:
    def made(words: Sequence[str]) -> Held:
        mapping = dict.fromkeys(words, 1)
        return Held(None, Held([mapping], None, set(words), {9: set(words), 10: set()}, [Inner(mapping, 1)]))

    raw = DEFAULT_CODEC.encode(made(WORDS))

    assert raw == DEFAULT_CODEC.encode(made(WORDS[::-1]))
    held = json.loads(raw)["otherOne"]
    assert [*held] == ["type", "z", "otherOne", "tags", "byNumber", "rows"]
    assert [*held["byNumber"]] == ["10", "9"]
    for sorted_too in (held["z"][0], held["tags"], held["byNumber"]["9"], held["rows"][0]["b"]):
        assert [*sorted_too] == [*WORDS]


@pytest.mark.parametrize("cls", [Aliased, Renamed])
def test_unique_keys_are_made_of_the_marked_fields(cls: Any) -> None:
    def key(**fields: Any) -> bytes | None:
        made = cls.model_validate(fields) if cls is Aliased else msgspec.convert(fields, cls)
        row = Settings().one(made, InsertOptions(unique=Unique(by_args=True)))
        return row.unique_at(datetime(2026, 1, 1, tzinfo=UTC)) if row.unique_at else None

    other = {"note": "n"} if cls is Aliased else {"apiKey": "n"}
    assert key(orderId=1) == key(orderId=1, **other)
    assert key(orderId=1) != key(orderId=2)


def test_neither_library_is_imported_unless_the_program_does() -> None:
    code = (
        "import sys, attrs\n"
        "from sqla_river import Job\n"
        "from sqla_river.args import DEFAULT_CODEC, redacted\n"
        "cls = attrs.make_class('A', ['x'], class_body={'kind': 'a'})\n"
        "DEFAULT_CODEC.encode(cls(1)); redacted(cls)\n"
        "assert not {'pydantic', 'msgspec'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
