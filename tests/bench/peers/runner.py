"""sqla_river, with the settings that it has by default."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import attrs
from sqlalchemy import create_engine, exists, make_url, select
from sqlalchemy.orm import Session

from sqla_river import Job, JobContext, JobState, Runner, Workers, enqueue, enqueue_many
from sqla_river.schema import create_all
from tests.bench.peers.face import SLOTS, Asked, Marks, Peer


@attrs.frozen
class Measured:
    kind: ClassVar[str] = "bench"
    num: int
    t: int = 0


class River(Peer):
    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._engine = create_engine(make_url(asked.url).set(drivername="postgresql+psycopg"))

    def prepare(self) -> None:
        create_all(self._engine)

    def fill(self, numbers: Sequence[int]) -> None:
        with Session(self._engine) as session, session.begin():
            enqueue_many(session, (Measured(number) for number in numbers))

    def put(self, number: int) -> None:
        with Session(self._engine) as session, session.begin():
            enqueue(session, Measured(number))

    @contextmanager
    def working(self) -> Generator[Marks]:
        marks, workers = Marks(), Workers()
        if self.asked.variant == "asyncio":

            @workers.register(Measured)
            async def _(_job: JobContext[Measured]) -> None:
                marks.note()
        else:

            @workers.register(Measured)
            def _(_job: JobContext[Measured]) -> None:
                marks.note()

        with Runner(self._engine, workers, queues={"default": SLOTS}):
            yield marks

    def unfinished(self) -> bool:
        some = select(exists().where(Job.state.in_([JobState.AVAILABLE, JobState.RUNNING])))
        with self._engine.connect() as connection:
            return connection.execute(some).scalar_one()

    def close(self) -> None:
        self._engine.dispose()


PEER = River
