"""Which jobs are there: `assert_enqueued`, `refute_enqueued`."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypedDict, TypeVar, cast, overload

import attrs
from sqlalchemy import Connection, func, select
from sqlalchemy.orm import Session

from sqla_river.args import JobArgs, kind_of, redacted
from sqla_river.codec.fields import declares_fields, fields_of
from sqla_river.errors import DecodeError, InvalidOptionError
from sqla_river.models import Job, JobMixin
from sqla_river.options import shown
from sqla_river.river import River
from sqla_river.session import AnySession, check_bind
from sqla_river.states import JobState
from sqla_river.testing.sessions import plain_session

A = TypeVar("A", bound=JobArgs)
J = TypeVar("J", bound=JobMixin)

MOST_SHOWN: Final = 10


class Wanted(TypedDict, total=False):
    """What a job may be asked for beside its args; all that is said must be so.

    ``metadata`` names keys that must be there; a timedelta as ``scheduled_at`` counts from the job's creation;
    ``count`` is the number of such jobs, exactly.
    """

    queue: str
    priority: int
    max_attempts: int
    attempt: int
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    state: JobState | str
    scheduled_at: datetime | timedelta
    count: int
    river: River[Any]


WORDS: Final = frozenset(Wanted.__annotations__)
ANYTHING: Final[Wanted] = {}


@overload
def assert_enqueued(
    session: AnySession, args: A | type[A], wanted: Wanted = ..., /, *, river: River[J], **fields: Any
) -> J: ...
@overload
def assert_enqueued(
    session: AnySession, args: A | type[A], wanted: Wanted = ..., /, *, river: None = None, **fields: Any
) -> Job: ...
def assert_enqueued(session: AnySession, args: Any, wanted: Wanted = ANYTHING, /, **fields: Any) -> Any:
    """Fail unless a job of that kind is there, in whatever state, as far as *session* sees. The session is flushed.

    ``assert_enqueued(session, SendSMS, order_id=7, queue="notifications")``. A keyword that is a field of the args
    class means that field; any other is a word of `Wanted`. Where a class has a field of such a name, say the word in
    *wanted*, which holds nothing else: ``assert_enqueued(session, Move, {"queue": "slow"}, queue="field of Move")``.

    Args:
        session: Session, scoped_session or Connection.
        args: the args class, or an instance: then all of its args must be equal.
        wanted: what else must be so.
        river: the `River` whose jobs are meant; the one of the shipped `Job` unless said otherwise.
        fields: as they are decoded, compared by ``==``.

    Returns:
        The Job; the one with the lowest id of several.

    Raises:
        AssertionError: there is none, or not as many as ``count``; the message shows the nearest ones, redacted fields
            masked.
        InvalidOptionError: a keyword that is neither a field nor a word of `Wanted`.
    """
    __tracebackhide__ = True
    question = _asked(args, wanted, fields)
    seen = _look(session, question, "assert_enqueued")
    if len(seen.found) == question.count or (question.count is None and seen.found):
        return seen.found[0]
    raise AssertionError(_missing(question, seen))


def refute_enqueued(session: AnySession, args: A | type[A], wanted: Wanted = ANYTHING, /, **fields: Any) -> None:
    """Fail if such a job is there, in whatever state unless ``state`` is said; everything else as `assert_enqueued`.

    Raises:
        AssertionError: there is one; the message shows it.
    """
    __tracebackhide__ = True
    question = _asked(args, wanted, fields)
    if question.count is not None:
        raise InvalidOptionError("count", "refute_enqueued takes no count; use assert_enqueued")
    found = _look(session, question, "refute_enqueued").found
    if found:
        jobs = [f"\n    {_name(job)}" for job in found[:MOST_SHOWN]]
        raise AssertionError(f"expected no job {question}, found {len(found)}:{''.join(jobs)}{_more(found)}")


@attrs.frozen
class _Question:
    """What is looked for. *fields* by attribute, *whole* as JSON where an instance was given."""

    cls: type[Any]
    river: River[Any]
    fields: Mapping[str, Any]
    whole: Mapping[str, Any] | None
    options: Mapping[str, Any]
    count: int | None
    secret: frozenset[str]

    def __str__(self) -> str:
        said = {**self.fields, **(self.whole or {})}
        words = [f"{name}={self.show(name, value)}" for name, value in said.items()]
        words += [f"{name}={_text(value)}" for name, value in self.options.items()]
        return f"of kind {kind_of(self.cls)!r}{' with ' + ', '.join(words) if words else ''}"

    def show(self, name: str, value: object) -> str:
        return "***" if name in self.secret else shown(value)

    def differences(self, job: JobMixin) -> list[str]:
        """How *job* is not what is wanted; empty if it is."""
        found: list[str] = []
        if self.whole is not None:
            theirs = job.args
            for key in sorted({*self.whole, *theirs}):
                found += self._unlike(key, theirs.get(key, _ABSENT), self.whole.get(key, _ABSENT))
        elif self.fields:
            try:
                args = self.river.settings.codec.decode(self.cls, json.dumps(job.args))
            except DecodeError as error:
                return [f"its args do not fit {self.cls.__name__}: {error}"]
            for name, value in self.fields.items():
                found += self._unlike(name, getattr(args, name, _ABSENT), value)
        for name, value in self.options.items():
            found += _option_unlike(job, name, value)
        return found

    def _unlike(self, name: str, theirs: object, wanted: object) -> list[str]:
        if wanted == theirs:
            return []
        return [f"{name} is {self.show(name, theirs)}, wanted {self.show(name, wanted)}"]


class _Absent:
    def __repr__(self) -> str:
        return "not there"


_ABSENT: Final = _Absent()


def _option_unlike(job: JobMixin, name: str, wanted: Any) -> list[str]:
    theirs: Any = getattr(job, "metadata_" if name == "metadata" else name)
    if name == "metadata":
        theirs = {key: theirs[key] for key in wanted if key in theirs}
        wanted = dict(wanted)
    elif name == "tags":
        theirs, wanted = list(theirs), list(wanted)
    elif name == "scheduled_at" and isinstance(wanted, timedelta):
        theirs = theirs - job.created_at
    return [] if wanted == theirs else [f"{name} is {_text(theirs)}, wanted {_text(wanted)}"]


def _text(value: object) -> str:
    return str(value) if isinstance(value, datetime | timedelta | JobState) else shown(value)


def _class_of(args: object) -> type[Any]:
    return args if isinstance(args, type) else type(args)


def _asked(args: Any, wanted: Wanted, keywords: Mapping[str, Any]) -> _Question:
    if not isinstance(cast("object", wanted), Mapping):
        raise InvalidOptionError(
            "wanted", f"the third argument is a dict such as {{'queue': 'q'}}, got {shown(wanted)}"
        )
    cls = _class_of(args)
    kind_of(cls)
    declared = {field.name: field.key for field in fields_of(cls)} if declares_fields(cls) else None
    fields: dict[str, Any] = {}
    words: dict[str, Any] = {**wanted}
    for name, value in keywords.items():
        known = name not in WORDS if declared is None else name in declared
        (fields if known and args is cls else words)[name] = value
    for name in words:
        if name not in WORDS:
            names = ", ".join(declared or ()) if args is cls else "none, an instance says them all"
            raise InvalidOptionError(
                name,
                f"{cls.__name__} has no field {name!r}; fields: {names}; beside them: {', '.join(sorted(WORDS))}",
            )
    count = words.pop("count", None)
    if count is not None and count < 1:
        raise InvalidOptionError("count", f"count must be at least 1, got {count}; use refute_enqueued for none")
    river: River[Any] = words.pop("river", None) or River.of(Job)
    whole = None if args is cls else json.loads(river.settings.codec.encode(args))
    keys = redacted(cls)
    secret = keys | {name for name, key in (declared or {}).items() if key in keys}
    return _Question(cls, river, fields, whole, words, count, secret)


@attrs.frozen
class _Seen:
    """The jobs that are as wanted, the others of that kind with what is different, and how many there are of others."""

    found: list[Any]
    near: list[tuple[Any, list[str]]]
    others: Mapping[str, int]


def _look(session: AnySession, question: _Question, verb: str) -> _Seen:
    plain = plain_session(session, verb)
    check_bind(plain, question.river.job_class)
    if isinstance(plain, Connection):
        with Session(plain, join_transaction_mode="rollback_only") as own:
            seen = _see(own, question)
            own.expunge_all()
            return seen
    plain.flush()
    return _see(plain, question)


def _see(session: Session, question: _Question) -> _Seen:
    mapped: Any = question.river.job_class
    kind = kind_of(question.cls)
    chosen = select(mapped).where(mapped.kind == kind).order_by(mapped.id)
    jobs = session.scalars(chosen, execution_options={"populate_existing": True}).all()
    counted = (
        select(mapped.kind, func.count().label("jobs"))
        .where(mapped.kind != kind)
        .group_by(mapped.kind)
        .order_by(mapped.kind)
    )
    judged = [(job, question.differences(job)) for job in jobs]
    return _Seen(
        [job for job, unlike in judged if not unlike],
        sorted((pair for pair in judged if pair[1]), key=lambda pair: len(pair[1])),
        {row.kind: row.jobs for row in session.execute(counted.order_by(mapped.kind))},
    )


def _missing(question: _Question, seen: _Seen) -> str:
    found, near = seen.found, seen.near
    wanted = (
        f"no job {question}"
        if question.count is None
        else f"expected {question.count} jobs {question}, found {len(found)}"
    )
    lines = [wanted, *(f"    {_name(job)}" for job in found[:MOST_SHOWN])]
    if near:
        lines.append(f"  {len(near)}{' more' if found else ''} of this kind, the nearest first:")
        lines += [f"    {_name(job)}: {'; '.join(unlike)}" for job, unlike in near[:MOST_SHOWN]]
        lines += ["    ..."] * (len(near) > MOST_SHOWN)
    if seen.others:
        lines.append(f"  of other kinds: {', '.join(f'{count} {kind}' for kind, count in seen.others.items())}")
    if not found and not near and not seen.others:
        lines.append("  there are no jobs at all")
    return "\n".join(lines)


def _name(job: JobMixin) -> str:
    return f"job {job.id} ({job.state}, queue {job.queue!r})"


def _more(jobs: list[Any]) -> str:
    return "\n    ..." if len(jobs) > MOST_SHOWN else ""
