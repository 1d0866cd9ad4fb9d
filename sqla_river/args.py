"""Typed args to JSON and back: what `River(codec=...)` takes, and the codec for attrs classes, dataclasses,
pydantic models and msgspec Structs.
"""

import json
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from types import MemberDescriptorType
from typing import Any, ClassVar, Final, NoReturn, Protocol, TypeVar, cast

import cattrs

from sqla_river.codec import fields, plain
from sqla_river.codec.plan import Plan
from sqla_river.codec.quick import quick_decoder
from sqla_river.codec.records import plan_for
from sqla_river.codec.shapes import Mismatch, shown, type_name
from sqla_river.errors import DecodeError, EncodeError, RegistrationError

_fast_dumps: Callable[[object], bytes] | None
_fast_loads: Callable[[str | bytes], object] | None
try:
    import orjson
except ImportError:
    _fast_dumps = _fast_loads = None
else:
    _fast_dumps, _fast_loads = orjson.dumps, orjson.loads

MAX_BYTES: Final = 1_048_576
_compiling: Final = threading.RLock()

if hasattr(os, "register_at_fork"):  # else a child forked while another thread compiles a class could compile none
    os.register_at_fork(
        before=_compiling.acquire, after_in_parent=_compiling.release, after_in_child=_compiling.release
    )


class JobArgs(Protocol):
    """What a job needs to know: a class with a stable name. ``ClassVar`` because pyright refuses a property here."""

    kind: ClassVar[str]


A = TypeVar("A", bound=JobArgs)
T = TypeVar("T")


class Codec(Protocol):
    """Turns args into JSON and back. Both ways must be pure, quick and safe to call from many threads."""

    def encode(self, args: JobArgs) -> bytes:
        """The UTF-8 JSON text of an object that jsonb takes; equal args are equal text, or two unique jobs.

        Raises:
            EncodeError: the args cannot be stored, or would not come back as they are.
        """
        ...

    def decode(self, args_type: type[A], raw: str | bytes) -> A:
        """The inverse of `encode`.

        Raises:
            DecodeError: whatever is wrong with *raw*; nothing else may escape.
        """
        ...


def kind_of(args: object) -> str:
    """The ``kind`` of an args class, or of an instance of one.

    Raises:
        RegistrationError: *args* is a class without a usable kind.
        EncodeError: *args* is an instance of such a class.
    """
    cls = cast("type[Any]", args if isinstance(args, type) else type(args))
    kind = getattr(cls, "kind", None)
    if isinstance(kind, str) and kind:
        return str.__str__(kind)
    way_out = "write 'kind: ClassVar[str] = \"send_sms\"' in the class body"
    if kind is None:
        message = f"class {cls.__name__} has no kind; {way_out}"
    elif isinstance(kind, str):
        message = f"the kind of class {cls.__name__} is empty; {way_out}"
    elif isinstance(kind, property | MemberDescriptorType):
        message = f"the kind of class {cls.__name__} is a field or property, but it names the whole class; {way_out}"
    else:
        message = f"the kind of class {cls.__name__} must be str, got {type_name(kind)}; {way_out}"
    raise RegistrationError(message) if isinstance(args, type) else EncodeError("$", message)


def redacted(args_type: type[JobArgs]) -> frozenset[str]:
    """The JSON keys of the fields marked ``redact``, at any depth: whoever shows args masks these keys.

    Empty for a class that only a codec of one's own knows.

    Raises:
        RegistrationError: a mark that does not exist, or an annotation that cannot be resolved.
    """
    return _declared(args_type, fields.redacted_keys) or frozenset()


def json_keys(args_type: type[JobArgs]) -> frozenset[str]:
    """The outermost JSON keys of a class, as far as its fields say: none for one that only a codec of one's own knows.

    Raises:
        RegistrationError: as for `redacted`.
    """
    return frozenset(field.key for field in _declared(args_type, fields.fields_of) or [])


def unique_fields(args_type: type[JobArgs]) -> list[str]:
    """Dotted JSON paths of the fields marked ``unique``, sorted.

    As River reads its struct tags: marks in a nested class count whether or not the field that holds it is marked, and
    stand in for a mark on that field. ``Address | None`` is nested too, ``list[Address]`` is not.

    Raises:
        RegistrationError: as for `redacted`.
    """
    return sorted(_declared(args_type, fields.unique_paths) or [])


def _declared(args_type: type, read: Callable[[type], T]) -> T | None:
    if not fields.declares_fields(args_type):
        return None
    try:
        return read(args_type)
    except TypeError as error:
        raise RegistrationError(str(error)) from None


