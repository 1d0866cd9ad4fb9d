"""What a supervisor decides, without processes: its pauses, its order, its limits."""

import itertools
import logging
import math
from typing import Any, Final

import pytest

from sqla_river.cli import crew as rules
from sqla_river.cli.crew import Action, Ask, Crew, Kill, Limits, Member, Start

LEASE: Final = 30.0
STOP_TIMEOUT: Final = 20.0
NO_LIMITS: Final = Limits()


class Play:
    """A crew, a clock, and processes that start at once when they are to."""

    def __init__(self, places: int = 1, limits: Limits = NO_LIMITS, *, waits: bool = False) -> None:
        self.crew = Crew(places, limits, waits=waits)
        self.now = 1_000.0
        self._pids = itertools.count(1)

    def act(self, after: float = 0.0) -> list[Action]:
        """What is decided so much later; what is to start, starts."""
        self.now += after
        actions = self.crew.decide(self.now)
        for action in actions:
            if isinstance(action, Start):
                self.crew.started(Member(action.place, next(self._pids), self.now))
        return actions

    def says(self, member: Member, **words: Any) -> None:
        word = {"stop_timeout": STOP_TIMEOUT, "lease": LEASE, "works": True, "jobs": 0, "rss": 0, **words}
        self.crew.heard(member, word, self.now)

    def working(self) -> "Play":
        """All places filled, and all at work."""
        while self.act():
            for member in self.crew.members:
                self.says(member)
        return self

    def ends(self, member: Member, code: int = 1) -> None:
        self.crew.ended(member, code, self.now)

    @property
    def pids(self) -> list[int]:
        return [member.pid for member in self.crew.members]


def test_one_process_goes_ahead_until_it_has_a_runner() -> None:
    play = Play(3)

    assert play.act() == [Start(1)]
    assert play.act(1) == []
    play.says(play.crew.members[0], works=False)
    assert play.act() == [Start(2), Start(3)]
    assert play.act(1) == []


def test_a_crashed_process_is_followed_after_1_s_doubling_to_30() -> None:
    play = Play().working()
    pauses: list[float] = []
    for _ in range(8):
        play.ends(play.crew.members[0])
        assert play.act() == []
        pauses.append(play.crew.next_at(play.now) - play.now)
        assert play.act(pauses[-1] - 0.001) == []
        assert play.act(0.001) == [Start(1)]

    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_the_pause_is_1_s_again_once_a_process_has_lived_for_a_minute() -> None:
    play = Play().working()
    for _ in range(4):
        play.ends(play.crew.members[0])
        play.act(30)
    play.now += rules.STEADY_AFTER
    play.ends(play.crew.members[0])

    assert play.crew.next_at(play.now) == play.now + 1


@pytest.mark.parametrize("code", [0, 1, 2, -9])
def test_an_end_that_nobody_asked_for_is_a_crash_whatever_its_code(code: int) -> None:
    play = Play(2).working()
    play.ends(play.crew.members[1], code)

    assert play.act(1) == [Start(2)]


def test_a_command_that_is_called_wrongly_is_not_tried_again() -> None:
    play = Play(3)
    play.act()
    play.ends(play.crew.members[0], rules.USAGE)

    assert play.crew.over
    assert play.act(60) == []
    assert play.crew.exit_code == rules.USAGE


def test_a_roll_goes_one_by_one_and_each_stays_until_its_successor_works() -> None:
    play = Play(2).working()
    first, second = play.crew.members
    play.crew.roll()

    assert play.act() == [Start(1)]
    assert play.act(5) == []
    play.says(play.crew.members[1])
    assert play.act() == [Ask(first, 1)]
    assert play.act(5) == []
    play.ends(first, 0)
    assert play.act() == [Start(2)]
    play.says(play.crew.members[2])
    assert play.act() == [Ask(second, 1)]
    play.ends(second, 0)
    assert play.act(100) == []
    assert play.pids == [3, 4]


def test_a_second_roll_replaces_those_also_that_started_before_it() -> None:
    play = Play().working()
    play.crew.roll()
    play.act()
    play.crew.roll()
    old, new = play.crew.members
    play.says(new)
    assert play.act() == [Ask(old, 1)]
    play.ends(old, 0)

    assert play.act() == [Start(1)]


def test_a_successor_that_crashes_ends_the_roll_and_the_others_go_on() -> None:
    play = Play(2).working()
    play.crew.roll()
    play.act()
    play.ends(play.crew.members[1], 1)

    assert play.act(1_000) == []
    assert play.pids == [1, 2]


def test_a_successor_that_does_not_come_to_work_is_stopped_and_ends_the_roll() -> None:
    play = Play(2).working()
    play.crew.roll()
    play.act()
    successor = play.crew.members[1]

    assert play.crew.next_at(play.now) == play.now + rules.WORKS_WITHIN
    assert play.act(rules.WORKS_WITHIN) == [Ask(successor, 1)]
    assert play.act(rules.GRACE) == [Kill(successor)]
    play.ends(successor, -9)
    assert play.act(1_000) == []
    assert play.pids == [1, 2]


def test_a_successor_takes_the_place_of_one_that_died_meanwhile() -> None:
    play = Play().working()
    play.crew.roll()
    play.act()
    old, new = play.crew.members
    play.ends(old)
    assert play.act(10) == []
    play.says(new)

    assert play.act(100) == []
    assert play.pids == [2]


