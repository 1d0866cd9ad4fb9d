"""A decoder in C for plain classes, where msgspec is installed: a fifth of the time of ours."""

import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

import attrs

from sqla_river.codec.fields import fields_of

_PLAIN: Final = frozenset({str, int, bool, float})
"""Types of which msgspec takes the same JSON as `shapes`, and makes the same of it."""
_GENERATED: Final = ("<attrs generated ", "<string>")
"""How attrs and dataclasses name the source of the constructors that they write."""


def quick_decoder(cls: type) -> Callable[[str | bytes], Any] | None:
    """What makes an instance of *cls* from JSON text; None for a class of which it might not make what its constructor
    does.

    Whatever it raises says nothing: our own decoder takes that text too, or says what is wrong with it. msgspec is
    imported now.
    """
    if not _only_keeps(cls) or not all(field.key == field.name and _is_plain(field.type) for field in fields_of(cls)):
        return None
    try:
        import msgspec

        decode: Callable[[str | bytes], Any] = msgspec.json.Decoder(cls).decode
    except Exception:  # noqa: BLE001 - not installed; or it evaluates annotations, also those that nobody needs
        return None
    return decode


def _is_plain(kind: Any) -> bool:
    """Whether *kind* is one of them, or that and None."""
    members = set(get_args(kind)) if get_origin(kind) in {Union, UnionType} else {kind}
    members.discard(NoneType)
    return len(members) == 1 and members <= _PLAIN


def _only_keeps(cls: Any) -> bool:
    """Whether making an instance is no more than setting its fields: msgspec calls no constructor."""
    code: Any = getattr(cls.__init__, "__code__", None)
    if (
        not getattr(code, "co_filename", "").startswith(_GENERATED)
        or "_attrs_cached_hash" in (*code.co_names, *code.co_consts)
        or cls.__new__ is not object.__new__
        or type(cls).__call__ is not type.__call__
        or inspect.isabstract(cls)
    ):
        return False
    if any(hasattr(cls, name) for name in ("__attrs_pre_init__", "__attrs_post_init__", "__post_init__")):
        return False
    if not attrs.has(cls):
        return _sets_plainly(cls, frozen=cls.__dataclass_params__.frozen) and all(
            field.init for field in cls.__dataclass_fields__.values()
        )
    return _sets_plainly(cls, frozen=getattr(cls.__setattr__, "__module__", "") == "attr._make") and all(
        field.init and field.converter is None and field.validator is None for field in attrs.fields(cls)
    )


def _sets_plainly(cls: Any, *, frozen: bool) -> bool:
    return frozen or cls.__setattr__ is object.__setattr__
