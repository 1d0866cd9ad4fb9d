"""How a job is put in: options, their rules, and which of them wins."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypedDict, cast

import attrs

from sqla_river.errors import InvalidOptionError
from sqla_river.outcomes import LONGEST_DELAY
from sqla_river.unique import Unique

DEFAULT_QUEUE: Final = "default"

# River's patterns; its queue pattern is written there so that Python's backtracking would take exponential time, and
# means this.
_KIND: Final = re.compile(r"[\w][\w\-\[\]<>/.·:+]{0,126}", re.ASCII)
_QUEUE: Final = re.compile(r"[a-z0-9]+(?:[_|\-][a-z0-9]+)*")
_TAG: Final = re.compile(r"[\w\-]{1,255}", re.ASCII)
_SCHEMA: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

MAX_QUEUE: Final = 64
MAX_SCHEMA: Final = (
    46  # bytes: '<schema>.river_leadership' is a NOTIFY channel, and a longer one aborts the user's transaction
)
MAX_ATTEMPTS: Final = 32767
MAX_DEPTH: Final = 100
_TOO_LONG: Final = 10**4300  # Python refuses to turn longer ints into text (sys.set_int_max_str_digits)
EARLIEST: Final = datetime(1, 1, 2, tzinfo=UTC)
LATEST: Final = datetime(9999, 12, 30, tzinfo=UTC)
"""The times that every session time zone can show; PostgreSQL knows later ones, Python does not."""


def shown(value: object) -> str:
    """*value* for an error message: escaped, and no longer than 60 characters."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - an int too long for text, or a class of the user's
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004


def check_kind(kind: object) -> str:
    r"""*kind*, if it is one: 1 to 127 of ``\w[\w\-\[\]<>/.·:+]*``."""
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise InvalidOptionError(
            "kind",
            "kind must be 1 to 127 letters, digits, '_' or any of -[]<>/.·:+ and start with a letter, digit or '_', "
            f"got {shown(kind)}",
        )
    return kind


def check_queue(queue: object) -> str:
    """*queue*, if River takes it: up to 64 lower case letters and digits, parted by single ``_``, ``-`` or ``|``."""
    if not isinstance(queue, str) or len(queue) > MAX_QUEUE or not _QUEUE.fullmatch(queue):
        raise InvalidOptionError(
            "queue",
            f"queue must be 1 to {MAX_QUEUE} lower case letters and digits, "
            f"parted by single '_', '-' or '|', got {shown(queue)}",
        )
    return queue


def check_schema(schema: object) -> str | None:
    """*schema*, if River's channels can carry it: an identifier of at most 46 bytes, or None."""
    if schema is None:
        return None
    if not isinstance(schema, str) or len(schema) > MAX_SCHEMA or not _SCHEMA.fullmatch(schema):
        raise InvalidOptionError(
            "schema",
            f"schema must be a plain identifier of at most {MAX_SCHEMA} bytes "
            f"(it is part of a NOTIFY channel), got {shown(schema)}",
        )
    return schema


def check_when(option: str, value: object) -> datetime | timedelta:
    """An aware datetime (turned to UTC) or a timedelta; anything else has no meaning on the database's clock."""
    if isinstance(value, timedelta):
        if abs(value) > LONGEST_DELAY:
            raise InvalidOptionError(option, f"{option} must be within {LONGEST_DELAY.days} days of now, got {value}")
        return value
    if not isinstance(value, datetime):
        raise InvalidOptionError(option, f"{option} must be an aware datetime or a timedelta, got {shown(value)}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise InvalidOptionError(
            option,
            f"{option} must be aware, got the naive {value.isoformat()}; "
            "write datetime.now(UTC) or give a timedelta from now",
        )
    try:
        value = value.astimezone(UTC)
    except OverflowError:
        value = LATEST + timedelta(days=1)
    if not EARLIEST <= value <= LATEST:
        raise InvalidOptionError(
            option, f"{option} must lie between {EARLIEST:%Y-%m-%d} and {LATEST:%Y-%m-%d}, got {shown(value)}"
        )
    return value


