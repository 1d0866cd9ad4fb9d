import math
import re
from collections import UserDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any, ClassVar, cast

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sqla_river.args import JobArgs
from sqla_river.config import Settings
from sqla_river.errors import EncodeError, InvalidOptionError
from sqla_river.options import InsertOptions, Retention, check_kind, check_queue, check_schema
from sqla_river.rows import InsertRow, Place, place
from sqla_river.states import JobState
from tests.jobs import Ping, SendSMS

NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


class Evil:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (check_queue, ["default", "a", "0", "a_b", "a-b", "a|b", "a1_b2-c3", "q" * 64]),
        (check_kind, ["a", "_", "A.b", "a-b", "a[b]", "a<b>", "a/b", "a·b", "a:b", "a+b", "0", "k" * 127]),
        (check_schema, ["river", "_x", "Jobs", "j0", "s" * 46, None]),
    ],
)
def test_names_within_their_rule_pass_unchanged(check: Callable[[Any], Any], good: list[str | None]) -> None:
    assert [check(name) for name in good] == good


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (check_queue, ["", "A", "a b", "a__b", "_a", "a_", "a-", "ä", "a\n", "a\0", "q" * 65, 1, None, b"a"]),
        (check_kind, ["", "-a", ".a", " a", "a b", "ä", "a\n", "a\0", "k" * 128, 1, None, b"a"]),
        (check_schema, ["", "a-b", "0a", "a.b", 'a"b', "ä", "a\n", "s" * 47, 1, b"a"]),
    ],
)
def test_names_outside_their_rule_are_refused_with_their_value(check: Callable[[Any], Any], bad: list[object]) -> None:
    for name in bad:
        with pytest.raises(InvalidOptionError, match="got"):
            check(name)


def test_a_hostile_queue_name_is_refused_at_once() -> None:
    """River's own pattern would take Python's engine exponential time."""
    with pytest.raises(InvalidOptionError):
        check_queue("a" * 63 + "!")


@pytest.mark.parametrize(
    ("option", "good"),
    [
        ("queue", ["default", "a_b"]),
        ("priority", [1, 4]),
        ("max_attempts", [1, 32767]),
        ("tags", [(), ["a"], ("a", "b-c_D"), {"x"}, frozenset({"x"}), ["t" * 255]]),
        ("metadata", [{}, {"a": [1, None, True, 1.5, "x", {"b": ()}]}, MappingProxyType({"a": 1})]),
        ("scheduled_at", [NOW, timedelta(0), timedelta(days=-1), timedelta(days=36500)]),
        ("pending", [True, False]),
    ],
)
def test_options_within_their_rule_are_taken(option: str, good: list[Any]) -> None:
    for value in [*good, None]:
        InsertOptions(**{option: value})


BAD: list[tuple[str, list[Any]]] = [
    ("queue", ["", "Default", 1, Evil()]),
    ("priority", [0, 5, -1, True, False, "1", 1.0, math.nan, 10**5000, [], Evil()]),
    ("max_attempts", [0, 32768, True, "3", 2.0, -(10**5000)]),
    ("tags", ["abc", b"abc", {"a": 1}, [""], ["a b"], ["a,b"], ["t" * 256], ["ä"], ["a\0"], [1], [None], 7, Evil()]),
    (
        "metadata",
        [
            [],
            "{}",
            {"a": math.nan},
            {"a": [math.inf]},
            {"a": "\0"},
            {"\0": 1},
            {"a": {"b": "\ud800"}},
            {"\udfff": 1},
            {1: 2},
            {None: 1},
            {"a": {1, 2}},
            {"a": b""},
            {"a": NOW},
            {"a": Evil()},
            {"a": 10**4300},
            {"a": UserDict({Evil(): 1})},
        ],
    ),
    ("scheduled_at", [datetime(2026, 1, 1), "2026-01-01", 30, 1.5, NOW.date(), timedelta.max, timedelta.min]),  # noqa: DTZ001
    ("pending", [0, 1, "yes", Evil()]),
]


