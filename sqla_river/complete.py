"""Complete: write results, in batches, under the fence.

One thread per runner, on a connection of its own, overlapping the fetch. It flushes at once when idle and grows its
batches under load (group commit): while one is being written, the next gathers.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from sqla_river.context import JobContext
from sqla_river.failure import storable
from sqla_river.logs import Log, first_line, of_job, without_passwords
from sqla_river.policy import RIVER_POLICY
from sqla_river.rows import ID, TOKEN, Fetched, JobRow, Result, row_of
from sqla_river.statements import COMPLETE_JOBS, NOTE_PROGRESS, NOTIFY_QUEUES, SELECT_HELD, SETTLE_JOBS
from sqla_river.states import AttemptError, JobState, Transition, completed, discarded, errored
from sqla_river.store import OwnConnection, error_json

log: Final = Log(__name__)

LARGEST_BATCH: Final = 2_000
"""Results of one statement: twice what a fetch brings, so that the completer catches up with the slots."""
LARGEST_BACKLOG: Final = 10_000
"""Results not yet written, for whatever reason, beyond which nothing more is fetched; River's number."""
NOTE_EVERY: Final = 1.0
"""Seconds between two writings of progress."""
_FIRST_RETRY: Final = 0.05
_LONGEST_RETRY: Final = 5.0
_GIVE_UP: Final = 0.4
"""After this pause, the fourth, an outcome that is refused is replaced by a plain failure: the job must not stay
running.
"""
_JUST_COMPLETED: Final = completed()


class Again(NamedTuple):
    """Results whose rows somebody else has locked, or that PostgreSQL refused: tried again at *at*, in a batch of
    their own.
    """

    at: float
    pause: float
    results: list[Result | Fetched]


class Written(NamedTuple):
    """What a write has come to so far; it counts once all of it is through: until then all of it may be done again."""

    results: list[Result]
    states: list[JobState]
    """What each result came to."""
    again: list[Again]
    stale: list[JobRow]
    """Jobs that were no longer this runner's."""

    def add(self, results: Iterable[Result], came_to: Mapping[int, JobState]) -> None:
        """Those of *results* whose jobs *came_to* something, by id."""
        through = [result for result in results if result.job.id in came_to]
        self.results.extend(through)
        self.states.extend(came_to[result.job.id] for result in through)


