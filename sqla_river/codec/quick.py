"""Decoders in C for classes of plain fields, where msgspec is installed: a fifth of the time of ours where the
constructor need not be called, a third to a half where it is.
"""

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType, MemberDescriptorType, NoneType, UnionType
from typing import Any, Final, Union, cast, get_args, get_origin

import attrs

from sqla_river.codec.fields import Field, fields_of

Decode = Callable[[str | bytes], Any]

_PLAIN: Final = frozenset({str, int, bool, float})
"""Types of which msgspec takes the same JSON as `shapes`, and makes the same of it."""
_HOOKS: Final = ("__attrs_pre_init__", "__attrs_post_init__", "__post_init__", "__getattr__", "__del__")
"""What msgspec calls where the constructor would not, or the other way round. It asks ``__getattr__`` whether a field
is set, and leaves half an instance to ``__del__``.
"""


def quick_decoder(cls: type) -> Decode | None:
    """What makes an instance of *cls*, as it stands now, from JSON text; None for a class of which it might not make
    what its constructor does.

    Whatever it raises says nothing: our own decoder takes that text too, or says what is wrong with it. Only under keys
    that no field has does it pass over what that one refuses: numbers too large, bytes that are no UTF-8. msgspec is
    imported now.
    """
    fields = fields_of(cls)
    if not all(_is_plain(field.type) for field in fields) or not _takes_each(cls, {field.alias for field in fields}):
        return None
    with suppress(Exception):  # msgspec evaluates annotations, also those that nobody needs
        if _only_fills_slots(cls, fields):
            return _filling(cls)
    with suppress(Exception):  # it is not installed
        return _constructing(cls, fields)
    return None


def _is_plain(kind: Any) -> bool:
    """Whether *kind* is one of them, or that and None."""
    members = set(get_args(kind)) if get_origin(kind) in {Union, UnionType} else {kind}
    members.discard(NoneType)
    return len(members) == 1 and members <= _PLAIN


def _takes_each(cls: Any, aliases: set[str]) -> bool:
    """Whether the constructor is a function of these and nothing else, which cannot tell how they were passed."""
    if (
        type(cls.__init__) is not FunctionType
        or cls.__new__ is not object.__new__
        or type(cls).__call__ is not type.__call__
    ):
        return False
    code = cls.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return (
        set(names) == aliases
        and code.co_posonlyargcount == 0
        and not code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
        and [*names] == [*inspect.signature(cls).parameters]
    )


def _filling(cls: type) -> Decode:
    import msgspec

    return msgspec.json.Decoder(cls).decode


def _constructing(cls: type, fields: list[Field]) -> Decode | None:
    """The constructor called with the values that msgspec read, and for a key that is not there with its own default,
    as `records` does.
    """
    from msgspec import NODEFAULT, defstruct, field
    from msgspec.json import Decoder
    from msgspec.structs import asdict, astuple

    by_alias = {one.alias: one for one in fields}
    parameters = inspect.signature(cls).parameters
    columns: list[tuple[str, Any, Any]] = []
    for alias, parameter in parameters.items():
        kept = by_alias[alias]
        if not kept.required and parameter.default is parameter.empty:
            return None
        otherwise: Any = NODEFAULT if kept.required else _always(parameter.default)
        column: Any = field(name=kept.key, default_factory=otherwise)  # default= would copy an empty list
        columns.append((alias, kept.type, column))
    read = Decoder(defstruct("Read", columns, kw_only=True, gc=False)).decode

    def by_position(raw: str | bytes) -> Any:
        return cls(*astuple(read(raw)))

    def by_name(raw: str | bytes) -> Any:
        return cls(**asdict(read(raw)))

    # Names take twice as long.
    return by_name if any(one.kind is one.KEYWORD_ONLY for one in parameters.values()) else by_position


def _always(value: Any) -> Any:
    return lambda: value


def _only_fills_slots(cls: Any, fields: list[Field]) -> bool:
    """Whether it is certain that making an instance is no more than filling a slot for each field.

    msgspec calls no constructor. Slots only, because it takes a field for set if the class has an attribute of its
    name, and because a ``__dict__`` shows in which order it was filled.
    """
    return (
        all(
            field.key == field.name and isinstance(inspect.getattr_static(cls, field.name, None), MemberDescriptorType)
            for field in fields
        )
        and not inspect.isabstract(cls)
        and cls.__getattribute__ is object.__getattribute__
        and not any(hasattr(cls, name) for name in _HOOKS)
        and (_dataclass_only_fills(cls) if dataclasses.is_dataclass(cls) else _attrs_only_fills(cls))
    )


def _attrs_only_fills(cls: Any) -> bool:
    code = cls.__init__.__code__
    return (
        _wrote_constructor(cls, "__attrs_attrs__")
        and code.co_filename.startswith("<attrs generated ")
        and code.co_qualname == "__init__"
        # It may keep a hash too, or write to the dict past a slot that hides it.
        and not {"_attrs_cached_hash", "__dict__"} & {*code.co_names, *code.co_consts}
        and all(field.init and field.converter is None and field.validator is None for field in attrs.fields(cls))
        and (cls.__setattr__ is object.__setattr__ or cls.__setattr__.__module__ == "attr._make")  # frozen
    )


def _dataclass_only_fills(cls: Any) -> bool:
    code = cls.__init__.__code__
    return (
        not attrs.has(cls)  # of both, msgspec fills the fields of the dataclass
        and _wrote_constructor(cls, "__dataclass_fields__")
        and code.co_filename == "<string>"
        # By which alone it differs from one that somebody's exec() made.
        and code.co_qualname == "__create_fn__.<locals>.__init__"
        and all(field.init for field in dataclasses.fields(cls))
        and (cls.__setattr__ is object.__setattr__ or cls.__dataclass_params__.frozen)
    )


def _wrote_constructor(cls: Any, mark: str) -> bool:
    """Whether the constructor belongs to the class that declares the fields, and was not borrowed from another."""
    owner = next(base for base in cast("type", cls).__mro__ if mark in vars(base))
    init: Any = vars(owner).get("__init__")
    return init is cls.__init__ and init.__qualname__ == f"{owner.__qualname__}.__init__"
