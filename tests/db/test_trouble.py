"""Warnings of what goes wrong slowly: each is said, and said rightly, by statements of bounded cost."""

import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from sqla_river import heartbeat, statements
from sqla_river.duties import trouble
from sqla_river.duties.trouble import Strangers, Trouble
from sqla_river.store import OwnConnection
from tests.database import emptied, shared_database
from tests.making import Count, explain, make_jobs, opened, own_settings


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    yield from emptied(shared)


@pytest.fixture
def own(engine: Engine) -> Iterator[OwnConnection]:
    with opened(engine) as own:
        yield own


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_a_transaction_that_stays_open_is_named_and_its_statement_is_not(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    duty = Trouble(lambda: True)
    with engine.connect() as connection:
        connection.execute(text("SET application_name = 'night_report'"))
        connection.commit()
        pid = connection.execute(text("SELECT pg_backend_pid() /* hunter2 */")).scalar_one()
        duty.do(own)
        young = said(caplog)
        monkeypatch.setattr(trouble, "OLD_TRANSACTION", timedelta(0))
        duty.do(own)

    assert young == []
    (line,) = said(caplog)
    assert line.startswith(f"pid {pid} (")
    assert re.search(r"night_report, idle in transaction\) has had a transaction open for \d+ s", line)
    assert "hunter2" not in line


def test_a_prepared_transaction_pins_as_much(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trouble, "OLD_TRANSACTION", timedelta(0))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.execute(text("SELECT current_setting('max_prepared_transactions')")).scalar_one() == "0":
            pytest.skip("the server was given, and takes no prepared transactions")
        for word in ("BEGIN", "LOCK river_queue IN ACCESS SHARE MODE", "PREPARE TRANSACTION 'forgotten'"):
            connection.execute(text(word))
        try:
            Trouble(lambda: True).do(own)
        finally:
            connection.execute(text("ROLLBACK PREPARED 'forgotten'"))

    assert any(line.startswith("prepared transaction 'forgotten' (") for line in said(caplog))


def test_a_large_backlog_is_reported_when_it_grows_and_only_then(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trouble, "LARGE_BACKLOG", 10)
    duty = Trouble(lambda: True)
    make_jobs(engine, 11, queue="steady")
    make_jobs(engine, 11, queue="grows")
    make_jobs(engine, 10, queue="appears")
    make_jobs(engine, 11, queue="waits", state="scheduled", due_in=timedelta(hours=1))
    duty.do(own)
    at_first = said(caplog)
    make_jobs(engine, 1, queue="grows")
    make_jobs(engine, 1, queue="appears")
    duty.do(own)

    assert at_first == []
    assert [line.partition(":")[0] for line in said(caplog)] == [
        "queue appears has a backlog of 11 jobs or more, and it grows",
        "queue grows has a backlog of 12 jobs or more, and it grows",
    ]


def test_a_backlog_beyond_counting_is_reported_at_once(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trouble, "LARGE_BACKLOG", 5)
    monkeypatch.setattr(trouble, "MOST_COUNTED", 10)
    make_jobs(engine, 15)
    Trouble(lambda: True).do(own)

    assert "queue default has a backlog of 10 jobs or more" in said(caplog)[0]


def test_kinds_that_nobody_knows_here_are_named_once_they_wait(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture
) -> None:
    old = timedelta(minutes=-2)
    make_jobs(engine, 3, kind="new\nkind", due_in=old)
    make_jobs(engine, 1, kind="other", due_in=old, priority=4)
    make_jobs(engine, 1, kind="young", due_in=timedelta(seconds=-30))
    make_jobs(engine, 5, kind=Count.kind, due_in=old)
    make_jobs(engine, 1, kind="elsewhere", queue="elsewhere", due_in=old)
    Strangers(lambda: ["default"], lambda: [Count.kind]).do(own)

    (line,) = said(caplog)
    assert r"have no worker in this runner: 3 of 'new\nkind', 1 of 'other'; import" in line


def test_a_clock_that_differs_is_reported_by_the_heartbeat(
    engine: Engine, own: OwnConnection, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beat() -> None:
        heartbeat.Heartbeat(
            own,
            "r",
            {"default": 1},
            5.0,
            30.0,
            free=list[str],
            unfinished=list,
            lost=lambda _: None,
            unknown=lambda _: (),
            rescued=lambda _: None,
            learnt=lambda _: None,
        ).step()

    class Shifted(datetime):
        by = timedelta(0)

        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz or UTC) + cls.by

    monkeypatch.setattr(heartbeat, "datetime", Shifted)
    beat()
    in_step = said(caplog)
    for seconds in (90, -90):
        Shifted.by = timedelta(seconds=seconds)
        beat()

    assert in_step == []
    ahead, behind = said(caplog)
    assert "the clock of this machine is 90.0 s ahead of that of the database" in ahead or "89." in ahead
    assert "s behind that of the database" in behind


def test_what_looks_for_trouble_reads_its_bound_of_one_index_and_no_more(engine: Engine) -> None:
    make_jobs(engine, 3_000, kind="unknown", due_in=timedelta(minutes=-2))
    make_jobs(engine, 3_000, state="completed")
    strangers = {"p_queues": ["default"], "p_kinds": [Count.kind], "p_age": timedelta(minutes=1)}
    with engine.connect() as connection:
        connection.execute(text("ANALYZE river_job"))
        for statement, asked, bound in (
            (statements.SELECT_STRANGERS, strangers, 250),
            (statements.COUNT_BACKLOGS, {"p_most": 500, "p_over": 10}, 500),
        ):
            for plan in ("generic", "custom"):
                found: Any = explain(
                    connection,
                    None,
                    statement,
                    asked,
                    plan=plan,
                    settings=own_settings("fetch"),
                )
                assert found.indexes == {"river_job_fetch_idx"}, found
                assert sum(node["Actual Rows"] * node["Actual Loops"] for node in found.scans("river_job")) <= bound
