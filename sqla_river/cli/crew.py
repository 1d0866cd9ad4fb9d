"""What a supervisor decides: pure rules, without processes or a clock. A `Crew` is told what happened, and answers what
to do.

Each of its places is worked by one process. One that ends unasked is followed by another after a pause; one that is to
be replaced goes on until its successor works.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

log: Final = logging.getLogger(__name__)

FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 30.0
STEADY_AFTER: Final = 60.0
"""Seconds of life after which an end counts as the first again."""
GRACE: Final = 10.0
"""Seconds beyond its stop_timeout that a process has to end, before it is killed; `Runner.stop` needs 6 at most."""
WORKS_WITHIN: Final = 60.0
"""Seconds that a successor has to begin its work; a runner waits 10 of them for its database."""
LEAST_LEASES: Final = 3
"""A runner may rescue once it has lived for a lease: a fleet that is recycled faster would never rescue."""
LAST_STEP: Final = 3
USAGE: Final = 2
"""The exit code of a command that was called wrongly: calling it again does not help."""
MIB: Final = 1024 * 1024


@attrs.frozen
class Limits:
    """When a process is replaced: after so many jobs, at so many bytes of resident memory."""

    jobs: float = math.inf
    rss: float = math.inf


@attrs.define(eq=False)
class Member:
    """One process, and what it last said of itself: its Runner's stop_timeout and lease in seconds, since when it
    works, the jobs that it has worked, and its resident memory in bytes.
    """

    place: int
    pid: int
    born: float
    stop_timeout: float = 0.0  # before it says more it has no jobs
    lease: float = math.inf
    works_since: float = math.inf
    jobs: int = 0
    rss: int = 0
    asked: int = 0
    kill_at: float = math.inf
    killed: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} (place {self.place})"

    @property
    def works(self) -> bool:
        return self.works_since < math.inf


@attrs.frozen
class Start:
    """Start a process for *place*, and say `Crew.started` or `Crew.not_started`."""

    place: int


@attrs.frozen
class Ask:
    """Ask *member* to stop: 1 when its running jobs are done, 2 interrupting them, 3 leaving them behind."""

    member: Member
    step: int


@attrs.frozen
class Kill:
    """Kill *member*."""

    member: Member


Action = Start | Ask | Kill


@attrs.define(eq=False)
class _Place:
    number: int
    member: Member | None = None
    successor: Member | None = None
    leaving: Member | None = None
    outdated: bool = False
    failures: int = 0
    start_at: float = -math.inf

    def __iter__(self) -> Iterator[Member]:
        return (each for each in (self.member, self.successor, self.leaving) if each is not None)

    def pause(self, now: float, lived: float) -> float:
        """Note a failure; seconds until the next start."""
        if lived >= STEADY_AFTER:
            self.failures = 0
        pause = min(FIRST_PAUSE * 2.0 ** min(self.failures, 10), LONGEST_PAUSE)
        self.failures += 1
        self.start_at = now + pause
        return pause


class Crew:
    """The processes of one supervisor. Every *now* is in seconds, of one monotonic clock.

    Args:
        places: how many processes work at once.
        limits: when one of them is replaced.
        waits: for development: a process that ends unasked is not followed by another before `restart`.
    """

    def __init__(self, places: int, limits: Limits = Limits(), *, waits: bool = False) -> None:
        self._places = [_Place(number) for number in range(1, places + 1)]
        self._limits = limits
        self._waits = waits
        self._has_runner = False
        self._step = 0
        self.exit_code: int = 0
        """For the supervisor, once it is `over`: 0 after a clean stop."""

    @property
    def members(self) -> list[Member]:
        """The processes that live."""
        return [member for place in self._places for member in place]

    @property
    def over(self) -> bool:
        """Whether all have stopped, as they were asked to."""
        return self._step > 0 and not self.members

    # ---- what happened ------------------------------------------------------------------------------

    def started(self, member: Member) -> None:
        place = self._places[member.place - 1]
        place.outdated = False
        if place.member is None:
            place.member = member
            log.info("%s starts", member)
        else:
            place.successor = member
            log.info("%s starts, to follow process %d", member, place.member.pid)

    def not_started(self, number: int, error: OSError, now: float) -> None:
        place = self._places[number - 1]
        place.outdated = False
        log.error("no process could be started: %s; tries again in %.0f s", error, place.pause(now, 0.0))

    def heard(self, member: Member, word: Mapping[str, Any], now: float) -> None:
        """It has told how it is, in the words of `Member`; `works` is whether its Runner has started."""
        self._has_runner = True
        member.stop_timeout, member.lease = word["stop_timeout"], word["lease"]
        member.jobs, member.rss = word["jobs"], word["rss"]
        if word["works"] and not member.works:
            member.works_since = now
            log.info("%s works", member)
            place = self._places[member.place - 1]
            if place.successor is member:
                place.leaving, place.member, place.successor = place.member, member, None

    def ended(self, member: Member, code: int, now: float) -> None:
        """It has ended; *code* as `subprocess` gives it, negative for a signal."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        place = self._places[member.place - 1]
        was_successor = place.successor is member
        place.member, place.successor, place.leaving = (
            None if each is member else each for each in (place.member, place.successor, place.leaving)
        )
        if was_successor and not self._step:
            place.pause(now, 0.0)
            self._outdate(False)
            log.error("%s %s before it worked: nothing more is replaced, and the others go on", member, how)
        elif code == USAGE and not self._has_runner:
            self._step, self.exit_code = max(self._step, 1), USAGE
        # One that is asked before it has a Runner ends by SIGTERM: it has nothing to lose.
        # And a signal may have come to it and to us, and have ended it before it was asked.
        elif (member.asked or self._step) and not member.killed and (code == 0 or not member.works):
            log.info("%s has stopped", member)
        elif self._step:
            log.error("%s %s, instead of stopping", member, how)
            self.exit_code = self.exit_code or 1
        elif member.asked:
            log.error("%s %s, instead of stopping", member, how)
        elif self._waits:
            place.start_at = math.inf
            log.warning("%s %s; another one starts when a file has changed", member, how)
        else:
            lived = now - member.born
            pause = place.pause(now, lived)
            log.warning("%s %s after %.0f s; another one starts in %.0f s", member, how, lived, pause)

    # ---- what is wanted -----------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop all, and when called again go one step further: interrupt the running jobs, then leave them behind."""
        self._step = min(self._step + 1, LAST_STEP)
        what = ("may finish; another signal interrupts them", "are interrupted", "are left behind")[self._step - 1]
        log.info("stopping: running jobs %s", what)

    def roll(self) -> None:
        """Replace all, one after the other, each when its successor works."""
        log.info("replacing all processes, one after the other")
        self._outdate(True)
        self._start_now()

    def restart(self, now: float) -> list[Action]:
        """Stop all that run, interrupting their jobs, and start others."""
        self._start_now()
        return [action for member in self.members for action in self._ask(member, 2, now)]

    def _outdate(self, outdated: bool) -> None:
        for place in self._places:
            place.outdated = outdated

    def _start_now(self) -> None:
        for place in self._places:
            place.start_at = -math.inf

    # ---- what to do ---------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Action]:
        """What to do now. Nothing is said twice."""
        actions = [action for member in self.members for action in self._ask(member, self._step, now)]
        if not self._step:
            actions += self._place_all(now)
        for member in self.members:
            if member.kill_at <= now and not member.killed:
                member.killed = True
                log.error("%s does not stop, and is killed", member)
                actions.append(Kill(member))
        return actions

    def next_at(self, now: float) -> float:
        """When to `decide` again though nothing may happen until then; after *now*, for which that is done."""
        times = [member.kill_at for member in self.members]
        times += [place.start_at for place in self._places]
        times += [place.successor.born + WORKS_WITHIN for place in self._places if place.successor is not None]
        return min((time for time in times if time > now), default=math.inf)

    def _ask(self, member: Member, step: int, now: float) -> list[Action]:
        if member.asked >= step:
            return []
        member.asked = step
        member.kill_at = min(member.kill_at, now + (member.stop_timeout if step == 1 else 0.0) + GRACE)
        return [Ask(member, step)]

    def _place_all(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for place in self._places:
            if place.member is None and place.successor is None:
                # One goes ahead, so that what is wrong with the app is told once.
                if place.start_at <= now and (self._has_runner or place.number == 1):
                    actions.append(Start(place.number))
            elif place.member is not None and place.successor is None and not place.outdated:
                place.outdated = self._is_spent(place.member, now)
            if place.leaving is not None:
                actions += self._ask(place.leaving, 1, now)
            if place.successor is not None and now >= place.successor.born + WORKS_WITHIN:
                actions += self._ask(place.successor, 1, now)
        if not any(place.successor or place.leaving for place in self._places):
            actions += self._replace_one(now)
        return actions

    def _replace_one(self, now: float) -> list[Action]:
        """One at a time: there is never more than one process too many, nor one too few."""
        for place in self._places:
            if place.outdated and place.member is not None and place.member.works and place.start_at <= now:
                return [Start(place.number)]
        return []

    def _is_spent(self, member: Member, now: float) -> bool:
        if now - member.works_since < LEAST_LEASES * member.lease:
            return False
        if member.jobs >= self._limits.jobs:
            log.info("%s has worked %d jobs, and is replaced", member, member.jobs)
            return True
        if member.rss >= self._limits.rss:
            log.info("%s holds %d MiB, and is replaced", member, member.rss // MIB)
            return True
        return False