class CattrsCodec:
    """The codec for attrs classes and dataclasses, and more; `shapes` says how each type looks in JSON.

    Values are checked against the declared types both ways, and nothing is coerced. On the way back unknown keys are
    ignored, and a missing one takes the field's default. A class is compiled when it is first met.

    A pydantic model or msgspec Struct is dumped and read by its own library, by its own rules; what would not come back
    as it is, such as the mask of a ``SecretStr``, is refused when it is enqueued.

    Args:
        max_bytes: the longest JSON that `encode` returns.
        converter: a cattrs converter whose hooks serve the classes that have no shape and no fields, such as
            ``IPv4Address``. A structure hook raises for what does not fit; an unstructure hook gives plain JSON.
    """

    def __init__(self, *, max_bytes: int = MAX_BYTES, converter: cattrs.Converter | None = None) -> None:
        self.max_bytes = max_bytes
        self.converter = converter or cattrs.Converter()
        self._plans: dict[type, Plan] = {}
        self._quick: dict[type, Callable[[str | bytes], Any] | None] = {}

    def encode(self, args: JobArgs) -> bytes:
        """*args* as the UTF-8 JSON text of an object.

        About 1 µs for a flat class with orjson, three times that without; the first call of a class compiles it.

        Raises:
            EncodeError: a value does not fit its declared type, or jsonb could not give it back as it is, or the whole
                takes more than *max_bytes*; or the class has no JSON form.
        """
        try:
            plan = self._plans.get(type(args)) or self.plan(type(args))
            tree = plan.encode(args)
            if plan.recursive:
                plain.check_depth(tree)
            raw = _dump(tree)
            if plan.check is not None and len(raw) <= self.max_bytes:
                plan.check(args, plan.decode(raw))
        except Exception as error:  # noqa: BLE001 - a class may do anything in its properties and hooks
            failure: Exception = EncodeError(*_told(error, self._plans.get(type(args)), encoding=True))
        else:
            if len(raw) <= self.max_bytes:
                return raw
            failure = EncodeError(
                "$",
                f"the args take {len(raw)} bytes as JSON, more than max_bytes={self.max_bytes}; "
                "store them elsewhere and pass a key",
            )
        # Outside of except, so that no traceback shows the first error, whose text may hold a redacted value.
        raise failure

    def decode(self, args_type: type[A], raw: str | bytes) -> A:
        """The *args_type* that *raw* holds.

        Raises:
            DecodeError: whatever is wrong with *raw* or the class; no other exception escapes.
        """
        decoded: A
        quick = self._quick.get(args_type)
        if quick is None and args_type not in self._quick:
            self.prepare(args_type)
            quick = self._quick[args_type]
        if quick is not None:
            try:
                decoded = quick(raw)
            except Exception:  # noqa: BLE001, S110 - what follows takes it, or says why not
                pass
            else:
                return decoded
        try:
            plan = self._plans.get(args_type) or self.plan(args_type)
            if plan.raw:
                decoded = plan.decode(raw)
                return decoded
            tree = _load(raw, exact=plan.open)
            try:
                decoded = plan.decode(tree)
            except Mismatch:
                # orjson reads an int of more than 64 bits as a float, which an int field refuses.
                if plan.open or not _holds_long_number(raw):
                    raise
                decoded = plan.decode(_load(raw, exact=True))
        except Exception as error:  # noqa: BLE001 - a poison row must fail alone
            failure = DecodeError(*_told(error, self._plans.get(args_type)))
        else:
            return decoded
        raise failure

    def prepare(self, args_type: type) -> None:
        """Compile what decodes *args_type* now, not when it is first decoded; no word of a class that cannot be."""
        quick = None
        with suppress(Exception):
            self.plan(args_type)
            quick = quick_decoder(args_type) if fields.has_fields(args_type) else None
        self._quick[args_type] = quick

    def plan(self, cls: type) -> Plan:
        """The compiled form of *cls*; raises `Mismatch` when it has none."""
        with _compiling:
            plan = self._plans.get(cls)
            if plan is None:
                plan = self._plans[cls] = plan_for(cls, self.converter)
            return plan


def _told(error: Exception, plan: Plan | None, *, encoding: bool = False) -> tuple[str, str]:
    """Path and message. A class with a redacted field shows no values at all: validators may quote other fields."""
    if isinstance(error, RecursionError):
        return "$", plain.TOO_DEEP
    if not isinstance(error, Mismatch):
        return "$", f"{'encoding' if encoding else 'decoding'} raised {type_name(error)}; see the class and its hooks"
    parts: list[str | int] = []
    for part in reversed(error.parts):
        parts.append(part)
        if plan is not None and part in plan.secrets:  # the keys below may be secret too
            break
    message = error.reason if plan is not None and plan.secrets else error.reason + error.detail
    if encoding and error.none_for:
        message += (
            "; if it comes from a row that is not flushed yet, call session.flush() first or declare the field as "
            f"{error.none_for} | None"
        )
    steps = [_step(part) for part in parts]
    if len(steps) > 20:  # noqa: PLR2004
        steps[10:-10] = ["..."]
    return "$" + "".join(steps), message


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return f".{shown(part)}" if part.isidentifier() else f'["{shown(part)}"]'


def _refuse_constant(_name: str) -> NoReturn:
    raise Mismatch("not JSON: NaN and infinity are no JSON numbers")


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:
        raise Mismatch("a number too large for a float")
    return number


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"))
_LONG_BYTES: Final = re.compile(rb"[0-9]{19}")  # 2**63 has 19 digits
_LONG_TEXT: Final = re.compile(r"[0-9]{19}", re.ASCII)


def _dump(tree: object) -> bytes:
    raw: bytes | None = None
    if _fast_dumps is not None:
        try:
            raw = _fast_dumps(tree)
        except TypeError:  # an int of more than 64 bits, a lone surrogate
            plain.plain(tree)  # says where, if it is not the int
    if raw is None:
        try:
            raw = _ENCODER.encode(tree).encode()
        except ValueError:
            plain.plain(tree)
            raise
    if rb"\u0000" in raw:  # also the text of an escaped backslash before 'u0000', which is harmless
        plain.plain(tree)
    return raw


def _load(raw: str | bytes, *, exact: bool) -> object:
    if _fast_loads is not None and not (exact and _holds_long_number(raw)):
        try:
            return _fast_loads(raw)
        except ValueError:  # the standard library also reads ints that orjson takes for an infinite float
            pass
    try:
        source = raw if isinstance(raw, str) else raw.decode()
        return _DECODER.decode(source)
    except json.JSONDecodeError as error:
        raise Mismatch(f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise Mismatch(f"not JSON ({type_name(error)})") from None


def _holds_long_number(raw: str | bytes) -> bool:
    return bool(_LONG_TEXT.search(raw) if isinstance(raw, str) else _LONG_BYTES.search(raw))


DEFAULT_CODEC: Final = CattrsCodec()
