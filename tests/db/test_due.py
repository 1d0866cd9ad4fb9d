"""Due on time: what the timer asks of the database, and how often."""

from collections.abc import Collection, Generator
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Final, Literal

import pytest
from sqlalchemy import Engine, Executable, text

from sqla_river import statements
from sqla_river.fetch import Fetcher, alone, bounds, due, fetcher
from sqla_river.rows import JobRow
from sqla_river.statements import (
    FETCH_AVAILABLE,
    SCHEDULE_DUE,
    SCHEDULE_DUE_AMONG,
    SELECT_BOUNDS,
    SELECT_DUE,
    SELECT_LATER_DUE,
    SELECT_LOST,
    SELECT_NEXT_DUE,
)
from sqla_river.states import JobState
from sqla_river.store import OwnConnection
from tests.hearing import DEFAULT, Ear
from tests.making import (
    Count,
    Plan,
    compiled,
    count_states,
    explain,
    make_fetcher,
    make_job,
    make_jobs,
    opened,
    own_settings,
    read_job,
)

Mode = Literal["generic", "custom"]
SCHEDULED = "INSERT INTO river_job (kind, args, state, scheduled_at) SELECT 'count', '{}', 'scheduled', "


# ---- plans -----------------------------------------------------------------------------------------------------------


def _fill(engine: Engine, future: int) -> None:
    """*future* jobs that are due in the next year, 100 that are due, and 1,000 available ones."""
    with engine.begin() as connection:
        connection.execute(
            text(f"{SCHEDULED} now() + interval '1 hour' + n * interval '25 seconds' FROM generate_series(1, :n) n"),
            {"n": future},
        )
        connection.execute(text(f"{SCHEDULED} now() - n * interval '1 second' FROM generate_series(1, 100) n"))
    make_jobs(engine, 1_000)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))


def _explained(engine: Engine, statement: Any, parameters: dict[str, Any], mode: Mode) -> Plan:
    with engine.begin() as connection:
        return explain(
            connection, None, statement, parameters, plan=mode, settings={"enable_seqscan": "off", "jit": "off"}
        )


ASKED = {"p_queues": ["default"], "p_slots": [100], "p_kinds": [Count.kind], "p_token": "test/1"}


def _check_plans(engine: Engine, future: int) -> None:
    _fill(engine, future)
    modes: tuple[Mode, ...] = ("generic", "custom")
    for mode in modes:
        look = _explained(engine, SELECT_NEXT_DUE, {"p_since": None}, mode)
        assert look.indexes == {"river_job_due_idx"}, look
        assert look.buffers < 10, (look, look.buffers)

        schedule = _explained(engine, SCHEDULE_DUE, {"p_schema": None}, mode)
        assert "river_job_due_idx" in schedule.indexes, schedule
        assert schedule.indexes <= {"river_job_due_idx", "river_job_unique_idx", "river_job_pkey"}, schedule
        assert not [scan for scan in schedule.scans("river_job") if scan["Node Type"] == "Seq Scan"], schedule
        assert schedule.buffers < 100 * 40, (schedule, schedule.buffers)

        named = _explained(engine, SELECT_DUE, {"p_refused": [1]}, mode)
        assert named.indexes == {"river_job_due_idx"}, named
        assert named.buffers < 100 * 10, (named, named.buffers)

        part = _explained(engine, SCHEDULE_DUE_AMONG, {"p_ids": [future + 1, future + 2]}, mode)
        assert part.indexes <= {"river_job_due_idx", "river_job_unique_idx", "river_job_pkey"}, part
        assert part.buffers < 100 * 10, (part, part.buffers)

        fetch = _explained(engine, FETCH_AVAILABLE, ASKED, mode)
        assert fetch.indexes <= {"river_job_fetch_idx", "river_queue_pkey", "river_suspect_pkey"}, fetch
        assert fetch.removed("Filter") == 0, fetch
        assert fetch.buffers < 100 * 30, (fetch, fetch.buffers)


def test_a_hundred_thousand_future_jobs_cost_the_timer_and_the_fetch_nothing(engine: Engine) -> None:
    _check_plans(engine, 100_000)