class Completer:
    """The completion loop of one runner; `step` is what its thread repeats, `flush` its last.

    Args:
        own: its connection.
        wake: lets the next step begin.
        completed: told of the jobs of a batch that just completed, where nobody wants to know more.
        written: told of the results that a batch changed, and of the state each came to.
        relieved: called when the backlog is short again.
    """

    def __init__(
        self,
        own: OwnConnection,
        *,
        wake: Callable[[], None],
        completed: Callable[[Sequence[Fetched]], None],
        written: Callable[[Sequence[Result], Sequence[JobState]], None],
        relieved: Callable[[], None],
    ) -> None:
        self._own = own
        self._wake = wake
        self._completed = completed
        self._written = written
        self._relieved = relieved
        self._results: deque[Result | Fetched] = deque()
        self._taken: list[Result | Fetched] = []
        self._again: list[Again] = []
        self._progress: dict[Fetched, JobContext[Any]] = {}
        self._noted_at = 0.0
        self._idle = True
        """Whether the loop may be waiting for a result."""
        self._full = False
        """Whether somebody was told that there is no room, and not yet that there is again."""
        self.stale = 0
        """Results that changed nothing, because the job was no longer this runner's."""

    def put(self, result: Result | Fetched) -> None:
        """Take *result*; written soon. What was fetched stands for a job that just completed: most do, and one object
        less for each is 1 us less, most of it the garbage collector's. Constant time, no lock.
        """
        self._results.append(result)
        if self._idle:
            self._wake()

    def progressed(self, job: JobContext[Any]) -> None:
        """Note how far *job* is; written with the next batch that is a second after the last."""
        self._progress[job.row] = job
        self._wake()

    @property
    def backlog(self) -> int:
        """Results not yet written."""
        return len(self._results) + len(self._taken) + sum(len(again.results) for again in self._again)

    @property
    def unwritten(self) -> set[tuple[int, str]]:
        """Their ids and tokens. What moves on while this looks is there before it leaves where it was."""
        waiting = [*self._results, *self._taken]
        for again in self._again:
            waiting += again.results
        return {_fence_of(each.job if isinstance(each, Result) else each) for each in waiting}

    @property
    def ready(self) -> bool:
        """Whether there is room for more; whoever hears that there is none is relieved later."""
        if self.backlog < LARGEST_BACKLOG:
            return True
        self._full = True
        return self.backlog < LARGEST_BACKLOG  # again: what was written before that relieves nobody

    def step(self) -> float:
        """Write one batch, and what is to be tried again; seconds until the next look."""
        self._idle = False
        if not self._taken:
            self._take()
        if self._taken:
            self._write(self._taken, _FIRST_RETRY)
            self._taken = []
        self._retry(time.monotonic())
        if self._full and self.backlog < LARGEST_BACKLOG:
            self._full = False  # before they are told: they look again, and may find it full again
            self._relieved()
        if self._progress and time.monotonic() >= self._noted_at + NOTE_EVERY:
            self._note()
        self._idle = True  # before the look: who puts a result after this wakes it
        if self._results:
            return 0.0
        waits = [again.at for again in self._again]
        if self._progress:
            waits.append(self._noted_at + NOTE_EVERY)
        return max(min(waits, default=math.inf) - time.monotonic(), 0.0) if waits else 3_600.0

    def _note(self) -> None:
        """Write what the jobs said of their progress. It is lost where the database is away: the next word of it comes
        soon enough.
        """
        self._noted_at = time.monotonic()
        noted: list[JobContext[Any]] = []
        while self._progress:
            noted.append(self._progress.popitem()[1])
        self._own.execute(
            NOTE_PROGRESS,
            {
                "p_ids": [job.id for job in noted],
                "p_tokens": [job.row.token for job in noted],
                "p_notes": [job.progressed for job in noted],
            },
        )

    def flush(self, until: Callable[[], float]) -> None:
        """Write everything, or as much as can be written *until* that time (monotonic). Errors are tried again."""
        while self.backlog and time.monotonic() < until():
            try:
                self.step()
                self._retry(math.inf)
            except Exception as error:  # noqa: BLE001 - the database may be on its way back
                log.warning("could not write %d results yet: %s", self.backlog, first_line(error))
            if self.backlog:
                time.sleep(max(0.0, min(_FIRST_RETRY, until() - time.monotonic())))

    def close(self) -> None:
        """Close the connection. Called in the completer's thread."""
        self._own.close()

    def _take(self) -> None:
        results, taken = self._results, self._taken
        for _ in range(min(len(results), LARGEST_BATCH)):
            taken.append(results[0])  # first: no look at `backlog` may miss it
            results.popleft()

    def _retry(self, now: float) -> None:
        for again in [again for again in self._again if again.at <= now]:
            self._write(again.results, min(again.pause * 2, _LONGEST_RETRY))
            # Only now: it stays if the database is away, and no look at `backlog` may miss it.
            self._again = [other for other in self._again if other is not again]

    def _write(self, ended: list[Result | Fetched], pause: float) -> None:
        """Write what has *ended*; what somebody has locked is put aside for *pause* seconds.

        Raises:
            Exception: the database is away; nothing of it is forgotten, and writing it again changes nothing twice.
                What is through by then is marked as settled.
        """
        written = Written([], [], [], [])
        results = [each for each in ended if isinstance(each, Result)]
        rows = [each for each in ended if not isinstance(each, Result)]
        heard, others = list[Result](), list[Result]()
        for result in results:
            if result.settled is not None:
                written.results.append(result)
                written.states.append(result.settled)
            else:
                (heard if result.transition is _JUST_COMPLETED else others).append(result)
        if self._complete([*rows, *(result.job for result in heard)] if heard else rows):
            written.results.extend(heard)
            written.states.extend([JobState.COMPLETED] * len(heard))
        else:
            others += [*heard, *(Result(row_of(row), _JUST_COMPLETED) for row in rows)]
            rows = []
        if others:
            others.sort(key=_id_of_job)
            try:
                for batch in _apart(others):
                    self._write_batch(batch, pause, written)
            except Exception:
                _mark_settled(ended, written, rows)
                raise
        # It is committed: what would raise from here on would have all of it counted again.
        self._again += written.again
        if rows:
            self._completed(rows)
        if written.results:
            self._written(written.results, written.states)
        if JobState.AVAILABLE in written.states:
            came_to = zip(written.results, written.states, strict=True)
            self._announce(sorted({result.job.queue for result, state in came_to if state == JobState.AVAILABLE}))
        if written.stale:
            self.stale += len(written.stale)
            ids = [job.id for job in written.stale[:20]]
            log.warning("%d outcomes came too late and changed nothing: jobs %s", len(written.stale), ids)

    def _complete(self, rows: Sequence[Fetched]) -> bool:
        """Write that *rows* just completed; False if that cannot be said of each of them: then the general way goes
        over all of them, and sorts them.
        """
        if not rows:
            return True
        given = complete_parameters(map(_fence_of, rows))
        try:
            return self._own.execute(COMPLETE_JOBS, given).rowcount == len(rows)
        except Exception as error:
            if _away(error):
                raise
            return False

    def _write_batch(self, batch: list[Result], pause: float, written: Written) -> None:
        try:
            given = settle_parameters([(result.job.id, result.job.token, result.transition) for result in batch])
            came_to = {job_id: JobState(state) for job_id, state in self._own.execute(SETTLE_JOBS, given)}
        except Exception as error:
            if _away(error):
                raise
            if len(batch) > 1:  # one of them is bad: halve until it stands alone
                middle = len(batch) // 2
                self._write_batch(batch[:middle], pause, written)
                self._write_batch(batch[middle:], pause, written)
            else:
                written.again.append(_refused(batch[0], error, pause))
            return
        written.add(batch, came_to)  # first: to look after the others may fail
        if len(came_to) < len(batch):
            missing = [result for result in batch if result.job.id not in came_to]
            written.add(missing, self._look_after(missing, pause, written))

    def _look_after(self, missing: list[Result], pause: float, written: Written) -> dict[int, JobState]:
        """Why some ids did not come back: written by an earlier try whose reply was lost; locked by somebody; or no
        longer ours.
        """
        jobs = [result.job for result in missing]
        given = {"p_ids": [job.id for job in jobs], "p_tokens": [job.token for job in jobs]}
        rows = self._own.execute(SELECT_HELD, given).all()
        states = {row.id: JobState(row.state) for row in rows}
        held: list[Result | Fetched] = [each for each in missing if states.get(each.job.id) == JobState.RUNNING]
        if held:
            written.again.append(Again(time.monotonic() + pause, pause, held))
        written.stale.extend(job for job in jobs if job.id not in states)
        return {job_id: state for job_id, state in states.items() if state != JobState.RUNNING}

    def _announce(self, queues: list[str], *, again: bool = True) -> None:
        """Let other runners hear of jobs that are available again. It is a hint, without which they find them at their
        next poll: a lost connection gives it one more try, and a full queue of notifications (54000) a line in the log.
        """
        try:
            self._own.execute(NOTIFY_QUEUES, {"p_schema": self._own.schema, "p_queues": queues})
        except Exception as error:  # noqa: BLE001 - the outcomes are written
            if again and isinstance(error, DBAPIError) and error.connection_invalidated:
                self._announce(queues, again=False)
            else:
                log.warning("could not announce the queues %s: %s", queues, first_line(error))


