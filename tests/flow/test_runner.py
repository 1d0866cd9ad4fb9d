"""A whole Runner against a real server: started, stopped, and with settings that make no sense."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from sqla_river import JobContext, Runner, Workers
from sqla_river.errors import ConfigError, InvalidOptionError, RunnerError, WrongDatabaseError
from sqla_river.live import MAX_SLOTS
from tests.making import (
    Count,
    Gate,
    all_are,
    count_states,
    eventually,
    make_job,
    make_jobs,
    read_jobs,
)
from tests.working import backends, handling, nothing, put, working

# ---- start and stop --------------------------------------------------------------


def test_a_job_enqueued_before_the_start_is_worked(engine: Engine) -> None:
    gate = Gate(opened=True)
    put(engine, 7)

    with working(engine, gate):
        (job,) = gate.wait()

    assert (job.args, job.attempt, job.kind, job.queue) == (Count(7), 1, "count", "default")
    assert count_states(engine) == {"completed": 1}


def test_leaving_the_block_returns_after_every_result_is_written(engine: Engine) -> None:
    gate = Gate()
    put(engine, *range(20))

    with working(engine, gate, 20):
        gate.wait(20)
        gate.open()

    assert count_states(engine) == {"completed": 20}


def test_a_stopped_runner_can_be_started_again_under_a_new_id(engine: Engine) -> None:
    gate = Gate(opened=True)
    runner = Runner(engine, handling(gate), queues={"default": 1})

    ids: list[str | None] = []
    for number in range(2):
        put(engine, number)
        runner.start()
        ids.append(runner.id)
        gate.wait(number + 1)
        runner.stop()

    assert len(set(ids)) == 2
    assert runner.id is None
    assert [row["token"].partition("/")[0] for row in read_jobs(engine)] == ids


def test_a_runner_that_runs_cannot_be_started_again(engine: Engine) -> None:
    with working(engine, nothing) as runner, pytest.raises(RunnerError, match="runs already; stop"):
        runner.start()


def test_construction_opens_and_starts_nothing() -> None:
    engine = create_engine("postgresql+psycopg://nobody@192.0.2.1/nowhere")
    threads = threading.active_count()

    Runner(engine, Workers(), queues={"default": 1})

    assert threading.active_count() == threads
    assert "Connections in pool: 0" in engine.pool.status()


def test_two_runners_in_one_process_have_different_ids(engine: Engine) -> None:
    workers = handling(nothing)

    with working(engine, workers) as one, working(engine, workers) as other:
        ids = one.id, other.id
        with engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT id FROM river_runner").scalars().all()

    assert len(set(ids)) == 2
    assert set(rows) == set(ids)


def test_a_runner_is_on_the_list_while_it_works(engine: Engine) -> None:
    def rows(table: str) -> list[Any]:
        with engine.connect() as connection:
            return list(connection.exec_driver_sql(f"SELECT * FROM {table} ORDER BY 1").mappings())

    with working(engine, nothing, queues={"a": 3, "b": 40}) as runner:
        (row,) = rows("river_runner")
        queues = rows("river_queue")
        beat = row["heartbeat_at"]
        assert row["id"] == runner.id

    assert dict(zip(row["queues"], row["slots"], strict=True)) == {"a": 3, "b": 40}
    assert beat >= row["started_at"]
    assert [queue["name"] for queue in queues] == ["a", "b"]
    assert eventually(lambda: rows("river_runner") == [], what="the row to go")


def test_the_heartbeat_goes_on(engine: Engine) -> None:
    def beat() -> Any:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT max(heartbeat_at) FROM river_runner").scalar_one()

    with working(engine, nothing, heartbeat=timedelta(milliseconds=100)):
        first = beat()
        assert eventually(lambda: beat() > first, what="the next beat")


def test_a_queue_that_others_made_is_touched_and_keeps_what_it_says(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO river_queue (name, metadata, paused_at, created_at, updated_at) "
            "VALUES ('default', '{\"a\": 1}', '2026-01-01', '2026-01-01', '2026-01-01')"
        )

    with working(engine, nothing), engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT *, now() - updated_at AS age FROM river_queue").mappings().one()

    assert row["metadata"] == {"a": 1}
    assert row["paused_at"] is not None
    assert row["age"] < timedelta(minutes=1)
    assert row["created_at"].year == row["paused_at"].year == 2026


def test_own_connections_have_names_and_bounds_and_leave_the_pool_to_handlers(engine: Engine) -> None:
    make_job(engine)
    with working(engine, nothing):
        eventually(all_are(engine, "completed", 1))
        checked_out = engine.pool.status()
        with engine.connect() as connection:
            names = connection.exec_driver_sql(
                "SELECT split_part(application_name, ':', 2) FROM pg_stat_activity "
                "WHERE application_name LIKE 'sqla\\_river:%%' AND datname = current_database()"
            ).scalars()
            roles = set(names)

    assert {"fetch", "complete", "heartbeat", "listen"} <= roles
    assert "Current Checked out connections: 0" in checked_out
    assert eventually(lambda: backends(engine) == 0, what="its connections to be closed")


def test_handlers_may_hold_the_whole_pool(url: str) -> None:
    engine = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=5)

    def handler(_: JobContext[Count]) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("SELECT pg_sleep(0.01)")

    make_jobs(engine, 20)
    with working(engine, handler, 2):
        eventually(all_are(engine, "completed", 20))
    engine.dispose()


def test_a_heartbeat_reconnects_while_handlers_hold_the_whole_pool(url: str, engine: Engine) -> None:
    narrow = create_engine(url, pool_size=2, max_overflow=0, pool_timeout=0.2)
    gate = Gate()

    def handler(job: JobContext[Count]) -> None:
        with narrow.connect():
            gate(job)

    def beat() -> Any:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT max(heartbeat_at) FROM river_runner").scalar_one()

    make_jobs(engine, 2)
    with working(narrow, handler, 2, heartbeat=timedelta(milliseconds=100)):
        gate.wait(2)
        assert backends(engine, "heartbeat", kill=True) == 1
        killed_at = beat()
        try:
            assert eventually(lambda: beat() > killed_at, what="a beat after the kill")
        finally:
            gate.open()
    narrow.dispose()


# ---- settings --------------------------------------------------------------------


NOWHERE: Final = "postgresql+psycopg://nobody@192.0.2.1/nowhere"
ZERO: Final = timedelta(0)


def make_runner(**settings: Any) -> Runner:
    return Runner(create_engine(NOWHERE), Workers(), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"queues": {}}, "queues is empty"),
        ({"queues": {"a": 0}}, "queue 'a' must have 1..10000 slots, got 0"),
        ({"queues": {"a": MAX_SLOTS + 1}}, f"got {MAX_SLOTS + 1}"),
        ({"queues": {"a": True}}, "got True"),
        ({"queues": {"a": 1.5}}, "got 1.5"),
        ({"queues": {"a": "5"}}, "got '5'"),
        ({"timeout": ZERO}, "timeout must be more than zero, got 0:00:00"),
        ({"timeout": -timedelta(seconds=1)}, "timeout must be more than zero"),
        ({"poll": ZERO}, "poll must be 1 ms to 5 minutes, got 0:00:00"),
        ({"poll": timedelta(hours=1)}, "got 1:00:00"),
        ({"heartbeat": timedelta(milliseconds=1)}, "heartbeat must be at least 100 ms, got 0:00:00.001000"),
        ({"heartbeat": timedelta(seconds=15)}, "lease=0:00:30 with heartbeat=0:00:15"),
        ({"lease": timedelta(seconds=14)}, "lease=0:00:14 with heartbeat=0:00:05"),
        ({"stop_timeout": -timedelta(seconds=1)}, "stop_timeout must not be negative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_their_values(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_runner(**{"queues": {"default": 1}, **settings})

    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["", "Upper", "a b", "a" * 65, "*", "a__b", "ä"])
def test_queues_that_river_would_not_take_are_refused(name: str) -> None:
    with pytest.raises(InvalidOptionError, match="queue must be"):
        Runner(create_engine(NOWHERE), Workers(), queues={name: 1})


@pytest.mark.parametrize(
    ("make", "url"),
    [
        (create_engine, "sqlite://"),
        (create_engine, "postgresql+psycopg2://nobody@192.0.2.1/nowhere"),
        (create_async_engine, "postgresql+asyncpg://nobody@192.0.2.1/nowhere"),
        (create_async_engine, NOWHERE),
    ],
    ids=["sqlite", "psycopg2", "asyncpg", "async psycopg"],
)
def test_an_engine_that_cannot_serve_a_runner_is_refused(make: Callable[[str], Any], url: str) -> None:
    with pytest.raises(WrongDatabaseError, match="psycopg"):
        Runner(make(url), Workers(), queues={"default": 1})
