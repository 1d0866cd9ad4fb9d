"""The queues of a Runner as a Mapping, and what may not be done to them."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import create_engine

from sqla_river import Runner, Workers
from sqla_river.errors import ConfigError, InvalidOptionError, QueueNotFoundError
from sqla_river.live import Queues


def test_a_runner_that_does_not_work_takes_changes_for_its_next_start() -> None:
    given = {"default": 10}
    runner = Runner(create_engine("postgresql+psycopg://"), Workers(), queues=given)

    runner.queues.add("mail", 5)
    runner.queues["mail"] = 6
    runner.queues.add("sms", 1)
    runner.queues.remove("default")

    assert isinstance(runner.queues, Mapping)
    assert runner.queues == {"mail": 6, "sms": 1}
    assert (list(runner.queues), sum(runner.queues.values()), len(runner.queues)) == (["mail", "sms"], 7, 2)
    assert ("sms" in runner.queues, runner.queues.get("default"), runner.queues["sms"]) == (True, None, 1)
    assert repr(runner.queues) == "{'mail': 6, 'sms': 1}"
    assert given == {"default": 10}


def test_all_may_be_replaced_at_once_and_are_checked_as_the_first_were() -> None:
    queues = Queues({"default": 10})
    queues.replace({"mail": 5, "sms": 1})

    assert queues == {"mail": 5, "sms": 1}
    with pytest.raises(ConfigError):
        queues.replace({})
    with pytest.raises(InvalidOptionError):
        queues.replace({"a b": 1})
    assert queues == {"mail": 5, "sms": 1}


@pytest.mark.parametrize("slots", [0, -1, 10_001, 1.0, "1", True, None])
def test_slots_are_1_to_10000(slots: Any) -> None:
    queues = Queues({"default": 10_000})
    refusals: list[Callable[[], object]] = [
        lambda: Queues({"default": slots}),
        lambda: queues.add("mail", slots),
        lambda: queues.__setitem__("default", slots),
    ]
    for refused in refusals:
        with pytest.raises(ConfigError, match=r"must have 1\.\.10000 slots, got "):
            refused()

    assert queues == {"default": 10_000}


@pytest.mark.parametrize("name", ["", "*", "A", "a b", "a\n", "a\0", "a'", "a" * 65, None, 7])
def test_a_bad_name_is_refused(name: Any) -> None:
    queues = Queues({"default": 1})
    with pytest.raises(InvalidOptionError, match="queue must be"):
        queues.add(name, 1)

    assert queues == {"default": 1}


def test_what_cannot_be_is_said_with_the_way_out() -> None:
    queues = Queues({"default": 1})

    with pytest.raises(ConfigError, match=r"'default' is worked here already, with 1 slots; write .*\['default'\] = 2"):
        queues.add("default", 2)
    with pytest.raises(ConfigError, match="'default' is the last one"):
        queues.remove("default")
    with pytest.raises(ConfigError, match="queues is empty"):
        Queues({})
    refusals: list[Callable[[], None]] = [lambda: queues.remove("mail"), lambda: queues.__setitem__("mail", 1)]
    for unknown in refusals:
        with pytest.raises(QueueNotFoundError, match=r"'mail' is not worked here, only default") as caught:
            unknown()
        assert caught.value.queue == "mail"
    with pytest.raises(KeyError):
        queues["mail"]

    assert queues == {"default": 1}


def test_readers_see_one_state_or_the_next() -> None:
    queues = Queues({"a": 1, "b": 1})
    done = threading.Event()
    seen: set[tuple[tuple[str, int], ...]] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(tuple(queues.items()))
            assert sum(queues.values()) in (2, 3)

    reading = threading.Thread(target=read)
    reading.start()
    for _ in range(2_000):
        queues.add("c", 1)
        queues.remove("c")
    done.set()
    reading.join()

    assert seen <= {(("a", 1), ("b", 1)), (("a", 1), ("b", 1), ("c", 1))}


def test_a_follower_hears_each_state_once_and_in_order() -> None:
    queues = Queues({"a": 1})
    heard: list[Mapping[str, int]] = []
    queues.add("b", 1)
    queues.follow(heard.append)
    queues["a"] = 2
    with pytest.raises(ConfigError):
        queues["a"] = 0
    queues.follow(None)
    queues["a"] = 3

    assert heard == [{"a": 1, "b": 1}, {"a": 2, "b": 1}]
    assert queues.now == {"a": 3, "b": 1}
