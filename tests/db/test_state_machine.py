"""Every event from every state, through the real statements, against one table."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import pytest
from sqlalchemy import Engine, RowMapping

from sqla_river import states
from sqla_river.complete import complete_parameters, settle_parameters
from sqla_river.statements import COMPLETE_JOBS, SCHEDULE_DUE, SETTLE_JOBS
from sqla_river.states import AttemptError, JobState, Transition
from sqla_river.store import OwnConnection
from tests.making import fetch, make_job, make_jobs, opened, read_job, text_of

TOKEN: Final = "test/1"
DELAY: Final = timedelta(minutes=7)
ERROR: Final = AttemptError(3, "ValueError: no", "a trace")
ASKED: Final = {"cancel_attempted_at": "2026-01-01T00:00:00Z"}


def _settle(own: OwnConnection, job_id: int, transition: Transition) -> None:
    own.execute(SETTLE_JOBS, settle_parameters([(job_id, TOKEN, transition)]))


Event = Callable[[OwnConnection, int], object]

EVENTS: Final[dict[str, Event]] = {
    "fetch": lambda own, _: fetch(own, TOKEN),
    "complete": lambda own, job_id: own.execute(COMPLETE_JOBS, complete_parameters([(job_id, TOKEN)])),
    "complete with metadata": lambda own, job_id: _settle(own, job_id, states.completed('{"seen": 1}')),
    "error": lambda own, job_id: _settle(own, job_id, states.errored(ERROR, DELAY)),
    "error, again at once": lambda own, job_id: _settle(own, job_id, states.errored(ERROR, timedelta(0))),
    "discard": lambda own, job_id: _settle(own, job_id, states.discarded(ERROR)),
    "snooze": lambda own, job_id: _settle(own, job_id, states.snoozed(DELAY)),
    "snooze for no time": lambda own, job_id: _settle(own, job_id, states.snoozed(timedelta(0))),
    "interrupt": lambda own, job_id: _settle(own, job_id, states.interrupted()),
    "cancelled": lambda own, job_id: _settle(own, job_id, states.cancelled(ERROR)),
    "schedule": lambda own, _: own.execute(SCHEDULE_DUE, {"p_schema": None}),
}


@dataclass(frozen=True)
class After:
    """What a job is after an event that applies to it; before, it was in attempt 3 and due an hour ago."""

    state: JobState
    attempt: int = 3
    delay: timedelta | None = None  # from now; None where scheduled_at stays as it was
    finalized: bool = False
    errors: int = 0
    snoozes: int | None = None


J: Final = JobState

EXPECTED: Final[dict[tuple[str, str], After]] = {
    ("available", "fetch"): After(J.RUNNING, attempt=4),
    ("running", "complete"): After(J.COMPLETED, finalized=True),
    ("running", "complete with metadata"): After(J.COMPLETED, finalized=True),
    ("running", "error"): After(J.RETRYABLE, delay=DELAY, errors=1),
    ("running", "error, again at once"): After(J.RETRYABLE, delay=timedelta(0), errors=1),
    ("running", "discard"): After(J.DISCARDED, finalized=True, errors=1),
    ("running", "snooze"): After(J.SCHEDULED, attempt=2, delay=DELAY, snoozes=1),
    ("running", "snooze for no time"): After(J.SCHEDULED, attempt=2, delay=timedelta(0), snoozes=1),
    ("running", "interrupt"): After(J.AVAILABLE, attempt=2),
    ("running", "cancelled"): After(J.CANCELLED, finalized=True, errors=1),
    # Asked to cancel while it ran: that beats every way back, but not an end; River keeps the attempt then.
    ("running, cancel asked", "complete"): After(J.COMPLETED, finalized=True),
    ("running, cancel asked", "complete with metadata"): After(J.COMPLETED, finalized=True),
    ("running, cancel asked", "error"): After(J.CANCELLED, finalized=True, errors=1),
    ("running, cancel asked", "error, again at once"): After(J.CANCELLED, finalized=True, errors=1),
    ("running, cancel asked", "discard"): After(J.DISCARDED, finalized=True, errors=1),
    ("running, cancel asked", "snooze"): After(J.CANCELLED, finalized=True),
    ("running, cancel asked", "snooze for no time"): After(J.CANCELLED, finalized=True),
    ("running, cancel asked", "interrupt"): After(J.CANCELLED, finalized=True),
    ("running, cancel asked", "cancelled"): After(J.CANCELLED, finalized=True, errors=1),
    ("scheduled", "schedule"): After(J.AVAILABLE),
    ("retryable", "schedule"): After(J.AVAILABLE),
}
BEFORE: Final = (*(state.value for state in J), "running, cancel asked", "scheduled, not due", "retryable, not due")


def _make(engine: Engine, before: str) -> int:
    state, _, more = before.partition(", ")
    return make_job(
        engine,
        state=state,
        attempt=3,
        token=TOKEN,
        attempted_at="now",
        due_in=timedelta(hours=1 if more == "not due" else -1),
        metadata=ASKED if more == "cancel asked" else {},
    )


def _agrees(row: RowMapping, was: RowMapping, after: After) -> None:
    assert row["state"] == after.state
    assert row["attempt"] == after.attempt
    assert row["finalized"] is after.finalized
    if after.delay is None:
        assert row["scheduled_at"] == was["scheduled_at"]
    else:
        assert after.delay - timedelta(seconds=10) < row["delay"] <= after.delay
    assert len(row["all_errors"] or []) == after.errors
    if after.snoozes is not None:
        assert row["metadata"]["snoozes"] == after.snoozes
    for name in ("id", "kind", "args", "queue", "priority", "max_attempts", "created_at", "tags"):
        assert row[name] == was[name], name


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_changes_what_the_table_says_and_nothing_else(engine: Engine, event: str) -> None:
    jobs = {before: _make(engine, before) for before in BEFORE}
    was = {before: (read_job(engine, job_id), text_of(engine, job_id)) for before, job_id in jobs.items()}

    with opened(engine) as own:
        for job_id in jobs.values():
            EVENTS[event](own, job_id)

    for before, job_id in jobs.items():
        after = EXPECTED.get((before, event))
        if after is None:
            assert text_of(engine, job_id) == was[before][1], f"{event} changed a job that is {before}"
        else:
            _agrees(read_job(engine, job_id), was[before][0], after)


def test_the_table_names_known_events_and_states_only() -> None:
    assert {before for before, _ in EXPECTED} <= set(BEFORE)
    assert {event for _, event in EXPECTED} == set(EVENTS)


def test_snoozes_are_counted(engine: Engine) -> None:
    job_id = make_job(engine, state=J.RUNNING, token=TOKEN, metadata={"snoozes": 4, "mine": True})

    with opened(engine) as own:
        _settle(own, job_id, states.snoozed(DELAY, '{"more": 1}'))

    assert read_job(engine, job_id)["metadata"] == {"snoozes": 5, "mine": True, "more": 1}


def test_an_attempt_that_was_never_counted_is_not_given_back_below_zero(engine: Engine) -> None:
    job_id = make_job(engine, state=J.RUNNING, token=TOKEN, attempt=0)

    with opened(engine) as own:
        _settle(own, job_id, states.interrupted())

    assert read_job(engine, job_id)["attempt"] == 0


def test_metadata_is_stored_with_whatever_came_of_the_job(engine: Engine) -> None:
    seen = '{"seen": [1, {"deep": null}]}'
    transitions = [
        states.completed(seen),
        states.errored(ERROR, DELAY, seen),
        states.discarded(ERROR, seen),
        states.snoozed(DELAY, seen),
        states.cancelled(ERROR, seen),
        states.interrupted(seen),
    ]
    jobs = make_jobs(engine, len(transitions), state=J.RUNNING, token=TOKEN, metadata={"seen": 0, "mine": 1})

    with opened(engine) as own:
        given = [(job_id, TOKEN, transition) for job_id, transition in zip(jobs, transitions, strict=True)]
        own.execute(SETTLE_JOBS, settle_parameters(given))

    for job_id in jobs:
        metadata = read_job(engine, job_id)["metadata"]
        assert (metadata["seen"], metadata["mine"]) == ([1, {"deep": None}], 1)


def test_a_job_fetched_by_one_is_no_longer_there_for_another(engine: Engine) -> None:
    job_id = make_job(engine)

    with opened(engine) as one, opened(engine) as other:
        first = fetch(one, "one/1")
        second = fetch(other, "other/1")

    assert [row.id for row in first] == [job_id]
    assert second == []


def test_what_is_available_but_not_due_is_not_fetched(engine: Engine) -> None:
    """A Go client writes such rows: a retry within five seconds."""
    make_job(engine, due_in=timedelta(minutes=1))
    due = make_job(engine, due_in=timedelta(minutes=-1))

    with opened(engine) as own:
        fetched = fetch(own)

    assert [row.id for row in fetched] == [due]


def test_a_schedule_moves_a_thousand_at_most_and_the_longest_due_first(engine: Engine) -> None:
    make_jobs(engine, 5, state=J.SCHEDULED, due_in=timedelta(minutes=-1))
    oldest = make_jobs(engine, 1_000, state=J.RETRYABLE, due_in=timedelta(minutes=-2))

    with opened(engine) as own:
        moved = own.execute(SCHEDULE_DUE, {"p_schema": None}).all()
        fetched = fetch(own, slots={"default": 2_000})

    assert [(row.queue, row.jobs) for row in moved] == [("default", 1_000)]
    assert [row.id for row in fetched] == oldest


def test_a_schedule_passes_by_what_somebody_has_locked(engine: Engine) -> None:
    locked = make_job(engine, state=J.SCHEDULED, due_in=timedelta(minutes=-2))
    free = make_job(engine, state=J.SCHEDULED, due_in=timedelta(minutes=-1))

    with engine.begin() as theirs, opened(engine) as own:
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
        own.execute(SCHEDULE_DUE, {"p_schema": None})

        assert read_job(engine, free)["state"] == "available"
        assert read_job(engine, locked)["state"] == "scheduled"
