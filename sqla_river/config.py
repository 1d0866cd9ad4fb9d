"""How args become rows: the settings of one `River`."""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import MemberDescriptorType
from typing import Any, Final, Literal, Protocol, cast
from weakref import WeakKeyDictionary

import attrs

from sqla_river.args import DEFAULT_CODEC, Codec, JobArgs, json_keys, kind_of, unique_fields
from sqla_river.errors import ConfigError, EncodeError, InvalidOptionError
from sqla_river.options import NOTHING_SAID, RIVER_DEFAULTS, InsertOptions, check_kind, shown
from sqla_river.rows import InsertRow
from sqla_river.unique import Unique

NotifyMode = Literal["transaction", "after_commit", "off"]
NOTIFY_MODES: Final = ("transaction", "after_commit", "off")
_noting: Final = threading.Lock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread notes a class could enqueue none
    os.register_at_fork(before=_noting.acquire, after_in_parent=_noting.release, after_in_child=_noting.release)


def _known_mode(_: object, __: object, value: object) -> None:
    if value not in NOTIFY_MODES:
        raise InvalidOptionError("notify", f"notify must be one of {', '.join(NOTIFY_MODES)}, got {value!r}")


class InsertMiddleware(Protocol):
    """Around what is put in: ``insert(rows, call_next)`` returns what ``call_next(rows)`` returns, or raises.

    It runs when ``Job(args)`` is made, or once for each block of many. A row's ``_replace(...)`` makes a
    changed one; there must be as many as there were, in their order.
    """

    def insert(
        self, rows: Sequence[InsertRow], call_next: Callable[[Sequence[InsertRow]], Sequence[InsertRow]], /
    ) -> Sequence[InsertRow]: ...


INSERT_EVERYWHERE: Final[list[InsertMiddleware]] = []
"""Around every insert of this process, outside of each River's own: for tools that watch the whole program."""


def _around(
    middleware: InsertMiddleware, next_: Callable[[Sequence[InsertRow]], Sequence[InsertRow]]
) -> Callable[[Sequence[InsertRow]], Sequence[InsertRow]]:
    return lambda rows: middleware.insert(rows, next_)


_OfClass = tuple[str, InsertOptions, tuple[Any, ...]]
"""Kind and options of an args class, and the columns that they come to."""


def _columns(options: InsertOptions) -> tuple[Any, ...]:
    """What `InsertRow` has between args and the unique key; RIVER_DEFAULTS says what nobody else did."""
    return (
        options.queue,
        options.priority,
        options.max_attempts,
        options.tags,
        options.metadata,
        options.scheduled_at,
        options.pending,
        options.expires,
    )


@attrs.frozen(kw_only=True)
class Settings:
    """What a `River` was told. Two with equal values are equal, and interchangeable."""

    codec: Codec = DEFAULT_CODEC
    defaults: InsertOptions = NOTHING_SAID
    notify: NotifyMode = attrs.field(default="transaction", validator=_known_mode)
    middleware: tuple[InsertMiddleware, ...] = ()
    _by_class: WeakKeyDictionary[type, _OfClass] = attrs.field(
        factory=WeakKeyDictionary[type, _OfClass], init=False, eq=False, repr=False
    )
    _last: list[tuple[type, _OfClass]] = attrs.field(factory=list[Any], init=False, eq=False, repr=False)
    """The class that was asked for last, which mostly is the next one too: a look into a weak dictionary costs more."""
    _uniques: WeakKeyDictionary[type, tuple[list[str], frozenset[str]]] = attrs.field(
        factory=WeakKeyDictionary[type, tuple[list[str], frozenset[str]]], init=False, eq=False, repr=False
    )

    def one(self, args: JobArgs, said: InsertOptions = NOTHING_SAID) -> InsertRow:
        """The `row` of *args*, through the middleware."""
        row = self.row(args, said)
        return self.through([row])[0] if self.middleware or INSERT_EVERYWHERE else row

    def through(self, rows: Sequence[InsertRow]) -> Sequence[InsertRow]:
        """*rows* as the middleware, the first of it outermost, hands them on.

        Raises:
            ConfigError: it made more or fewer of them.
        """

        def innermost(rows: Sequence[InsertRow]) -> Sequence[InsertRow]:
            return rows

        next_: Callable[[Sequence[InsertRow]], Sequence[InsertRow]] = innermost
        for middleware in reversed((*INSERT_EVERYWHERE, *self.middleware)):
            next_ = _around(middleware, next_)
        passed: Any = next_(rows)
        if not isinstance(passed, list | tuple) or len(cast("Sequence[InsertRow]", passed)) != len(rows):
            got = f"{len(cast('list[object]', passed))} in a " if isinstance(passed, list | tuple) else "a "
            raise ConfigError(
                f"insert middleware must return the {len(rows)} rows that call_next gives, "
                f"got {got}{type(cast('object', passed)).__name__}"
            )
        return cast("Sequence[InsertRow]", passed)

    def row(self, args: JobArgs, said: InsertOptions = NOTHING_SAID) -> InsertRow:
        """Validate and encode *args* now: what happens to the object later does not matter.

        Raises:
            EncodeError: args that their own types, JSON or PostgreSQL refuse.
            InvalidOptionError: a kind outside its rule.
        """
        args_type = type(args)
        of_class = self._last[0] if self._last else None
        if of_class is None or of_class[0] is not args_type:
            of_class = args_type, self._of_class(args_type, args)
            self._last[:] = [of_class]
        kind, options, columns = of_class[1]
        if said is not NOTHING_SAID:
            options = said.over(options)
            columns = _columns(options)
        encoded = self.codec.encode(args)
        unique = options.unique
        if unique is None:
            return InsertRow(kind, encoded, *columns)
        key = partial(unique.key_of, kind, encoded, columns[0], marked=self._marked(args_type, unique))
        return InsertRow(kind, encoded, *columns)._replace(unique_at=key, unique_states=unique.states)

    def _marked(self, args_type: type, unique: Unique) -> list[str]:
        """The fields that *args_type* marks as unique; refuses names that it has not, with which all jobs were one."""
        known = self._uniques.get(args_type)
        if known is None:
            known = (unique_fields(args_type), json_keys(args_type))
            with _noting:
                self._uniques[args_type] = known
        marked, keys = known
        for name in unique.names:
            if keys and name.partition(".")[0] not in keys:
                raise InvalidOptionError(
                    "unique",
                    f"by_args names {shown(name)}, which {args_type.__name__} has not; "
                    f"its JSON keys: {', '.join(sorted(keys))}",
                )
        return marked

    def _of_class(self, args_type: type, args: JobArgs) -> _OfClass:
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
            options = options.over(self.defaults).over(RIVER_DEFAULTS)
            known = kind, options, _columns(options)
            with _noting:
                self._by_class[args_type] = known
        return known
