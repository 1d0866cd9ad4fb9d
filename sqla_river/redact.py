"""Keeping secrets: the values of args fields marked ``redact`` are taken out of every text that we show or store."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, cast

from sqla_river.codec.fields import fields_of, has_fields, redacted_keys

HIDDEN: Final = "***"
_SHORT: Final = 4
"""A secret of fewer characters is hidden only where it stands alone: a pin of 7 must not make every 17 unreadable."""
_LONG_LINE: Final = 8


def hider(args_type: type, raw: str, args: object = None) -> Callable[[str], str] | None:
    """What puts ``***`` for the secrets of one job into a text; None for a class without any.

    Args:
        args_type: the args class.
        raw: the args as they are stored, JSON.
        args: the args as the handler sees them, where they could be decoded.
    """
    keys = _keys(args_type)
    if not keys:
        return None
    found: set[str] = set()
    with suppress(ValueError, RecursionError):  # no handler saw what is no JSON
        _look(json.loads(raw), keys, found)
    with suppress(Exception):  # a class of the user's may do anything when it is asked
        for value in _marked(args):
            found.update(_spellings(value))
    texts = sorted(found, key=len, reverse=True)
    if not texts:
        return None
    pattern = re.compile("|".join(map(_pattern, texts)))
    return lambda text: pattern.sub(HIDDEN, text)


def shown_args(args_type: type, raw: str) -> str:
    """The stored args with ``***`` for the values of redacted fields; nothing of what is no JSON."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError):
        return HIDDEN
    return json.dumps(_masked(tree, _keys(args_type)), ensure_ascii=False)


@lru_cache(maxsize=1_000)
def _keys(args_type: type) -> frozenset[str]:
    try:
        return redacted_keys(args_type) if has_fields(args_type) else frozenset()
    except TypeError:  # such a class can neither be encoded nor decoded
        return frozenset()


def _masked(tree: Any, keys: frozenset[str]) -> Any:
    if isinstance(tree, dict):
        items = cast("dict[str, Any]", tree).items()
        return {key: HIDDEN if key in keys else _masked(value, keys) for key, value in items}
    return [_masked(each, keys) for each in cast("list[object]", tree)] if isinstance(tree, list) else tree


def _look(tree: Any, keys: frozenset[str], found: set[str]) -> None:
    """Collect what stands under *keys* in a tree of JSON."""
    if isinstance(tree, dict):
        for key, value in cast("dict[str, Any]", tree).items():
            if key in keys:
                for leaf in _leaves(value):
                    found.update(_spellings(leaf))
            else:
                _look(value, keys, found)
    elif isinstance(tree, list):
        for each in cast("list[object]", tree):
            _look(each, keys, found)


def _marked(value: object) -> Iterator[object]:
    """The leaves of all redacted fields in *value*."""
    if has_fields(type(value)):
        for field in fields_of(type(value)):
            inner = getattr(value, field.name, None)
            yield from _leaves(inner) if field.redact else _marked(inner)
    elif isinstance(value, Mapping):
        for each in cast("Mapping[object, object]", value).values():
            yield from _marked(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in cast("Iterable[Any]", value):
            yield from _marked(each)


def _leaves(value: object) -> Iterator[object]:
    if has_fields(type(value)):
        for field in fields_of(type(value)):
            yield from _leaves(getattr(value, field.name, None))
    elif isinstance(value, Mapping):
        for key, each in cast("Mapping[object, object]", value).items():
            yield from _leaves(key)
            yield from _leaves(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in cast("Iterable[Any]", value):
            yield from _leaves(each)
    elif value is not None and not isinstance(value, bool):
        yield value


def _spellings(value: object) -> set[str]:
    """How *value* may stand in a text: as it is, within quotes, within JSON, and each long line of it."""
    if isinstance(value, bytes):
        texts = {repr(value)[2:-1], value.decode(errors="replace")}
    elif isinstance(value, str):
        texts = {value}
    else:
        texts = {str(value), repr(value)}
    for text in list(texts):
        texts |= {repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], text.strip()}
        texts.update(line.strip() for line in text.splitlines() if len(line.strip()) >= _LONG_LINE)
    return texts - {"", HIDDEN}


def _pattern(text: str) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)" if len(text) < _SHORT else re.escape(text)
