"""What mypy and pyright, both strict, must take, with the types they must see. Never run."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, assert_type

import attrs
from sqlalchemy import Connection, Engine, MetaData, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session, scoped_session

from sqla_river import (
    Cancel,
    Exponential,
    InsertOptions,
    Job,
    JobContext,
    JobMixin,
    JobState,
    QueueInfo,
    River,
    Runner,
    Snooze,
    Workers,
    create_all,
    enqueue,
    enqueue_many,
    list_queues,
    pause,
    resume,
    update_queue,
)
from sqla_river import asyncio as awaited
from sqla_river.insert import Inserted
from sqla_river.models import RiverBase


@attrs.frozen
class Attrs:
    kind: ClassVar[str] = "attrs"
    options: ClassVar[InsertOptions] = InsertOptions(queue="a", priority=1, max_attempts=3)
    n: int


@dataclass(frozen=True)
class Data:
    kind: ClassVar[str] = "data"
    n: int


class Bare:
    kind: ClassVar = "bare"


class Base(DeclarativeBase):
    pass


class Mine(JobMixin, Base):
    pass


class InMyMetadata(JobMixin, RiverBase):
    __river_schema__ = "jobs"
    metadata = MetaData()


def columns() -> None:
    assert_type(Job.state, InstrumentedAttribute[JobState])
    assert_type(Mine.metadata_, InstrumentedAttribute[dict[str, Any]])
    job = Job(Attrs(1), priority=2, queue="q", tags=["a"], metadata={"a": 1}, pending=True)
    assert_type(job.id, int)
    assert_type(job.finalized_at, datetime | None)
    assert_type(job.unique_states, frozenset[JobState] | None)
    Mine(Data(1), scheduled_at=timedelta(1), max_attempts=None)
    InMyMetadata(Bare())


def verbs(session: Session, scoped: scoped_session[Session], connection: Connection, engine: Engine) -> None:
    assert_type(enqueue(session, Attrs(1)), Job)
    assert_type(enqueue(scoped, Data(1), queue="q", scheduled_at=timedelta(minutes=1)), Job)
    assert_type(enqueue(connection, Bare(), priority=None), Job)
    assert_type(enqueue_many(session, [Attrs(1), Data(2)]), Inserted)
    enqueue_many(connection, ((Attrs(n), InsertOptions(priority=1)) for n in range(3)), returning=True)
    assert_type(session.scalars(select(Job).where(Job.state == JobState.RETRYABLE)).one(), Job)
    create_all(engine)
    create_all(connection, "river")


def queues(session: Session, connection: Connection, runner: Runner) -> None:
    assert_type(pause(session, "mail"), list[QueueInfo])
    assert_type(resume(connection, "*"), list[QueueInfo])
    assert_type([info.paused_at for info in list_queues(session)], list[datetime | None])
    assert_type(update_queue(session, "mail", metadata={"a": 1}), QueueInfo)
    runner.queues.add("mail", 5)
    runner.queues["mail"] = 6
    runner.queues.remove("mail")
    assert_type(dict(runner.queues), dict[str, int])


async def async_queues(session: AsyncSession) -> None:
    assert_type(await awaited.pause(session, "mail"), list[QueueInfo])
    assert_type(await awaited.update_queue(session, "mail", metadata={}), QueueInfo)


def rivers(session: Session) -> None:
    assert_type(River().enqueue(session, Attrs(1)), Job)
    assert_type(River(notify="off"), River[Job])
    river = River(job_class=Mine, defaults=InsertOptions(queue="q"), notify="after_commit")
    assert_type(river, River[Mine])
    assert_type(river.enqueue(session, Attrs(1), priority=1), Mine)


async def async_verbs(
    session: AsyncSession, scoped: async_scoped_session[AsyncSession], connection: AsyncConnection
) -> None:
    assert_type(await awaited.enqueue(session, Attrs(1), priority=2), Job)
    assert_type(await awaited.enqueue(scoped, Attrs(1)), Job)
    assert_type(await awaited.enqueue_many(connection, [Attrs(1)], returning=True), Inserted)


workers = Workers()


@workers.register(Attrs, timeout=timedelta(seconds=1), retry=Exponential(base=timedelta(seconds=1)))
def plain(job: JobContext[Attrs]) -> None:
    assert_type(job.args, Attrs)
    assert_type(job.attempt, int)


@workers.register(Data)
def outcomes(job: JobContext[Data]) -> Snooze | Cancel | None:
    return Snooze(timedelta(seconds=job.args.n)) if job.attempt == 1 else None


@workers.register(Bare)
def several(job: JobContext[Attrs | Bare]) -> Cancel:
    return Cancel(str(job.args))


def the_decorated_stays_what_it_was() -> Callable[[JobContext[Data]], Snooze | Cancel | None]:
    return outcomes
