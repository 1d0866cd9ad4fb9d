"""Counters: what runners have finished arrives once, is folded without loss, and no two runners meet at a row."""

import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, Executable, text
from sqlalchemy.orm import Session

from sqla_river import ddl, queue_stats
from sqla_river.counters import Counters
from sqla_river.duties.count import Count
from sqla_river.statements import COUNT_OTHERS
from sqla_river.states import FINALIZED, JobState
from sqla_river.store import OwnConnection, Rows
from tests.crashing import new_id
from tests.making import explain, make_jobs, opened

DONE = ("default", JobState.COMPLETED)
JOB_INDEXES = {*ddl.INDEXES, ddl.ARBITER, "river_job_pkey"}
NOW = datetime.now(UTC)


def total(engine: Engine) -> int:
    with Session(engine) as session:
        return queue_stats(session, "default").completed


def rows(engine: Engine, table: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT minute::text, queue, state, jobs FROM {table} ORDER BY 1, 2, 3"))
        return [tuple(row) for row in found]


class Unsure(OwnConnection):
    """A connection that loses the reply to a statement that has been done."""

    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Rows:
        super().execute(statement, parameters)
        raise ConnectionError("the reply is lost")


def test_a_batch_whose_reply_was_lost_counts_once(engine: Engine) -> None:
    counters = Counters("r")
    counters.add([DONE] * 7)
    lost = Unsure(engine, None, "lost")
    with pytest.raises(ConnectionError):
        counters.write(lost, NOW, 0)
    lost.close()
    counters.add([DONE] * 3)
    with opened(engine) as own:
        counters.write(own, NOW + timedelta(minutes=1), 0)  # its minute is not that of the first try

    assert total(engine) == 10
    assert [row[3] for row in rows(engine, "river_counter")] == [7, 3]


def test_a_batch_whose_reply_was_lost_counts_once_however_often_it_was_folded_meanwhile(engine: Engine) -> None:
    """A runner that is cut off for minutes: what it may not have told is in the sums of all time already."""
    counters = Counters("r")
    counters.add([DONE] * 7)
    lost = Unsure(engine, None, "lost")
    with opened(engine) as own:
        with pytest.raises(ConnectionError):
            counters.write(lost, NOW - timedelta(minutes=5), 0)
        Count().do(own)
        Count().do(own)
        counters.add([DONE] * 3)
        counters.write(own, NOW - timedelta(minutes=4), 0)
        Count().do(own)
    lost.close()

    assert total(engine) == 10


def test_of_what_was_folded_only_the_last_batch_of_each_runner_leaves_a_trace_for_a_day(engine: Engine) -> None:
    over, failed = NOW - timedelta(minutes=10), ("default", JobState.DISCARDED)
    counters = [Counters("a"), Counters("b"), Counters("long ago")]
    with opened(engine) as own:
        for mine in counters:
            for batch in ([DONE, failed], [DONE]):
                mine.add(batch)
                mine.write(own, over if mine is not counters[2] else NOW - timedelta(days=2), 0)
                Count().do(own)
    with engine.connect() as connection:
        left = connection.execute(text("SELECT runner, state, jobs, batch FROM river_counter ORDER BY 1, 2")).all()

    assert [tuple(row) for row in left] == [("a", "completed", 0, 2), ("b", "completed", 0, 2)]
    assert total(engine) == 6


def test_what_cannot_be_written_is_kept(engine: Engine, empty_url: str) -> None:
    counters = Counters("r")
    counters.add([DONE] * 7)
    closed = OwnConnection(engine.execution_options(), "no_such_schema", "test")
    with pytest.raises(Exception, match="no_such_schema"):
        counters.write(closed, NOW, 0)
    closed.close()
    with opened(engine) as own:
        counters.write(own, NOW, 0)

    assert total(engine) == 7


def test_only_ends_and_failed_attempts_are_counted_and_nothing_is_written_for_nothing(engine: Engine) -> None:
    counters = Counters("r")
    with opened(engine) as own:
        counters.write(own, NOW, 0)
        counters.add(("default", state) for state in JobState)
        counters.write(own, NOW, 0)

    assert [row[2] for row in rows(engine, "river_counter")] == ["cancelled", "completed", "discarded", "retryable"]


def test_folding_neither_loses_nor_doubles_while_runners_write_and_others_fold(engine: Engine) -> None:
    """The minutes are over, so that each row may be folded as soon as it is written."""
    over = datetime.now(UTC) - timedelta(minutes=10)
    writing = threading.Event()
    writing.set()
    failed: list[BaseException] = []
    seen: list[int] = []

    def write(number: int) -> None:
        counters = Counters(f"runner-{number}")
        with opened(engine) as own:
            for _ in range(40):
                counters.add([DONE, DONE, ("default", JobState.DISCARDED)])
                counters.write(own, over, 0)

    def fold() -> None:
        with opened(engine) as own:
            while writing.is_set():
                Count().do(own)

    def watch() -> None:
        while writing.is_set():
            seen.append(total(engine))

    def guarded(act: Any, *given: Any) -> threading.Thread:
        def run() -> None:
            try:
                act(*given)
            except BaseException as error:  # noqa: BLE001
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    others = [guarded(fold), guarded(fold), guarded(watch)]
    for thread in [guarded(write, number) for number in range(4)]:
        thread.join()
    writing.clear()
    for thread in others:
        thread.join()
    with opened(engine) as own:
        assert Count().do(own) is False

    assert not failed
    assert seen == sorted(seen)  # whoever looks while rows are folded sees each job, and once
    assert {row[3] for row in rows(engine, "river_counter")} == {0}
    assert [row[1:] for row in rows(engine, "river_history")] == [
        ("default", "completed", 320),
        ("default", "discarded", 160),
    ] * 2
    assert total(engine) == 320


def by_state(engine: Engine) -> dict[str, int]:
    with Session(engine) as session:
        found = queue_stats(session, "default").by_state
    return {state.value: found[state] for state in FINALIZED if found[state]}


def test_what_others_end_is_counted_once_and_of_go_while_it_leads(engine: Engine) -> None:
    ours = f"{new_id()}/7"
    for state in FINALIZED:
        make_jobs(engine, 5, state=state, token=ours)  # a runner has counted them
    make_jobs(engine, 3, state="completed", token="go-client", finished_ago=timedelta(seconds=70))
    make_jobs(engine, 2, state="discarded", token="go-client")
    make_jobs(engine, 1, state="cancelled")  # before its first attempt
    make_jobs(engine, 8, state="discarded", token="go-client", finished_ago=timedelta(hours=1))
    with opened(engine) as own:
        Count().do(own)
        without = by_state(engine)
        with engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO river_leader (elected_at, expires_at, leader_id) "
                    "VALUES (now(), now() + interval '1 minute', 'go-client')"
                )
            )
        Count().do(own)
        make_jobs(
            engine, 1, state="completed", token="go-client", finished_ago=timedelta(seconds=70)
        )  # it commits late
        for _ in range(3):
            Count().do(own)

    assert without == {"discarded": 2, "cancelled": 1}
    assert by_state(engine) == {"completed": 4, "discarded": 2, "cancelled": 1}


