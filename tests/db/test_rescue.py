"""Rescue: the jobs of runners whose lease has run out, through the real statements."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import psycopg
import pytest
from sqlalchemy import Engine, Executable, make_url, text

from sqla_river import store
from sqla_river.duties.rescue import BATCH, Rescue
from sqla_river.statements import FETCH_SUSPECT, RESCUE_STUCK, RESCUE_STUCK_AMONG, SELECT_RUNNING, UPSERT_RUNNER
from sqla_river.states import JobState
from tests.crashing import FOR_EVER, LEASE, make_heart, make_runner, new_id, runners, silence, suspects, sweep
from tests.making import (
    Count,
    Plan,
    count_states,
    eventually,
    explain,
    fetch,
    make_job,
    make_jobs,
    opened,
    read_job,
    read_jobs,
    text_of,
)

DEAD = timedelta(seconds=31)
GO = "some-host_2026_03_01T10_00_00_000000"


# ---- what becomes of a job -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [1, 5, 24])
def test_a_job_of_a_dead_runner_is_available_at_once_whatever_its_attempt(engine: Engine, attempt: int) -> None:
    owner = make_runner(engine, silent=DEAD)
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", attempt=attempt, due_in=-timedelta(days=1))

    with opened(engine) as own:
        sweep(own)
        row = read_job(engine, job_id)
        again = fetch(own, "other/1")

    assert (row["state"], row["attempt"], row["finalized_at"]) == ("available", attempt, None)
    assert timedelta(seconds=-5) < row["delay"] <= timedelta(0)
    assert [(job.id, job.attempt) for job in again] == [(job_id, attempt + 1)]


def test_a_rescue_is_counted_and_noted_as_an_error_of_rivers_shape(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    began = "2026-03-01T10:00:00.123456Z"
    before = {"at": began, "attempt": 2, "error": "boom", "trace": "there"}
    job_id = make_job(
        engine,
        state=JobState.RUNNING,
        token=f"{owner}/7",
        attempt=3,
        attempted_at=began,
        errors=[before],
        metadata={"a": 1},
    )

    with opened(engine) as own:
        sweep(own)
        row = read_job(engine, job_id)
        fetch(own, f"{owner}/8")
        sweep(own)

    assert row["all_errors"] == [
        before,
        {"at": began, "attempt": 3, "error": f"rescued: the lease of runner {owner} ran out", "trace": ""},
    ]
    assert row["metadata"] == {"a": 1, "river:rescue_count": 1}
    assert read_job(engine, job_id)["metadata"] == {"a": 1, "river:rescue_count": 2}


def test_the_last_attempt_discards(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", attempt=3, max_attempts=3)

    with opened(engine) as own:
        sweep(own)

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"], row["finalized"], len(row["all_errors"])) == ("discarded", 3, True, 1)


@pytest.mark.parametrize("attempt", [1, 25])
def test_a_cancel_asked_before_the_death_cancels(engine: Engine, attempt: int) -> None:
    owner = make_runner(engine, silent=DEAD)
    asked = {"cancel_attempted_at": "2026-03-01T10:00:00Z"}
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", attempt=attempt, metadata=asked)

    with opened(engine) as own:
        sweep(own)

    row = read_job(engine, job_id)
    assert (row["state"], row["finalized"], row["metadata"]["river:rescue_count"]) == ("cancelled", True, 1)


def test_a_kind_that_nobody_here_knows_is_rescued_too(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", kind="of_another_deploy", queue="of_another_fleet")

    with opened(engine) as own:
        sweep(own)

    assert count_states(engine) == {"available": 1}


def test_no_row_keeps_others_from_being_rescued(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    token = f"{owner}/7"
    odd: list[dict[str, Any]] = [
        {"attempt": 32767, "max_attempts": 32767},
        {"attempt": 32767, "max_attempts": 1},
        {"attempt": -5},
        {"metadata": "[1, 2]"},
        {"metadata": "null"},
        {"metadata": {"river:rescue_count": "many"}},
        {"metadata": {"river:rescue_count": 1e300}},
        {"errors": "{}"},
        {"errors": "{{1,2},{3,4}}"},
        {"errors": [f"{number}" for number in range(400)]},
        {"attempted_at": None},
        {"attempted_at": "infinity"},
        {"attempted_at": "-infinity"},
        {"attempted_at": "0044-03-15 BC"},
        {"attempted_at": "20000-01-01"},
        {"scheduled_at": "infinity"},
        {"attempted_by": [*(f"{GO}{number}" for number in range(300)), token]},
        {"kind": "nobody's"},
        {"queue": 'x"y\\z'},
    ]
    for columns in odd:
        make_job(engine, state=JobState.RUNNING, **{"token": token, **columns})
    healthy = make_job(engine, state=JobState.RUNNING, token=token)

    with opened(engine) as own:
        freed = sweep(own)

    assert len(freed) == len(odd) + 1
    assert Counter(row.state for row in freed) == {"available": len(odd) - 1, "discarded": 2}
    with engine.connect() as connection:
        assert connection.execute(text("SELECT max(cardinality(errors)) FROM river_job")).scalar() == 25
    assert read_job(engine, healthy)["state"] == "available"


def test_a_job_whose_unique_key_is_taken_is_discarded_with_that_reason_and_the_others_go_on(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    waiting = "00000001"  # holds its key while it is available, not while it runs: no River of today writes that
    make_job(engine, unique_key="taken", unique_states=waiting)
    keys = ("taken", "twice", "twice")
    jobs = [
        make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", unique_key=key, unique_states=waiting)
        for key in keys
    ]
    healthy = make_jobs(engine, 3, state=JobState.RUNNING, token=f"{owner}/7")

    with opened(engine) as own:
        sweep(own)

    rows = [read_job(engine, job_id) for job_id in jobs]
    assert [row["state"] for row in rows] == ["discarded", "available", "discarded"]
    assert "unique key" in rows[0]["all_errors"][0]["error"]
    assert {read_job(engine, job_id)["state"] for job_id in healthy} == {"available"}


# ---- whose jobs ------------------------------------------------------------------------------------------------------


def test_a_job_of_a_living_runner_is_left_alone_however_long_it_runs(engine: Engine) -> None:
    owner = make_runner(engine, silent=LEASE - timedelta(seconds=5))
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", attempted_at="2020-01-01")
    before = text_of(engine, job_id)

    with opened(engine) as own:
        assert sweep(own) == []

    assert text_of(engine, job_id) == before
    assert suspects(engine) == {}


def test_each_runner_has_the_lease_that_it_wrote(engine: Engine) -> None:
    owners = [make_runner(engine, silent=timedelta(minutes=2)) for _ in range(2)]
    with engine.begin() as connection:
        connection.execute(text("UPDATE river_runner SET lease = '1 hour' WHERE id = :id"), {"id": owners[1]})
    jobs = [make_job(engine, state=JobState.RUNNING, token=f"{owner}/7") for owner in owners]

    with opened(engine) as own:
        assert [row.id for row in sweep(own)] == jobs[:1]


def test_the_owner_is_whoever_fetched_last(engine: Engine) -> None:
    dead, living = make_runner(engine, silent=DEAD), make_runner(engine)
    make_job(engine, state=JobState.RUNNING, attempted_by=[f"{dead}/1", f"{living}/1"])
    stuck = make_job(engine, state=JobState.RUNNING, attempted_by=[f"{living}/1", f"{dead}/2"])

    with opened(engine) as own:
        assert [row.id for row in sweep(own)] == [stuck]


@pytest.mark.parametrize("state", [state for state in JobState if state != JobState.RUNNING])
def test_a_job_that_does_not_run_is_left_alone(engine: Engine, state: JobState) -> None:
    owner = make_runner(engine, silent=DEAD)
    job_id = make_job(engine, state=state, token=f"{owner}/7", attempted_at="2020-01-01")
    before = text_of(engine, job_id)

    with opened(engine) as own:
        sweep(own)

    assert text_of(engine, job_id) == before


def test_an_owner_without_a_row_gets_one_and_then_the_ordinary_rule(engine: Engine) -> None:
    owner = new_id()
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", attempted_at="2020-01-01")

    with opened(engine) as own:
        assert sweep(own) == []
        assert runners(engine) == [owner]
        silence(engine, LEASE - timedelta(seconds=5))
        assert sweep(own) == []
        silence(engine, timedelta(seconds=10))
        assert [row.id for row in sweep(own)] == [job_id]


def test_an_owner_that_lost_its_row_but_lives_keeps_its_jobs(engine: Engine) -> None:
    owner = new_id()
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7")

    with opened(engine) as own, opened(engine) as theirs:
        heart = make_heart(theirs, owner)
        heart.step()
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_runner"))
        assert sweep(own) == []
        silence(engine)
        heart.step()
        assert sweep(own) == []


@pytest.mark.parametrize(
    "tokens", [[GO], [f"{new_id()}/1", GO], None, [], [""], ["a/b"], ["host:1:notanonce/3"]], ids=str
)
def test_an_owner_of_another_shape_has_rivers_hour(engine: Engine, tokens: list[str] | None) -> None:
    columns: dict[str, Any] = {"state": JobState.RUNNING, "attempted_by": tokens}
    with engine.connect() as connection:
        ago = {
            minutes: str(connection.execute(text(f"SELECT now() - interval '{minutes} minutes'")).scalar())
            for minutes in (59, 61)
        }
    make_job(engine, **columns, attempted_at=ago[59])
    stuck = make_job(engine, **columns, attempted_at=ago[61])

    with opened(engine) as own:
        assert [row.id for row in sweep(own)] == [stuck]

    assert read_job(engine, stuck)["all_errors"][0]["error"] == "rescued: no word of it for an hour"
    assert runners(engine) == []
    assert suspects(engine) == {}  # it says nothing of what the job did to its process


def test_a_runner_whose_heartbeat_lies_in_the_future_is_dead_one_lease_later(engine: Engine) -> None:
    owner = make_runner(engine, silent=-timedelta(hours=1))  # as after a clock that was set back
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7")

    with opened(engine) as own:
        assert sweep(own) == []
        silence(engine, DEAD)
        assert len(sweep(own)) == 1


# ---- who may ---------------------------------------------------------------------------------------------------------


def test_a_rescue_that_arrives_after_its_time_finds_nobody_dead(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7")
    make_job(engine, state=JobState.RUNNING, token=GO, attempted_at="2020-01-01")

    with opened(engine) as own:
        assert sweep(own, datetime.now(UTC) - timedelta(seconds=10)) == []
        assert sweep(own, None) == []

    assert count_states(engine) == {"running": 2}
    assert suspects(engine) == {}


def test_a_runner_that_may_not_rescue_is_not_entitled() -> None:
    assert not Rescue(lambda: None, lambda freed: None).entitled()
    assert Rescue(lambda: FOR_EVER, lambda freed: None).entitled()


# ---- at the same moment ----------------------------------------------------------------------------------------------


def test_an_owner_that_is_just_renewing_its_row_is_passed_by(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7")

    with opened(engine) as own, engine.begin() as theirs:
        store.execute(
            theirs,
            None,
            UPSERT_RUNNER,
            {"p_id": owner, "p_queues": [], "p_slots": [], "p_free": [], "p_version": "1", "p_lease": LEASE},
        )
        assert sweep(own) == []
    with opened(engine) as own:
        assert sweep(own) == []

    assert count_states(engine) == {"running": 1}


def test_an_owner_that_comes_back_during_the_rescue_learns_what_it_lost(engine: Engine) -> None:
    owner = make_runner(engine)
    lost: list[int] = []
    with opened(engine) as theirs, engine.connect() as rescuer:
        make_jobs(engine, 2)
        rows = fetch(theirs, f"{owner}/1")
        heart = make_heart(theirs, owner, unfinished=rows, lost=lambda gone: lost.extend(row.id for row in gone))
        heart.step()
        heart._beat_at -= 60  # it was out of touch
        silence(engine)
        with rescuer.begin():
            store.execute(rescuer, None, RESCUE_STUCK, {"p_schema": None, "p_until": FOR_EVER})
            returning = threading.Thread(target=heart.step)
            returning.start()
            eventually(lambda: _waiting(engine), what="the owner to wait for its row")
            assert lost == []
        returning.join(30)

    assert sorted(lost) == [row.id for row in rows]


def _waiting(engine: Engine) -> bool:
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(connection.execute(text(query)).scalar())


def test_a_job_that_somebody_has_locked_is_passed_by_and_freed_later(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    locked, *others = make_jobs(engine, 3, state=JobState.RUNNING, token=f"{owner}/7")

    with opened(engine) as own:
        with engine.begin() as theirs:
            theirs.execute(text("SELECT 1 FROM river_job WHERE id = :id FOR UPDATE"), {"id": locked})
            assert sorted(row.id for row in sweep(own)) == others
        assert [row.id for row in sweep(own)] == [locked]


def test_many_who_rescue_at_once_free_each_job_once(engine: Engine) -> None:
    owners = [make_runner(engine, silent=DEAD) for _ in range(4)]
    for owner in owners:
        make_jobs(engine, 700, state=JobState.RUNNING, token=f"{owner}/7")

    def rescuer(_: int) -> list[Any]:
        with opened(engine) as own:
            return [row.id for _ in range(6) for row in sweep(own)]

    with ThreadPoolExecutor(4) as pool:
        freed = Counter(job_id for ids in pool.map(rescuer, range(4)) for job_id in ids)

    assert len(freed) == 2_800
    assert set(freed.values()) == {1}
    assert {
        (row["state"], row["metadata"]["river:rescue_count"], len(row["all_errors"])) for row in read_jobs(engine)
    } == {("available", 1, 1)}


def test_a_sweep_frees_a_thousand_at_a_time_in_order(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    jobs = make_jobs(engine, 2 * BATCH + 300, state=JobState.RUNNING, token=f"{owner}/7")
    freed: list[list[int]] = []
    duty = Rescue(lambda: FOR_EVER, lambda rows: freed.append(sorted(row.id for row in rows)))

    with opened(engine) as own:
        more = [duty.do(own) for _ in range(3)]

    assert more == [True, True, False]
    assert freed == [jobs[:BATCH], jobs[BATCH : 2 * BATCH], jobs[2 * BATCH :]]


# ---- who hears of it -------------------------------------------------------------------------------------------------


def test_what_was_freed_is_announced_once_per_queue(engine: Engine, url: str) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_jobs(engine, 5, state=JobState.RUNNING, token=f"{owner}/7", queue="a")
    make_jobs(engine, 5, state=JobState.RUNNING, token=f"{owner}/7", queue="b")
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", queue="c", attempt=25)  # discarded: nothing to run
    again = make_job(engine, state=JobState.RUNNING, token=f"{owner}/7", queue="d")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (:id, 1, 0)"), {"id": again})

    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as listener, opened(engine) as own:
        listener.execute('LISTEN "public.river_insert"')
        sweep(own)
        heard = [json.loads(note.payload) for note in listener.notifies(timeout=30, stop_after=3)]
        heard += [json.loads(note.payload) for note in listener.notifies(timeout=0.05)]

    assert sorted(heard, key=str) == [
        {"queue": "a", "deaths": True},
        {"queue": "b", "deaths": True},
        {"queue": "d", "suspects": True},
    ]


# ---- suspects --------------------------------------------------------------------------------------------------------


def _run_all(engine: Engine, token: str) -> None:
    """Every job is running, suspects too."""
    with engine.begin() as connection:
        connection.execute(
            text("""UPDATE river_job SET state = 'running', attempt = attempt + 1, attempted_at = now(),
                attempted_by = array_append(attempted_by, :token)"""),
            {"token": token},
        )


def test_a_job_that_met_two_deaths_is_a_suspect_until_it_has_finished(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    job_id = make_job(engine, state=JobState.RUNNING, token=f"{owner}/1")

    with opened(engine) as own:
        (first,) = sweep(own)
        _run_all(engine, f"{owner}/2")
        (second,) = sweep(own)
        assert (first.suspect, second.suspect) == (False, True)
        assert suspects(engine) == {job_id: (2, 0)}
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET state = 'retryable'"))
        sweep(own)
        assert suspects(engine) == {job_id: (2, 0)}
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET state = 'completed', finalized_at = now()"))
        sweep(own)

    assert suspects(engine) == {}


def test_what_a_second_death_frees_nobody_fetches_with_other_jobs_whether_he_has_heard_of_it_or_not(
    engine: Engine,
) -> None:
    owner = make_runner(engine, silent=DEAD)
    job_id = make_job(engine)
    asked = {"p_queues": ["default"], "p_kinds": [Count.kind], "p_id": owner, "p_token": f"{owner}/3"}

    with opened(engine) as own:
        fetched: list[list[int]] = []
        for number in range(2):
            fetched.append([job.id for job in fetch(own, f"{owner}/{number}")])
            sweep(own)
        others = make_jobs(engine, 2)
        fetched.append([job.id for job in fetch(own, "other/1")])
        alone = own.execute(FETCH_SUSPECT, asked).all()

    assert fetched == [[job_id], [job_id], others]
    assert [row.id for row in alone] == [job_id]


def test_a_suspect_that_was_deleted_is_forgotten(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (4711, 2, 0)"))

    with opened(engine) as own:
        sweep(own)

    assert suspects(engine) == {}


def test_three_deaths_alone_discard_and_say_so_whatever_attempts_are_left(engine: Engine) -> None:
    owner = new_id()
    killer = make_job(engine)
    states: list[str] = []

    with opened(engine) as own:
        for number in range(5):
            _run_all(engine, f"{owner}/{number}")
            make_runner(engine, owner, silent=DEAD, alone=killer if number >= 2 else None)
            states += [row.state for row in sweep(own)]

    row = read_job(engine, killer)
    assert states == ["available"] * 4 + ["discarded"]
    assert row["attempt"] == 5
    assert "died 3 times while this job ran alone" in row["all_errors"][-1]["error"]
    assert suspects(engine) == {}


def test_deaths_in_company_never_discard(engine: Engine) -> None:
    owner = new_id()
    make_jobs(engine, 3)

    with opened(engine) as own:
        for number in range(20):
            _run_all(engine, f"{owner}/{number}")
            make_runner(engine, owner, silent=DEAD)
            sweep(own)

    assert count_states(engine) == {"available": 3}
    assert set(suspects(engine).values()) == {(20, 0)}


def test_a_suspect_calls_for_its_turn_at_once(engine: Engine) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/1")
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO river_duty (name, due_at) VALUES ('isolate', now() + interval '2 minutes')")
        )

    def due(connection: Any) -> bool:
        return bool(connection.execute(text("SELECT due_at <= now() FROM river_duty WHERE name = 'isolate'")).scalar())

    with opened(engine) as own:
        sweep(own)
        assert not due(own)
        fetch(own, f"{owner}/2")
        sweep(own)
        assert due(own)


# ---- plans -----------------------------------------------------------------------------------------------------------

Mode = Literal["generic", "custom"]


@pytest.mark.parametrize("statement", [RESCUE_STUCK, RESCUE_STUCK_AMONG, SELECT_RUNNING], ids=["whole", "part", "ids"])
@pytest.mark.parametrize("mode", ["generic", "custom"])
def test_a_sweep_reads_the_running_jobs_and_no_others(engine: Engine, mode: Mode, statement: Executable) -> None:
    owner = make_runner(engine, silent=DEAD)
    make_jobs(engine, 30_000, state=JobState.COMPLETED)
    make_jobs(engine, 20_000)
    jobs = make_jobs(engine, 50, state=JobState.RUNNING, token=f"{owner}/1")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))

    with engine.begin() as connection:
        plan: Plan = explain(
            connection,
            None,
            statement,
            {"p_schema": None, "p_until": FOR_EVER, "p_tell": True, "p_refused": [], "p_ids": jobs, "p_after": 0},
            plan=mode,
            settings={"enable_seqscan": "off"},
        )

    assert "river_job_running_idx" in plan.indexes, plan
    assert not [scan for scan in plan.scans("river_job") if scan["Node Type"] == "Seq Scan"], plan
    assert plan.removed("Filter") == 0, plan
    assert plan.buffers < 50 * 40, plan