@pytest.mark.slow
def test_a_million_future_jobs_cost_the_timer_and_the_fetch_nothing(engine: Engine) -> None:
    _check_plans(engine, 1_000_000)


def test_a_schedule_with_nothing_due_reads_next_to_nothing(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"{SCHEDULED} now() + interval '1 hour' FROM generate_series(1, 20000) n"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))

    plan = _explained(engine, SCHEDULE_DUE, {"p_schema": None}, "generic")

    assert plan.buffers < 12, (plan, plan.buffers)


# ---- the timer -------------------------------------------------------------------------------------------------------


class Time:
    """A local clock that goes only as far as the loop asks to wait."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    for module in (fetcher, due, alone):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep))
    return clock


@contextmanager
def counting(engine: Engine, local: Time, **settings: Any) -> Generator[tuple[Fetcher, list[str]]]:
    """A fetcher on `local` time, and the names of the statements that it executes."""
    named = {id(getattr(statements, name)): name for name in statements.__all__}
    sent: list[str] = []
    with opened(engine, **own_settings("fetch")) as own:
        execute = own.execute

        def note(statement: Any, *rest: Any) -> Any:
            sent.append(named.get(id(statement), str(statement)))
            return execute(statement, *rest)

        setattr(own, "execute", note)  # noqa: B010
        delivered: list[JobRow] = []
        yield make_fetcher(own, delivered, **settings), sent


def _run(fetcher: Fetcher, local: Time, seconds: float) -> int:
    """Steps of *fetcher* in so many seconds."""
    until, steps = local.now + seconds, 0
    while local.now < until:
        local.now += max(fetcher.step(), 0.0005)
        steps += 1
    return steps


@pytest.mark.parametrize(("hears", "statements"), [(True, 45), (False, 150)])
def test_an_idle_runner_asks_little(engine: Engine, local: Time, hears: bool, statements: int) -> None:
    make_job(engine, state=JobState.SCHEDULED, due_in=timedelta(days=1))

    with counting(engine, local, hears=lambda: hears) as (fetcher, sent):
        _run(fetcher, local, 10)
        sent.clear()
        _run(fetcher, local, 60)

    assert 10 <= len(sent) <= statements, sent
    assert set(sent) == {"FETCH_AVAILABLE", "SELECT_NEXT_DUE"}


def test_a_due_job_that_somebody_has_locked_does_not_make_the_timer_spin(engine: Engine, local: Time) -> None:
    job_id = make_job(engine, state=JobState.SCHEDULED, due_in=-timedelta(seconds=1))

    with engine.begin() as theirs, counting(engine, local, hears=lambda: True) as (fetcher, sent):
        theirs.execute(text("SELECT 1 FROM river_job WHERE id = :id FOR UPDATE"), {"id": job_id})
        _run(fetcher, local, 60)
        assert len(sent) < 300, len(sent)
        theirs.rollback()
        _run(fetcher, local, 1.2)

    assert read_job(engine, job_id)["state"] == "running"


def _refuse(engine: Engine, which: str) -> None:
    """Let a trigger refuse whatever is done to the jobs of which *which* is true."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql "
                "AS $$ BEGIN RAISE EXCEPTION 'job % is frozen', old.id; END $$"
            )
        )
        connection.execute(
            text(
                "CREATE TRIGGER refuse BEFORE UPDATE ON river_job "
                f"FOR EACH ROW WHEN ({which}) EXECUTE FUNCTION refuse()"
            )
        )


def test_a_due_job_that_is_refused_is_named_and_does_not_make_the_timer_spin(
    engine: Engine, local: Time, caplog: pytest.LogCaptureFixture
) -> None:
    refused = make_job(engine, state="retryable", due_in=-timedelta(minutes=1))
    make_jobs(engine, 999, state="scheduled", due_in=-timedelta(seconds=1))
    _refuse(engine, f"old.id = {refused}")

    with counting(engine, local, hears=lambda: True, slots={"default": 1_000}) as (fetcher, sent):
        _run(fetcher, local, 1)
        at_first = len(sent)
        _run(fetcher, local, 59)

    assert count_states(engine) == {"running": 999, "retryable": 1}
    assert at_first < 90, sent
    assert len(sent) - at_first < 420, len(sent)
    assert f"making available job {refused} failed; jobs are fetched nevertheless" in caplog.text
    assert len(caplog.records) == 2, caplog.text


