"""pydantic models and msgspec Structs: they travel by the machinery of their own library, and are read back when they
are enqueued, since either writes what it would not read, or would read as something else.

Neither library is imported from here: a class of theirs exists only where they are loaded already.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any, Final, cast

from sqla_river.codec import plain
from sqla_river.codec.containers import set_order
from sqla_river.codec.fields import declares_fields, fields_of, is_model, is_secret, is_struct, redacted_keys
from sqla_river.codec.plan import Plan
from sqla_river.codec.shapes import Mismatch, is_dict, is_list, key_name, shown, type_name


def library_plan(cls: type) -> Plan | None:
    """How *cls* travels if it is a pydantic model or a msgspec Struct; None for any other class.

    Raises:
        Mismatch: a type in it has no JSON form.
    """
    if is_model(cls):
        dump, read = _model(cls)
    elif is_struct(cls):
        dump, read = _struct(cls)
    else:
        return None
    name = shown(cls.__name__)
    in_order = _Order().of

    def encode(args: Any) -> Any:
        tree = dump(args)
        if not is_dict(tree):
            raise Mismatch(f"{name} is no object in JSON but {type_name(tree)}; hold it in a field of another class")
        return in_order(args, plain.plain(tree))

    def check(sent: Any, back: Any) -> None:
        if sent != back:
            _compare(sent, back)

    return Plan(encode, read, redacted_keys(cls), raw=True, check=check)


# ---- pydantic ---------------------------------------------------------------------------


def _model(cls: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    from pydantic import ValidationError

    name = shown(cls.__name__)

    def dump(args: Any) -> Any:
        try:
            # Without computed fields, which a model that forbids extra keys would not take back. Of values that do not
            # fit, pydantic would warn; reading them back says where they are.
            return args.model_dump(mode="json", by_alias=True, round_trip=True, warnings=False)
        except RecursionError:
            raise
        except Exception as error:  # noqa: BLE001 - serializers are the user's
            raise Mismatch(f"{name} cannot be dumped ({type_name(error)})", f": {shown(str(error))}") from None

    def read(raw: str | bytes) -> Any:
        try:
            return cls.model_validate_json(raw)  # as JSON: a strict model takes text for a date only there
        except ValidationError as error:
            first, *others = error.errors(include_url=False, include_context=False, include_input=False)
            refusal = _refusal(first["type"], first["msg"], others)
            refusal.parts.extend(reversed(first["loc"]))
            raise refusal from None

    return dump, read


def _refusal(kind: str, message: str, others: list[Any]) -> Mismatch:
    more = f" (and {len(others)} more)" if others else ""
    if kind == "missing":
        return Mismatch(f"is missing, and the field has no default{more}")
    if kind == "json_invalid":
        return Mismatch("not JSON")
    return Mismatch(f"refused as {kind}", f": {shown(message)}{more}")


# ---- msgspec ----------------------------------------------------------------------------

_AT: Final = re.compile(r" - at `(?:key` in `)?\$(.*)`$")
_PART: Final = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")


def _struct(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    import msgspec

    try:
        decoder = msgspec.json.Decoder[Any](cls)
    except Exception as error:  # noqa: BLE001 - it raises what the annotations raise, and its own TypeError
        raise Mismatch(f"msgspec cannot read {shown(cls.__name__)} ({type_name(error)}): {error}") from None

    def dump(args: Any) -> Any:
        try:
            return _with_lists(msgspec.to_builtins(args, str_keys=True))
        except TypeError as error:
            raise Mismatch(f"{error}; declare a type that msgspec knows") from None

    def read(raw: str | bytes) -> Any:
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise _located(str(error)) from None
        except msgspec.DecodeError as error:
            raise Mismatch(f"not JSON: {error}") from None

    return dump, read


def _with_lists(tree: Any) -> Any:
    """Msgspec leaves tuples as they are; reading back tells those that would become lists."""
    if is_dict(tree):
        return {key: _with_lists(item) for key, item in tree.items()}
    return [_with_lists(item) for item in cast("list[Any]", tree)] if isinstance(tree, list | tuple) else tree


def _located(message: str) -> Mismatch:
    at = _AT.search(message)
    said = message[: at.start()] if at else message
    # What begins so names types only; anything else may quote a value.
    plain_words = said.startswith(("Expected `", "Object "))
    refusal = Mismatch(said[0].lower() + said[1:]) if plain_words else Mismatch("refused", f": {shown(said)}")
    for name, index in reversed(_PART.findall(at[1]) if at else []):
        refusal.parts.append(name or (int(index) if index.isdigit() else index))
    return refusal


# ---- the order of keys ------------------------------------------------------------------


class _Order:
    """Sees to it that equal args are equal bytes, for of those unique keys are made."""

    def __init__(self) -> None:
        self._attributes: dict[type, Mapping[str, str] | None] = {}

    def of(self, value: Any, tree: Any) -> Any:
        """*tree*, which *value* was dumped as: fields in the order of their class; sorted are keys that are no fields,
        and the items of sets.
        """
        if is_dict(tree):
            names = self._named(_class_of(value))
            if names is not None:
                is_root = getattr(value, "__pydantic_root_model__", False)
                return self.of(value.root, tree) if is_root else self._of_fields(value, tree, names)
            inner = _by_text(value) if isinstance(value, Mapping) else {}
            return {key: self.of(inner.get(key), tree[key]) for key in sorted(tree)}
        if is_list(tree):
            of_set = isinstance(value, AbstractSet)
            known = of_set or isinstance(value, list | tuple)
            held = list(cast("Iterable[Any]", value)) if known else []
            items = list(map(self.of, held if len(held) == len(tree) else [None] * len(tree), tree))
            return sorted(items, key=set_order) if of_set else items
        return tree

    def _of_fields(self, value: Any, tree: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
        ordered: dict[str, Any] = {}
        # What a model takes beside its fields comes in the order in which it was given.
        extra: Mapping[str, Any] = getattr(value, "__pydantic_extra__", None) or {}
        for key in sorted(tree, key=lambda key: (key in extra, key if key in extra else "")) if extra else tree:
            if isinstance(node := tree[key], dict | list):
                node = self.of(extra[key] if key in extra else getattr(value, names.get(key, ""), None), node)
            ordered[key] = node
        return ordered

    def _named(self, cls: type) -> Mapping[str, str] | None:
        """The attribute of each JSON key of *cls*; None for a class without fields."""
        if cls not in self._attributes:
            names: dict[str, str] | None = {} if declares_fields(cls) else None
            if names is not None:
                with suppress(TypeError):  # a class that stands in no annotation, with one of its own not resolved
                    names = {field.key: field.name for field in fields_of(cls)}
            self._attributes[cls] = names
        return self._attributes[cls]


def _by_text(value: Any) -> dict[str, Any]:
    return {key if isinstance(key, str) else str(key): item for key, item in value.items()}


# ---- reading back -----------------------------------------------------------------------


def _compare(sent: Any, back: Any) -> None:
    """Raise `Mismatch` at the first place where *back* is not what was *sent*."""
    cls = _class_of(sent)
    if is_secret(cls):
        if sent != back:
            raise Mismatch(
                f"{type_name(sent)} dumps as a mask, and the secret would be lost; give the model a field_serializer "
                "that writes the secret, or declare str with json_schema_extra={'sqla_river': {'redact': True}}"
            )
    elif cls is not _class_of(back):
        if sent != back or not isinstance(sent, _class_of(back)):
            raise _changed(sent, back)
    elif is_model(cls) or is_struct(cls):
        for field in fields_of(cls):
            _compare_at(field.key, getattr(sent, field.name, None), getattr(back, field.name, None))
    elif is_dict(sent) and sent.keys() == back.keys():
        for key, value in sent.items():
            _compare_at(key_name(key), value, back[key])
    elif (is_list(sent) or isinstance(sent, tuple)) and len(cast("list[Any]", sent)) == len(back):
        for number, value in enumerate(cast("list[Any]", sent)):
            _compare_at(number, value, back[number])
    elif _can_be_equal(sent) and sent != back:
        raise _changed(sent, back)


def _class_of(value: object) -> type:
    return type(value)


def _can_be_equal(value: Any) -> bool:
    """Whether its class says what is equal: else nothing that came back is."""
    equal: Any = type(value).__eq__
    return equal is not object.__eq__


def _compare_at(part: str | int, sent: Any, back: Any) -> None:
    try:
        _compare(sent, back)
    except Mismatch as error:
        error.parts.append(part)
        raise


def _changed(sent: Any, back: Any) -> Mismatch:
    if isinstance(sent, float) and sent - sent != 0:
        return Mismatch("NaN and infinity have no JSON form; declare the field as float | None and pass None")
    if type(sent) is type(back):
        return Mismatch(f"is {type_name(sent)} and would come back as another one; see its serializers and validators")
    return Mismatch(
        f"is {type_name(sent)} and would come back as {type_name(back)}; declare its type, or pass what JSON holds"
    )
