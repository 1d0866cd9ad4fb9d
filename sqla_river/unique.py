"""Unique jobs: the key and the mask that River's unique index compares, byte for byte as River makes them.

The text that is hashed is made of what Go's JSON encoder would write: fields in the order of the class, the keys of
mappings sorted, as the codec encodes both. Different from River, on purpose: the period is that of ``scheduled_at``
(River's client takes the time of the call, so jobs for tomorrow and today collide), and it is counted in UTC.
"""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, cast

import attrs

from sqla_river.errors import InvalidOptionError
from sqla_river.states import JobState

ALWAYS: Final = frozenset({JobState.AVAILABLE, JobState.PENDING, JobState.RUNNING, JobState.SCHEDULED})
"""States in which a unique job always holds its key."""
USUALLY: Final = frozenset(JobState) - {JobState.CANCELLED, JobState.DISCARDED}
"""River's default: completed jobs hold it too, until they are pruned."""

_YEAR_ONE: Final = datetime(1, 1, 1, tzinfo=UTC)
_ESCAPED: Final = re.compile(r'["\\<>&\x00-\x1f\u2028\u2029]')
_SHORT: Final = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


@attrs.frozen(kw_only=True)
class Unique:
    """What makes a job the same as another one. While such a one holds the key, a second is not put in.

    Args:
        by_args: True for all args, or the names of some (``"customer.id"`` for nested ones). With True, fields that
            the args class marks as unique are all that counts, if it marks any.
        by_queue: jobs of different queues are different.
        by_period: jobs of different periods are different; counted from the year 1 in UTC, as River does. At least 1
            s.
        by_state: the states in which a job holds its key; at least available, pending, running and scheduled. River's
            default adds retryable and completed: the same job can come again once the finished one is pruned.
        exclude_kind: jobs of different kinds may be the same.
        key: a key of one's own, in place of all the rest but `by_state`: ``Unique(key="payment-4711")``.

    Raises:
        InvalidOptionError: wrong combinations, unknown states, a period below 1 s.
    """

    by_args: bool | Sequence[str] = False
    by_queue: bool = False
    by_period: timedelta | None = None
    by_state: Collection[JobState] | None = None
    exclude_kind: bool = False
    key: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.key is not None:
            if not self.key or self.by_args or self.by_queue or self.by_period is not None or self.exclude_kind:
                raise InvalidOptionError(
                    "unique",
                    f"a unique key of one's own stands alone and is not empty, got {repr(self.key)[:60]} with more",
                )
        elif not (self.by_args or self.by_queue or self.by_period is not None or self.by_state is not None):
            raise InvalidOptionError(
                "unique", "Unique() says nothing; name by_args, by_queue, by_period, by_state or key"
            )
        if self.by_period is not None and self.by_period < timedelta(seconds=1):
            raise InvalidOptionError("unique", f"by_period must be at least one second, got {self.by_period}")
        names: object = self.by_args
        if not isinstance(names, bool) and (
            isinstance(names, str) or not all(type(name) is str for name in self.names)
        ):
            raise InvalidOptionError("unique", f"by_args must be True or names of fields, got {repr(names)[:60]}")
        if self.by_state is not None and not ALWAYS <= frozenset(self.by_state) <= frozenset(JobState):
            raise InvalidOptionError(
                "unique",
                f"by_state must hold {', '.join(sorted(ALWAYS))}, and any other states, "
                f"got {repr(sorted(self.by_state))[:60]}",
            )

    @property
    def names(self) -> Sequence[str]:
        """The named fields, if any are."""
        return () if isinstance(self.by_args, bool) else self.by_args

    @property
    def states(self) -> frozenset[JobState]:
        """In which a job holds its key."""
        return USUALLY if self.by_state is None else frozenset(self.by_state)

    def key_of(self, kind: str, args: bytes, queue: str, at: datetime, marked: Sequence[str] = ()) -> bytes:
        """The 32 bytes that stand in ``unique_key``.

        Args:
            kind: the job's.
            args: its encoded args.
            queue: where it goes.
            at: when it is due.
            marked: the fields that its class marks as unique.
        """
        return hashlib.sha256(self.text_of(kind, args, queue, at, marked).encode()).digest()

    def text_of(self, kind: str, args: bytes, queue: str, at: datetime, marked: Sequence[str] = ()) -> str:
        """What is hashed."""
        if self.key is not None:
            return f"&key={self.key}"
        text = "" if self.exclude_kind else f"&kind={kind}"
        if self.by_args:
            names = marked if self.by_args is True else sorted(self.names)
            text += f"&args={_chosen(args, names) if names else _sorted(args)}"
        if self.by_period is not None:
            begin = at.astimezone(UTC) - (at.astimezone(UTC) - _YEAR_ONE) % self.by_period
            text += f"&period={begin:%Y-%m-%dT%H:%M:%S}Z"
        return f"{text}&queue={queue}" if self.by_queue else text


class _Raw(str):
    """A number as it stands in the JSON text."""


def _parsed(args: bytes) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(args, parse_int=_Raw))


def _sorted(args: bytes) -> str:
    """All args, the outermost keys in order of their bytes; what is inside keeps the order in which it is encoded."""
    pairs = sorted(_parsed(args).items(), key=lambda pair: pair[0].encode())
    return "{" + ",".join(f'"{key}":{go_json(value)}' for key, value in pairs) + "}"


def _chosen(args: bytes, names: Sequence[str]) -> str:
    """The named fields that are there, nested as they were, in order of their names; nothing if none is."""
    root = _parsed(args)
    found: dict[str, Any] = {}
    for name in names:
        steps = name.split(".")
        value: Any = root
        for step in steps:
            value = cast("dict[str, Any]", value).get(step, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING:
            continue
        place = found
        for step in steps[:-1]:
            place = place.setdefault(step, {})
        place[steps[-1]] = value
    return go_json(found) if found else ""


_MISSING: Final = object()


def go_json(value: object) -> str:
    """*value* as Go's encoding/json writes it: no spaces, HTML escaped, floats its way."""
    if isinstance(value, _Raw):
        return str(value)
    if isinstance(value, str):
        return f'"{_ESCAPED.sub(_escape, value)}"'
    if isinstance(value, dict):
        items = cast("dict[str, Any]", value).items()
        return "{" + ",".join(f"{go_json(key)}:{go_json(item)}" for key, item in items) + "}"
    if isinstance(value, list):
        listed: Sequence[object] = cast("Sequence[object]", value)
        return "[" + ",".join(go_json(item) for item in listed) + "]"
    if isinstance(value, float):
        return _go_float(value)
    return json.dumps(value)


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    return _SHORT.get(character) or f"\\u{ord(character):04x}"


def _go_float(value: float) -> str:
    """The shortest digits that give the number back, which are those of repr; in exponent form only below 1e-6 and from
    1e21, where repr, which turns to exponents below 1e-4 and from 1e16, has it too.
    """
    digits, _, exponent = repr(value).partition("e")
    if not exponent or 1e-6 <= abs(value) < 1e21:  # noqa: PLR2004 - Go's own bounds
        return f"{Decimal(repr(value)):f}".removesuffix(".0")
    return f"{digits}e{int(exponent):+d}"
