"""What mypy and pyright, both strict, must refuse: an ignore that is not needed is an error. Never run."""

from datetime import timedelta
from typing import ClassVar, Literal

import attrs
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sqla_river import (
    InsertOptions,
    Job,
    JobContext,
    River,
    Workers,
    create_all,
    enqueue,
    enqueue_many,
)
from sqla_river import asyncio as awaited


@attrs.frozen
class Good:
    kind: ClassVar[str] = "good"
    n: int


@attrs.frozen
class Other:
    kind: ClassVar[str] = "other"


@attrs.frozen
class NoKind:
    n: int


@attrs.frozen
class KindAsField:
    kind: str


class KindUnannotated:
    kind = "unannotated"


class KindLiteral:
    kind: ClassVar[Literal["literal"]] = "literal"


class KindAsNumber:
    kind: ClassVar[int] = 1


def args(session: Session) -> None:
    enqueue(session, NoKind(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, KindAsField("x"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, KindUnannotated())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, KindLiteral())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, KindAsNumber())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, "good")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Job(NoKind(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue_many(session, [NoKind(1)])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    enqueue_many(session, [(Good(1), {"priority": 1})])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]


def options(session: Session) -> None:
    enqueue(session, Good(1), prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    enqueue(session, Good(1), priority="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, Good(1), scheduled_at=60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Job(Good(1), quue="q")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    InsertOptions(prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    River(notify="never")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    River(job_class=Good)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


async def sessions(session: AsyncSession, plain: Session, engine: Engine) -> None:
    enqueue(session, Good(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(engine, Good(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue_many(session, [Good(1)])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await awaited.enqueue(plain, Good(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    awaited.enqueue(session, Good(1))  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await awaited.enqueue(session, Good(1), prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    create_all(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


workers = Workers()


@workers.register(Good)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def other_args(job: JobContext[Other]) -> None: ...


@workers.register(Good)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
def other_outcome(job: JobContext[Good]) -> int:
    return 1


@workers.register(Good)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def session_without_a_transaction(job: JobContext[Good], session: Session) -> None: ...


@workers.register(NoKind)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
def no_kind(job: JobContext[NoKind]) -> None: ...


@workers.register(Good, timeout=10)  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportArgumentType]
def bare_number(job: JobContext[Good]) -> None: ...


@workers.register(Good, timout=timedelta(1))  # type: ignore[call-overload, untyped-decorator]  # pyright: ignore[reportCallIssue, reportUntypedFunctionDecorator]
def misspelt(job: JobContext[Good]) -> None: ...


def wrong_columns(job: Job, good: JobContext[Good]) -> None:
    job.stat  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    job.priority = "1"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
    good.args.m  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def misspelt_import() -> None:
    from sqla_river import enqeue  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]

    print(enqeue)  # pyright: ignore[reportUnknownArgumentType]
