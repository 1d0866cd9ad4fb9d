"""Queues that are paused, resumed, added, removed and resized while runners work them."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_river import pause, resume
from tests.database import emptied, shared_database
from tests.making import count_states, eventually, make_job, make_jobs, read_job, read_jobs
from tests.working import SLOW_POLL, handling, is_state, nothing, put, working

SOON = timedelta(seconds=20)


@pytest.fixture(scope="module")
def url(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    for engine in emptied(url):
        yield engine
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE river_queue, river_suspect, river_duty, river_runner"))


def now(engine: Engine) -> Any:
    """The database's clock."""
    with engine.connect() as connection:
        return connection.execute(text("SELECT clock_timestamp()")).scalar_one()


def paused(engine: Engine, queue: str) -> None:
    with Session(engine) as session, session.begin():
        pause(session, queue)


def resumed(engine: Engine, queue: str) -> None:
    with Session(engine) as session, session.begin():
        resume(session, queue)


def probe(engine: Engine, *queues: str) -> None:
    """Wait until the runners of *queues* have fetched, all their queues at once, in snapshots that begin now."""
    ids = [put(engine, 0, queue=queue)[0] for queue in queues]
    for job_id in ids:
        eventually(is_state(engine, job_id, "completed"))


# ---- pause


@pytest.mark.parametrize("which", ["load", "*"])
def test_no_fetch_that_begins_after_a_pause_starts_a_job_and_resume_wakes_at_once(engine: Engine, which: str) -> None:
    """Two runners under load; nothing is found by polling. The ledger is the time of each fetch, by the database."""
    windows: list[tuple[Any, Any]] = []
    with (
        working(engine, nothing, queues={"load": 4, "a": 1}, poll=SLOW_POLL),
        working(engine, nothing, queues={"load": 4, "b": 1}, poll=SLOW_POLL),
    ):
        for _ in range(40):
            make_jobs(engine, 60, queue="load")
            paused(engine, which)
            since = now(engine)
            if which == "*":
                put(engine, 0, queue="a")
                resumed(engine, "a")
                resumed(engine, "b")
            put(engine, 0, queue="load")  # both runners hear that there is something in it
            probe(engine, "a", "b")
            windows.append((since, now(engine)))
            waiting = {row["id"] for row in read_jobs(engine) if row["state"] == "available"}
            assert waiting
            resumed(engine, "load")
            eventually(
                lambda ids=waiting: any(row["attempt"] for row in read_jobs(engine) if row["id"] in ids), what="a start"
            )
        resumed(engine, "*")
        eventually(lambda: set(count_states(engine)) == {"completed"}, within=30)

    with engine.connect() as connection:
        starts = list(
            connection.execute(text("SELECT attempted_at FROM river_job WHERE queue = 'load' ORDER BY 1")).scalars()
        )
    assert len(starts) == 40 * 61
    late = [at for at in starts for since, until in windows if since < at < until]
    assert late == []
