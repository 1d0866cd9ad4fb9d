"""Which of the fetched jobs may begin."""

import threading
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sqla_river.admission import Admission
from sqla_river.rows import ID, QUEUE, Fetched, JobRow

QUEUES = ("a", "b")


def _row(number: int, queue: str = "a") -> JobRow:
    return JobRow(1, 0.0, number, queue, "count", 1, 25, "{}", "{}", None, "runner/1")


def test_as_many_begin_as_there_are_slots_and_each_that_leaves_lets_the_next_begin() -> None:
    rows = [_row(number) for number in range(5)]
    admission = Admission({"a": 2})

    assert admission.admit(rows) == rows[:2]
    assert [admission.leave("a") for _ in range(5)] == [*rows[2:], None, None]


class Slots(RuleBasedStateMachine):
    """Jobs come, leave, are turned away, and slots change."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = {"a": 2, "b": 1}
        self.admission = Admission(self.slots)
        self.running: dict[str, list[Fetched]] = {queue: [] for queue in QUEUES}
        self.waiting: dict[str, list[JobRow]] = {queue: [] for queue in QUEUES}
        self.number = 0

    def _begun(self, row: Fetched) -> None:
        queue = row[QUEUE]
        assert len(self.running[queue]) < self.slots.get(queue, 0)
        self.running[queue].append(row)

    @rule(queue=st.sampled_from(QUEUES), count=st.integers(1, 4))
    def come(self, queue: str, count: int) -> None:
        rows = [_row(self.number + each, queue) for each in range(count)]
        self.number += count
        begin = self.admission.admit(rows)
        assert begin == rows[: len(begin)]
        for row in begin:
            self._begun(row)
        self.waiting[queue] += rows[len(begin) :]

    @rule(queue=st.sampled_from(QUEUES))
    def leave(self, queue: str) -> None:
        if self.running[queue]:
            self.running[queue].pop()
            following = self.admission.leave(queue)
            if following is not None:
                assert following == self.waiting[queue].pop(0)
                self._begun(following)

    @rule(queue=st.sampled_from([*QUEUES, None]))
    def turn_away(self, queue: str | None) -> None:
        asked = QUEUES if queue is None else (queue,)
        assert self.admission.turn_away(queue) == [row for each in asked for row in self.waiting[each]]
        self.waiting |= {each: [] for each in asked}

    @rule(a=st.integers(1, 4), b=st.integers(0, 3))
    def resize(self, a: int, b: int) -> None:
        self.slots = {"a": a, **({"b": b} if b else {})}
        self.admission.resize(self.slots)
        self.turn_away(None)  # as whoever resizes does

    @invariant()
    def all_slots_are_used(self) -> None:
        assert self.admission.passed == sum(map(len, self.running.values()))
        for queue in QUEUES:
            assert not self.waiting[queue] or len(self.running[queue]) >= self.slots.get(queue, 0)


TestSlots: Any = Slots.TestCase


@given(slots=st.integers(1, 4), batches=st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_no_job_is_forgotten_nor_begins_twice_however_many_threads_work(slots: int, batches: list[int]) -> None:
    admission = Admission({"a": slots})
    begun: list[int] = []
    running = Counter[str]()
    over: list[int] = []
    lock = threading.Lock()

    def work(row: Fetched | None) -> None:
        while row is not None:
            with lock:
                running["a"] += 1
                begun.append(row[ID])
                over.append(running["a"])
            with lock:
                running["a"] -= 1
            row = admission.leave("a")

    threads: list[threading.Thread] = []
    number = 0
    for batch in batches:
        rows = [_row(number + each) for each in range(batch)]
        number += batch
        for row in admission.admit(rows):
            threads.append(threading.Thread(target=work, args=(row,)))
            threads[-1].start()
    for thread in threads:
        thread.join()

    assert sorted(begun) == list(range(number))
    assert max(over) <= slots
    assert admission.passed == 0