def _refused(result: Result, error: Exception, pause: float) -> Again:
    """PostgreSQL will not have this outcome: try it again, and after some tries a plain failure in its place."""
    job = result.job
    said = without_passwords(first_line(error))
    log.error("the outcome of job %d cannot be written, tried again in %.2f s: %s", job.id, pause, said, **of_job(job))
    if pause >= _GIVE_UP:
        error_ = AttemptError(job.attempt, storable(f"its outcome could not be stored: {said}", 1_000))
        last = job.attempt >= job.max_attempts
        transition = discarded(error_) if last else errored(error_, RIVER_POLICY.delay(job.attempt))
        result = result._replace(transition=transition)
    return Again(time.monotonic() + pause, pause, [result])


def complete_parameters(given: Iterable[tuple[int, str]]) -> dict[str, Sequence[Any]]:
    """The parameters of COMPLETE_JOBS for (id, token): the ids in order, and from which of them on each token holds.

    Jobs that were fetched together end together, so that few tokens do for many ids.
    """
    jobs = sorted(given)
    firsts: list[int] = []
    tokens: list[str] = [""]
    for job_id, token in jobs:
        if token != tokens[-1]:
            firsts.append(job_id)
            tokens.append(token)
    return {"p_ids": [job_id for job_id, _ in jobs], "p_firsts": firsts, "p_tokens": tokens[1:]}


