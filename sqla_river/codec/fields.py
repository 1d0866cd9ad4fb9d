"""What an args class declares: fields, JSON keys, types, marks. Standard library and attrs only: pydantic and msgspec
are asked only about classes of theirs.
"""

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Union, cast, get_args, get_origin

import attrs

MARKS: Final = frozenset({"name", "redact", "unique"})
_GJSON_SPECIAL: Final = frozenset(".*?|#@!{}[]()<>=%~\\:")
"""Characters with a meaning in the path language in which River reads unique fields."""


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One field that the constructor takes."""

    name: str
    """The attribute."""
    alias: str
    """The constructor's keyword."""
    key: str
    """The JSON key."""
    type: Any
    """The resolved annotation; ``Any`` where there is none."""
    required: bool
    redact: bool
    unique: bool


def has_fields(cls: object) -> bool:
    """Whether *cls* is an attrs class or a dataclass."""
    return isinstance(cls, type) and (attrs.has(cls) or dataclasses.is_dataclass(cls))


def is_model(cls: object) -> bool:
    """Whether *cls* is a pydantic model."""
    return _derives(cls, "pydantic.main", "BaseModel")


def is_struct(cls: object) -> bool:
    """Whether *cls* is a msgspec Struct."""
    return _derives(cls, "msgspec", "Struct")


def is_secret(cls: object) -> bool:
    """Whether *cls* is a type of pydantic's that shows a mask for its value."""
    return any(_derives(cls, "pydantic.types", name) for name in ("SecretStr", "SecretBytes", "Secret"))


def _derives(cls: object, module: str, name: str) -> bool:
    base = getattr(sys.modules.get(module), name, None)  # where the module is not loaded, no class can be its
    return isinstance(base, type) and isinstance(cls, type) and issubclass(cls, base)


def declares_fields(cls: object) -> bool:
    """Whether *cls* is an attrs class, a dataclass, a pydantic model or a msgspec Struct."""
    return has_fields(cls) or is_model(cls) or is_struct(cls)


def fields_of(cls: type) -> list[Field]:
    """The fields of a class that `declares_fields`, in order.

    Those with ``init=False`` are left out: they follow from the others.

    Raises:
        TypeError: a mark that does not exist, a JSON key used twice, an annotation that cannot be resolved.
    """
    if not has_fields(cls):
        return list(_library_fields(cls))
    found = [_marked(cls, *raw) for raw in _raw_fields(cls)]
    keys = [field.key for field in found]
    for key in keys:
        if keys.count(key) > 1:
            raise TypeError(
                f"class {cls.__name__} has two fields with the JSON key {key!r}; rename one with metadata 'name'"
            )
    hints = _types(cls, found)
    return [dataclasses.replace(field, type=hints[field.name]) for field in found]


def redacted_keys(cls: type) -> frozenset[str]:
    """The JSON keys of the redacted fields of *cls* and of all classes in it; raises like `fields_of`."""
    keys: set[str] = set()
    seen: list[Any] = []  # types need not have a hash
    todo: list[Any] = [cls]
    while todo:
        kind = todo.pop()
        if kind in seen:
            continue
        seen.append(kind)
        bare = get_origin(kind) or kind
        if declares_fields(bare):
            fields = fields_of(bare)
            keys.update(field.key for field in fields if field.redact)
            todo += [field.type for field in fields]
        todo += [*get_args(kind), getattr(bare, "__value__", None), getattr(kind, "__supertype__", None)]
    return frozenset(keys)


def unique_paths(cls: type, above: tuple[str, ...] = (), seen: tuple[type, ...] = ()) -> list[str]:
    """Dotted JSON paths of the unique fields, in the order of the fields; raises like `fields_of`."""
    paths: list[str] = []
    for field in fields_of(cls):
        path = (*above, field.key)
        nested = _nested(field.type)
        below = unique_paths(nested, path, (*seen, cls)) if nested is not None and nested not in (*seen, cls) else []
        paths += below or ([".".join(path)] if field.unique else [])
    return paths


def _nested(kind: Any) -> type | None:
    """The class with fields that *kind* is, or is next to None; River's "struct or pointer to struct"."""
    members = [kind]
    if get_origin(kind) in {Union, types.UnionType}:
        members = [one for one in get_args(kind) if one is not types.NoneType]
    bare = get_origin(members[0]) or members[0]
    return bare if len(members) == 1 and declares_fields(bare) else None


def _raw_fields(cls: type) -> Iterator[tuple[str, str, Any, bool, Mapping[str, Any]]]:
    if attrs.has(cls):
        for each in attrs.fields(cls):
            if each.init:
                yield each.name, each.alias or each.name, each.type, each.default is attrs.NOTHING, each.metadata
        return
    for one in dataclasses.fields(cls):
        if one.init:
            required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
            yield one.name, one.name, one.type, required, one.metadata


