"""The heartbeat: the row that says this runner lives, and the rows of its queues. A thread and a connection of its
own.

A runner keeps its jobs for as long as its row is fresh: one lease. Whoever finds its own row older than that, less a
margin, stops fetching; when the database answers again it renews the row first, and then reads which of its jobs are
still its own. Each beat also asks the reverse: which jobs run under this runner's name, and it knows nothing of them.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple

from sqlalchemy.exc import DBAPIError

from sqla_river.logs import Log, first_line
from sqla_river.refusal import REFUSED_FOR, in_parts, told_if_possible
from sqla_river.rows import ID, TOKEN, Fetched
from sqla_river.statements import (
    DELETE_RUNNER,
    REFRESH_LONG,
    RESCUE_STRAYS,
    SELECT_FLEET,
    SELECT_OWN,
    SELECT_PEERS,
    UPSERT_QUEUES,
    UPSERT_RUNNER,
)
from sqla_river.store import OwnConnection

log: Final = Log(__name__)

TOUCH_QUEUES_EVERY: Final = 600.0
"""Seconds; River's clients delete a queue that nobody touched for 24 h."""


LOCK_NOT_AVAILABLE: Final = "55P03"
MOST_STRAYS: Final = 1_000
"""Jobs that one beat frees at most: 30 ms or so."""
MOST_SKEW: Final = timedelta(seconds=1)


class Fleet(NamedTuple):
    """What a heartbeat learns: how many live runners come before this one, whether there are suspects, and jobs that
    may run soon whose runner died, which of its jobs to cancel; and, by queue, the places of those that have a free
    slot, this runner's own being *place*.
    """

    rank: int
    suspects: bool
    deaths: bool
    cancelled: Sequence[int]
    place: int
    peers: Mapping[str, Sequence[int]]


def library_version() -> str:
    try:
        return version("sqla-river")
    except PackageNotFoundError:
        return "unknown"


def _compare(before: datetime, at: datetime, after: datetime) -> None:
    """Warn if the clock of this machine, read *before* and *after* the database's, is another one."""
    skew = before - at if before > at else min(after - at, timedelta(0))
    if abs(skew) > MOST_SKEW:
        log.remind(
            "the clock of this machine is %.1f s %s that of the database; jobs go by the database's, what the program "
            "compares with its own will be wrong: keep both in step with NTP",
            abs(skew.total_seconds()),
            "ahead of" if skew > timedelta(0) else "behind",
        )


