from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqla_river import states
from sqla_river.states import FINALIZED, UNFINISHED, AttemptError, JobState, Transition, mask_of, states_of

ERROR = AttemptError(1, "ValueError: no", "trace")
HOUR = timedelta(hours=1)
# River's uniquestates, as integers of the bit(8).
RIVER_BITS = {
    JobState.AVAILABLE: 0x01,
    JobState.CANCELLED: 0x02,
    JobState.COMPLETED: 0x04,
    JobState.DISCARDED: 0x08,
    JobState.PENDING: 0x10,
    JobState.RETRYABLE: 0x20,
    JobState.RUNNING: 0x40,
    JobState.SCHEDULED: 0x80,
}


def test_states_are_named_and_ordered_as_in_rivers_enum() -> None:
    assert [str(state) for state in JobState] == [
        "available",
        "cancelled",
        "completed",
        "discarded",
        "pending",
        "retryable",
        "running",
        "scheduled",
    ]


def test_every_state_is_finalized_or_unfinished() -> None:
    assert frozenset({"cancelled", "completed", "discarded"}) == FINALIZED
    assert frozenset(JobState) == FINALIZED | UNFINISHED
    assert not FINALIZED & UNFINISHED


@given(st.frozensets(st.sampled_from(JobState)))
def test_masks_are_rivers_and_come_back(some: frozenset[JobState]) -> None:
    mask = mask_of(some)

    assert int(mask, 2) == sum(RIVER_BITS[state] for state in some)
    assert states_of(mask) == some


@pytest.mark.parametrize(
    ("made", "state", "back", "delay", "error"),
    [
        (states.completed(), JobState.COMPLETED, 0, None, None),
        (states.errored(ERROR, HOUR), JobState.RETRYABLE, 0, HOUR, ERROR),
        (states.discarded(ERROR), JobState.DISCARDED, 0, None, ERROR),
        (states.snoozed(HOUR), JobState.SCHEDULED, 1, HOUR, None),
        (states.cancelled(ERROR), JobState.CANCELLED, 0, None, ERROR),
        (states.interrupted(), JobState.AVAILABLE, 1, None, None),
    ],
    ids=["completed", "errored", "discarded", "snoozed", "cancelled", "interrupted"],
)
def test_each_result_asks_for_its_row_of_the_table(
    made: Transition, state: JobState, back: int, delay: timedelta | None, error: AttemptError | None
) -> None:
    assert (made.state, made.attempt_back, made.delay, made.error) == (state, back, delay, error)
    assert made.snoozed is (state is JobState.SCHEDULED)
    assert made.metadata is None


def test_only_waiting_states_have_a_delay_however_short() -> None:
    assert states.errored(ERROR, timedelta(0)).state is JobState.RETRYABLE
    assert states.snoozed(timedelta(0)).state is JobState.SCHEDULED


def test_each_result_carries_metadata() -> None:
    said = '{"output": 1}'
    made = [
        states.completed(said),
        states.errored(ERROR, HOUR, said),
        states.discarded(ERROR, said),
        states.snoozed(HOUR, said),
        states.cancelled(ERROR, said),
        states.interrupted(said),
    ]

    assert all(each.metadata == said for each in made)


def test_a_completion_without_metadata_is_always_the_same_object() -> None:
    assert states.completed() is states.completed(None)