def settle_parameters(results: Sequence[tuple[int, str, Transition]]) -> dict[str, list[Any]]:
    """The parameters of SETTLE_JOBS for (id, token, transition)."""
    transitions = [transition for _, _, transition in results]
    return {
        "p_ids": [job_id for job_id, _, _ in results],
        "p_tokens": [token for _, token, _ in results],
        "p_states": [transition.state.value for transition in transitions],
        "p_backs": [transition.attempt_back for transition in transitions],
        "p_delays": [transition.delay for transition in transitions],
        "p_errors": [error_json(transition) for transition in transitions],
        "p_metadata": [transition.metadata for transition in transitions],
        "p_snoozed": [int(transition.snoozed) for transition in transitions],
    }


def _mark_settled(ended: list[Result | Fetched], written: Written, rows: Sequence[Fetched]) -> None:
    """Say in *ended* what is through: what is *written* so far, and *rows*, which just completed. Written again, one
    whose job somebody fetched meanwhile would look as if it came too late.
    """
    through = {_fence_of(result.job): state for result, state in zip(written.results, written.states, strict=True)}
    through |= dict.fromkeys(map(_fence_of, rows), JobState.COMPLETED)
    for place, each in enumerate(ended):
        result = each if isinstance(each, Result) else Result(row_of(each), _JUST_COMPLETED)
        ended[place] = result._replace(settled=through.get(_fence_of(result.job), result.settled))


def _apart(results: Iterable[Result]) -> list[list[Result]]:
    """*results* in batches that have no job twice, as it may be if it was fetched again while it ran: the database's
    answers name jobs, not attempts.
    """
    batches: list[dict[int, Result]] = []
    for result in results:
        batch = next((batch for batch in batches if result.job.id not in batch), None)
        if batch is None:
            batches.append(batch := {})
        batch[result.job.id] = result
    return [list(batch.values()) for batch in batches]


_id_of_job: Final = attrgetter("job.id")
_fence_of: Final = itemgetter(ID, TOKEN)

_AWAY: Final = frozenset({"08", "25", "40", "53", "55", "57", "58", "F0", "XX"})


def _away(error: Exception) -> bool:
    """Whether the database is away or busy (connection, transaction state, rollback, resources, locks, operators,
    system), so that the same statement may do later; anything else is about what was sent, or a trigger of the user's
    that refuses it.
    """
    if isinstance(error, PoolTimeoutError | OSError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    code = getattr(error.orig, "sqlstate", None)
    if code is None:
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return code[:2] in _AWAY