@pytest.mark.parametrize(("option", "bad"), BAD, ids=lambda case: case if isinstance(case, str) else "")
def test_options_outside_their_rule_are_refused_by_name(option: str, bad: list[Any]) -> None:
    for value in bad:
        with pytest.raises(InvalidOptionError, match=option.removesuffix("s")) as refused:
            InsertOptions(**{option: value})
        assert refused.value.option == option


def test_metadata_that_holds_itself_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["a"] = [metadata]

    with pytest.raises(InvalidOptionError, match="nested deeper"):
        InsertOptions(metadata=metadata)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.datetimes()
    | st.datetimes(timezones=st.timezones())
    | st.timedeltas(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters(codec=None)) | inner.filter(_hashable), inner)
    ),
    max_leaves=8,
)


@given(st.sampled_from([field.name for field in attrs.fields(InsertOptions)]), anything)
@example("scheduled_at", datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))))
@example("scheduled_at", datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))
def test_whatever_is_given_is_taken_or_refused_by_name(option: str, value: Any) -> None:
    try:
        InsertOptions(**{option: value})
    except InvalidOptionError as refused:
        assert (refused.option, len(str(refused)) < 300) == (option, True)  # noqa: PT017


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="prioritty"):
        InsertOptions(prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_options_are_frozen_and_keep_a_copy() -> None:
    inner = [1]
    metadata = {"a": inner}
    tags = ["a"]
    options = InsertOptions(metadata=metadata, tags=tags)

    inner.append(2)
    tags.append("b")

    assert options == InsertOptions(metadata={"a": [1]}, tags=("a",))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        options.priority = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def row(args: JobArgs, said: InsertOptions | None = None, defaults: InsertOptions | None = None) -> InsertRow:
    return Settings(defaults=defaults or InsertOptions()).row(args, said or InsertOptions())


def test_last_come_rivers_own_defaults() -> None:
    assert row(Ping(1)) == InsertRow("ping", b'{"n":1}', "default", 1, 25, (), {}, None, False)


def test_the_settings_beat_rivers_defaults() -> None:
    defaults = InsertOptions(queue="mine", priority=3, max_attempts=7, tags=("t",), metadata={"m": 1})

    assert row(Ping(1), defaults=defaults) == InsertRow("ping", b'{"n":1}', "mine", 3, 7, ("t",), {"m": 1}, None, False)


def test_the_class_beats_the_settings() -> None:
    defaults = InsertOptions(queue="mine", priority=4, max_attempts=7, tags=("t",), metadata={"m": 1})

    made = row(SendSMS("a"), defaults=defaults)

    assert (made.queue, made.priority, made.max_attempts) == ("notifications", 2, 3)
    assert (made.tags, made.metadata) == (("sms",), {"from": "class"})


def test_the_call_beats_the_class_and_replaces_tags_and_metadata() -> None:
    said = InsertOptions(
        queue="now", priority=1, max_attempts=1, tags=["urgent"], metadata={"by": "call"}, pending=True
    )

    made = row(SendSMS("a"), said)

    assert (made.queue, made.priority, made.max_attempts, made.pending) == ("now", 1, 1, True)
    assert (made.tags, made.metadata) == (("urgent",), {"by": "call"})


def test_an_empty_value_said_is_said_and_none_is_not() -> None:
    made = row(SendSMS("a"), InsertOptions(tags=(), metadata={}, queue=None))

    assert (made.tags, made.metadata, made.queue) == ((), {}, "notifications")


def test_class_options_may_hold_every_option() -> None:
    @attrs.frozen
    class Later:
        kind: ClassVar[str] = "later"
        options: ClassVar[InsertOptions] = InsertOptions(scheduled_at=timedelta(hours=1), pending=True)

    made = row(Later())

    assert (made.when, made.pending) == (timedelta(hours=1), True)


def test_class_options_of_another_type_are_refused() -> None:
    class Wrong:
        kind: ClassVar[str] = "wrong"
        options: ClassVar[dict[str, int]] = {"priority": 1}

    with pytest.raises(InvalidOptionError, match=r"Wrong\.options must be InsertOptions"):
        row(Wrong())


def test_a_field_may_be_named_options() -> None:
    @attrs.frozen
    class Render:
        kind: ClassVar[str] = "render"
        options: dict[str, int]

    assert row(Render({"dpi": 300})).args == b'{"options":{"dpi":300}}'


def test_args_without_a_usable_kind_are_refused() -> None:
    class Nameless:
        pass

    class Badly:
        kind: ClassVar[str] = "two words"

    with pytest.raises(EncodeError, match="kind"):
        row(cast("JobArgs", Nameless()))
    with pytest.raises(InvalidOptionError, match="'two words'"):
        row(Badly())


def test_a_class_in_place_of_an_instance_is_refused_and_spoils_nothing() -> None:
    for args_type in (Ping, SendSMS):
        with pytest.raises(EncodeError, match=rf"write {args_type.__name__}\("):
            row(cast("JobArgs", args_type))


def test_settings_with_equal_values_are_equal() -> None:
    assert Settings(defaults=InsertOptions(priority=2)) == Settings(defaults=InsertOptions(priority=2))
    assert Settings(notify="off") != Settings()
    with pytest.raises(InvalidOptionError, match="notify must be one of transaction, after_commit, off"):
        Settings(notify="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"completed": timedelta.max}, "completed must be from 0 to 36500 days, got 999999999 days"),
        ({"discarded": timedelta(days=-1)}, "discarded must be from 0 to 36500 days, got -1 day"),
        ({"cancelled": 3_600}, "cancelled must be a timedelta or None, got 3600"),
        ({"queues": {"No queue": Retention()}}, "queue must be 1 to 64 lower case letters"),
        ({"queues": {"a": timedelta(days=1)}}, "queue 'a' must have a Retention without queues of its own"),
        ({"queues": {"a": Retention(queues={"b": Retention()})}}, "queue 'a' must have a Retention without queues"),
    ],
)
def test_a_retention_that_no_sweep_could_keep_is_refused_at_once(said: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(why)):
        Retention(**said)


