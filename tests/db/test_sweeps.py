"""The sweeps of prune: one that fails keeps no other, and none reads again what the last has seen."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, text

from sqla_river.duties.prune import BATCH, Prune
from sqla_river.duties.turns import Turns
from sqla_river.options import Retention
from sqla_river.statements import PRUNE_COMPLETED
from sqla_river.states import JobState
from sqla_river.store import OwnConnection
from tests.making import count_states, explain, make_job, make_jobs, opened, read_jobs

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def test_one_state_that_cannot_be_pruned_slows_no_other_and_is_reported_at_the_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_jobs(engine, 2 * BATCH + 1, state=JobState.DISCARDED, finished_ago=30 * DAY)
    make_job(engine, state=JobState.COMPLETED, finished_ago=30 * DAY)
    tries: list[int] = []

    def fails(self: OwnConnection, statement: Any, parameters: Any = None) -> Any:
        if statement is PRUNE_COMPLETED:
            tries.append(1)
            statement, parameters = text("SELECT 1 / 0"), None
        return execute(self, statement, parameters)

    execute = OwnConnection.execute
    monkeypatch.setattr(OwnConnection, "execute", fails)
    with opened(engine) as own:
        duty = Prune(Retention())
        assert [duty.do(own), duty.do(own)] == [True, True]
        with pytest.raises(Exception, match="division by zero"):
            duty.do(own)
        assert len(tries) == 1
        with pytest.raises(Exception, match="division by zero"):
            duty.do(own)  # the next time it is tried again

    assert count_states(engine) == {"completed": 1}


def test_a_state_that_cannot_be_pruned_puts_off_no_batch_of_another(engine: Engine) -> None:
    make_jobs(engine, 5 * BATCH, state=JobState.COMPLETED, finished_ago=2 * DAY)
    referenced = make_job(engine, state=JobState.DISCARDED, finished_ago=8 * DAY)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE mine (job_id bigint REFERENCES river_job)"))
        connection.execute(text("INSERT INTO mine VALUES (:job)"), {"job": referenced})
    with opened(engine) as own:
        turns = Turns(own, [Prune(Retention())])
        pauses = [turns.step() for _ in range(7)]  # the first makes the duty's row
        left = [row["id"] for row in read_jobs(engine)]
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE mine"))

    assert pauses[:6] == [0.0] * 6
    assert left == [referenced]


# ---- how far back ----------------------------------------------------------------------------------------------------


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The local clock, whose `now` is moved by hand."""
    clock = SimpleNamespace(now=1_000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("sqla_river.duties.prune.time", clock)
    return clock


def test_a_sweep_begins_where_the_last_one_ended_and_now_and_then_at_the_start(
    engine: Engine, local: SimpleNamespace
) -> None:
    duty = Prune(Retention(discarded=None, cancelled=None))

    def left() -> int:
        with opened(engine) as own:
            while duty.do(own):
                pass
        return len(read_jobs(engine))

    make_jobs(engine, 1_500, state=JobState.COMPLETED, finished_ago=30 * DAY)
    found = [left()]  # the first looks at everything
    make_job(engine, state=JobState.COMPLETED, finished_ago=30 * DAY)  # as nothing ends by itself
    make_job(engine, state=JobState.COMPLETED, finished_ago=DAY + timedelta(minutes=9))  # committed late
    found.append(left())
    make_job(engine, state=JobState.COMPLETED, finished_ago=DAY + timedelta(minutes=49))  # since the last sweep
    local.now += 40 * 60
    found.append(left())
    local.now += 21 * 60
    found.append(left())

    assert found == [0, 1, 1, 0]


@pytest.mark.parametrize("mode", ["generic", "custom"])
@pytest.mark.parametrize("only", [True, False], ids=["one queue", "all others"])
def test_a_sweep_reads_nothing_of_what_other_queues_have_kept_for_long(
    engine: Engine, only: bool, mode: Literal["generic", "custom"]
) -> None:
    make_jobs(engine, 5_000, state=JobState.COMPLETED, queue="kept", finished_ago=30 * DAY)
    make_jobs(engine, 10, state=JobState.COMPLETED, queue="default", finished_ago=DAY + SECOND)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))

    asked: dict[str, Any] = {"p_age": DAY, "p_back": HOUR, "p_queue": None, "p_others": ["kept"]}
    if only:
        asked |= {"p_queue": "default", "p_others": []}
    with engine.begin() as connection:
        plan = explain(connection, None, PRUNE_COMPLETED, asked, plan=mode, settings={"enable_seqscan": "off"})

    assert plan.removed("Filter") == 0, plan
    assert plan.buffers < 100, plan
