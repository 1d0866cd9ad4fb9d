"""The jobs that a runner holds: from their fetch, through a slot, until the completer has what came of them."""

import threading
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

from sqla_river import states
from sqla_river.admission import Admission
from sqla_river.complete import Completer
from sqla_river.context import JobContext, cancel_context
from sqla_river.eventloop import EventLoop, Last
from sqla_river.execute import Executor
from sqla_river.failure import at
from sqla_river.logs import Log, of_job
from sqla_river.rows import ID, KIND, QUEUE, TOKEN, Fetched, Result, row_of
from sqla_river.slots import Threads

log: Final = Log(__name__)

_queue_of: Final = itemgetter(QUEUE)


class Held:
    """The jobs that a runner holds, and the slots that they run in.

    Args:
        executor: what runs in a slot.
        completer: takes what came of a job.
        slots: by queue.
        freed: told of the queue of each job that has come to its end.
        returned: told of the queue of each job that is let go without it.
        recovered: told when so many handlers hang no more that nothing may be fetched.
        runner: the id that the log lines of the slots bear.
        last: parts with what belongs to the event loop of the async handlers, and returns what closes it there.
    """

    def __init__(
        self,
        executor: Executor,
        completer: Completer,
        slots: Mapping[str, int],
        *,
        freed: Callable[[str], None],
        returned: Callable[[str], None],
        recovered: Callable[[], None],
        runner: str,
        last: Last | None,
    ) -> None:
        self._executor = executor
        self._completer = completer
        self._slots = slots
        self._freed = freed
        self._returned = returned
        self._recovered = recovered
        self._admission = Admission(slots)
        self._threads = Threads(sum(slots.values()), executor.execute, self._finished_plain, "sqla_river-slot", runner)
        self._event_loop = EventLoop(executor.execute_async, self._finished_async, "sqla_river-loop", runner, last)
        self._unfinished: dict[int, Fetched] = {}
        """By identity: a job may be fetched again while its last attempt is still here."""
        self._given_up: set[Fetched] = set()
        """Those whose handlers hang beyond their timeout."""
        self._giving_up = threading.Lock()
        self._open: set[int] = set()
        """Those of them that nobody has brought to their end yet; who takes one out does. No lock per job."""
        self._placing = threading.Lock()
        self.stopping = False
        """Whether nothing may begin any more: what is delivered goes back."""
        self.changed = threading.Event()
        """Set whenever a job has come to its end while `stopping`."""
        self.exhausted = False
        """Whether more handlers hang than there are slots. Then nothing is to be fetched: each would cost a thread."""

    def __contains__(self, job_id: object) -> bool:
        return any(row[ID] == job_id for row in self.rows)

    def __len__(self) -> int:
        return len(self._unfinished)

    @property
    def rows(self) -> list[Fetched]:
        return list(self._unfinished.values())

    def unknown(self, running: Iterable[tuple[int, str]], unsure: Container[str]) -> list[tuple[int, str]]:
        """Those of *running*, by id and token, that this runner neither holds nor has still to write; without what may
        yet come of fetches under the tokens *unsure*, which were read before this is asked.
        """
        known = {(row[ID], row[TOKEN]) for row in self.rows}  # first: what is let go of is put before
        known |= self._completer.unwritten
        return [each for each in running if each not in known and each[1] not in unsure]

    # ---- in and out -------------------------------------------------------------------------------------------------

    def deliver(self, rows: Sequence[Fetched]) -> None:
        """Begin *rows*, as many as there are free slots; the others wait for one. Those of a queue that is worked no
        more go back.
        """
        with self._placing:
            if self.stopping:
                self.give_back(rows)
                return
            if not self._slots.keys() >= set(map(_queue_of, rows)):
                self.give_back([row for row in rows if row[QUEUE] not in self._slots])
                rows = [row for row in rows if row[QUEUE] in self._slots]
            self._unfinished.update(zip(map(id, rows), rows, strict=True))
            self._open.update(map(id, rows))
            self._begin(self._admission.admit(rows))

    def _begin(self, rows: list[Fetched]) -> None:
        """Begin *rows*, each of which has a slot."""
        awaited = {kind for kind in {row[KIND] for row in rows} if self._executor.is_async(kind)}
        if awaited:
            self._event_loop.deliver([row for row in rows if row[KIND] in awaited])
            rows = [row for row in rows if row[KIND] not in awaited]
        if rows:
            self._threads.deliver(rows, self._admission.passed)

    def _finished(self, row: Fetched, result: Result | None) -> Fetched | None:
        """The handler of *row* has come to its end; the job that begins in its place."""
        if not self._hand_on(row, result):
            self._come_back(row)
            self._completer.stale += 1
            late = row_of(row)
            log.warning("job %d came to its end after it was given up; that changes nothing", late.id, **of_job(late))
            return None
        following = self._admission.leave(row[QUEUE])
        self._freed(row[QUEUE])
        if self.stopping:
            self.changed.set()
        return following

    def _finished_plain(self, row: Fetched, result: Result | None) -> Fetched | None:
        following = self._finished(row, result)
        if following is None or not self._executor.is_async(following[KIND]):
            return following
        self._event_loop.deliver([following])
        return None

    def _finished_async(self, row: Fetched, result: Result | None) -> Fetched | None:
        following = self._finished(row, result)
        if following is None or self._executor.is_async(following[KIND]):
            return following
        self._threads.deliver([following], self._admission.passed)
        return None

    def _hand_on(self, row: Fetched, result: Result | None) -> bool:
        """Put what came of *row*, and let go of it; False where that was done before, because it was given up."""
        try:
            self._open.remove(id(row))
        except KeyError:
            return False
        self._completer.put(result or row)  # first, or a stop might see neither
        self._unfinished.pop(id(row), None)
        return True

    def give_back(self, rows: Iterable[Fetched]) -> None:
        """Make *rows* available again, their attempt given back."""
        for row in rows:
            self._completer.put(Result(row_of(row), states.interrupted()))
            self._let_go(row)
            self._returned(row[QUEUE])

    def _let_go(self, row: Fetched) -> None:
        self._executor.forget(row)
        self._open.discard(id(row))
        self._unfinished.pop(id(row), None)

    def give_back_waiting(self) -> None:
        """Give back what no slot has begun."""
        with self._placing:  # else a delivery that had yet to see the stop could still put something there
            self.give_back(self._admission.turn_away())
            self._give_back_admitted(self._take_back())

    def _take_back(self) -> list[Fetched]:
        """The rows that have a slot and have not begun."""
        return self._threads.take_back() + self._event_loop.take_back()

    def _give_back_admitted(self, rows: Iterable[Fetched]) -> None:
        for row in rows:
            self._admission.leave(row[QUEUE])  # nothing waits: it was turned away
            self.give_back([row])

    def cancel(self, ids: Iterable[int]) -> None:
        """Somebody asked to cancel the jobs with these *ids*: those that are here are told."""
        asked = set(ids)
        for row in self.rows if asked else ():
            if row[ID] in asked:
                self._executor.cancel(row)

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
            waiting = self._take_back()
            surplus = Counter(row[QUEUE] for row in self.rows)
            surplus.subtract(slots)
            back = set[Fetched]()
            for row in reversed(waiting):
                if surplus[row[QUEUE]] > 0:
                    surplus[row[QUEUE]] -= 1
                    back.add(row)
            self._begin([row for row in waiting if row not in back])
            self._give_back_admitted(back)
            self._threads.resize(sum(slots.values()), self._admission.passed)
        with self._giving_up:
            self._judge_the_hanging()

    def lost(self, rows: Sequence[Fetched]) -> None:
        """Jobs that were freed while this runner was out of touch: those that run are told, those that have not begun
        are dropped.
        """
        log.warning(
            "%d jobs were freed while this runner was out of touch: %s", len(rows), [row[ID] for row in rows[:20]]
        )
        lost = set(rows)
        with self._placing:
            ahead = self._drop(self._admission.turn_away(), lost)
            admitted = self._take_back()
            keep = self._drop(admitted, lost)
            for row in lost.intersection(admitted):
                self._admission.leave(row[QUEUE])
            self._begin(keep)
            self._begin(self._admission.admit(ahead))
        for job in list(self._executor.running.values()):
            if job.row in lost:
                cancel_context(job, "lease lost")

    def _drop(self, rows: list[Fetched], lost: set[Fetched]) -> list[Fetched]:
        """Let go of those of *rows* that are *lost*; the others."""
        for row in lost.intersection(rows):
            self._let_go(row)
            self._returned(row[QUEUE])
        return [row for row in rows if row not in lost]

    def stuck(self, job: JobContext[Any]) -> None:
        """A handler ignores its timeout: its attempt is recorded as failed, and another thread takes its place."""
        row = next((row for row in self.rows if row == job.row), None)
        if row is None:  # it has ended just now
            return
        stack = self._threads.stack_of(row) or self._event_loop.stack_of(row)
        result = Result(job.row, self._executor.judge.give_up(job, stack))
        with self._giving_up:  # who comes back at this moment is taken out after it was put in
            if not self._hand_on(row, result):
                return
            self._given_up.add(row)
            self._event_loop.give_up(row)
        log.error(
            "job %d (%s) ignores its timeout and is given up; it hangs at %s",
            job.id,
            job.kind,
            at(stack),
            **of_job(job.row),
        )
        self._threads.replace(row)
        following = self._admission.leave(row[QUEUE])
        self._freed(row[QUEUE])
        if following is not None:
            self._begin([following])
        with self._giving_up:
            self._judge_the_hanging()
        self._event_loop.look()

    def _come_back(self, row: Fetched) -> None:
        """The handler of *row*, which was given up, has come to its end after all."""
        with self._giving_up:
            self._given_up.discard(row)
            self._event_loop.come_back(row)
            self._judge_the_hanging()

    def _judge_the_hanging(self) -> None:
        hang, before = len(self._given_up), self.exhausted
        self.exhausted = hang > sum(self._slots.values())
        if self.exhausted and not before:
            log.error("%d handlers hang, more than there are slots: nothing is fetched until some of them end", hang)
        elif before and not self.exhausted:
            log.info("%d handlers hang now: jobs are fetched again", hang)
            self._recovered()

    # ---- the slots --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Say so if a handler blocks the event loop, leave one that is lost, and see that threads are called for what
        waits.
        """
        self._event_loop.look()
        self._threads.look()

    def stop(self) -> None:
        """Let the slots end, each after what it is doing."""
        self._threads.stop()
        self._event_loop.stop()

    def join(self, timeout: float) -> None:
        """Wait at most *timeout* seconds for the end of the event loop."""
        self._event_loop.join(timeout)