@pytest.mark.parametrize("mode", ["generic", "custom"])
def test_of_finished_rows_only_those_of_the_last_minutes_are_read(
    engine: Engine, mode: Literal["generic", "custom"]
) -> None:
    for state in FINALIZED:
        make_jobs(engine, 10_000, state=state, finished_ago=timedelta(hours=1))
        make_jobs(engine, 20, state=state)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE river_job"))
    with engine.begin() as connection:
        plan = explain(connection, None, COUNT_OTHERS, {}, plan=mode, settings={"enable_seqscan": "off"})

    assert plan.indexes & JOB_INDEXES == {"river_job_finalized_idx"}
    assert sum(node["Actual Rows"] * node["Actual Loops"] for node in plan.scans("river_job")) <= 3 * 20
    assert plan.buffers < 400


def test_minutes_that_go_on_are_not_folded_and_those_of_a_week_ago_go(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_counter (runner, minute, queue, state, jobs) "
                "VALUES ('r', date_trunc('minute', now()), 'default', 'completed', 1)"
            )
        )
        connection.execute(
            text(
                "INSERT INTO river_history VALUES ('-infinity', 'default', 'completed', 50), "
                "(now() - interval '8 days', 'default', 'completed', 30), "
                "(now() - interval '6 days', 'default', 'completed', 20)"
            )
        )
    with opened(engine) as own:
        Count().do(own)

    assert [row[3] for row in rows(engine, "river_counter")] == [1]
    assert sorted(row[3] for row in rows(engine, "river_history")) == [20, 50]
    assert total(engine) == 51
