"""Plain values that travel between the stations."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple, cast

from sqla_river.states import JobState, Transition

ANNOUNCED_AHEAD: Final = timedelta(seconds=5)
"""A job that is due this soon is announced, so that the woken runner reads the next due time again."""


EXPIRES_KEY: Final = "sqla_river:expires_at"
"""Where a job's expiry stands in its metadata, in seconds of the epoch."""


class Place(NamedTuple):
    """Where a new job starts: its state, its time (None is the database's now()), and whether runners hear of it."""

    state: JobState
    at: datetime | None
    told: bool


AT_ONCE: Final = Place(JobState.AVAILABLE, None, True)
_PENDING: Final = Place(JobState.PENDING, None, False)


def place(when: datetime | timedelta | None, pending: bool, now: Callable[[], datetime]) -> Place:
    """Decide between available, scheduled and pending by *now*, the database's clock, which is asked only if there is
    a time to compare.

    A time that has come inserts as available: River would let it wait for its scheduler.
    """
    if when is None:
        return _PENDING if pending else AT_ONCE
    present = now()
    at = present + when if isinstance(when, timedelta) else when
    if pending:
        return Place(JobState.PENDING, at, False)
    return Place(JobState.SCHEDULED if at > present else JobState.AVAILABLE, at, at - present <= ANNOUNCED_AHEAD)


class Heard(NamedTuple):
    """What runners should hear of some new jobs: of the queues in `now` when they are committed; of the others only if
    that comes as late as their next job is due.
    """

    now: set[str]
    due: dict[str, datetime]

    @classmethod
    def of(cls, placed: Iterable[tuple[str, Place]]) -> "Heard":
        """From queue and place of each job."""
        heard = cls(set(), {})
        for queue, place_ in placed:
            if place_.told:
                heard.now.add(queue)
            elif place_.state is JobState.SCHEDULED and place_.at is not None:
                heard.due[queue] = min(place_.at, heard.due.get(queue, place_.at))
        return heard


def expiring(
    metadata: Mapping[str, Any], expires: datetime | timedelta | None, now: Callable[[], datetime]
) -> dict[str, Any]:
    """*metadata*, and in it when the job expires, if it does."""
    if expires is None:
        return dict(metadata)
    at = now() + expires if isinstance(expires, timedelta) else expires
    return {**metadata, EXPIRES_KEY: at.timestamp()}


class InsertRow(NamedTuple):
    """One job on its way in: validated, encoded, and not yet in the database.

    `args` is the JSON text of an object. `when` is None (at once), an aware time, or a delay from the database's
    now().
    """

    kind: str
    args: bytes
    queue: str
    priority: int
    max_attempts: int
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    when: datetime | timedelta | None
    pending: bool
    expires: datetime | timedelta | None = None
    unique_at: Callable[[datetime], bytes] | None = None
    """For a unique job, its key when it is due at that time."""
    unique_states: frozenset[JobState] | None = None

    def __repr__(self) -> str:  # args may hold secrets, and a repr gets everywhere
        return f"<new {self.kind!r} for queue {self.queue!r}>"


class JobRow(NamedTuple):
    """One fetched job. `args` and `metadata` are raw JSON text: they are decoded in the slot, so that a poison row
    fails alone.

    Rows sort in the order in which they begin. `attempt` counts this attempt already. `due` is ``scheduled_at`` in
    seconds of the epoch. `token` is the fence: only its holder may change the outcome.
    """

    priority: int
    due: float
    id: int
    queue: str
    kind: str
    attempt: int
    max_attempts: int
    args: str
    metadata: str
    expired: bool | None
    token: str

    def __repr__(self) -> str:  # as above
        return f"<row of job {self.id} {self.kind!r} attempt {self.attempt}>"


Fetched = tuple[int, float, int, str, str, int, int, str, str, bool | None, str]
"""A JobRow as a plain tuple: so jobs wait, begun or not, until their slot makes a JobRow of it. Of plain tuples that
hold nothing but text and numbers the garbage collector lets go at its first look, where thousands of other objects that
outlive some looks make it look at all the program's, 30 ms for each 75,000 jobs.
"""
ID: Final = 2
QUEUE: Final = 3
KIND: Final = 4
TOKEN: Final = 10
row_of: Final[Callable[[Fetched], JobRow]] = partial(cast("Any", tuple).__new__, JobRow)
"""What was fetched, by the names of its fields: half the time of ``JobRow._make``."""


def drained(waiting: deque[Fetched]) -> list[Fetched]:
    """What stands in *waiting*, from which others may take meanwhile; none of it stands there any more."""
    rows: list[Fetched] = []
    with suppress(IndexError):
        while True:
            rows.append(waiting.popleft())
    return rows


class Result(NamedTuple):
    """What user code came to: the job, the row change it asks for, and how long it ran (monotonic seconds)."""

    job: JobRow
    transition: Transition
    seconds: float = 0.0
    settled: JobState | None = None
    """The state that the job came to, where the row change is committed already with the handler's own transaction."""
    error: BaseException | None = None
    """What ended the attempt, if it failed."""