def check_whole(option: str, value: object, high: int, meaning: str = "") -> int:
    """*value*, if it is a whole number from 1 to *high*."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise InvalidOptionError(option, f"{option} must be 1..{high}{meaning}, got {shown(value)}")
    return value


def check_priority(value: object) -> int:
    """*value*, if it is a priority: 1 (runs first) to 4."""
    return check_whole("priority", value, 4, " (1 runs first)")


def _check_tags(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise InvalidOptionError("tags", f"tags must be a sequence of strings, got {shown(value)}")
    tags: list[str] = []
    for tag in cast("Sequence[object]", value):
        if not isinstance(tag, str) or not _TAG.fullmatch(tag):
            raise InvalidOptionError("tags", f"a tag must be 1 to 255 letters, digits, '_' or '-', got {shown(tag)}")
        tags.append(tag)
    return tuple(tags)


def _check_flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidOptionError(option, f"{option} must be True or False, got {shown(value)}")
    return value


def check_json(option: str, value: object, path: str = "$", depth: int = 0) -> Any:
    """A plain copy of *value*, if it is JSON that jsonb takes.

    That is: no NaN, infinity, U+0000, lone surrogate, or key that is not a string.
    """
    where = f"at {path[:60]}"
    if depth > MAX_DEPTH:
        raise InvalidOptionError(option, f"{option} is nested deeper than {MAX_DEPTH} {where}")
    if isinstance(value, Mapping):
        entries: dict[str, Any] = {}
        for key, item in cast("Mapping[object, object]", value).items():
            if not isinstance(key, str):
                raise InvalidOptionError(option, f"{option} has a key that is not a string {where}: {shown(key)}")
            name = _check_scalar(option, key, where)
            entries[name] = check_json(option, item, f"{path}.{name}", depth + 1)
        return entries
    if isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        return [check_json(option, item, f"{path}[{index}]", depth + 1) for index, item in enumerate(items)]
    return _check_scalar(option, value, where)


def _check_scalar(option: str, value: object, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise InvalidOptionError(
                option, f"{option} holds U+0000 or a lone surrogate {where}; PostgreSQL cannot store it"
            )
        return str.__str__(value)
    if isinstance(value, int):
        if not -_TOO_LONG < value < _TOO_LONG:
            raise InvalidOptionError(option, f"{option} holds an int of over 4,300 digits {where}; store it as text")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidOptionError(option, f"{option} holds {value} {where}; JSON has no such number")
        return float(value)
    raise InvalidOptionError(option, f"{option} holds a {type(value).__name__} {where}; JSON knows only plain values")


def json_text(option: str, value: object) -> str:
    """*value* as JSON text that jsonb takes.

    Raises:
        InvalidOptionError: it holds what JSON or jsonb does not know.
    """
    check_json(option, value)
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOptionError(option, f"{option} cannot be written as JSON: {error}") from None


def check_metadata(value: object) -> dict[str, Any]:
    """A copy of *value*, if it is a mapping that JSON and PostgreSQL take."""
    if not isinstance(value, Mapping):
        raise InvalidOptionError("metadata", f"metadata must be a mapping, got {shown(value)}")
    copy: dict[str, Any] = check_json("metadata", cast("object", value))
    return copy


# One converter per option, with the types that a caller may give: mypy and pyright read them here.


def _queue(value: str | None) -> str | None:
    return None if value is None else check_queue(value)


def _priority(value: int | None) -> int | None:
    return None if value is None else check_priority(value)


def _max_attempts(value: int | None) -> int | None:
    return None if value is None else check_whole("max_attempts", value, MAX_ATTEMPTS)


def _tags(value: Sequence[str] | None) -> Sequence[str] | None:
    return None if value is None else _check_tags(value)


def _metadata(value: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if value is None else check_metadata(value)


def _scheduled_at(value: datetime | timedelta | None) -> datetime | timedelta | None:
    return None if value is None else check_when("scheduled_at", value)


def _expires(value: datetime | timedelta | None) -> datetime | timedelta | None:
    return None if value is None else check_when("expires", value)


def _unique(value: Unique | None) -> Unique | None:
    if value is not None and type(value) is not Unique:
        raise InvalidOptionError("unique", f"unique must be Unique(...), got {shown(value)}")
    return value


def _pending(value: bool | None) -> bool | None:
    return None if value is None else _check_flag("pending", value)


class OptionWords(TypedDict, total=False):
    """The options as keywords of a call; `InsertOptions` says what they mean."""

    queue: str | None
    priority: int | None
    max_attempts: int | None
    tags: Sequence[str] | None
    metadata: Mapping[str, Any] | None
    scheduled_at: datetime | timedelta | None
    pending: bool | None
    expires: datetime | timedelta | None
    unique: Unique | None


@attrs.frozen(kw_only=True)
class InsertOptions:
    """Options of one enqueue, or the defaults of an args class (``options: ClassVar[InsertOptions]``).

    None means "not said here": the call beats the class, the class beats `River`'s defaults, and last come River's own
    (queue ``default``, priority 1, 25 attempts). Tags and metadata replace; they are not merged.

    Args:
        queue: the lane; see `check_queue` for the names that River takes.
        priority: 1 (first) to 4.
        max_attempts: 1 to 32767; the last failure discards.
        tags: up to any number of short words to find the job by.
        metadata: a JSON object kept beside the args, which handlers and operators may read and change.
        scheduled_at: not before this time; an aware datetime, or a timedelta from the database's now(). A time that
            has come already inserts as available.
        expires: fetched later than that it is cancelled, not run; as `scheduled_at`, from the same now().
        unique: put it in only if no other one holds its key; see `Unique`. Only for `enqueue` and `enqueue_many`.
        pending: put it in as ``pending``: it waits until somebody moves it.

    Raises:
        InvalidOptionError: at construction, naming the option, its value and its rule.
    """

    queue: str | None = attrs.field(default=None, converter=_queue)
    priority: int | None = attrs.field(default=None, converter=_priority)
    max_attempts: int | None = attrs.field(default=None, converter=_max_attempts)
    tags: Sequence[str] | None = attrs.field(default=None, converter=_tags)
    metadata: Mapping[str, Any] | None = attrs.field(default=None, converter=_metadata)
    scheduled_at: datetime | timedelta | None = attrs.field(default=None, converter=_scheduled_at)
    expires: datetime | timedelta | None = attrs.field(default=None, converter=_expires)
    unique: Unique | None = attrs.field(default=None, converter=_unique)
    pending: bool | None = attrs.field(default=None, converter=_pending)

    def over(self, other: "InsertOptions") -> "InsertOptions":
        """These options, and *other* wherever these say nothing."""
        if other is NOTHING_SAID:
            return self
        if self is NOTHING_SAID:
            return other
        said = {field.name: value for field in _FIELDS if (value := getattr(self, field.name)) is not None}
        return attrs.evolve(other, **said)


_FIELDS: Final = attrs.fields(InsertOptions)
NOTHING_SAID: Final = InsertOptions()


def said_in(words: OptionWords) -> InsertOptions:
    """The options of one call."""
    return InsertOptions(**words) if words else NOTHING_SAID


RIVER_DEFAULTS: Final = InsertOptions(
    queue=DEFAULT_QUEUE, priority=1, max_attempts=25, tags=(), metadata={}, pending=False
)


def _check_age(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is None:
        return
    if not isinstance(value, timedelta):
        raise InvalidOptionError(field.name, f"{field.name} must be a timedelta or None, got {shown(value)}")
    if not timedelta(0) <= value <= LONGEST_DELAY:
        raise InvalidOptionError(
            field.name,
            f"{field.name} must be from 0 to {LONGEST_DELAY.days} days, got {value}; None keeps such jobs for ever",
        )


def _check_retentions(_: object, field: "attrs.Attribute[Any]", value: Mapping[object, object]) -> None:
    for queue, other in value.items():
        check_queue(queue)
        if not isinstance(other, Retention) or other.queues:
            raise InvalidOptionError(
                field.name, f"queue {shown(queue)} must have a Retention without queues of its own, got {shown(other)}"
            )


@attrs.frozen
class Retention:
    """How long finished jobs stay before the prune duty deletes them. None keeps them for ever.

    Args:
        completed, cancelled: 24 hours.
        discarded: 7 days.
        queues: another Retention for the queues named here. What one queue keeps for longer than others is read once an
            hour for each of them: no index parts finished rows by queue.

    Raises:
        InvalidOptionError: an age that is no timedelta, or negative, or over 100 years.
    """

    completed: timedelta | None = attrs.field(default=timedelta(hours=24), validator=_check_age)
    cancelled: timedelta | None = attrs.field(default=timedelta(hours=24), validator=_check_age)
    discarded: timedelta | None = attrs.field(default=timedelta(days=7), validator=_check_age)
    queues: Mapping[str, "Retention"] = attrs.field(factory=dict[str, "Retention"], validator=_check_retentions)