def test_a_retention_may_be_nothing_a_century_or_for_ever() -> None:
    ages = Retention(completed=timedelta(0), cancelled=timedelta(days=36_500), discarded=None)

    assert Retention(queues={"audit": ages}).queues["audit"] is ages


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("when", "pending", "expected"),
    [
        (None, False, Place(JobState.AVAILABLE, None, True)),
        (None, True, Place(JobState.PENDING, None, False)),
        (NOW, False, Place(JobState.AVAILABLE, NOW, True)),
        (NOW - SECOND, False, Place(JobState.AVAILABLE, NOW - SECOND, True)),
        (NOW + SECOND, False, Place(JobState.SCHEDULED, NOW + SECOND, True)),
        (NOW + 5 * SECOND, False, Place(JobState.SCHEDULED, NOW + 5 * SECOND, True)),
        (NOW + 6 * SECOND, False, Place(JobState.SCHEDULED, NOW + 6 * SECOND, False)),
        (timedelta(0), False, Place(JobState.AVAILABLE, NOW, True)),
        (-SECOND, False, Place(JobState.AVAILABLE, NOW - SECOND, True)),
        (SECOND, False, Place(JobState.SCHEDULED, NOW + SECOND, True)),
        (SECOND, True, Place(JobState.PENDING, NOW + SECOND, False)),
        (NOW - SECOND, True, Place(JobState.PENDING, NOW - SECOND, False)),
    ],
)
def test_a_job_starts_by_the_databases_clock(when: datetime | timedelta | None, pending: bool, expected: Place) -> None:
    assert place(when, pending, lambda: NOW) == expected


def test_a_job_without_a_time_does_not_ask_for_the_clock() -> None:
    def never() -> datetime:
        raise AssertionError

    assert place(None, False, never).state is JobState.AVAILABLE