def _library_fields(cls: Any) -> Iterator[Field]:
    """Those of a pydantic model or a msgspec Struct. Their library names the JSON key, so a mark cannot."""
    if is_model(cls):
        for name, info in cls.model_fields.items():
            said = _said_by(info) | _said_in(info.annotation)
            field = _marked(cls, name, name, info.annotation, info.is_required(), said, info.serialization_alias)
            yield dataclasses.replace(field, redact=field.redact or _holds_secret(info.annotation))
        return
    try:
        found = sys.modules["msgspec"].structs.fields(cls)
    except Exception as error:  # noqa: BLE001 - evaluating annotations can raise anything
        raise TypeError(
            f"the fields of {cls.__name__} cannot be read ({type(error).__name__}: {error}); import their types at "
            "module level"
        ) from None
    for each in found:
        bare = get_args(each.type)[0] if get_origin(each.type) is Annotated else each.type
        yield _marked(cls, each.name, each.name, bare, each.required, _said_in(each.type), each.encode_name)


def _said_in(kind: Any) -> dict[str, Any]:
    """What is said in ``Annotated`` anywhere inside *kind*: ``Annotated[str, ...] | None`` is secret too."""
    said: dict[str, Any] = {}
    for meta in getattr(kind, "__metadata__", ()):
        said |= _said_by(meta)
    for inner in get_args(kind):
        said |= _said_in(inner)
    return said


def _said_by(meta: Any) -> dict[str, Any]:
    """The extra of a ``msgspec.Meta`` or ``pydantic.Field``."""
    extra: Any = getattr(meta, "extra", None) or getattr(meta, "json_schema_extra", None)
    return cast("dict[str, Any]", extra) if isinstance(extra, dict) else {}


def _holds_secret(kind: Any) -> bool:
    return is_secret(get_origin(kind) or kind) or any(map(_holds_secret, get_args(kind)))


def _marked(
    cls: type,
    name: str,
    alias: str,
    annotation: Any,
    required: bool,
    metadata: Mapping[str, Any],
    library_key: str | None = None,
) -> Field:
    marks = metadata.get("sqla_river", {})
    where = f"field {name!r} of {cls.__name__}"
    # A typo must not pass: {"redacted": True} would print the secret.
    if not isinstance(marks, Mapping) or not MARKS.issuperset(cast("Mapping[str, Any]", marks)):
        raise TypeError(f"{where} has metadata 'sqla_river' other than a dict of 'name', 'redact', 'unique'")
    marks = cast("Mapping[str, Any]", marks)
    if "name" in marks and not has_fields(cls):
        raise TypeError(f"{where} has metadata 'name', but its library names the JSON key; use an alias, or rename=")
    key, redact, unique = marks.get("name", library_key or name), marks.get("redact", False), marks.get("unique", False)
    if not isinstance(key, str) or not key:
        raise TypeError(f"{where} has metadata 'name' that is not a text of at least one character")
    if not isinstance(redact, bool) or not isinstance(unique, bool):
        raise TypeError(f"{where} has metadata 'redact' or 'unique' that is neither True nor False")
    if unique and _GJSON_SPECIAL.intersection(key):
        raise TypeError(
            f"{where} is unique, but River would read its JSON key {key!r} as a path; use letters, digits, '_' and '-'"
        )
    return Field(name, alias, key, annotation, required, redact, unique)


def _types(cls: type, fields: list[Field]) -> dict[str, Any]:
    """Resolve the annotations; one that nobody needs (a ClassVar under TYPE_CHECKING) may stay unresolved."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # noqa: BLE001 - evaluating annotations can raise anything; field by field below says which one does
        hints = {}
    found: dict[str, Any] = {}
    for field in fields:
        if field.name in hints:
            found[field.name] = hints[field.name]
        elif field.type is None:
            found[field.name] = Any
        else:
            found[field.name] = _resolved(cls, field)
    return found


def _resolved(cls: type, field: Field) -> Any:
    names: dict[str, Any] = {"typing": typing}  # make_dataclass writes 'typing.Any'
    for base in reversed(cls.__mro__):
        names.update(vars(base))
    for base in reversed(cls.__mro__):
        names.update(vars(sys.modules.get(base.__module__, typing)))
    names[cls.__name__] = cls  # a class inside a function that names itself

    def probe() -> None: ...

    probe.__annotations__ = {"it": field.type}
    try:
        return typing.get_type_hints(probe, globalns=names)["it"]
    except Exception as error:  # noqa: BLE001 - the same
        raise TypeError(
            f"the type of field {field.name!r} of {cls.__name__} cannot be resolved "
            f"({type(error).__name__}: {error}); import it at module level, not under TYPE_CHECKING or in a function"
        ) from None
