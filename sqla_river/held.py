"""The jobs that a runner holds: from their fetch, through a slot, until the completer has what came of them."""

import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

from sqla_river import states
from sqla_river.admission import Admission
from sqla_river.complete import Completer
from sqla_river.context import JobContext, cancel_context
from sqla_river.eventloop import EventLoop
from sqla_river.execute import Executor
from sqla_river.failure import at
from sqla_river.logs import Log, of_job
from sqla_river.rows import JobRow, Result
from sqla_river.slots import Threads

log: Final = Log(__name__)

_id_of: Final = attrgetter("id")


class Held:
    """The jobs that a runner holds, and the slots that they run in.

    Args:
        executor: what runs in a slot.
        completer: takes what came of a job.
        slots: by queue.
        freed: told of the queue of each job that has come to its end.
        returned: told of the queue of each job that is let go without it.
        runner: the id that the log lines of the slots bear.
        last: awaited when the event loop of the async handlers ends.
    """

    def __init__(
        self,
        executor: Executor,
        completer: Completer,
        slots: Mapping[str, int],
        *,
        freed: Callable[[str], None],
        returned: Callable[[str], None],
        runner: str,
        last: Callable[[], Coroutine[Any, Any, object]] | None,
    ) -> None:
        self._executor = executor
        self._completer = completer
        self._slots = slots
        self._freed = freed
        self._returned = returned
        self._admission = Admission(slots)
        self._threads = Threads(sum(slots.values()), executor.execute, self._finished_plain, "sqla_river-slot", runner)
        self._event_loop = EventLoop(executor.execute_async, self._finished_async, "sqla_river-loop", runner, last)
        self._unfinished: dict[int, JobRow] = {}
        """By identity: a job may be fetched again before its last attempt has been taken out here."""
        self._given_up: set[JobRow] = set()
        self._open: dict[int, JobRow] = {}
        """By job: the attempts that nobody has brought to their end yet; who takes one out does. No lock per job."""
        self._placing = threading.Lock()
        self.stopping = False
        """Whether nothing may begin any more: what is delivered goes back."""
        self.changed = threading.Event()
        """Set whenever a job has come to its end while `stopping`."""
        self.exhausted = threading.Event()
        """Set once more handlers hang than there are slots."""

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._open

    def __len__(self) -> int:
        return len(self._unfinished)

    @property
    def rows(self) -> list[JobRow]:
        return list(self._unfinished.values())

    # ---- in and out -------------------------------------------------------------------------------------------------

    def deliver(self, rows: list[JobRow]) -> None:
        """Begin *rows*, as many as there are free slots; the others wait for one. Those of a queue that is worked no
        more go back.
        """
        with self._placing:
            if self.stopping:
                self.give_back(rows)
                return
            unwanted = [row for row in rows if row.queue not in self._slots]
            if unwanted:
                self.give_back(unwanted)
                rows = [row for row in rows if row.queue in self._slots]
            self._unfinished.update(zip(map(id, rows), rows, strict=True))
            self._open.update(zip(map(_id_of, rows), rows, strict=True))
            self._begin(self._admission.admit(rows))

    def _begin(self, rows: list[JobRow]) -> None:
        """Begin *rows*, each of which has a slot."""
        awaited = {kind for kind in {row.kind for row in rows} if self._executor.is_async(kind)}
        if awaited:
            self._event_loop.deliver([row for row in rows if row.kind in awaited])
            rows = [row for row in rows if row.kind not in awaited]
        if rows:
            self._threads.deliver(rows, self._admission.passed)

    def _finished(self, row: JobRow, result: Result | None) -> JobRow | None:
        """The handler of *row* has come to its end; the job that begins in its place."""
        if not self._hand_on(row, result):
            self._given_up.discard(row)
            self._completer.stale += 1
            log.warning("job %d came to its end after it was given up; that changes nothing", row.id, **of_job(row))
            return None
        following = self._admission.leave(row.queue)
        self._freed(row.queue)
        if self.stopping:
            self.changed.set()
        return following

    def _finished_plain(self, row: JobRow, result: Result | None) -> JobRow | None:
        following = self._finished(row, result)
        if following is None or not self._executor.is_async(following.kind):
            return following
        self._event_loop.deliver([following])
        return None

    def _finished_async(self, row: JobRow, result: Result | None) -> JobRow | None:
        following = self._finished(row, result)
        if following is None or self._executor.is_async(following.kind):
            return following
        self._threads.deliver([following], self._admission.passed)
        return None

    def _hand_on(self, row: JobRow, result: Result | None) -> bool:
        """Put what came of *row*, and let go of it; False where that was done before, because it was given up."""
        if self._open.get(row.id) is not row or self._open.pop(row.id, None) is not row:
            return False
        self._completer.put(result or row)  # first, or a stop might see neither
        self._unfinished.pop(id(row), None)
        return True

    def give_back(self, rows: Iterable[JobRow]) -> None:
        """Make *rows* available again, their attempt given back."""
        for row in rows:
            self._completer.put(Result(row, states.interrupted()))
            self._let_go(row)
            self._returned(row.queue)

    def _let_go(self, row: JobRow) -> None:
        if self._open.get(row.id) is row:
            self._open.pop(row.id, None)
        self._unfinished.pop(id(row), None)

    def give_back_waiting(self) -> None:
        """Give back what no slot has begun."""
        self.give_back(self._admission.turn_away())
        self._give_back_admitted(self._threads.take_back())

    def _give_back_admitted(self, rows: Iterable[JobRow]) -> None:
        for row in rows:
            self._admission.leave(row.queue)  # nothing waits
            self.give_back([row])

    def give_back_ahead(self, queue: str | None) -> None:
        """Give back the jobs that were fetched ahead, those of *queue* where one is named."""
        self.give_back(self._admission.turn_away(queue))

    # ---- what may befall them ---------------------------------------------------------------------------------------

    def resize(self, slots: Mapping[str, int]) -> None:
        """Run as many jobs at once as *slots* says. Where a queue has more than that, what has not begun goes back."""
        with self._placing:
            self._slots = slots
            self._admission.resize(slots)
            self.give_back(self._admission.turn_away())
            waiting = self._threads.take_back()
            surplus = Counter(row.queue for row in self.rows)
            surplus.subtract(slots)
            back = set[JobRow]()
            for row in reversed(waiting):
                if surplus[row.queue] > 0:
                    surplus[row.queue] -= 1
                    back.add(row)
            self._threads.put_back(row for row in waiting if row not in back)
            self._give_back_admitted(back)
            self._threads.resize(sum(slots.values()), self._admission.passed)

    def lost(self, rows: Sequence[JobRow]) -> None:
        """Jobs that were freed while this runner was out of touch: those that run are told, those that have not begun
        are dropped.
        """
        log.warning(
            "%d jobs were freed while this runner was out of touch: %s", len(rows), [row.id for row in rows[:20]]
        )
        lost = set(rows)
        with self._placing:
            ahead = self._drop(self._admission.turn_away(), lost)
            admitted = self._threads.take_back()
            keep = self._drop(admitted, lost)
            for row in lost.intersection(admitted):
                self._admission.leave(row.queue)
            self._threads.put_back(keep)
            self._begin(self._admission.admit(ahead))
        for row in rows:
            job = self._executor.running.get(row.id)
            if job is not None and job.row is row:
                cancel_context(job, "lease lost")

    def _drop(self, rows: list[JobRow], lost: set[JobRow]) -> list[JobRow]:
        """Let go of those of *rows* that are *lost*; the others."""
        for row in lost.intersection(rows):
            self._let_go(row)
            self._returned(row.queue)
        return [row for row in rows if row not in lost]

    def stuck(self, job: JobContext[Any]) -> None:
        """A handler ignores its timeout: its attempt is recorded as failed, and another thread takes its place."""
        row = job.row
        stack = self._threads.stack_of(row) or self._event_loop.stack_of(row)
        self._given_up.add(row)
        if not self._hand_on(row, Result(row, self._executor.judge.give_up(job, stack))):
            self._given_up.discard(row)
            return
        log.error(
            "job %d (%s) ignores its timeout and is given up; it hangs at %s",
            row.id,
            row.kind,
            at(stack),
            **of_job(row),
        )
        self._threads.replace(row)
        following = self._admission.leave(row.queue)
        self._freed(row.queue)
        if following is not None:
            self._begin([following])
        if len(self._given_up) > sum(self._slots.values()):
            log.error(
                "%d handlers hang; this runner drains and ends, for its supervisor to start another",
                len(self._given_up),
            )
            self.exhausted.set()

    # ---- the slots --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Say so if a handler blocks the event loop."""
        self._event_loop.look()

    def stop(self) -> None:
        """Let the slots end, each after what it is doing."""
        self._threads.stop()
        self._event_loop.stop()

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the end of the event loop."""
        self._event_loop.join(timeout)
