"""How many jobs stand where, and how many have come to their end."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final

import attrs
from sqlalchemy import Connection

from sqla_river import store
from sqla_river.models import JobMixin, declared_schema
from sqla_river.options import check_queue, check_when
from sqla_river.session import connect, sync_session
from sqla_river.statements import COUNT_LIVE, SELECT_COUNTS, SELECT_HISTORY, SELECT_INDEX_SIZES, SELECT_QUEUE_NAMES
from sqla_river.states import JobState

Ask = Callable[..., store.Rows]
"""Runs one of our statements, with its parameters."""
MOST_READ: Final = 10_000
"""Index entries per state and queue that are counted; more are estimated."""
COUNTED: Final = (JobState.COMPLETED, JobState.CANCELLED, JobState.DISCARDED)
"""The states whose figures are what runners counted."""
ALWAYS_ESTIMATED: Final = frozenset({*COUNTED, "failed", "throughput", "failures"})


@attrs.frozen
class QueueStats:
    """How one queue stands.

    What waits or runs is counted, up to 10,000 jobs of each state; beyond that it is estimated from the size that an
    index had at the last VACUUM or ANALYZE. What is finished is what runners of sqla_river have counted since the
    tables are there, whether the rows are still kept or not. They tell it with their heartbeat, every 5 s, so it may
    lag that far behind, and a runner that is killed takes its last 5 s with it.

    What ends without them, a duty counts once a minute: jobs that were cancelled before their first attempt, and what
    Go's clients finish while one of them leads. Of each minute it looks at the first 10,000 jobs of a state; what Go
    finished beyond that, or while no runner of sqla_river lived, is missing, and so are jobs that were cancelled while
    they waited for another attempt.
    """

    queue: str
    pending: int
    """Jobs that wait for a slot: available, and in state pending."""
    running: int
    completed: int
    failed: int
    """Jobs that were discarded."""
    by_state: Mapping[JobState, int]
    """The same for each state under its own name."""
    oldest_available: timedelta | None
    """For how long the first of the available jobs has been due; None if there is none."""
    throughput: float
    """Jobs completed per second, over the last five minutes and the one that has begun."""
    failures: float
    """Attempts that failed per second, likewise, whether there is another attempt or not."""
    estimated: frozenset[str]
    """The names of the figures that are not exact, states under their own names: those of what is finished always,
    others where there are many.
    """


@attrs.frozen
class MinuteStats:
    """What runners finished within one minute."""

    minute: datetime
    """Its start, UTC."""
    completed: int
    failed: int
    """Jobs that were discarded."""
    by_state: Mapping[JobState, int]
    """What jobs came to: completed, cancelled, discarded, or retryable, which is an attempt that failed."""


def queue_stats(session: Any, queue: str, job_class: type[JobMixin]) -> QueueStats:
    """See `River.queue_stats`."""
    connection = connect(sync_session(session), job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    return _stats(partial(store.execute, connection, schema), schema, [check_queue(queue)])[0]


def all_stats(connection: Connection, schema: str | None) -> list[QueueStats]:
    """The stats of every queue of *schema* that a runner works, that has jobs, or that ever had a job finished: its
    count of all time stays. By name. Three round trips.
    """
    schema = store.real_schema(connection, schema)
    return stats_of_all(partial(store.execute, connection, schema), schema)


def stats_of_all(ask: Ask, schema: str | None) -> list[QueueStats]:
    """The same for who runs our statements in another way; *schema* is the real one."""
    return _stats(ask, schema, _queues(ask))


def stats_history(
    session: Any, queue: str | None, since: datetime | timedelta, job_class: type[JobMixin]
) -> list[MinuteStats]:
    """See `River.stats_history`."""
    if queue is not None:
        check_queue(queue)
    since = check_when("since", since)
    connection = connect(sync_session(session), job_class)
    schema = store.real_schema(connection, declared_schema(job_class))
    return history(connection, schema, queue, since)


def history(
    connection: Connection, schema: str | None, queue: str | None, since: datetime | timedelta
) -> list[MinuteStats]:
    """The minutes of *queue*, of all queues where None, in *schema*. One round trip."""
    back = isinstance(since, timedelta)
    asked = {"p_queue": queue, "p_since": None if back else since, "p_back": since if back else None}
    minutes: dict[datetime, dict[JobState, int]] = {}
    for minute, state, jobs in store.execute(connection, store.real_schema(connection, schema), SELECT_HISTORY, asked):
        counts = minutes.setdefault(minute.astimezone(UTC), dict.fromkeys((*COUNTED, JobState.RETRYABLE), 0))
        if state is not None:
            counts[JobState(state)] = jobs
    return [
        MinuteStats(minute, counts[JobState.COMPLETED], counts[JobState.DISCARDED], counts)
        for minute, counts in minutes.items()
    ]


def _queues(ask: Ask) -> list[str]:
    return list(ask(SELECT_QUEUE_NAMES).scalars())


def _live(ask: Ask, queues: Sequence[str]) -> list[Any]:
    return list(ask(COUNT_LIVE, {"p_queues": list(queues)}).all())


def _stats(ask: Ask, schema: str | None, queues: Sequence[str]) -> list[QueueStats]:
    rows = {row.queue: row for row in _live(ask, queues)}
    many = _Many(ask, schema, list(rows.values()))
    counts: dict[str, dict[str, tuple[int, float]]] = {queue: {} for queue in queues}
    for row in ask(SELECT_COUNTS, {"p_queues": list(queues)}):
        counts[row.queue][row.state] = (row.jobs, row.lately / row.seconds)
    return [_queue_stats(rows[queue], counts[queue], many) for queue in queues]


def _queue_stats(row: Any, counts: Mapping[str, tuple[int, float]], many: "_Many") -> QueueStats:
    live, estimated = many.figures(row)
    finished = {state: counts.get(state, (0, 0.0)) for state in (*COUNTED, JobState.RETRYABLE)}
    by_state = {**live, **{state: finished[state][0] for state in COUNTED}}
    return QueueStats(
        queue=row.queue,
        pending=by_state[JobState.AVAILABLE] + by_state[JobState.PENDING],
        running=by_state[JobState.RUNNING],
        completed=by_state[JobState.COMPLETED],
        failed=by_state[JobState.DISCARDED],
        by_state={state: by_state[state] for state in JobState},
        oldest_available=None if row.oldest is None else max(row.oldest, timedelta(0)),
        throughput=finished[JobState.COMPLETED][1],
        failures=finished[JobState.RETRYABLE][1] + finished[JobState.DISCARDED][1],
        estimated=ALWAYS_ESTIMATED | estimated,
    )


class _Many:
    """The live figures of queues, and estimates where one look did not reach the end."""

    def __init__(self, ask: Ask, schema: str | None, rows: list[Any]) -> None:
        self._ask = ask
        self._schema = schema
        self._rows = rows
        self._sizes: dict[str, int] | None = None
        self._whole = False

    def figures(self, row: Any) -> tuple[dict[JobState, int], frozenset[str]]:
        """The jobs of each live state, and the names of those figures that are estimated."""
        figures: dict[JobState, int] = {}
        estimated: set[str] = set()
        for state, index in ((JobState.AVAILABLE, "fetch"), (JobState.PENDING, "pending")):
            figures[state] = getattr(row, state)
            if figures[state] > MOST_READ:
                figures[state] = self._by_queue(state, index)
                estimated |= {state, "pending"}
        for state, all_, index in (
            (JobState.RUNNING, row.all_running, "running"),
            (JobState.SCHEDULED, row.all_due, "due"),
            (JobState.RETRYABLE, row.all_due, "due"),
        ):
            figures[state] = getattr(row, state)
            if all_ > MOST_READ:  # the share of the queue in what was read stands for its share in all
                figures[state] = max(figures[state], figures[state] * self._size(index) // all_)
                estimated.add(state)
        return figures, frozenset(estimated)

    def _by_queue(self, state: str, index: str) -> int:
        """What the index holds beyond the queues that were counted to their end, in equal shares for the others."""
        if not self._whole:
            self._rows = _live(self._ask, _queues(self._ask))
            self._whole = True
        counts: list[int] = [getattr(row, state) for row in self._rows]
        ended = [count for count in counts if count <= MOST_READ]
        return max(MOST_READ, (self._size(index) - sum(ended)) // max(len(counts) - len(ended), 1))

    def _size(self, index: str) -> int:
        if self._sizes is None:
            rows = self._ask(SELECT_INDEX_SIZES, {"p_schema": self._schema})
            self._sizes = {name: size for name, size in rows}  # noqa: C416 - rows are no pairs to the type checkers
        return self._sizes.get(f"river_job_{index}_idx", 0)
