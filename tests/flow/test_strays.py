"""The database loses its last commits, the end of a job among them, and the runner of that job lives on."""

import threading
from collections import Counter
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Engine, create_engine, text

from sqla_river import JobContext, create_all
from sqla_river.embedded import EmbeddedPostgres
from tests.making import Count, Gate, eventually, read_job
from tests.working import backends, errors, is_state, put, working

QUICK: Final[dict[str, Any]] = {"heartbeat": timedelta(seconds=0.2), "lease": timedelta(seconds=5)}


class Noting:
    """A handler that notes which jobs it began, and lets them end once it may."""

    def __init__(self) -> None:
        self.began = Counter[int]()
        self.go = threading.Event()

    def __call__(self, job: JobContext[Count]) -> None:
        self.began[job.id] += 1
        self.go.wait(30)


def test_a_job_whose_end_a_failover_lost_runs_again_and_the_others_go_on(engine: Engine) -> None:
    gate, noting = Gate(), Noting()
    noting.go.set()

    def handler(job: JobContext[Count]) -> None:
        (gate if job.args.number == 1 else noting)(job)

    with working(engine, handler, **QUICK), working(engine, handler, **QUICK):
        long, short = put(engine, 1, 2)
        gate.wait()
        eventually(is_state(engine, short, "completed"))
        with engine.begin() as connection:  # what a standby has that was behind by a moment
            connection.execute(
                text("UPDATE river_job SET state = 'running', finalized_at = NULL WHERE id = :id"), {"id": short}
            )
        backends(engine, kill=True)
        eventually(lambda: noting.began[short] == 2, what="it to run again")
        eventually(is_state(engine, short, "completed"))
        gate.open()
        eventually(is_state(engine, long, "completed"))

    assert (read_job(engine, long)["attempt"], len(gate.started)) == (1, 1)
    assert read_job(engine, short)["attempt"] == 2
    assert errors(read_job(engine, short)) == ["rescued: its runner lives, and holds it no more"]


def _crash_after_a_job(postgres: EmbeddedPostgres, engine: Engine, noting: Noting, number: int) -> int:
    """Work a job, whose fetch is on the disk, and its end not; then PostgreSQL dies. Its id."""
    noting.go.clear()
    (job,) = put(engine, number)
    eventually(lambda: noting.began[job] == 1, what="it to begin")
    with engine.begin() as connection:  # what was committed until now is on the disk
        connection.execute(text("SET LOCAL synchronous_commit = on"))
        connection.execute(text(f"CREATE TABLE mark_{number} ()"))
    noting.go.set()
    eventually(is_state(engine, job, "completed"))
    postgres.restart("immediate")
    engine.dispose()
    return job


def test_a_job_whose_end_a_crash_lost_runs_again() -> None:
    """PostgreSQL dies where commits do not wait for the disk."""
    noting = Noting()
    with EmbeddedPostgres(settings={"synchronous_commit": "off", "wal_writer_delay": "10s"}) as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        with working(engine, noting, **QUICK):
            job = _crash_after_a_job(postgres, engine, noting, 1)
            if noting.began[job] == 1 and is_state(engine, job, "completed")():  # the WAL writer just looked: once more
                job = _crash_after_a_job(postgres, engine, noting, 2)
            eventually(lambda: noting.began[job] == 2, what="it to run again")
            eventually(is_state(engine, job, "completed"))
            row = read_job(engine, job)
        engine.dispose()

    assert (row["attempt"], errors(row)) == (2, ["rescued: its runner lives, and holds it no more"])


def test_what_a_runner_works_for_many_beats_is_never_freed(engine: Engine) -> None:
    gate = Gate()
    with working(engine, gate, 2, heartbeat=timedelta(seconds=0.1), lease=timedelta(seconds=5)) as runner:
        jobs = put(engine, *range(6))
        gate.wait(2)
        incarnation: Any = runner._incarnation
        heard: list[int] = []
        learnt = incarnation._heart._learnt

        def count(fleet: Any) -> None:
            heard.append(1)
            learnt(fleet)

        incarnation._heart._learnt = count
        eventually(lambda: len(heard) >= 10, what="ten beats")
        gate.open()
        for job in jobs:
            eventually(is_state(engine, job, "completed"))

    assert {read_job(engine, job)["attempt"] for job in jobs} == {1}
