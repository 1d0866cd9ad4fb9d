"""Fetching: what is taken, in which order, by which plan; and that no row, however broken, is in the way of others."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, Literal

import pytest
from psycopg import ClientCursor
from psycopg.pq import Format
from sqlalchemy import Connection, Engine, Executable, create_engine
from sqlalchemy.exc import OperationalError

from sqla_river import states
from sqla_river.context import JobContext
from sqla_river.fetch import LARGEST_FETCH
from sqla_river.rows import ID, QUEUE, TOKEN, Fetched, JobRow, Result
from sqla_river.statements import FETCH_AVAILABLE, FETCH_SUSPECT, SCHEDULE_DUE, SELECT_NEXT_DUE
from sqla_river.states import JobState
from sqla_river.store import OwnConnection
from sqla_river.workers import Workers
from tests.making import (
    Count,
    Plan,
    count_statements,
    count_states,
    explain,
    fetch,
    make_completer,
    make_executor,
    make_fetcher,
    make_job,
    make_jobs,
    opened,
    own_settings,
    read_job,
    read_jobs,
    text_of,
)


def _asked(slots: dict[str, int], token: str = "test/1", kinds: tuple[str, ...] = (Count.kind,)) -> dict[str, Any]:
    return {"p_queues": list(slots), "p_slots": list(slots.values()), "p_kinds": list(kinds), "p_token": token}


def _ids(rows: list[JobRow]) -> list[int]:
    return [row.id for row in rows]


# ---- how it is read -----------------------------------------------------------------


def test_what_is_fetched_comes_in_binary_unless_the_user_has_cursors_of_his_own(engine: Engine) -> None:
    client = create_engine(engine.url, connect_args={"cursor_factory": ClientCursor})  # which can only do text
    ids = make_jobs(engine, 2)
    formats: list[Format] = []
    for each in (engine, client):
        own = OwnConnection(each, None, "test", binary=True)
        formats.append(own.raw.cursor().format)
        rows = own.fetch(FETCH_AVAILABLE, _asked({"default": 1}))
        own.close()
        assert [row[ID] for row in rows] == [ids.pop(0)]
    client.dispose()

    assert formats == [Format.BINARY, Format.TEXT]


# ---- what is taken ------------------------------------------------------------------


def test_one_round_trip_serves_every_queue(engine: Engine) -> None:
    sizes = {"a": 2, "b": 3, "c": 1, "empty": 5}
    for queue in ("a", "b", "c"):
        make_jobs(engine, 4, queue=queue)

    with opened(engine) as own:
        own.get()
        with count_statements(engine) as sent:
            fetched = fetch(own, slots=sizes)

    assert Counter(row.queue for row in fetched) == {"a": 2, "b": 3, "c": 1}
    assert len(sent) == 1


def test_a_fetched_row_brings_what_a_slot_needs(engine: Engine) -> None:
    args = {"number": 7, "more": [1, {"é": None}]}
    job_id = make_job(engine, args=args, metadata={"m": 1}, attempt=2, max_attempts=9, priority=3, queue="q")

    with opened(engine) as own:
        (row,) = fetch(own, "runner/5", slots={"q": 1})

    assert (row.id, row.queue, row.kind, row.attempt, row.max_attempts, row.priority) == (job_id, "q", "count", 3, 9, 3)
    assert row.token == "runner/5"
    assert (row.args, row.metadata) == ('{"more": [1, {"é": null}], "number": 7}', '{"m": 1}')
    assert read_job(engine, job_id)["token"] == "runner/5"


def test_priority_goes_before_time_and_time_before_id(engine: Engine) -> None:
    wanted = [
        make_job(engine, priority=1, due_in=timedelta(hours=-1), id=9),
        make_job(engine, priority=1, due_in=timedelta(minutes=-1), id=3),
        make_job(engine, priority=2, scheduled_at="2026-01-01 00:00Z", id=4),
        make_job(engine, priority=2, scheduled_at="2026-01-01 00:00Z", id=5),
        make_job(engine, priority=4, scheduled_at="1999-01-01 00:00Z", id=1),
    ]

    with opened(engine) as own:
        fetched = [fetch(own, f"test/{number}", slots={"default": 1})[0].id for number in range(5)]

    assert fetched == wanted


def test_a_batch_takes_the_first_in_order(engine: Engine) -> None:
    later = make_jobs(engine, 10, priority=2)
    first = make_jobs(engine, 10, priority=1)

    with opened(engine) as own:
        fetched = fetch(own, slots={"default": 12})

    assert _ids(fetched) == later[:2] + first


def test_a_kind_without_a_worker_stays_available_unburnt(engine: Engine) -> None:
    unknown = make_job(engine, kind="of_a_newer_deploy")
    known = make_job(engine)
    was = text_of(engine, unknown)

    with opened(engine) as own:
        fetched = fetch(own)

    assert _ids(fetched) == [known]
    assert text_of(engine, unknown) == was


def test_without_workers_nothing_is_fetched(engine: Engine) -> None:
    make_job(engine)

    with opened(engine) as own:
        fetched = fetch(own, kinds=())

    assert fetched == []


def test_rows_locked_by_another_are_passed_by(engine: Engine) -> None:
    locked, free = make_jobs(engine, 2)

    with engine.begin() as theirs, opened(engine, lock_timeout="1s") as own:
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
        fetched = fetch(own)

    assert _ids(fetched) == [free]


def test_a_fetch_locks_no_more_rows_than_it_takes(engine: Engine) -> None:
    jobs = make_jobs(engine, 20)
    paused = make_jobs(engine, 5, queue="paused")
    _pause(engine, "paused")

    with engine.begin() as connection, opened(engine) as other:
        taken = connection.execute(FETCH_AVAILABLE, _asked({"default": 3, "paused": 3})).all()
        for_others = fetch(other, "other/1", slots={"default": 100})
        with engine.connect() as looking:
            unlocked = looking.exec_driver_sql("SELECT id FROM river_job WHERE queue = 'paused' FOR UPDATE SKIP LOCKED")
            free = sorted(unlocked.scalars())

    assert sorted(row.id for row in taken) == jobs[:3]
    assert _ids(for_others) == jobs[3:]
    assert free == paused


def _pause(engine: Engine, queue: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO river_queue (name, paused_at) VALUES ('{queue}', now())")


def test_a_paused_queue_is_not_fetched_and_one_without_a_row_is(engine: Engine) -> None:
    make_job(engine, queue="paused")
    wanted = [make_job(engine, queue="rowless"), make_job(engine, queue="resumed")]
    _pause(engine, "paused")
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO river_queue (name) VALUES ('resumed')")

    with opened(engine) as own:
        fetched = fetch(own, slots={"paused": 5, "rowless": 5, "resumed": 5})

    assert _ids(fetched) == wanted


def test_four_at_once_run_ten_thousand_jobs_once_each(engine: Engine) -> None:
    make_jobs(engine, 10_000)
    fetched: list[int] = []
    stale: list[int] = []

    def work(name: str) -> None:
        with opened(engine) as own, opened(engine) as completing:
            # A fetch with an older snapshot holds rows for a moment that run by now: the completer tries those again.
            completer = make_completer(completing)
            number = 0
            while rows := fetch(own, f"{name}/{number}", slots={"default": 97}):
                fetched.extend(row.id for row in rows)
                for row in rows:
                    completer.put(Result(row, states.completed()))
                completer.step()
                number += 1
            until = time.monotonic() + 10
            completer.flush(lambda: until)
            stale.append(completer.stale)

    threads = [threading.Thread(target=work, args=(f"runner{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    # A short fetch is no promise of an empty queue: what all four passed by is fetched now.
    work("sweep")

    assert len(fetched) == len(set(fetched))
    assert count_states(engine) == {"completed": 10_000}
    assert sum(stale) == 0


# ---- poison -------------------------------------------------------------------------

DEEP: Final = "[" * 5_000 + "]" * 5_000
POISON: Final[dict[str, dict[str, Any]]] = {
    "attempt at its end": {"attempt": 32_767},
    "attempt below zero": {"attempt": -32_768},
    "max_attempts at its end": {"max_attempts": 32_767, "attempt": 32_766},
    "due for ever": {"scheduled_at": "-infinity"},
    "due before Python's time": {"scheduled_at": "4714-11-24 00:00 BC"},
    "made at infinity": {"created_at": "infinity"},
    "attempted at infinity": {"attempted_at": "infinity"},
    "nested attempted_by": {"attempted_by": [["a", "b"], ["c", "d"]]},
    "attempted_by from 5": {"attempted_by": "[5:6]={a,b}"},
    "empty attempted_by": {"attempted_by": "{}"},
    "attempted_by of NULLs": {"attempted_by": "{NULL,NULL}"},
    "nested errors": {"errors": '{{"{}","{}"},{"{}","{}"}}'},
    "errors of anything": {"errors": ["1", "null", '"text"']},
    "a number of 5,000 digits": {"args": '{"number": ' + "9" * 5_000 + "}", "metadata": '{"n": ' + "9" * 5_000 + "}"},
    "a number beyond floats": {"args": '{"number": 1e9999}'},
    "deep args": {"args": '{"number": ' + DEEP + "}"},
    "deep metadata": {"metadata": '{"m": ' + DEEP + "}"},
    "args that are a list": {"args": "[1, 2]"},
    "args that are null": {"args": "null"},
    "args of another type": {"args": '{"number": "seven"}'},
    "metadata that is a list": {"metadata": "[1]"},
    "metadata that is null": {"metadata": "null"},
    "metadata that is a word": {"metadata": '"cancel_attempted_at"'},
    "snoozes that are no number": {"metadata": '{"snoozes": {"a": 1}}'},
    "snoozes beyond integers": {"metadata": '{"snoozes": 1e300}'},
    "a megabyte": {"args": '{"number": 1, "more": "' + "x" * 1_000_000 + '"}'},
    "odd tags": {"tags": "{{a,b},{c,d}}"},
}
OUTCOME: Final[dict[str, Callable[[JobContext[Count]], object]]] = {
    "completes": lambda job: None,
    "reads its metadata": lambda job: print(dict(job.metadata)),
    "writes metadata": lambda job: job.metadata.update(mine=1),
    "fails": lambda job: 1 / 0,
}


@pytest.mark.parametrize("outcome", OUTCOME)
def test_no_row_breaks_the_fetch_or_the_completion_of_others(engine: Engine, outcome: str) -> None:
    poison = {make_job(engine, **columns): name for name, columns in POISON.items()}
    healthy = make_jobs(engine, 10)
    handler: Any = OUTCOME[outcome]
    workers = Workers()
    workers.register(Count)(handler)
    executor = make_executor(workers)

    with opened(engine) as own:
        fetched = fetch(own)
        completer = make_completer(own)
        for row in fetched:
            completer.put(executor.execute(row) or row)
        completer.step()

    assert _ids(fetched) == sorted([*poison, *healthy])
    assert completer.backlog == 0
    assert completer.stale == 0
    left = {poison.get(row["id"], "healthy"): row["state"] for row in _shown(engine) if row["state"] == "running"}
    assert left == {}
    wanted = "retryable" if outcome == "fails" else "completed"
    assert [row["state"] for row in _shown(engine) if row["id"] in healthy] == [wanted] * 10


def _shown(engine: Engine) -> list[dict[str, Any]]:
    """Ids and states; the other columns hold what Python has no type for."""
    with engine.connect() as connection:
        return [
            row._asdict() for row in connection.exec_driver_sql("SELECT id, state::text FROM river_job ORDER BY id")
        ]


def test_an_attempt_at_its_end_does_not_overflow(engine: Engine) -> None:
    job_id = make_job(engine, attempt=32_767)

    with opened(engine) as own:
        (row,) = fetch(own)

    assert row.attempt == 32_767
    assert read_job(engine, job_id)["attempt"] == 32_767


@pytest.mark.parametrize("when", ["-infinity", "4714-11-24 00:00 BC", "0001-01-01 BC", "2020-01-01"])
def test_times_at_the_edge_do_not_break_the_timer(engine: Engine, when: str) -> None:
    make_job(engine, state=JobState.SCHEDULED, scheduled_at=when)

    with opened(engine) as own:
        seconds, since = own.execute(SELECT_NEXT_DUE, {"p_since": None}).one()
        again = own.execute(SELECT_NEXT_DUE, {"p_since": since}).one_or_none()
        own.execute(SCHEDULE_DUE, {"p_schema": None})
        fetched = fetch(own)

    assert seconds <= 0
    assert again is None or again[0] <= 0
    assert len(fetched) == 1


@pytest.mark.parametrize("when", ["infinity", "294276-12-31 23:59:59"])
def test_a_job_due_beyond_time_is_waited_for_without_an_error(engine: Engine, when: str) -> None:
    make_job(engine, state=JobState.SCHEDULED, scheduled_at=when)
    soon = make_job(engine, state=JobState.RETRYABLE, due_in=timedelta(minutes=1))

    with opened(engine) as own:
        seconds, _ = own.execute(SELECT_NEXT_DUE, {"p_since": None}).one()
        own.execute(SCHEDULE_DUE, {"p_schema": None})

    assert 50 < seconds <= 60
    assert read_job(engine, soon)["state"] == "retryable"


def test_a_unique_row_that_cannot_run_now_does_not_break_the_fetch_of_others(engine: Engine) -> None:
    """Two available jobs under one key, of which one may run at a time: no client writes such a mask, but SQL may."""
    make_jobs(engine, 2, unique_key="key", unique_states="01000000")
    healthy = make_jobs(engine, 3)
    delivered: list[JobRow] = []

    with opened(engine) as own:
        fetcher = make_fetcher(own, delivered)
        for _ in range(20):
            try:
                fetcher.step()
            except Exception:  # noqa: BLE001 - the loop of a runner goes on, too
                continue

    assert set(healthy) <= set(_ids(delivered))


def test_a_job_whose_unique_key_is_taken_does_not_stop_the_schedule(engine: Engine) -> None:
    make_job(engine, unique_key="key", unique_states="00000001")
    late = make_job(
        engine, state=JobState.SCHEDULED, due_in=timedelta(minutes=-1), unique_key="key", unique_states="00000001"
    )
    other = make_job(engine, state=JobState.SCHEDULED, due_in=timedelta(minutes=-1))

    with opened(engine) as own:
        own.execute(SCHEDULE_DUE, {"p_schema": None})

    assert read_job(engine, other)["state"] == "available"
    assert read_job(engine, late)["state"] == "discarded"


# ---- the loop -----------------------------------------------------------------------


def test_a_step_fetches_as_many_as_there_are_free_slots(engine: Engine) -> None:
    make_jobs(engine, 10)
    delivered: list[JobRow] = []

    with opened(engine) as own:
        fetcher = make_fetcher(own, delivered, slots={"default": 4})
        fetcher.step()
        fetcher.step()
        first = len(delivered)
        fetcher.freed("default")
        fetcher.freed("default")
        fetcher.step()

    assert first == 4
    assert len(delivered) == 6


def test_nothing_is_fetched_while_results_pile_up(engine: Engine) -> None:
    make_jobs(engine, 3)
    delivered: list[JobRow] = []
    room = [False]

    with opened(engine) as own:
        fetcher = make_fetcher(own, delivered, ready=lambda: room[0])
        fetcher.step()
        before = len(delivered)
        room[0] = True
        fetcher.step()

    assert (before, len(delivered)) == (0, 3)


def test_one_fetch_is_never_larger_than_its_bound(engine: Engine) -> None:
    make_jobs(engine, LARGEST_FETCH + 200)
    sizes: list[int] = []

    def deliver(rows: list[Fetched]) -> None:
        sizes.append(len(rows))

    with opened(engine) as own:
        fetcher = make_fetcher(own, [], slots={"default": 10_000}, deliver=deliver)
        fetcher.step()
        fetcher.step()

    assert sizes == [LARGEST_FETCH, 200]


def test_no_token_is_used_twice(engine: Engine) -> None:
    make_jobs(engine, 20)
    fetches: list[list[Fetched]] = []

    with opened(engine) as own:
        fetcher = make_fetcher(own, [], slots={"default": 1}, deliver=fetches.append)
        while sum(map(len, fetches)) < 20:
            fetcher.step()
            for row in fetches[-1]:
                fetcher.freed(row[QUEUE])

    tokens = [{row[TOKEN] for row in rows} for rows in fetches if rows]
    assert {len(each) for each in tokens} == {1}
    assert len(set[str]().union(*tokens)) == len(tokens) > 1


def test_what_one_fetch_brings_is_delivered_by_priority_then_time_then_id(engine: Engine) -> None:
    """Whatever order the rows have in the table, and for times that are no number too."""
    times = ["-infinity", "2020-01-02", "2020-01-01", "2020-01-02", "2020-01-01 00:00:00.000001"]
    jobs = [make_job(engine, priority=priority, scheduled_at=time) for priority in (2, 1) for time in times]
    delivered: list[JobRow] = []

    with opened(engine) as own:
        make_fetcher(own, delivered).step()

    order = [0, 2, 4, 1, 3]
    assert [row.id for row in delivered] == [*(jobs[5 + place] for place in order), *(jobs[place] for place in order)]


def test_a_queue_that_is_full_is_looked_at_as_soon_as_a_slot_is_free(engine: Engine) -> None:
    """Even if the other queues of the runner were found empty meanwhile."""
    make_jobs(engine, 2, queue="busy")
    delivered: list[JobRow] = []
    woken: list[bool] = []

    with opened(engine) as own:
        fetcher = make_fetcher(own, delivered, slots={"busy": 1, "idle": 1}, wake=lambda: woken.append(True))
        for _ in range(5):
            fetcher.step()
        woken.clear()
        fetcher.freed("busy")
        told = bool(woken)
        fetcher.step()

    assert told
    assert len(delivered) == 2


def test_a_pause_is_heeded_by_the_next_step(engine: Engine) -> None:
    make_job(engine)
    delivered: list[JobRow] = []
    _pause(engine, "default")

    with opened(engine) as own:
        fetcher = make_fetcher(own, delivered)
        fetcher.step()
        before = len(delivered)
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE river_queue SET paused_at = NULL")
        fetcher.heard("default")
        fetcher.step()

    assert (before, len(delivered)) == (0, 1)


class _LossyConnection(OwnConnection):
    """Loses the reply to the next fetch: the server has committed, the client hears of an error."""

    lose = 1

    def execute(self, statement: Executable, parameters: Any = None) -> Any:
        answer = super().execute(statement, parameters)
        if statement in (FETCH_AVAILABLE, FETCH_SUSPECT) and self.lose:
            self.lose -= 1
            answer.all()
            self.close()
            raise OperationalError(
                "lost", {}, Exception("server closed the connection unexpectedly"), connection_invalidated=True
            )
        return answer


def test_a_fetch_whose_reply_is_lost_is_recovered(engine: Engine) -> None:
    jobs = make_jobs(engine, 5)
    delivered: list[JobRow] = []
    own = _LossyConnection(engine, None, "test", {"enable_seqscan": "off"})

    fetcher = make_fetcher(own, delivered, slots={"default": 10})
    with pytest.raises(OperationalError):
        fetcher.step()
    fetcher.step()
    fetcher.step()
    own.close()

    assert sorted(_ids(delivered)) == jobs
    assert {row["token"] for row in read_jobs(engine)} == {row.token for row in delivered}
    assert {row.attempt for row in delivered} == {1}


def test_what_is_recovered_still_passes_the_fence(engine: Engine) -> None:
    make_jobs(engine, 3)
    delivered: list[JobRow] = []
    own = _LossyConnection(engine, None, "test", {"enable_seqscan": "off"})
    fetcher = make_fetcher(own, delivered)
    with pytest.raises(OperationalError):
        fetcher.step()
    fetcher.step()

    completer = make_completer(own)
    for row in delivered:
        completer.put(Result(row, states.completed()))
    completer.step()
    own.close()

    assert count_states(engine) == {"completed": 3}


def test_a_suspect_is_alone_also_when_the_reply_to_its_fetch_is_lost(engine: Engine) -> None:
    suspect = make_job(engine, attempt=2)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"INSERT INTO river_suspect (job_id, deaths, alone) VALUES ({suspect}, 2, 0)")
    delivered: list[JobRow] = []
    own = _LossyConnection(engine, None, "test", {"enable_seqscan": "off"})
    fetcher = make_fetcher(own, delivered, slots={"default": 10})
    assert fetcher.turn.begin(own)
    with pytest.raises(OperationalError):
        fetcher.step()
    others = make_jobs(engine, 5)

    for _ in range(3):
        fetcher.step()
    alone = _ids(delivered)
    fetcher.freed("default")
    for _ in range(3):
        fetcher.step()
    own.close()

    assert alone == [suspect]
    assert sorted(_ids(delivered)) == [suspect, *others]


# ---- plans --------------------------------------------------------------------------

PlanMode = Literal["generic", "custom"]
SETTINGS: Final = own_settings("fetch")


def _fill(connection: Connection, *, analyze: bool) -> None:
    """A queue in the midst of its work: many finished, some waiting, some of other queues."""
    connection.exec_driver_sql(
        """INSERT INTO river_job (kind, args, queue, state, priority, finalized_at, scheduled_at)
        SELECT 'count', '{}', CASE WHEN mod(n, 10) = 0 THEN 'other' ELSE 'default' END,
               CASE WHEN mod(n, 4) = 0 THEN 'available' ELSE 'completed' END::river_job_state, mod(n, 4) + 1,
               CASE WHEN mod(n, 4) = 0 THEN NULL ELSE now() END, now() - n * interval '1 second'
        FROM generate_series(1, 20000) n"""
    )
    if analyze:
        connection.exec_driver_sql("ANALYZE river_job")


def _check_fetch_plan(plan: Plan, fetched: int) -> None:
    scans = {(scan["Node Type"], scan.get("Index Name")) for scan in plan.scans("river_job")}
    assert scans == {("Index Scan", "river_job_fetch_idx"), ("Tid Scan", None)}, plan
    assert not plan.types & {"Seq Scan", "Sort", "Bitmap Heap Scan", "Hash Join"} or _only_small(plan), plan
    assert plan.removed("Filter") == 0
    assert plan.buffers < 30 * fetched + 200


def _only_small(plan: Plan) -> bool:
    """Whether sorts and sequential scans touch nothing but the list of queues."""
    return all(
        node.get("Relation Name") in (None, "river_queue") and node["Actual Rows"] <= 5
        for node in plan.nodes
        if node["Node Type"] in {"Seq Scan", "Sort", "Hash Join"}
    )


@pytest.mark.parametrize("mode", ["generic", "custom"])
@pytest.mark.parametrize("queues", [1, 3])
def test_a_fetch_walks_the_fetch_index_and_nothing_else(engine: Engine, mode: PlanMode, queues: int) -> None:
    names: list[str] = ["default", "other", "empty"]
    slots = dict.fromkeys(names[:queues], 50)
    with engine.connect() as connection:
        _fill(connection, analyze=True)

        plan = explain(connection, None, FETCH_AVAILABLE, _asked(slots), plan=mode, settings=SETTINGS)

    _check_fetch_plan(plan, sum(slots.values()))


def test_a_fetch_planned_on_an_empty_table_is_still_good_when_it_has_filled(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("ANALYZE river_job")

        def fill() -> None:
            _fill(connection, analyze=False)

        plan = explain(
            connection, None, FETCH_AVAILABLE, _asked({"default": 50}), plan="generic", settings=SETTINGS, before=fill
        )

    _check_fetch_plan(plan, 50)


@pytest.mark.parametrize("mode", ["generic", "custom"])
def test_the_timer_reads_the_first_entry_of_the_due_index(engine: Engine, mode: PlanMode) -> None:
    with engine.connect() as connection:
        _fill(connection, analyze=False)
        connection.exec_driver_sql(
            "INSERT INTO river_job (kind, args, state, scheduled_at) "
            "SELECT 'count', '{}', 'scheduled', now() + n * interval '1 second' FROM generate_series(1, 5000) n"
        )
        connection.exec_driver_sql("ANALYZE river_job")

        plan = explain(connection, None, SELECT_NEXT_DUE, {"p_since": None}, plan=mode, settings=SETTINGS)

    assert plan.indexes == {"river_job_due_idx"}
    assert plan.buffers <= 20


@pytest.mark.parametrize("mode", ["generic", "custom"])
def test_a_schedule_walks_the_due_index(engine: Engine, mode: PlanMode) -> None:
    with engine.connect() as connection:
        _fill(connection, analyze=False)
        connection.exec_driver_sql(
            "INSERT INTO river_job (kind, args, state, scheduled_at) "
            "SELECT 'count', '{}', 'scheduled', now() + (n - 100) * interval '1 second' FROM generate_series(1, 5000) n"
        )
        connection.exec_driver_sql("ANALYZE river_job")

        plan = explain(connection, None, SCHEDULE_DUE, {"p_schema": None}, plan=mode, settings=SETTINGS)

    assert "river_job_due_idx" in plan.indexes
    assert not [scan for scan in plan.scans("river_job") if scan["Node Type"] == "Seq Scan"]
    assert plan.removed("Filter") + plan.removed("Join Filter") == 0
