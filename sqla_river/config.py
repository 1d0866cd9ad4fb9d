"""How args become rows: the settings of one `River`."""

import threading
from types import MemberDescriptorType
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary

import attrs

from sqla_river.args import DEFAULT_CODEC, Codec, JobArgs, kind_of
from sqla_river.errors import EncodeError, InvalidOptionError
from sqla_river.options import NOTHING_SAID, RIVER_DEFAULTS, InsertOptions, check_kind
from sqla_river.rows import InsertRow

NotifyMode = Literal["transaction", "after_commit", "off"]
NOTIFY_MODES: Final = ("transaction", "after_commit", "off")


def _known_mode(_: object, __: object, value: object) -> None:
    if value not in NOTIFY_MODES:
        raise InvalidOptionError("notify", f"notify must be one of {', '.join(NOTIFY_MODES)}, got {value!r}")


@attrs.frozen(kw_only=True)
class Settings:
    """What a `River` was told. Two with equal values are equal, and interchangeable."""

    codec: Codec = DEFAULT_CODEC
    defaults: InsertOptions = NOTHING_SAID
    notify: NotifyMode = attrs.field(default="transaction", validator=_known_mode)
    _by_class: WeakKeyDictionary[type, tuple[str, InsertOptions]] = attrs.field(
        factory=WeakKeyDictionary[type, tuple[str, InsertOptions]], init=False, eq=False, repr=False
    )
    _lock: Any = attrs.field(factory=threading.Lock, init=False, eq=False, repr=False)

    def row(self, args: JobArgs, said: InsertOptions = NOTHING_SAID) -> InsertRow:
        """Validate and encode *args* now: what happens to the object later does not matter.

        Raises:
            EncodeError: args that their own types, JSON or PostgreSQL refuse.
            InvalidOptionError: a kind outside its rule.
        """
        kind, options = self._of_class(type(args), args)
        if said is not NOTHING_SAID:
            options = said.over(options)
        return InsertRow(
            kind,
            self.codec.encode(args),
            options.queue,  # type: ignore[arg-type]  # RIVER_DEFAULTS says all but scheduled_at
            options.priority,  # type: ignore[arg-type]
            options.max_attempts,  # type: ignore[arg-type]
            options.tags,  # type: ignore[arg-type]
            options.metadata,  # type: ignore[arg-type]
            options.scheduled_at,
            options.pending,  # type: ignore[arg-type]
            options.expires,
        )

    def _of_class(self, args_type: type, args: JobArgs) -> tuple[str, InsertOptions]:
        known = self._by_class.get(args_type)
        if known is None:
            if isinstance(args, type):
                raise EncodeError(
                    "$", f"args must be an instance, got the class {args.__name__}; write {args.__name__}(...)"
                )
            kind = check_kind(kind_of(args))
            options = getattr(args_type, "options", NOTHING_SAID)
            if isinstance(options, MemberDescriptorType):  # a field of that name
                options = NOTHING_SAID
            if not isinstance(options, InsertOptions):
                raise InvalidOptionError(
                    "options", f"{args_type.__name__}.options must be InsertOptions(...), got {type(options).__name__}"
                )
            known = (kind, options.over(self.defaults).over(RIVER_DEFAULTS))
            with self._lock:
                self._by_class[args_type] = known
        return known
