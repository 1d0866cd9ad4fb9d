"""The threads of the slots, without a runner around them."""

import threading

from sqla_river.rows import Fetched
from sqla_river.slots import Threads
from tests.making import eventually


def _row(number: int) -> Fetched:
    return (1, 0.0, number, "default", "count", 1, 25, "{}", "{}", None, "test/1")


def test_slots_that_were_added_while_a_call_was_on_its_way_have_a_thread_each() -> None:
    ends = {number: threading.Event() for number in range(1, 7)}
    begun: list[int] = []

    def execute(row: Fetched) -> None:
        begun.append(row[2])
        ends[row[2]].wait(30)

    threads = Threads(1, execute, lambda _row, _result: None, "test-slot", "test")
    threads.deliver([_row(1)], 1)
    eventually(lambda: begun == [1])
    threads.deliver([_row(2)], 1)  # its call is not heard: the one thread takes it without
    ends[1].set()
    eventually(lambda: begun == [1, 2])
    threads.resize(5, 1)
    threads.deliver(list(map(_row, range(3, 7))), 5)

    eventually(lambda: sorted(begun) == [1, 2, 3, 4, 5, 6], what="all to begin")
    for end in ends.values():
        end.set()
    threads.stop()