def test_a_roll_starts_at_once_what_waits_after_a_crash() -> None:
    play = Play().working()
    for _ in range(5):
        play.ends(play.crew.members[0])
        play.act(30)
    play.ends(play.crew.members[0])
    assert play.act() == []
    play.crew.roll()

    assert play.act() == [Start(1)]


def test_a_stop_gives_stop_timeout_and_10_s_and_then_kills() -> None:
    play = Play(2).working()
    first, second = play.crew.members
    play.crew.stop()

    assert play.act() == [Ask(first, 1), Ask(second, 1)]
    assert play.crew.next_at(play.now) == play.now + STOP_TIMEOUT + 10
    play.ends(first, 0)
    assert play.act(STOP_TIMEOUT + 9.9) == []
    assert play.act(0.1) == [Kill(second)]
    assert play.act(1) == []
    assert not play.crew.over
    play.ends(second, -9)
    assert (play.crew.over, play.crew.exit_code) == (True, 1)


def test_a_clean_stop_ends_with_0_and_starts_nothing() -> None:
    play = Play(3).working()
    play.ends(play.crew.members[2])
    play.crew.stop()
    play.act()
    for member in play.crew.members:
        play.ends(member, 0)

    assert play.act(60) == []
    assert (play.crew.over, play.crew.exit_code) == (True, 0)


def test_each_further_stop_goes_one_step_further_and_shortens_the_wait() -> None:
    play = Play().working()
    (member,) = play.crew.members
    play.crew.stop()
    play.act()
    play.crew.stop()

    assert play.act(1) == [Ask(member, 2)]
    assert play.crew.next_at(play.now) == play.now + 10
    play.crew.stop()
    assert play.act(1) == [Ask(member, 3)]
    play.crew.stop()
    assert play.act(1) == []
    assert play.crew.next_at(play.now) == play.now + 8


def test_a_process_that_is_stopped_before_it_has_a_runner_may_end_by_its_signal() -> None:
    play = Play()
    play.act()
    play.crew.stop()
    play.act()
    assert play.crew.next_at(play.now) == play.now + 10
    play.ends(play.crew.members[0], -15)

    assert (play.crew.over, play.crew.exit_code) == (True, 0)


@pytest.mark.parametrize(("works", "code"), [(True, 0), (False, -2), (False, 130)])
def test_a_process_that_the_same_signal_ended_before_it_was_asked_is_a_clean_stop(works: bool, code: int) -> None:
    play = Play()
    play.act()
    play.says(play.crew.members[0], works=works)
    play.crew.stop()
    play.ends(play.crew.members[0], code)

    assert (play.crew.over, play.crew.exit_code) == (True, 0)


def test_a_process_that_fails_while_it_stops_is_no_clean_stop() -> None:
    play = Play().working()
    play.crew.stop()
    play.act()
    play.ends(play.crew.members[0], 1)

    assert play.crew.exit_code == 1


@pytest.mark.parametrize("words", [{"jobs": 1_000}, {"rss": 2**30}])
def test_a_process_is_recycled_at_its_limits_but_never_before_three_leases(words: dict[str, int]) -> None:
    play = Play(2, Limits(jobs=1_000, rss=2**30)).working()
    first, second = play.crew.members
    play.now += 3 * LEASE - 1
    play.says(first, **{name: limit - 1 for name, limit in words.items()})
    play.says(second, **words)
    assert play.act() == []
    assert play.act(1) == [Start(2)]
    assert play.act(1) == []
    play.says(play.crew.members[-1])
    assert play.act() == [Ask(second, 1)]
    play.ends(second, 0)

    assert play.act(1) == []
    play.says(first, **words)
    assert play.act() == [Start(1)]


def test_recycling_is_tried_again_after_a_pause() -> None:
    play = Play(1, Limits(jobs=10)).working()
    play.now += 1_000
    play.says(play.crew.members[0], jobs=10)
    pauses: list[float] = []
    for _ in range(3):
        assert play.act() == [Start(1)]
        play.ends(play.crew.members[1])
        assert play.act() == []
        pauses.append(play.crew.next_at(play.now) - play.now)
        play.now += pauses[-1]

    assert pauses == [1, 2, 4]


def test_for_development_a_crash_waits_for_a_change() -> None:
    play = Play(waits=True).working()
    play.ends(play.crew.members[0])
    assert play.act(1_000) == []
    assert play.crew.next_at(play.now) == math.inf
    assert play.crew.restart(play.now) == []
    assert play.act() == [Start(1)]


def test_a_restart_interrupts_and_starts_anew() -> None:
    play = Play(waits=True).working()
    (member,) = play.crew.members
    assert play.crew.restart(play.now) == [Ask(member, 2)]
    assert play.act() == []
    play.ends(member, 0)

    assert play.act() == [Start(1)]


def test_a_system_that_starts_no_process_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    crew = Crew(1)
    crew.decide(0.0)
    crew.not_started(1, BlockingIOError("no more processes"), 0.0)

    assert crew.decide(0.9) == []
    assert crew.decide(1.0) == [Start(1)]
    assert "no more processes" in caplog.text


def test_what_happens_is_told_in_a_line_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, rules.log.name)
    play = Play().working()
    play.ends(play.crew.members[0], -9)
    play.act(1)
    play.crew.stop()
    play.act()
    play.ends(play.crew.members[0], 0)

    assert caplog.messages == [
        "process 1 (place 1) starts",
        "process 1 (place 1) works",
        "process 1 (place 1) was killed by signal 9 after 0 s; another one starts in 1 s",
        "process 2 (place 1) starts",
        "stopping: running jobs may finish; another signal interrupts them",
        "process 2 (place 1) has stopped",
    ]
