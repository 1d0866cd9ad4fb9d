"""What mypy and pyright, both strict, must refuse: an ignore that is not needed is an error. Never run."""

from datetime import timedelta
from typing import ClassVar, Literal

import attrs
import msgspec
import pydantic
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
from sqla_river.ext.flask import FlaskRiver
from sqla_river.testing import assert_enqueued, drain, refute_enqueued, work_one
from sqla_river.testing import asyncio as awaited_testing


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


class Model(pydantic.BaseModel):
    kind: ClassVar[str] = "model"
    n: int


class ModelNoKind(pydantic.BaseModel):
    n: int


class ModelKindAsField(pydantic.BaseModel):
    kind: Literal["x"] = "x"


class Struct(msgspec.Struct):
    kind: ClassVar[str] = "struct"
    n: int


class StructNoKind(msgspec.Struct):
    n: int


class StructKindAsField(msgspec.Struct):
    kind: str = "x"


def args(session: Session) -> None:
    enqueue(session, ModelNoKind(n=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, ModelKindAsField())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, StructNoKind(n=1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, StructKindAsField())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, Model(n="1"))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    enqueue(session, Struct(m=1))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
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


def in_flask(river: FlaskRiver[Job]) -> None:
    river.enqueue(NoKind(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    river.enqueue(Good(1), prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    river.enqueue_many([NoKind(1)])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
    river.runner(lease=30)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    river.runner(leese=timedelta(1))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


workers = Workers()


@workers.register(Good)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def other_args(job: JobContext[Other]) -> None: ...


@workers.register(Good)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
def other_outcome(job: JobContext[Good]) -> int:
    return 1


@workers.register(Good)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def session_without_a_transaction(job: JobContext[Good], session: Session) -> None: ...


@workers.register(Model)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
def struct_for_a_model(job: JobContext[Struct]) -> None: ...


@workers.register(StructNoKind)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
def struct_without_kind(job: JobContext[StructNoKind]) -> None: ...


@workers.register(Struct)
def field_that_is_not_there(job: JobContext[Struct]) -> None:
    job.args.m  # type: ignore[attr-defined]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


async def testing(session: Session, awaited_session: AsyncSession) -> None:
    assert_enqueued(session, NoKind)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    assert_enqueued(session, "good")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    assert_enqueued(session, Good, {"quue": "q"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    assert_enqueued(session, Good, {"count": "2"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    assert_enqueued(session, Good, river=Job)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert_enqueued(awaited_session, Good)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    refute_enqueued(session, StructNoKind)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    drain(awaited_session, workers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    drain(session)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    drain(session, workers, now=60)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    drain(session, workers, clock=timedelta(1))  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    work_one(workers, Good)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    work_one(workers, Good(1), prioritty=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await awaited_testing.drain(session, workers)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    awaited_testing.assert_enqueued(awaited_session, Good)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]


def river_of_args(river: River[Good]) -> None: ...  # type: ignore[type-var]  # pyright: ignore[reportInvalidTypeArguments]


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
