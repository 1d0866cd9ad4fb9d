"""Prune and clean: what is over goes, in bounded batches; what somebody wants stays."""

import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, event, text

from sqla_river import store
from sqla_river.duties.prune import BATCH, PRUNE, Clean, Prune
from sqla_river.options import Retention
from sqla_river.statements import PRUNE_COMPLETED
from sqla_river.states import FINALIZED, JobState
from sqla_river.store import OwnConnection
from tests.crashing import make_runner, new_id, runners
from tests.making import count_states, eventually, explain, fetch, make_job, make_jobs, opened, read_jobs

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def prune(own: OwnConnection, retention: Retention | None = None) -> int:
    """Prune to the end; how many batches that took."""
    duty = Prune(retention if retention is not None else Retention())
    batches = 1
    while duty.do(own):
        batches += 1
    return batches


def _left(engine: Engine) -> list[int]:
    return [row["id"] for row in read_jobs(engine)]


# ---- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "age"), [("completed", DAY), ("cancelled", DAY), ("discarded", 7 * DAY)])
def test_by_default_finished_jobs_stay_for_a_day_and_discarded_ones_for_a_week(
    engine: Engine, state: str, age: timedelta
) -> None:
    make_job(engine, state=state, finished_ago=age + SECOND)
    young = make_job(engine, state=state, finished_ago=age - HOUR)

    with opened(engine) as own:
        prune(own)

    assert _left(engine) == [young]


@pytest.mark.parametrize("state", sorted(FINALIZED))
def test_each_state_has_its_own_retention(engine: Engine, state: JobState) -> None:
    jobs = {each: make_job(engine, state=each, finished_ago=HOUR) for each in sorted(FINALIZED)}
    ages: dict[str, Any] = {each.value: 2 * HOUR for each in FINALIZED}
    ages[state.value] = HOUR - SECOND

    with opened(engine) as own:
        prune(own, Retention(**ages))

    assert _left(engine) == sorted(job_id for each, job_id in jobs.items() if each != state)


def test_what_is_kept_for_ever_is_not_even_looked_for(engine: Engine) -> None:
    make_jobs(engine, 3, state=JobState.COMPLETED, finished_ago=1_000 * DAY)
    none = Prune(Retention(completed=None, cancelled=None, discarded=None))

    assert not none.entitled()
    with opened(engine) as own:
        prune(own, Retention(completed=None))
    assert count_states(engine) == {"completed": 3}


def test_a_queue_may_have_a_retention_of_its_own(engine: Engine) -> None:
    retention = Retention(
        completed=HOUR,
        discarded=None,
        queues={"audit": Retention(completed=None), "noise": Retention(completed=timedelta(0), discarded=HOUR)},
    )
    for queue in ("default", "audit", "noise"):
        for state in ("completed", "discarded"):
            for age in (30 * DAY, timedelta(minutes=30)):
                make_job(engine, state=state, queue=queue, finished_ago=age)

    with opened(engine) as own:
        prune(own, retention)

    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT queue, state::text, now() - finalized_at > '1 day' AS old FROM river_job ORDER BY 1, 2, 3")
        )
        assert [tuple(row) for row in rows] == [
            ("audit", "completed", False),
            ("audit", "completed", True),
            ("audit", "discarded", False),
            ("default", "completed", False),
            ("default", "discarded", False),
            ("default", "discarded", True),
            ("noise", "discarded", False),
        ]


@pytest.mark.parametrize("state", [state for state in JobState if state not in FINALIZED])
def test_a_job_that_has_not_finished_never_goes(engine: Engine, state: JobState) -> None:
    make_job(engine, state=state, created_at="2020-01-01", scheduled_at="2020-01-01", attempted_at="2020-01-01")

    with opened(engine) as own:
        prune(own, Retention(completed=timedelta(0), cancelled=timedelta(0), discarded=timedelta(0)))

    assert count_states(engine) == {state.value: 1}


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_a_thousand_rows_the_oldest_first(engine: Engine) -> None:
    young = make_jobs(engine, 800, state=JobState.COMPLETED, finished_ago=2 * DAY)
    make_jobs(engine, 700, state=JobState.COMPLETED, finished_ago=3 * DAY)
    duty = Prune(Retention())

    with opened(engine) as own:
        assert duty.do(own)
        assert _left(engine) == young[300:]
        assert not duty.do(own)
    assert _left(engine) == []


