"""The database goes and comes."""

import logging
import os
import resource
import threading
import time
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from sqla_river import JobContext, Runner, create_all, enqueue_many
from sqla_river.embedded import EmbeddedPostgres, StopMode
from tests.making import (
    Count,
    Gate,
    all_are,
    count_states,
    eventually,
    make_jobs,
    read_jobs,
)
from tests.working import SLOW_POLL, backends, handling, nothing, put, working


def test_a_listener_that_lost_its_connection_listens_again(engine: Engine) -> None:
    gate = Gate(opened=True)

    with working(engine, gate, poll=SLOW_POLL):
        for number in range(3):
            assert backends(engine, "listen", kill=True) == 1
            put(engine, number)  # said while nobody listens, or after: it starts either way
            gate.wait(number + 1)
            eventually(lambda: backends(engine, "listen") == 1, what="a new connection")

    assert count_states(engine) == {"completed": 3}


@pytest.mark.parametrize("role", ["fetch", "complete", "heartbeat"])
def test_a_station_that_lost_its_connection_goes_on(engine: Engine, role: str) -> None:
    gate = Gate(opened=True)

    put(engine, 0)
    with working(engine, gate, heartbeat=timedelta(milliseconds=100)):
        for number in range(3):
            eventually(all_are(engine, "completed", number + 1))
            eventually(lambda: backends(engine, role, kill=True) == 1, what=f"a connection to {role}")
            put(engine, number + 1)
        eventually(all_are(engine, "completed", 4))


def test_a_runner_whose_connections_are_killed_under_load_runs_every_job_once(engine: Engine) -> None:
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        ran.append(job.args.number)
        time.sleep(0.001)

    with Session(engine) as session, session.begin():
        enqueue_many(session, (Count(number) for number in range(3_000)))

    with working(engine, handler, 10) as runner:
        for milestone in (100, 500, 900, 1_300, 1_700, 2_100):
            eventually(lambda least=milestone: len(ran) >= least, within=30, what=f"{milestone} runs")  # type: ignore[misc]
            backends(engine, kill=True)
        eventually(all_are(engine, "completed", 3_000), within=40)
        stale = runner.stale

    assert Counter(ran) == Counter(range(3_000))
    assert {row["attempt"] for row in read_jobs(engine)} == {1}
    assert stale == 0


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_runner_goes_on_when_postgresql_was_restarted_under_it(mode: StopMode) -> None:
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        ran.append(job.args.number)
        time.sleep(0.001)

    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        with Session(engine) as session, session.begin():
            enqueue_many(session, (Count(number) for number in range(2_000)))
        with working(engine, handler, 10):
            for milestone in (200, 1_000):
                eventually(lambda least=milestone: len(ran) >= least, within=30, what=f"{milestone} runs")  # type: ignore[misc]
                postgres.restart(mode)
            engine.dispose()
            eventually(all_are(engine, "completed", 2_000), within=40)
            put(engine, 2_000)
            eventually(all_are(engine, "completed", 2_001))
        assert {row["attempt"] for row in read_jobs(engine)} == {1}
        engine.dispose()

    assert Counter(ran) == Counter(range(2_001))


def test_a_stop_waits_for_a_database_that_is_on_its_way_back() -> None:
    gate = Gate()
    with EmbeddedPostgres() as postgres:
        engine = create_engine(postgres.url())
        create_all(engine)
        make_jobs(engine, 5)
        runner = Runner(engine, handling(gate), queues={"default": 5}, stop_timeout=timedelta(seconds=20))
        runner.start()
        gate.wait(5)
        postgres.stop_server()
        gate.open()
        stopping = threading.Thread(target=runner.stop)
        stopping.start()
        stopping.join(2)  # as long as a restart takes; no signal says that a stop has given up
        postgres.start_server()
        stopping.join(25)
        engine.dispose()

        assert not stopping.is_alive()
        assert count_states(engine) == {"completed": 5}
        engine.dispose()


def test_a_row_that_somebody_has_locked_delays_its_own_job_only(engine: Engine) -> None:
    gate = Gate()
    locked, *_ = make_jobs(engine, 10)

    with working(engine, gate, 10):
        gate.wait(10)
        with engine.begin() as theirs:
            theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
            gate.open()
            eventually(lambda: count_states(engine) == {"completed": 9, "running": 1}, what="all but one")
            put(engine, 1)
            eventually(lambda: count_states(engine) == {"completed": 10, "running": 1}, what="a new one")
        eventually(all_are(engine, "completed", 11))


def test_a_runner_listens_in_a_process_with_many_open_files(engine: Engine) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 1_500:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1_500), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_100)]
    gate = Gate(opened=True)
    try:
        with working(engine, gate, poll=SLOW_POLL), engine.connect() as connection:
            find = text("SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'sqla\\_river:listen:%'")
            before = connection.execute(find).scalars().all()
            for number in range(20):
                put(engine, number)
                gate.wait(number + 1)
            after = connection.execute(find).scalars().all()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert len(before) == 1
    assert after == before


def _read_only(caplog: pytest.LogCaptureFixture, failed: str) -> bool:
    return any(failed in line and "read-only" in line for line in caplog.text.splitlines())


def test_a_runner_that_a_failover_led_to_a_standby_for_a_moment_leaves_it(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    writes = {"options": "-c default_transaction_read_only=off"}
    admin = create_engine(url, isolation_level="AUTOCOMMIT", connect_args=writes)
    often: dict[str, Any] = {
        "poll": timedelta(milliseconds=50),
        "listen": False,
        "heartbeat": timedelta(milliseconds=100),
    }
    with caplog.at_level(logging.WARNING), working(engine, nothing, **often), admin.connect() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        try:
            backends(admin, kill=True)
            for loop in ("fetch", "heartbeat"):
                eventually(partial(_read_only, caplog, f"sqla_river-{loop} failed"), what=f"{loop} to be there")
        finally:
            connection.execute(text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
        put(admin, 0)
        eventually(all_are(admin, "completed", 1))
    admin.dispose()