class Heartbeat:
    """The heartbeat loop of one runner; `step` is what its thread repeats, every *every* seconds.

    Args:
        own: its connection.
        runner_id, slots: what the row says.
        every, lease: seconds.
        free: the queues that have a free slot here.
        unfinished: the jobs that this runner holds.
        beat: told the database's clock at each beat, in this thread.
        lost: told of those of them that are another's by now.
        unknown: those of the jobs, by id and token, that run under this runner's name by the table, and that are
            neither held nor on their way in or out.
        rescued: told of those that were freed: id, queue, kind, state, suspect, ours.
        learnt: told what each beat found out.
    """

    def __init__(
        self,
        own: OwnConnection,
        runner_id: str,
        slots: Mapping[str, int],
        every: float,
        lease: float,
        *,
        free: Callable[[], Sequence[str]],
        unfinished: Callable[[], Sequence[Fetched]],
        lost: Callable[[Sequence[Fetched]], None],
        unknown: Callable[[Sequence[tuple[int, str]]], Sequence[tuple[int, str]]],
        rescued: Callable[[Sequence[Any]], None],
        learnt: Callable[[Fleet], None],
        beat: Callable[[datetime], None] = lambda _: None,
    ) -> None:
        self._own = own
        self._runner_id = runner_id
        self.slots = slots
        self._every = every
        self._lease = lease
        self._free = free
        self._unfinished = unfinished
        self._lost = lost
        self._unknown = unknown
        self._rescued = rescued
        self._missed: dict[tuple[int, str], float] = {}
        """Jobs that are unknown, by id and token, and since when (monotonic)."""
        self._refused: dict[tuple[int, str], float] = {}
        """Those of them that were refused when they stood alone, and until when they are left out (monotonic)."""
        self._parts: Iterator[Sequence[Any]] | None = None
        """The freeing of some that the next beat goes on with."""
        self._learnt = learnt
        self._beat = beat
        self._touched_at = -math.inf
        self._beat_at = -math.inf
        self._beat_on: datetime | None = None  # by the database's clock
        self._kept_since = math.inf
        self.touched: frozenset[str] = frozenset()
        """The queues that have a row because of this runner."""
        self.beaten = False
        """Whether the row was ever written, and `learnt` told: before that nothing may be fetched."""

    @property
    def fresh(self) -> bool:
        """Whether the lease holds for some time yet: 5 s of 30. Without that nothing more is fetched."""
        return time.monotonic() - self._beat_at < self._lease * 5 / 6

    @property
    def clock(self) -> datetime | None:
        """The database's clock at the last beat; None before the first."""
        return self._beat_on

    @property
    def kept(self) -> datetime | None:
        """Until when, by the database's clock, this runner may take silent ones for dead; None if it may not.

        It may once it has kept its own heartbeat for a whole lease, without a gap of more than two beats and without a
        jump of the database's clock: after an outage everybody's heartbeat is old.
        """
        now = time.monotonic()
        if self._beat_on is None or now - self._kept_since < self._lease or now - self._beat_at > 2 * self._every:
            return None
        return self._beat_on + timedelta(seconds=2 * self._every)

    def step(self) -> float:
        """Renew the runner's row, and every ten minutes those of its queues; seconds until the next."""
        # The moment before the statement is sent: the row is at least as fresh as this clock says.
        began = time.monotonic()
        slots = self.slots  # which may change meanwhile
        before = datetime.now(UTC)
        beat_on: datetime = self._own.execute(
            UPSERT_RUNNER,
            {
                "p_id": self._runner_id,
                "p_queues": list(slots),
                "p_slots": list(slots.values()),
                "p_free": [queue for queue in self._free() if queue in slots],
                "p_version": library_version(),
                "p_lease": timedelta(seconds=self._lease),
            },
        ).scalar_one()
        _compare(before, beat_on, datetime.now(UTC))
        gap = began - self._beat_at
        # The monotonic clock stands still while a machine sleeps, and the database's may be set: the longer gap counts.
        stored = (beat_on - self._beat_on).total_seconds() if self._beat_on is not None else math.inf
        if gap > 2 * self._every or abs(stored - gap) > self._every:
            self._kept_since = began
        # The statement may itself have waited, while the row grew old.
        if max(gap, stored, time.monotonic() - self._beat_at) >= self._lease * 5 / 6:
            self._look_for_lost()
        asked = {"p_id": self._runner_id, "p_before": self._beat_on}
        self._beat_on = beat_on
        self._beat_at = began
        rank, suspects, deaths, cancelled, place, ids, tokens = self._own.execute(SELECT_FLEET, asked).one()
        peers = self._own.execute(SELECT_PEERS, {"p_queues": list(slots)})
        self._learnt(Fleet(rank, suspects, deaths, cancelled, place, {row.queue: row.places for row in peers}))
        if began - self._touched_at >= TOUCH_QUEUES_EVERY:
            self._own.execute(REFRESH_LONG, {"p_id": self._runner_id})
            self.touched = frozenset(slots) - self._touch_queues(slots.keys())
            self._touched_at = began
        else:
            self.touched = frozenset(slots) - self._touch_queues(slots.keys() - self.touched)
        self.beaten = True
        self._beat(beat_on)
        self._rescue_strays(list(zip(ids, tokens, strict=True)), began)
        return max(self._every - (time.monotonic() - began), 0.0)

    def _touch_queues(self, names: Collection[str]) -> frozenset[str]:
        """Renew the rows of the queues *names*; those of them that have to wait for another beat."""
        if not names:
            return frozenset()
        try:
            self._own.execute(UPSERT_QUEUES, {"p_queues": sorted(names)})
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
                raise
            if len(names) > 1:  # one of them keeps no other
                return frozenset[str]().union(*(self._touch_queues([name]) for name in sorted(names)))
            log.remind(
                "an open transaction is making the row of queue %s, as the first pause does; it is worked meanwhile: "
                "commit or roll back",
                *names,
            )
            return frozenset(names)
        return frozenset()

    def _look_for_lost(self) -> None:
        """After a gap in which the lease may have run out: which jobs were freed, and are perhaps another's."""
        unfinished = self._unfinished()
        if unfinished:
            tokens = sorted({row[TOKEN] for row in unfinished})
            own = set(self._own.execute(SELECT_OWN, {"p_tokens": tokens}).scalars())
            self._lost([row for row in unfinished if row[ID] not in own])

    def _rescue_strays(self, running: Sequence[tuple[int, str]], began: float) -> None:
        """Free those of *running* that this runner has known nothing of for a whole beat.

        A crash of the database that did not wait for its disk, or a failover to a standby that was behind, takes the
        last commits back: the end of a job may be among them, and its fetch not. Nobody else frees it while this runner
        lives. Nothing that is only on its way stays so from one beat to the next. What the database refuses is left out
        for a minute, so that it keeps no other.
        """
        missed = self._unknown(running) if running else ()
        self._missed = {each: self._missed.get(each, began) for each in missed}
        self._refused = {each: until for each, until in self._refused.items() if each in self._missed and until > began}
        parts, self._parts = self._parts, None
        if parts is None:
            due = (each for each, since in self._missed.items() if began - since >= self._every)
            strays = sorted(each for each in due if each not in self._refused)[:MOST_STRAYS]
            if not strays:
                return
            parts = in_parts([strays], self._free_strays, self._leave_out)
        freed: list[Any] = []
        try:
            for rows in parts:
                freed += rows
                if time.monotonic() - began > self._every:  # the lease comes first; what it frees is fenced
                    self._parts = parts
                    break
        except DBAPIError as error:
            log.warning("could not free jobs that nobody works: %s", first_line(error))
        if freed:
            log.warning(
                "freed %d jobs that ran under this runner's name, and that it held no more, as after a crash or a "
                "failover of the database: %s",
                len(freed),
                [row.id for row in freed[:20]],
            )
            self._rescued(freed)

    def _free_strays(self, strays: Sequence[tuple[int, str]]) -> Sequence[Any]:
        ids, tokens = zip(*strays, strict=True)
        given = {"p_ids": list(ids), "p_tokens": list(tokens), "p_schema": self._own.schema}
        return told_if_possible(lambda tell: self._own.execute(RESCUE_STRAYS, {**given, "p_tell": tell}).all())

    def _leave_out(self, stray: tuple[int, str], error: Exception) -> None:
        self._refused[stray] = time.monotonic() + REFUSED_FOR
        log.remind(
            "job %d, which nobody works, cannot be freed and stays running; tried again in %.0f s: %s",
            stray[0],
            REFUSED_FOR,
            first_line(error),
            job_id=stray[0],
        )

    def leave(self) -> None:
        """Take the runner's row away, if it was ever written, unless a running job still names it."""
        try:
            if self.beaten:
                self._own.execute(DELETE_RUNNER, {"p_id": self._runner_id})
        finally:
            self._own.close()
