"""What mypy and pyright, both strict, must take, with the types they must see. Never run."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, assert_type

import attrs
import msgspec
import pydantic
from flask import Flask
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
    change_priority,
    create_all,
    delete,
    enqueue,
    enqueue_many,
    list_jobs,
    list_queues,
    pause,
    reschedule,
    resume,
    retry,
    update_queue,
)
from sqla_river import asyncio as awaited
from sqla_river.admin import Changed
from sqla_river.ext.flask import FlaskRiver
from sqla_river.insert import Inserted
from sqla_river.listing import Page
from sqla_river.models import RiverBase
from sqla_river.testing import Worked, assert_enqueued, drain, refute_enqueued, rolled_back, work_one
from sqla_river.testing import asyncio as awaited_testing


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


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True)
    kind: ClassVar[str] = "model"
    options: ClassVar[InsertOptions] = InsertOptions(queue="a")
    n: int


class Struct(msgspec.Struct, frozen=True):
    kind: ClassVar[str] = "struct"
    options: ClassVar[InsertOptions] = InsertOptions(queue="a")
    n: int


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
    assert_type(enqueue(session, Model(n=1)), Job)
    assert_type(enqueue(session, Struct(n=1)), Job)
    enqueue_many(session, [Model(n=1), (Struct(n=2), InsertOptions(priority=1))])
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


def on_jobs(session: Session, river: River[Mine]) -> None:
    assert_type(retry(session, 1), Job)
    assert_type(retry(session, select(Job).where(Job.kind == "a")), Changed)
    assert_type(delete(session, Job.kind == "a"), Changed)
    assert_type(river.delete(session, 1), Mine)
    assert_type(river.reschedule(session, 1, scheduled_at=timedelta(hours=1)), Mine)
    assert_type(reschedule(session, Job.state == JobState.SCHEDULED, scheduled_at=datetime.now(UTC)), Changed)
    assert_type(change_priority(session, 1, priority=2), Job)
    assert_type(list_jobs(session, Job.tags.contains(["a"]), by="scheduled_at", limit=5), Page[Job])
    assert_type(river.list_jobs(session).jobs, list[Mine])
    list_jobs(session, Job.args.contains({"order_id": 17}), after=list_jobs(session).after)


async def async_verbs(
    session: AsyncSession, scoped: async_scoped_session[AsyncSession], connection: AsyncConnection
) -> None:
    assert_type(await awaited.enqueue(session, Attrs(1), priority=2), Job)
    assert_type(await awaited.enqueue(scoped, Attrs(1)), Job)
    assert_type(await awaited.retry(session, 1), Job)
    assert_type(await awaited.delete(connection, Job.id == 1), Changed)
    assert_type(await awaited.reschedule(scoped, 1, scheduled_at=timedelta(0)), Job)
    assert_type(await awaited.change_priority(session, select(Job), priority=1), Changed)
    assert_type(await awaited.list_jobs(session, limit=1), Page[Job])
    assert_type(await awaited.enqueue_many(connection, [Attrs(1)], returning=True), Inserted)
    mine = awaited.AsyncRiver(River(job_class=Mine))
    assert_type(await mine.enqueue(session, Attrs(1), priority=2), Mine)
    assert_type(await mine.cancel(session, 1), Mine)
    assert_type(await mine.cancel(scoped, Mine.id > 1), Changed)
    assert_type(await mine.reschedule(session, 1, scheduled_at=timedelta(0)), Mine)
    assert_type(await mine.list_jobs(connection), Page[Mine])
    assert_type(await mine.wait_for(session, 1), Mine)


def in_flask(app: Flask) -> None:
    river = FlaskRiver(app, workers=workers, queues={"default": 1}, in_process=True)
    assert_type(river, FlaskRiver[Job])
    assert_type(river.enqueue(Attrs(1), priority=1), Job)
    assert_type(river.enqueue_many([Attrs(1), (Data(2), InsertOptions(priority=1))], returning=True), Inserted)
    assert_type(FlaskRiver(river=River(job_class=Mine)).enqueue(Data(1)), Mine)
    assert_type(river.runner(queues={"q": 1}, lease=timedelta(minutes=1), around=app.app_context), Runner)


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


@workers.register(Model)
def model(job: JobContext[Model]) -> None:
    assert_type(job.args, Model)


@workers.register(Struct, transactional=True)
async def struct(job: JobContext[Struct], session: AsyncSession) -> Snooze | None:
    assert_type(job.args.n, int)
    return None


def testing(session: Session, scoped: scoped_session[Session], connection: Connection, engine: Engine) -> None:
    river = River(job_class=Mine)
    assert_type(assert_enqueued(session, Attrs), Job)
    assert_type(assert_enqueued(scoped, Model, n=1, queue="a"), Job)
    assert_type(assert_enqueued(connection, Struct(n=1), {"queue": "a", "count": 2}), Job)
    assert_type(assert_enqueued(session, Attrs, n=1, river=river), Mine)
    assert_type(assert_enqueued(session, Attrs(1), river=River()), Job)
    refute_enqueued(session, Data, {"state": JobState.RETRYABLE}, n=1)
    assert_type(drain(session, workers, now=timedelta(hours=1)), list[Worked])
    assert_type(drain(scoped, workers=workers, river=river, limit=5), list[Worked])
    assert_type(work_one(workers, Model(n=1), attempt=2, queue="q").state, JobState | None)
    work_one(workers, Struct(n=1), session=session)
    with rolled_back(engine) as joined:
        assert_type(joined, Session)


async def async_testing(session: AsyncSession) -> None:
    assert_type(await awaited_testing.assert_enqueued(session, Attrs, n=1), Job)
    assert_type(await awaited_testing.assert_enqueued(session, Attrs, river=River(job_class=Mine)), Mine)
    await awaited_testing.refute_enqueued(session, Model(n=1))
    assert_type(await awaited_testing.drain(session, workers, now=timedelta(0)), list[Worked])
    assert_type(await awaited_testing.work_one(workers, Data(1), session=session), Worked)


def the_decorated_stays_what_it_was() -> Callable[[JobContext[Data]], Snooze | Cancel | None]:
    return outcomes