def test_what_comes_due_does_not_wait_behind_many_that_are_refused(
    engine: Engine, local: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(due, "PATIENCE", 0.0)
    make_jobs(engine, 1_100, state="retryable", due_in=-timedelta(minutes=1))
    _refuse(engine, "old.state = 'retryable'")

    with counting(engine, local, hears=lambda: True) as (fetcher, _):
        _run(fetcher, local, 2)
        job_id = make_job(engine, state="scheduled", due_in=timedelta(0))
        _run(fetcher, local, 1.2)

    assert read_job(engine, job_id)["state"] == "running"


def test_what_was_refused_is_tried_again_though_another_is_refused_for_ever(engine: Engine, local: Time) -> None:
    jobs = make_jobs(engine, 3, state="retryable", due_in=-timedelta(minutes=1))
    _refuse(engine, "old.priority = 1")

    with counting(engine, local, hears=lambda: True) as (fetcher, _):
        _run(fetcher, local, 3)
        refused = count_states(engine)
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE river_job DISABLE TRIGGER refuse"))
            connection.execute(text("UPDATE river_job SET priority = 2 WHERE id <> :id"), {"id": jobs[0]})
            connection.execute(text("ALTER TABLE river_job ENABLE TRIGGER refuse"))
        _run(fetcher, local, 4)

    assert refused == {"retryable": 3}
    assert count_states(engine) == {"retryable": 1, "running": 2}


FAILING: Final = {
    "a look at the next due time": [SELECT_NEXT_DUE],
    "the schedule, and which jobs are due": [SCHEDULE_DUE, SELECT_DUE],
    "every schedule": [SCHEDULE_DUE, SCHEDULE_DUE_AMONG],
    "a look at what is due later": [SELECT_LATER_DUE],
    "a look for what was lost": [SELECT_LOST],
    "a look at how far a fetch came": [SELECT_BOUNDS],
}


@pytest.mark.parametrize("failing", FAILING)
def test_what_fails_beside_the_fetch_costs_no_fetch(
    engine: Engine, local: Time, failing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounds, "WASTEFUL", -1.0)
    make_job(engine, state="scheduled", due_in=-timedelta(minutes=1))
    _refuse(engine, "old.state = 'scheduled'")
    delivered: list[JobRow] = []
    with failing_connection(engine, FAILING[failing]) as own:
        fetcher = make_fetcher(own, delivered, hears=lambda: True)
        fetcher._lost["test/0"] = local.now + 31
        for number in range(5):
            make_job(engine)
            fetcher.heard("default")
            _run(fetcher, local, 1)
            assert len(delivered) == number + 1

    assert "division by zero" in caplog.text


@contextmanager
def failing_connection(engine: Engine, failing: Collection[Any]) -> Generator[OwnConnection]:
    """A connection on which the server refuses the statements *failing*."""
    with opened(engine, **own_settings("fetch")) as own:
        execute = own.execute

        def refused(statement: Any, *rest: Any) -> Any:
            return execute(text("SELECT 1 / 0"), *rest) if statement in failing else execute(statement, *rest)

        setattr(own, "execute", refused)  # noqa: B010
        yield own


def test_jobs_come_due_also_where_nobody_can_be_told(
    engine: Engine, local: Time, caplog: pytest.LogCaptureFixture
) -> None:
    make_jobs(engine, 1_500, state="scheduled", due_in=-timedelta(seconds=1))
    telling = [value for value in vars(statements).values() if _notifies(value)]
    with failing_connection(engine, telling) as own:
        _run(make_fetcher(own, []), local, 0.5)

    assert count_states(engine) == {"available": 1_400, "running": 100}
    assert "telling other runners what came due failed; jobs are fetched nevertheless" in caplog.text


def _notifies(value: object) -> bool:
    return isinstance(value, Executable) and "pg_notify" in compiled(value)


def test_others_are_told_of_what_came_due_beside_one_that_was_refused(engine: Engine, local: Time) -> None:
    refused, *others = make_jobs(engine, 9, state="scheduled", due_in=-timedelta(seconds=1))
    _refuse(engine, f"old.id = {refused}")

    ear = Ear(engine.url.render_as_string(hide_password=False))
    with counting(engine, local, hears=lambda: True, slots={"other": 1}) as (fetcher, _):
        _run(fetcher, local, 1)
        told = ear.heard()
    ear.connection.close()

    assert count_states(engine) == {"available": len(others), "scheduled": 1}
    assert told == [DEFAULT]


@pytest.mark.parametrize("when", ["infinity", "294276-12-31", "2200-01-01"])
def test_a_job_due_beyond_all_time_does_not_make_the_timer_spin(engine: Engine, local: Time, when: str) -> None:
    make_job(engine, state=JobState.SCHEDULED, scheduled_at=when)

    with counting(engine, local, hears=lambda: True) as (fetcher, sent):
        _run(fetcher, local, 60)

    assert len(sent) < 60, len(sent)


def test_a_burst_of_announcements_is_one_look_each_25_ms(engine: Engine, local: Time) -> None:
    with counting(engine, local, hears=lambda: True) as (fetcher, sent):
        _run(fetcher, local, 10)
        sent.clear()
        until = local.now + 1.0
        while local.now < until:
            fetcher.heard("default")
            fetcher.step()
            local.now += 0.001

    assert sent.count("SELECT_NEXT_DUE") <= 41, len(sent)


def test_the_runners_of_a_fleet_do_not_all_fire_for_one_job(engine: Engine, local: Time) -> None:
    make_job(engine, state=JobState.SCHEDULED, due_in=timedelta(seconds=0))
    fired: list[str] = []
    with opened(engine) as own:
        for rank in range(5):
            fetcher = make_fetcher(own, [], slots={"other": 1})
            fetcher.due.rank = rank
            fetcher.due.at = local.now
            execute = own.execute

            def note(statement: Any, *rest: Any, execute: Any = execute) -> Any:
                if statement is SCHEDULE_DUE:
                    fired.append("fired")
                return execute(statement, *rest)

            setattr(own, "execute", note)  # noqa: B010
            fetcher.step()
            setattr(own, "execute", execute)  # noqa: B010

    assert fired == ["fired"]
    assert count_states(engine) == {"available": 1}


def test_a_schedule_moves_more_than_a_thousand_one_batch_after_the_other(engine: Engine, local: Time) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"{SCHEDULED} now() FROM generate_series(1, 2500) n"))

    with counting(engine, local, hears=lambda: True, slots={"default": 10}) as (fetcher, sent):
        _run(fetcher, local, 0.2)

    assert sent.count("SCHEDULE_DUE") <= 4
    assert count_states(engine) == {"available": 2_490, "running": 10}


def test_fifty_idle_runners_and_one_job_make_at_most_five_fetches_in_the_first_50_ms(
    engine: Engine, local: Time
) -> None:
    places = list(range(50))
    sent: list[float] = []
    delivered: list[JobRow] = []
    with opened(engine, **own_settings("fetch")) as own:
        fleet = [make_fetcher(own, delivered, hears=lambda: True) for _ in places]
        for place, each in zip(places, fleet, strict=True):
            each.step()
            each.step()
            each.wakeups.place, each.wakeups.peers = place, {"default": places}
        execute = own.execute

        def note(statement: Any, *rest: Any) -> Any:
            if statement is FETCH_AVAILABLE:
                sent.append(local.now)
            return execute(statement, *rest)

        setattr(own, "execute", note)  # noqa: B010
        make_job(engine)
        began = local.now
        for each in fleet:
            each.heard("default", 4_711)
        while local.now < began + 0.05:
            for each in fleet:
                while each.step() == 0:
                    pass
            local.now += 0.001

    assert 1 <= len(sent) <= 5
    assert len(delivered) == 1