def test_many_who_prune_at_once_neither_wait_nor_deadlock(engine: Engine) -> None:
    make_jobs(engine, 6_000, state=JobState.COMPLETED, finished_ago=2 * DAY)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with opened(engine, lock_timeout="1ms", deadlock_timeout="10ms") as own:
                prune(own)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    with opened(engine) as own:
        prune(own)  # what the last of them passed by
    assert failed == []
    assert _left(engine) == []


def test_one_state_that_cannot_be_pruned_keeps_no_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    for state in FINALIZED:
        make_job(engine, state=state, finished_ago=30 * DAY)
    monkeypatch.setitem(PRUNE, "completed", text("SELECT 1 / 0"))

    with opened(engine) as own, pytest.raises(Exception, match="division by zero"):
        Prune(Retention()).do(own)

    assert count_states(engine) == {"completed": 1}


def _prune_under_load(engine: Engine, rows: int) -> None:
    """Runners fetch and enqueue while *rows* finished ones go; nobody waits for the prune."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_job (kind, args, state, finalized_at) "
                "SELECT 'count', '{}', 'completed', now() - interval '2 days' FROM generate_series(1, :rows)"
            ),
            {"rows": rows},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE river_job"))
    batches: list[int] = []

    def work() -> None:
        with opened(engine, statement_timeout="10s") as own:
            batches.append(prune(own))

    pruning = threading.Thread(target=work)
    pruning.start()
    worked = 0
    with opened(engine, lock_timeout="1ms") as own:
        while pruning.is_alive():
            make_jobs(engine, 5)
            worked += len(fetch(own, f"test/{worked}"))
            with engine.begin() as connection:
                connection.execute(
                    text("UPDATE river_job SET state = 'completed', finalized_at = now() WHERE state = 'running'")
                )
        worked += len(fetch(own, "test/last"))
    pruning.join()

    states = count_states(engine)
    assert sum(states.values()) == worked
    assert set(states) <= {"completed", "running"}
    assert batches[0] >= rows // BATCH
    with engine.connect() as connection:
        assert (
            connection.execute(
                text("SELECT count(*) FROM river_job WHERE finalized_at < now() - interval '1 day'")
            ).scalar()
            == 0
        )


def test_prune_under_load_blocks_nobody(engine: Engine) -> None:
    _prune_under_load(engine, 30_000)


@pytest.mark.slow
def test_a_million_finished_rows_go_without_blocking_anybody(engine: Engine) -> None:
    _prune_under_load(engine, 1_000_000)


# ---- at the same moment ----------------------------------------------------------------------------------------------

RETRY = """UPDATE river_job SET state = 'available', finalized_at = NULL, scheduled_at = now() WHERE id = :id"""


def test_a_job_that_is_just_being_retried_is_passed_by(engine: Engine) -> None:
    retried, _ = make_jobs(engine, 2, state=JobState.COMPLETED, finished_ago=2 * DAY)

    with engine.begin() as theirs, opened(engine) as own:
        theirs.execute(text(RETRY), {"id": retried})
        prune(own)
        assert _left(engine) == [retried]
    with opened(engine) as own:
        prune(own)

    assert count_states(engine) == {"available": 1}


def test_a_job_retried_between_the_read_and_the_delete_stays(engine: Engine, url: str) -> None:
    """The DELETE has read the row and is held before it locks it; the retry commits; then the DELETE goes on."""
    retried, _ = make_jobs(engine, 2, state=JobState.COMPLETED, finished_ago=2 * DAY)
    with engine.begin() as connection:
        # The reading half of the statement stops here, with its snapshot taken.
        connection.execute(text("CREATE TABLE held (id int PRIMARY KEY)"))
        connection.execute(text("INSERT INTO held VALUES (1)"))
        connection.execute(
            text(
                "CREATE FUNCTION slow(text) RETURNS text LANGUAGE plpgsql AS "
                "'BEGIN PERFORM 1 FROM held FOR SHARE; RETURN $1; END'"
            )
        )
    with opened(engine) as own:
        slow = _held(own)
        with engine.connect() as gate:
            gate.execute(text("SELECT 1 FROM held FOR UPDATE"))
            pruning = threading.Thread(target=slow)
            pruning.start()
            eventually(lambda: _waits(engine), what="the prune to be held")
            with engine.begin() as theirs:
                assert theirs.execute(text(RETRY), {"id": retried}).rowcount == 1
            gate.rollback()
        pruning.join(20)

    assert [(row["id"], row["state"]) for row in read_jobs(engine)] == [(retried, "available")]


def _held(own: OwnConnection) -> Any:
    """Runs PRUNE_COMPLETED so that it waits for the table `held` when it compares a queue, before the row is locked."""
    connection = own.get()

    def hold(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        assert "w.queue !=" in statement
        return statement.replace("w.queue !=", "slow(w.queue) !="), parameters

    def run() -> None:
        event.listen(connection, "before_cursor_execute", hold, retval=True)
        parameters: Mapping[str, Any] = {"p_age": DAY, "p_back": None, "p_queue": None, "p_others": ["nothing"]}
        store.execute(connection, None, PRUNE_COMPLETED, parameters)

    return run


def _waits(engine: Engine) -> bool:
    with engine.connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(connection.execute(text(query)).scalar())


def test_jobs_retried_by_hand_under_an_aggressive_prune_are_never_lost(engine: Engine) -> None:
    jobs = make_jobs(engine, 3_000, state=JobState.COMPLETED, finished_ago=2 * DAY)
    stop = threading.Event()

    def work() -> None:
        with opened(engine) as own:
            duty = Prune(Retention())
            while not stop.is_set():
                duty.do(own)

    kept: list[int] = []
    pruning = threading.Thread(target=work)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        pruning.start()
        kept += [job_id for job_id in reversed(jobs) if connection.execute(text(RETRY), {"id": job_id}).rowcount]
    stop.set()
    pruning.join(20)

    assert kept  # it was a race
    assert _left(engine) == sorted(kept)


# ---- clean -----------------------------------------------------------------------------------------------------------


def clean(own: OwnConnection) -> None:
    assert not Clean().do(own)


def test_a_queue_untouched_for_a_day_goes_and_a_paused_one_never(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_queue (name, updated_at, paused_at) VALUES "
                "('old', now() - interval '25 hours', NULL), ('young', now() - interval '23 hours', NULL), "
                "('paused', now() - interval '1 year', now() - interval '1 year')"
            )
        )

    with opened(engine) as own:
        clean(own)

    with engine.connect() as connection:
        assert list(connection.execute(text("SELECT name FROM river_queue ORDER BY name")).scalars()) == [
            "paused",
            "young",
        ]


def test_a_queue_that_is_just_being_paused_or_touched_stays_and_nobody_waits(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_queue (name, updated_at) "
                "SELECT unnest(array['a', 'b', 'c']), now() - interval '2 days'"
            )
        )

    with engine.begin() as theirs, opened(engine, lock_timeout="100ms") as own:
        theirs.execute(text("UPDATE river_queue SET paused_at = now() WHERE name = 'a'"))
        theirs.execute(text("UPDATE river_queue SET updated_at = now() WHERE name = 'b'"))
        clean(own)
    with opened(engine) as own:
        clean(own)

    with engine.connect() as connection:
        assert list(connection.execute(text("SELECT name FROM river_queue ORDER BY name")).scalars()) == ["a", "b"]


def test_a_runners_row_goes_ten_leases_after_its_last_word_unless_a_job_names_it(engine: Engine) -> None:
    kept = [make_runner(engine), make_runner(engine, silent=timedelta(seconds=290))]
    owner = make_runner(engine, silent=DAY)
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/1")
    make_job(engine, state=JobState.COMPLETED, token=f"{make_runner(engine, silent=timedelta(seconds=310))}/1")
    make_runner(engine, new_id(), silent=30 * DAY)

    with opened(engine) as own:
        clean(own)

    assert runners(engine) == sorted([*kept, owner])


# ---- plans -----------------------------------------------------------------------------------------------------------

Mode = Literal["generic", "custom"]


@pytest.mark.parametrize("mode", ["generic", "custom"])
@pytest.mark.parametrize("over", [True, False], ids=["much to do", "nothing to do"])
def test_prune_walks_its_index_and_reads_no_more_than_it_deletes(engine: Engine, mode: Mode, over: bool) -> None:
    make_jobs(engine, 40_000, state=JobState.COMPLETED, finished_ago=2 * DAY if over else HOUR)
    make_jobs(engine, 10_000)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))

    with engine.begin() as connection:
        parameters: dict[str, Any] = {"p_age": DAY, "p_back": None, "p_queue": None, "p_others": []}
        plan = explain(connection, None, PRUNE_COMPLETED, parameters, plan=mode, settings={"enable_seqscan": "off"})

    assert plan.indexes == {"river_job_finalized_idx"}, plan
    assert {node["Node Type"] for node in plan.nodes} >= {"Tid Scan", "Limit"}, plan
    assert plan.removed("Filter") == 0, plan
    assert plan.buffers < (8 * BATCH if over else 20), plan
