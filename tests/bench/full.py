"""The rate of a runner while a million finished and 300,000 waiting jobs are in the table, by its own with nothing else
in it, in turns: `python -m tests.bench.full`.
"""

import statistics
import threading
import time
from typing import Final

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from sqla_river import JobContext, Runner, Workers, create_all, enqueue_many
from sqla_river.embedded import EmbeddedPostgres
from tests.making import Count

TURNS: Final = 4
WORKED: Final = 60_000
WAITING: Final = 300_000
FINISHED: Final = """INSERT INTO river_job (args, kind, max_attempts, queue, state, priority, finalized_at, attempt)
SELECT '{"number": 1}', 'count', 25, 'default', 'completed', 1, now(), 1 FROM generate_series(1, 1000000)"""


def fill(engine: Engine, waiting: int, *finished: str) -> None:
    """Leave *waiting* jobs, and what the statements *finished* make, as in a queue that has been in use."""
    with engine.connect() as connection:
        for statement in ("TRUNCATE river_job", *finished):
            connection.exec_driver_sql(statement)
    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(waiting)))
    with engine.connect() as connection:
        connection.exec_driver_sql("VACUUM ANALYZE river_job")
        connection.exec_driver_sql("CHECKPOINT")


def rate(engine: Engine) -> float:
    """Jobs a second, from the first handler to that of job WORKED."""
    ended: list[float] = []
    over = threading.Event()
    workers = Workers()

    @workers.register(Count)
    def work(_: JobContext[Count]) -> None:
        ended.append(time.perf_counter())
        if len(ended) == WORKED:
            over.set()

    with Runner(engine, workers, queues={"default": 100}):
        if not over.wait(300):
            raise TimeoutError(f"{len(ended)} of {WORKED} jobs are done after 300 s")
    return (WORKED - 1) / (ended[WORKED - 1] - ended[0])


def main() -> None:
    """Print each turn, and the ratio of the medians."""
    with EmbeddedPostgres(settings={"shared_buffers": "256MB", "max_wal_size": "4GB"}, durable=True) as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        maintenance = engine.execution_options(isolation_level="AUTOCOMMIT")
        alone: list[float] = []
        among: list[float] = []
        for _ in range(TURNS):
            fill(maintenance, WORKED)
            alone.append(rate(engine))
            fill(maintenance, WAITING, FINISHED)
            among.append(rate(engine))
            print(f"alone {alone[-1]:,.0f}/s, in a full table {among[-1]:,.0f}/s: {among[-1] / alone[-1]:.2f}")
        print(f"medians: {statistics.median(among) / statistics.median(alone):.2f}")


if __name__ == "__main__":
    main()
