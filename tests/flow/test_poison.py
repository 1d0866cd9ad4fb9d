"""A job that kills its process: it ends alone, and costs nobody else anything but time."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from sqla_river.context import JobContext
from sqla_river.fetch import alone
from sqla_river.store import OwnConnection
from tests.commands import start
from tests.crashing import Ledger, suspects, working
from tests.making import Count, Gate, count_states, eventually, make_job, make_jobs, read_job, read_jobs

KILLER: Final = 666
APP: Final = """
import os
from datetime import timedelta
from sqlalchemy import create_engine
from sqla_river import Runner, Workers
from tests.making import Count

book = os.open("ledger", os.O_WRONLY | os.O_APPEND)
workers = Workers()

@workers.register(Count)
def work(job):
    os.write(book, f"start {job.id} {os.getpid()}\\n".encode())
    if job.args.number == 666:
        os._exit(1)
    os.write(book, f"end {job.id} {os.getpid()}\\n".encode())

times = {"heartbeat": timedelta(seconds=0.5), "lease": timedelta(seconds=1.5)}
runner = Runner(create_engine(os.environ["DATABASE_URL"]), workers, queues={"default": 20}, **times)
"""


def _a_killer_among(good: int, url: str, engine: Engine, folder: Path, within: float) -> None:
    """Under the supervisor of the command line: one process rescues while another waits for its start."""
    last_attempt = make_job(engine, max_attempts=1, priority=4)
    killer = make_job(engine, args={"number": KILLER})
    make_jobs(engine, good)
    (folder / "app.py").write_text(APP)
    ledger = Ledger(folder / "ledger")
    supervisor = start("work", "-A", "app:runner", "--processes", "2", cwd=folder, env={"DATABASE_URL": url})
    try:
        eventually(lambda: not set(count_states(engine)) & {"available", "running", "retryable"}, within, "the jobs")
        eventually(lambda: suspects(engine) == {}, what="the suspects to be cleared")
        supervisor.terminate()
        said, _ = supervisor.communicate(timeout=30)
        assert supervisor.returncode == 0, said
    finally:
        supervisor.kill()

    deaths = said.count("ended with exit code 1")
    rows = {row["id"]: row for row in read_jobs(engine)}
    row = rows.pop(killer)
    assert row["state"] == "discarded"
    assert "died 3 times while this job ran alone" in row["all_errors"][-1]["error"]
    assert row["attempt"] == deaths == 5, said  # twice in company, three times alone
    rows.pop(last_attempt)  # the only one that could be discarded, had it been in company
    assert {each["state"] for each in rows.values()} == {"completed"}
    assert max(each["attempt"] for each in rows.values()) <= 3
    alone = [pid for word, job_id, pid in ledger.lines() if word == "start" and int(job_id) == killer][2:]
    for pid in alone:  # nothing was running beside it, and what ran before had ended
        lines = [(word, int(job_id)) for word, job_id, by in ledger.lines() if by == pid]
        assert {job_id for word, job_id in lines if word == "start"} - {
            job_id for word, job_id in lines if word == "end"
        } == {killer}
        assert lines[-1] == ("start", killer)


def test_a_killer_among_two_thousand_is_discarded_after_three_deaths_alone(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    _a_killer_among(2_000, url, engine, tmp_path, within=120)


@pytest.mark.slow
def test_a_killer_among_ten_thousand_is_discarded_after_three_deaths_alone(
    url: str, engine: Engine, tmp_path: Path
) -> None:
    _a_killer_among(10_000, url, engine, tmp_path, within=300)


def _suspect(engine: Engine, **columns: Any) -> int:
    job_id = make_job(engine, attempt=2, **columns)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (:id, 2, 0)"), {"id": job_id})
    return job_id


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "RUN_EMPTY_WITHIN", 1.0)
    monkeypatch.setattr(alone, "ALONE_FOR", 0.5)


def test_a_long_job_that_met_two_deaths_runs_alone_for_a_while_and_then_beside_others(
    engine: Engine, hasty: None
) -> None:
    gate = Gate()
    long = _suspect(engine, args={"number": 1})
    ran: list[int] = []

    def handler(job: JobContext[Count]) -> None:
        if job.id == long:
            gate(job)
        else:
            ran.append(job.id)

    with working(engine, handler, lease=timedelta(seconds=3)):
        gate.wait(within=20)
        before = len(ran)
        others = make_jobs(engine, 50)
        eventually(lambda: len(ran) >= before + 50, within=20, what="the others to run beside it")
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM river_runner WHERE alone IS NOT NULL")).scalar() == 0
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": 51})

    assert sorted(ran) == others
    assert (read_job(engine, long)["attempt"], read_job(engine, long)["all_errors"]) == (3, None)


def test_a_suspect_runs_with_nobody_beside_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "RUN_EMPTY_WITHIN", 1.0)
    beside: list[int] = []
    running: set[int] = set()
    _suspects = {_suspect(engine) for _ in range(3)}
    make_jobs(engine, 200)

    def handler(job: JobContext[Count]) -> None:
        running.add(job.id)
        time.sleep(0.002)
        if job.id in _suspects:
            beside.append(len(running) - 1)
        running.discard(job.id)

    with working(engine, handler, lease=timedelta(seconds=3)):
        eventually(lambda: count_states(engine) == {"completed": 203}, within=30)

    assert beside == [0, 0, 0]


def test_a_runner_with_a_long_job_of_its_own_does_not_stand_empty_for_a_suspect(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "RUN_EMPTY_WITHIN", 0.5)
    gate = Gate()
    long = make_job(engine, args={"number": 1}, priority=1)
    ran: list[int] = []
    turns: list[None] = []
    begin = alone.Turn.begin

    def noted(turn: alone.Turn, own: OwnConnection) -> bool:
        began = begin(turn, own)
        if began:
            turns.append(None)
        return began

    monkeypatch.setattr(alone.Turn, "begin", noted)

    def handler(job: JobContext[Count]) -> None:
        if job.id == long:
            gate(job)
        else:
            ran.append(job.id)

    with working(engine, handler, lease=timedelta(seconds=3), poll=timedelta(seconds=0.02)) as runner:
        gate.wait()
        suspect = _suspect(engine, state="pending")
        incarnation: Any = runner._incarnation
        eventually(lambda: incarnation._fetcher.suspects, what="the runner to know")
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET state = 'available' WHERE id = :id"), {"id": suspect})
            connection.execute(text("UPDATE river_duty SET due_at = now() WHERE name = 'isolate'"))
        eventually(lambda: _isolating(engine), within=20, what="the turn to be taken")
        made = 0
        until = time.monotonic() + 3
        while time.monotonic() < until:  # load of one job each 20 ms
            make_job(engine)
            made += 1
            time.sleep(0.02)
        eventually(lambda: len(ran) == made, what="the others")
        assert len(turns) == 1  # and not one after the other
        assert read_job(engine, suspect)["state"] == "available"
        gate.open()
        eventually(lambda: count_states(engine) == {"completed": made + 2}, within=20)


def _isolating(engine: Engine) -> bool:
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT due_at > now() + interval '1 minute' FROM river_duty WHERE name = 'isolate'")
        )
        return bool(found.scalar())


def test_a_suspect_in_a_paused_queue_costs_nobody_a_turn(engine: Engine, hasty: None) -> None:
    suspect = _suspect(engine, queue="paused")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_queue (name, paused_at) VALUES ('paused', now())"))
    gate = Gate(opened=True)

    with working(engine, gate, queues={"default": 2, "paused": 2}, lease=timedelta(seconds=3)):
        eventually(lambda: _asked_for_a_turn(engine), within=20, what="the duty to be looked at")
        make_jobs(engine, 5)
        gate.wait(5)
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_queue SET paused_at = NULL"))
            connection.execute(text("UPDATE river_duty SET due_at = now() WHERE name = 'isolate'"))
        eventually(lambda: read_job(engine, suspect)["state"] == "completed", within=20)


def _asked_for_a_turn(engine: Engine) -> bool:
    with engine.connect() as connection:
        return bool(
            connection.execute(text("SELECT done_at IS NOT NULL FROM river_duty WHERE name = 'isolate'")).scalar()
        )
