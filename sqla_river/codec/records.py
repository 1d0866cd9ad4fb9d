"""From an args class to two functions, generated once, that check and convert in one pass."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence
from collections.abc import Set as AbstractSet
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Final, Literal, NoReturn, TypeVar, Union, cast, get_args, get_origin

import attrs
import cattrs
from cattrs.disambiguators import create_default_dis_func
from cattrs.gen import override

from sqla_river.codec import containers, plain, shapes
from sqla_river.codec.fields import Field, fields_of, has_fields, redacted_keys
from sqla_river.codec.library import library_plan
from sqla_river.codec.plan import Plan
from sqla_river.codec.shapes import Mismatch, Shape, shown, type_name


def plan_for(cls: type, converter: cattrs.Converter) -> Plan:
    """Compile *cls*; classes without fields inside it travel by the hooks of *converter*. A pydantic model or msgspec
    Struct is left to its own library.

    Raises:
        Mismatch: the class, or a type in it, has no JSON form.
    """
    if not has_fields(cls):
        plan = library_plan(cls)
        if plan is None:
            raise Mismatch(
                f"class {shown(cls.__name__)} has no fields; decorate it with @attrs.frozen or @dataclass, "
                "or give River a codec that knows it"
            )
        return plan
    root = _Compiler(converter).shape(cls)
    seen: dict[int, bool] = {}  # True while the walk is below it
    recursive = is_open = False

    def walk(shape: Shape) -> None:
        nonlocal recursive, is_open
        if id(shape) in seen:
            recursive = recursive or seen[id(shape)]
            return
        seen[id(shape)] = True
        is_open = is_open or shape.open
        for inner in shape.inner:
            walk(inner)
        seen[id(shape)] = False

    walk(root)
    return Plan(root.encode, root.decode, redacted_keys(cls), recursive, is_open)


_LISTS: Final = frozenset({list, Sequence, MutableSequence})
_SETS: Final = frozenset({set, MutableSet})
_FROZENSETS: Final = frozenset({frozenset, AbstractSet})
_DICTS: Final = frozenset({dict, Mapping, MutableMapping})
_DERIVABLE: Final = (str, int, float, bytes)


class _Compiler:
    """From a type to its shape. Lives for one class, so that a failure leaves nothing half built behind."""

    def __init__(self, converter: cattrs.Converter) -> None:
        self.converter = converter
        self.growing: dict[Any, Shape] = {}

    def shape(self, kind: Any) -> Shape:
        if isinstance(kind, str | typing.ForwardRef):
            raise Mismatch(f"type {kind!r} is not resolved; import it at module level")
        if kind is Any or kind is object:
            return plain.ANY
        try:
            if kind in shapes.SCALARS:
                return shapes.SCALARS[kind]
        except TypeError:  # Annotated[int, []] has no hash
            return self.shape(get_args(kind)[0])
        if isinstance(kind, TypeVar):
            return self.shape(kind.__bound__ or Any)
        if isinstance(kind, typing.NewType):
            return self.shape(kind.__supertype__)
        origin = get_origin(kind) or kind
        if origin in (typing.Annotated, typing.Final):
            return self.shape(get_args(kind)[0])
        if origin in (Union, UnionType):
            return self.union([self.shape(member) for member in get_args(kind)])
        if origin is Literal:
            return shapes.literal(get_args(kind))
        if hasattr(origin, "__value__"):  # type X = ...
            return self.grown(
                kind,
                shown(str(kind)),
                lambda: self.shape(_filled(origin.__value__, origin.__type_params__, get_args(kind))),
            )
        if has_fields(origin):
            return self.grown(kind, shown(origin.__name__), lambda: self.record(origin, get_args(kind)), origin)
        return self.container(origin, get_args(kind)) or self.foreign(kind)

    def container(self, origin: Any, inner: tuple[Any, ...]) -> Shape | None:
        if origin is tuple and inner[1:] != (...,) and inner:
            return containers.fixed([self.shape(one) for one in inner])
        if origin in _DICTS:
            key, value = inner or (str, Any)
            return containers.mapping(self.shape(key), self.shape(value))
        item = self.shape(inner[0]) if inner else plain.ANY
        if origin is tuple:
            return containers.array("tuple", tuple, tuple, item)
        if origin in _LISTS:
            return containers.array("list", list, list, item)
        if origin in _SETS:
            return containers.array("set", set, set, item, ordered=False)
        if origin is frozenset:
            return containers.array("frozenset", frozenset, frozenset, item, ordered=False)
        if origin is AbstractSet:
            return containers.array("Set", (set, frozenset), frozenset, item, ordered=False)
        return None

    def foreign(self, kind: Any) -> Shape:
        """Enums, subclasses of scalars, and classes for which the converter has hooks."""
        python: Any = kind
        if not isinstance(kind, type) or issubclass(cast("type[Any]", kind), tuple) or typing.is_typeddict(kind):
            raise Mismatch(
                f"type {shown(str(getattr(kind, '__name__', kind)))} has no JSON form; use an attrs class or dataclass"
            )
        if issubclass(kind, Enum):
            return shapes.enum(kind)
        name = shown(kind.__name__)
        for base in _DERIVABLE:
            if issubclass(kind, base):
                return shapes.derived(kind, shapes.SCALARS[base])
        try:
            structure = self.converter.get_structure_hook(kind)
            unstructure = self.converter.get_unstructure_hook(kind)
        except Exception as error:  # noqa: BLE001 - cattrs asks the class all kinds of things
            raise Mismatch(
                f"type {name} has no JSON form ({type_name(error)}); give CattrsCodec a converter with hooks for it"
            ) from None

        def encode(value: Any) -> Any:
            if not isinstance(value, kind):
                raise shapes.wrong(name, value)
            image = unstructure(value)
            if image is value:
                raise Mismatch(f"type {name} has no unstructure hook; give CattrsCodec a converter with one")
            if image is None:
                raise Mismatch(f"the unstructure hook of {name} gave None, which is how None itself looks")
            return plain.by_key(plain.plain(image))

        def decode(value: Any) -> Any:
            try:
                return structure(value, kind)
            except Exception as error:  # noqa: BLE001 - user code
                raise Mismatch(
                    f"the structure hook of {name} refused it ({type_name(error)})", f": {shown(str(error))}"
                ) from None

        return Shape(name, encode, decode, plain.ANY.json - {NoneType}, python, open=True)

    def grown(self, key: Any, name: str, build: Callable[[], Shape], python: Any = None) -> Shape:
        """A shape that may hold itself: who asks while it is being built gets a stand-in that becomes the real one."""
        known = self.growing.get(key)
        if known is not None:
            return known
        shape = self.growing[key] = Shape(
            name,
            lambda value: shape.encode(value),
            lambda value: shape.decode(value),
            frozenset({dict}) if python else frozenset(),
            python,
        )
        real = build()
        for part in dataclasses.fields(Shape):
            setattr(shape, part.name, getattr(real, part.name))
        return shape

    def union(self, members: list[Shape]) -> Shape:
        if plain.ANY in members:
            return plain.ANY
        records = [member for member in dict.fromkeys(members) if has_fields(member.python)]
        if len(records) > 1:
            members = [member for member in members if member not in records] + [self.either(records)]
        return containers.union(members)

    def either(self, records: list[Shape]) -> Shape:
        """Classes side by side, told apart by a Literal field or by a key that only one of them has."""
        by_class = {cast("type", record.python): record for record in records}
        names = " | ".join(record.name for record in records)
        renames = {f.name: override(rename=f.key) for cls in by_class for f in fields_of(cls) if f.key != f.name}
        try:
            choose = create_default_dis_func(
                self.converter, *list[Any](by_class), use_literals=not renames, overrides=renames
            )
        except Exception:  # noqa: BLE001 - cattrs raises more than it documents when classes have no fields
            raise Mismatch(
                f"{names} cannot be told apart in JSON; give each its own field without default, or a Literal field"
            ) from None

        def chosen(tree: dict[str, Any]) -> Shape | None:
            try:
                return by_class.get(cast("type", choose(tree)))
            except Exception:  # noqa: BLE001 - KeyError, TypeError, ValueError: it is none of them
                return None

        def encode(value: object) -> Any:
            record = by_class.get(type(value))
            if record is None:
                raise shapes.wrong(names, value)
            tree = record.encode(value)
            if chosen(tree) is not record:
                raise Mismatch(
                    f"{record.name} cannot be told from the others of {names} in JSON; give each a Literal field"
                )
            return tree

        def decode(value: object) -> Any:
            record = chosen(value) if shapes.is_dict(value) else None
            if record is None:
                raise shapes.wrong(f"object of {names}", value)
            return record.decode(value)

        return Shape(names, encode, decode, frozenset({dict}), inner=records)

    def record(self, cls: type, arguments: tuple[Any, ...]) -> Shape:
        """An attrs class or dataclass as an object."""
        try:
            fields = fields_of(cls)
        except TypeError as error:
            raise Mismatch(str(error)) from None
        _check_constructor(cls, fields)
        inner: list[Shape] = []
        for field in fields:
            try:
                inner.append(self.shape(_filled(field.type, getattr(cls, "__parameters__", ()), arguments)))
            except Mismatch as error:
                error.parts.append(field.key)
                raise
        return Shape(
            shown(cls.__name__),
            _encoder(cls, fields, inner),
            _decoder(cls, fields, inner),
            frozenset({dict}),
            cls,
            inner=inner,
        )


def _check_constructor(cls: type, fields: list[Field]) -> None:
    """An InitVar, or an ``__init__`` by hand, can ask for what no field remembers: found now, not when the job runs."""
    aliases = {field.alias for field in fields}
    parameters = inspect.signature(cls).parameters.values()
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind not in {one.VAR_KEYWORD, one.VAR_POSITIONAL}]
    names = {one.name for one in named if one.kind is not one.POSITIONAL_ONLY}
    needed = {one.name for one in named if one.default is one.empty}
    odd = sorted(needed - aliases) or sorted(set() if takes_all else aliases - names)
    if odd:
        raise Mismatch(
            f"the constructor of {shown(cls.__name__)} and its fields differ in {shown(odd[0])!r}, so JSON "
            "cannot build it; let attrs or dataclass write __init__"
        )


def _filled(kind: Any, parameters: Sequence[Any], arguments: Sequence[Any]) -> Any:
    """*kind* with the type variables of a generic class replaced."""
    given = dict(zip(parameters, arguments, strict=False))
    if not given or isinstance(kind, type):
        return kind
    if isinstance(kind, TypeVar):
        return given.get(kind, kind)
    own = getattr(kind, "__parameters__", ())
    return kind[tuple(given.get(one, one) for one in own)] if own else kind


def _encoder(cls: type, fields: list[Field], inner: list[Shape]) -> Callable[[Any], Any]:
    """``def encode(value)`` that gives the object's dict; ``at`` remembers the field for the error's path."""
    lines = ["def encode(value):", "  if type(value) is not cls: refuse(value)", "  at = 0", "  try:"]
    for n, (field, shape) in enumerate(zip(fields, inner, strict=True)):
        lines += [f"    at = {n}", f"    v{n} = value.{field.name}"]
        unless = f"if not ({shape.encode_as_is.format(f'v{n}')}): " if shape.encode_as_is else ""
        lines.append(f"    {unless}v{n} = encode_{n}(v{n})")
    pairs = ", ".join(f"{field.key!r}: v{n}" for n, field in enumerate(fields))
    lines += [f"    return {{{pairs}}}", "  except Exception as error: failed(error, at)"]

    def refuse(value: object) -> None:
        if isinstance(value, cls):
            raise Mismatch(
                f"expected {shown(cls.__name__)}, got its subclass {type_name(value)}, which would come back as the "
                f"former; declare the field as {shown(cls.__name__)} | {type_name(value)}"
            )
        raise shapes.wrong(shown(cls.__name__), value)

    def failed(error: Exception, at: int) -> NoReturn:
        if isinstance(error, AttributeError):
            error = Mismatch("is not set")
        if isinstance(error, Mismatch):
            error.parts.append(fields[at].key)
        raise error

    names = {f"encode_{n}": shape.encode for n, shape in enumerate(inner)}
    return _compiled("encode", lines, {"cls": cls, "refuse": refuse, "failed": failed, **names})


def _decoder(cls: type, fields: list[Field], inner: list[Shape]) -> Callable[[Any], Any]:
    """``def decode(value)`` that gives the instance.

    For a key that is not there the constructor gets its own default, which may be the sentinel of a factory: as if
    nothing were passed, and no dict is needed for what is. Only a constructor written by hand can hide it; that one is
    passed nothing.
    """
    parameters = inspect.signature(cls).parameters
    defaults: dict[str, Any] = {}
    given: list[str] = []
    hidden = False
    lines = ["def decode(value):", "  if type(value) is not dict: raise wrong('object', value)", "  get = value.get"]
    lines += ["  more = {}", "  at = 0", "  try:"]
    for n, (field, shape) in enumerate(zip(fields, inner, strict=True)):
        default = parameters[field.alias].default if field.alias in parameters else inspect.Parameter.empty
        if field.required:
            otherwise = "raise absent()"
        elif default is inspect.Parameter.empty:
            otherwise = "pass"
        else:
            defaults[f"default_{n}"] = default
            otherwise = f"v{n} = default_{n}"
        check = shape.decode_as_is.format(f"v{n}") or "False"
        lines += [
            f"    at = {n}",
            f"    v{n} = get({field.key!r}, missing)",
            f"    if v{n} is missing: {otherwise}",
            f"    elif not ({check}): v{n} = decode_{n}(v{n})",
        ]
        if otherwise == "pass":
            hidden = True
            lines.append(f"    if v{n} is not missing: more[{field.alias!r}] = v{n}")
        else:
            given.append(f"{field.alias}=v{n}")
    if hidden:
        given.append("**more")
    else:
        lines.remove("  more = {}")
    lines += [
        "    pass",
        "  except Mismatch as error:",
        "    error.parts.append(keys[at])",
        "    raise",
        f"  try: return cls({', '.join(given)})",
        "  except Exception as error: failed(error)",
    ]
    keys = {field.name: field.key for field in fields}

    def absent() -> Mismatch:
        return Mismatch("is missing, and the field has no default")

    def failed(error: Exception) -> NoReturn:
        if isinstance(error, RecursionError):
            raise error
        cause = error.args[0] if error.args and isinstance(error.args[0], str) else ""
        refusal = Mismatch(
            f"{shown(cls.__name__)} refused it ({type_name(error)})", f": {shown(cause)}" if cause else ""
        )
        name = _validated(error)
        if name in keys:
            refusal.parts.append(keys[name])
        raise refusal from None

    names = {f"decode_{n}": shape.decode for n, shape in enumerate(inner)}
    own = {"cls": cls, "keys": list(keys.values()), "missing": object(), "absent": absent, "failed": failed}
    return _compiled("decode", lines, {**own, "wrong": shapes.wrong, "Mismatch": Mismatch, **names, **defaults})


def _validated(error: Exception) -> str:
    """The name of the attrs field whose validator raised: every validator is called with its ``Attribute``."""
    trace = error.__traceback__
    while trace is not None:
        for local in trace.tb_frame.f_locals.values():
            if isinstance(local, attrs.Attribute):
                return str(local.name)
        trace = trace.tb_next
    return ""


def _compiled(name: str, lines: list[str], names: dict[str, Any]) -> Callable[[Any], Any]:
    # A loop over the fields in place of generated source takes twice as long. Names come from the class, keys by repr.
    exec("\n".join(lines), names)  # noqa: S102
    return cast("Callable[[Any], Any]", names[name])
