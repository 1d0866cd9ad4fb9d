"""The states of a job, and the only row changes that a result may ask for.

The table of events stands in one place, here; SQL adds only the fence (``statements.py``). Source of the rules:
River's state machine, with the differences that the README lists under "Different from River".
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job stands. The order is that of River's enum in the database."""

    AVAILABLE = "available"
    CANCELLED = "cancelled"
    COMPLETED = "completed"
    DISCARDED = "discarded"
    PENDING = "pending"
    RETRYABLE = "retryable"
    RUNNING = "running"
    SCHEDULED = "scheduled"


FINALIZED: Final = frozenset({JobState.CANCELLED, JobState.COMPLETED, JobState.DISCARDED})
UNFINISHED: Final = frozenset(JobState) - FINALIZED

# River's mask: bit 0 is the leftmost character of bit(8), and get_bit(mask, 7) is `available`.
MASK_ORDER: Final = (
    JobState.SCHEDULED,
    JobState.RUNNING,
    JobState.RETRYABLE,
    JobState.PENDING,
    JobState.DISCARDED,
    JobState.COMPLETED,
    JobState.CANCELLED,
    JobState.AVAILABLE,
)


def mask_of(states: frozenset[JobState]) -> str:
    """The bit(8) text of *states*, as River writes it."""
    return "".join("1" if state in states else "0" for state in MASK_ORDER)


def states_of(mask: str) -> frozenset[JobState]:
    """The states named by a bit(8) text; the inverse of `mask_of`."""
    return frozenset(state for state, bit in zip(MASK_ORDER, mask, strict=True) if bit == "1")


@dataclass(frozen=True, slots=True)
class AttemptError:
    """One failed attempt, as it is kept in ``errors``; the database adds ``at``, the start of the attempt."""

    attempt: int
    error: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Transition:
    """A row change that a result asks for. Only the functions below build one, so no wrong combination can be said.

    `state` is where the job goes, unless somebody asked to cancel it while it ran: then every unfinished state becomes
    cancelled. `delay` counts from the database's now(); None leaves ``scheduled_at`` as it is. `metadata` is the JSON
    text of an object that is merged into the job's.
    """

    state: JobState
    attempt_back: int = 0
    delay: timedelta | None = None
    error: AttemptError | None = None
    metadata: str | None = None
    snoozed: bool = False


_COMPLETED: Final = Transition(JobState.COMPLETED)


def completed(metadata: str | None = None) -> Transition:
    """The handler returned. Without metadata always the same object, which the completer takes as its fast path."""
    return Transition(JobState.COMPLETED, metadata=metadata) if metadata else _COMPLETED


def errored(error: AttemptError, delay: timedelta, metadata: str | None = None) -> Transition:
    """The attempt failed and there are attempts left: again after *delay*, waiting as retryable however short it is."""
    return Transition(JobState.RETRYABLE, delay=delay, error=error, metadata=metadata)


def discarded(error: AttemptError, metadata: str | None = None) -> Transition:
    """The last attempt failed."""
    return Transition(JobState.DISCARDED, error=error, metadata=metadata)


def snoozed(delay: timedelta, metadata: str | None = None) -> Transition:
    """The handler asked for a later time; the attempt is given back and the snooze counted in the metadata."""
    return Transition(JobState.SCHEDULED, attempt_back=1, delay=delay, metadata=metadata, snoozed=True)


def cancelled(error: AttemptError, metadata: str | None = None) -> Transition:
    """The handler, or somebody outside, asked that the job never run again."""
    return Transition(JobState.CANCELLED, error=error, metadata=metadata)


def interrupted(metadata: str | None = None) -> Transition:
    """A stop of the runner ended the attempt: it is given back, without an error, and the job is available at once."""
    return Transition(JobState.AVAILABLE, attempt_back=1, metadata=metadata)
