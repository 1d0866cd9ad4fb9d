"""What the database refuses to rescue keeps nothing else from being rescued."""

import logging
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from sqla_river.duties import rescue
from sqla_river.duties.rescue import Rescue
from sqla_river.states import JobState
from tests.crashing import FOR_EVER, make_runner, new_id, runners, silence, suspects, sweep
from tests.making import count_statements, count_states, make_job, make_jobs, opened, read_job
from tests.refusing import full_queue, instead, refuse, relent

DEAD: Final = timedelta(seconds=31)


def _stuck(engine: Engine, count: int, **columns: Any) -> list[int]:
    """Jobs of a runner that is dead."""
    owner = make_runner(engine, silent=DEAD)
    return make_jobs(engine, count, state=JobState.RUNNING, token=f"{owner}/7", **columns)


@pytest.mark.parametrize("code", ["P0001", "XX001", "58P01", "54000", "57014", "55P03", "40P01", "42501"])
def test_a_job_that_is_refused_keeps_no_other_from_being_rescued(
    engine: Engine, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = _stuck(engine, 20)
    refuse(engine, [jobs[11]], code)

    with opened(engine) as own, caplog.at_level(logging.WARNING):
        freed = sweep(own)

    others = sorted(set(jobs) - {jobs[11]})
    assert [row.id for row in freed] == others
    assert read_job(engine, jobs[11])["state"] == "running"
    assert suspects(engine) == dict.fromkeys(others, (1, 0))  # what is refused is not counted either
    assert [record.args[0] for record in caplog.records if "cannot be freed" in record.msg] == [jobs[11]]  # type: ignore[index]


@pytest.mark.parametrize("pooled", [False, True])
def test_a_job_that_is_refused_at_the_commit_keeps_no_other_also_through_a_pooler(engine: Engine, pooled: bool) -> None:
    jobs = _stuck(engine, 3)
    refuse(engine, jobs[1:2], at_commit=True)

    with opened(engine) as own:
        own.get()
        own.pooled = pooled
        freed = sweep(own)

    assert [row.id for row in freed] == [jobs[0], jobs[2]]


def test_jobs_behind_a_thousand_refused_ones_are_rescued_in_the_same_sweep(engine: Engine) -> None:
    refuse(engine, _stuck(engine, 1_000))
    behind = _stuck(engine, 50)

    with opened(engine) as own, count_statements(engine) as sent:
        freed = sweep(own)

    assert [row.id for row in freed] == behind
    assert len(sent) < 2 * 1_000 + 20  # each was refused alone once, and that was it


def test_what_was_refused_is_left_out_of_the_next_sweeps_and_tried_again_after_a_minute(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(rescue, "time", SimpleNamespace(monotonic=lambda: now))
    refused, *_ = _stuck(engine, 20)
    refuse(engine, [refused])
    freed: list[int] = []
    duty = Rescue(lambda: FOR_EVER, lambda rows: freed.extend(row.id for row in rows))

    with opened(engine) as own:
        assert not duty.do(own)
        freed.clear()
        others = _stuck(engine, 5)
        with count_statements(engine) as sent:
            assert not duty.do(own)
        assert (freed, len(sent)) == (others, 4)
        relent(engine)
        now += 59
        duty.do(own)
        assert read_job(engine, refused)["state"] == "running"
        now += 2
        duty.do(own)

    assert freed == [*others, refused]


def test_an_ordinary_sweep_takes_four_round_trips(engine: Engine) -> None:
    _stuck(engine, 20)

    with opened(engine) as own:
        own.get()
        with count_statements(engine) as sent:
            sweep(own)

    assert len(sent) == 4


def test_a_rescue_in_parts_that_takes_long_lets_other_duties_have_their_turn_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescue, "LONGEST_BATCH", -1.0)
    jobs = _stuck(engine, 8)
    refuse(engine, [jobs[2]])
    batches: list[list[int]] = []
    duty = Rescue(lambda: FOR_EVER, lambda rows: batches.append([row.id for row in rows]))

    with opened(engine) as own:
        turns = 1
        while duty.do(own):
            turns += 1

    assert batches == [jobs[:2], jobs[3:4], jobs[4:]]
    assert turns > len(batches)


def test_what_was_freed_before_the_connection_broke_is_told_and_the_next_sweep_goes_on(engine: Engine) -> None:
    jobs = _stuck(engine, 4)
    refuse(engine, jobs[3:])
    freed: list[int] = []
    asked = 0

    def until() -> datetime:
        nonlocal asked
        asked += 1
        if asked == 4:  # all of them, all by their ids, the first half, and then
            with engine.begin() as connection:
                connection.execute(
                    text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'test'")
                )
        return FOR_EVER

    with opened(engine) as own:
        duty = Rescue(until, lambda rows: freed.extend(row.id for row in rows))
        with pytest.raises(OperationalError):
            duty.do(own)
        assert freed == jobs[:2]
        assert not duty.do(own)

    assert freed == jobs[:3]


def test_a_rescue_in_parts_ends_with_its_time(engine: Engine) -> None:
    jobs = _stuck(engine, 4)
    refuse(engine, jobs[3:])
    times = iter([FOR_EVER, FOR_EVER, FOR_EVER])  # all of them, all by their ids, the first half
    over = datetime.now(UTC) - timedelta(seconds=1)

    with opened(engine) as own:
        Rescue(lambda: next(times, over), lambda rows: None).do(own)

    assert [read_job(engine, job_id)["state"] for job_id in jobs] == ["available"] * 2 + ["running"] * 2


def test_a_row_that_cannot_even_be_read_keeps_no_other_from_being_rescued(url: str, engine: Engine) -> None:
    damaged = make_job(engine, state=JobState.RUNNING, token="damaged/1")
    jobs = _stuck(engine, 20)
    lost = new_id()
    of_the_lost = make_job(engine, state=JobState.RUNNING, token=f"{lost}/1")
    body = (
        "IF $1 LIKE 'damaged%' THEN RAISE 'missing chunk number 0 for toast value' USING errcode = 'XX001'; END IF; "
        "RETURN pg_catalog.split_part($1, $2, $3);"
    )

    freed: list[int] = []
    duty = Rescue(lambda: FOR_EVER, lambda rows: freed.extend(row.id for row in rows))
    with (
        instead(url, "split_part(text, text, int) RETURNS text IMMUTABLE COST 1", body) as theirs,
        opened(theirs) as own,
    ):
        duty.do(own)
        assert freed == jobs
        duty.do(own)  # which knows by now what to leave out
        assert lost in runners(engine)
        silence(engine)
        duty.do(own)

    assert freed == [*jobs, of_the_lost]
    assert read_job(engine, damaged)["state"] == "running"


def test_jobs_are_rescued_while_the_queue_of_notifications_is_full(
    url: str, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    _stuck(engine, 20)

    with full_queue(url) as theirs, opened(theirs) as own, caplog.at_level(logging.WARNING):
        freed = sweep(own)

    assert len(freed) == 20
    assert count_states(engine) == {"available": 20}
    assert "too many notifications" in caplog.text


def test_one_refused_job_keeps_no_other_while_the_queue_of_notifications_is_full_too(url: str, engine: Engine) -> None:
    jobs = _stuck(engine, 20)
    refuse(engine, [jobs[3]])

    with full_queue(url) as theirs, opened(theirs) as own:
        sweep(own)

    assert count_states(engine) == {"available": 19, "running": 1}
