"""A Runner for tests of what handlers may do: started, watched, and stopped."""

import contextlib
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqla_river import JobContext, Runner, Workers, enqueue
from tests.making import Count, eventually, read_job

SLOW_POLL: Final = timedelta(minutes=5)
"""So that nothing is found by polling: what starts was announced, or was due."""
HOUR: Final = timedelta(hours=1)
Handler = Callable[..., Any]


class Base(DeclarativeBase):
    """Of the user's own tables."""


class Note(Base):
    """What a transactional handler writes."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[str] = mapped_column(unique=True)


def notes(engine: Engine) -> list[str]:
    """What is stored of what handlers wrote."""
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT words FROM note ORDER BY id")).scalars())


def nothing(_: JobContext[Any]) -> None:
    """A handler that has nothing to do."""


def after(delay: timedelta) -> Callable[[JobContext[Any]], timedelta]:
    """A retry callable that always says *delay*."""

    def retry(_: JobContext[Any]) -> timedelta:
        return delay

    return retry


def handling(handler: Handler, **settings: Any) -> Workers:
    """Workers that give every `Count` to *handler*, whatever it takes and returns."""
    workers = Workers()
    workers.register(Count, **settings)(handler)
    return workers


@contextmanager
def working(engine: Engine, workers: Workers | Handler, slots: int = 4, **settings: Any) -> Generator[Runner]:
    """A started runner of the queue ``default``."""
    if not isinstance(workers, Workers):
        workers = handling(workers)
    settings = {"queues": {"default": slots}, "stop_timeout": timedelta(seconds=3), **settings}
    with Runner(engine, workers, **settings) as runner:
        yield runner


def put(engine: Engine, *numbers: int, **options: Any) -> list[int]:
    """Enqueue a `Count` for each number, in one transaction; their ids."""
    with Session(engine, expire_on_commit=False) as session, session.begin():
        jobs = [enqueue(session, Count(number), **options) for number in numbers]
        session.flush()
        return [job.id for job in jobs]


def is_state(engine: Engine, job_id: int, state: str) -> Callable[[], bool]:
    """A condition: the job is in *state*."""

    def is_so() -> bool:
        return bool(read_job(engine, job_id)["state"] == state)

    is_so.__name__ = f"job {job_id} to be {state}"
    return is_so


def settled(engine: Engine, job_id: int, within: float = 30.0) -> Any:
    """The row of the job once it neither waits for its start nor runs."""

    def row_if_settled() -> Any:
        row = read_job(engine, job_id)
        return row if row["state"] not in {"available", "running"} else None

    return eventually(row_if_settled, within, f"job {job_id} to settle")


def outcome(engine: Engine, workers: Workers | Handler, within: float = 30.0, **settings: Any) -> Any:
    """The row of one job after one attempt by *workers*."""
    (job_id,) = put(engine, 0)
    with working(engine, workers, **settings):
        return settled(engine, job_id, within)


def begun(runner: Runner, count: int) -> None:
    """Wait until the handlers of so many jobs run: a row says so a little sooner."""

    def run() -> bool:
        return runner._incarnation is not None and len(runner._incarnation.executor.running) == count

    eventually(run, what=f"{count} handlers to run")


def errors(row: Any) -> list[str]:
    """The messages of what went wrong in a job's attempts."""
    kept: list[dict[str, str]] = row["all_errors"] or []
    return [error["error"] for error in kept]


@contextmanager
def released() -> Generator[threading.Event]:
    """An Event that holds handlers which ignore everything, set at the end, so that no thread outlives its test."""
    event = threading.Event()
    before = set(threading.enumerate())
    try:
        yield event
    finally:
        event.set()
        for thread in set(threading.enumerate()) - before:
            thread.join(30)


def quietly(act: Callable[[], object]) -> None:
    """Do it, whatever comes of it."""
    with contextlib.suppress(BaseException):
        act()


def backends(engine: Engine, role: str = "%", *, kill: bool = False) -> int:
    """How many connections runners have for *role*; killed if asked for, and gone when this returns."""
    what = "pg_terminate_backend(pid, 5000)" if kill else "pid"
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                f"SELECT {what} FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name LIKE :name AND pid <> pg_backend_pid()"
            ),
            {"name": f"sqla\\_river:{role}:%"},
        )
        return len(rows.all())
