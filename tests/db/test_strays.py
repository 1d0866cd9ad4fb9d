"""Strays: jobs that run by the table under the name of a living runner, which knows nothing of them."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Final

import pytest
from sqlalchemy import Engine, text

from sqla_river import heartbeat, states
from sqla_river.fetch import Fetcher
from sqla_river.heartbeat import Heartbeat
from sqla_river.rows import Fetched
from sqla_river.states import JobState
from sqla_river.workers import Workers
from tests.crashing import Clock, make_heart, make_runner, new_id, suspects
from tests.making import (
    Gate,
    count_states,
    ended,
    fetch,
    incarnation,
    make_fetcher,
    make_job,
    make_jobs,
    opened,
    read_job,
    result,
)
from tests.refusing import full_queue, refuse, relent
from tests.working import handling

OWNER: Final = new_id()
TOKEN: Final = f"{OWNER}/1"
LONG_AGO: Final = "2026-03-01T10:00:00Z"
Pairs = Sequence[tuple[int, str]]


class Beats:
    """The heart of the runner OWNER, and a local clock that stands still between its beats."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        self.known: set[tuple[int, str]] = set()
        self.asked: list[list[int]] = []
        self.freed: list[Any] = []
        self.meanwhile: Callable[[], object] = lambda: None
        monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: self.now))

    def unknown(self, running: Pairs) -> Pairs:
        self.asked.append([job_id for job_id, _ in running])
        self.meanwhile()
        return [each for each in running if each not in self.known]

    @contextmanager
    def of(self, engine: Engine) -> Generator[Callable[..., Heartbeat]]:
        """Beats again and again: after 5 s, unless another pause is said."""
        with opened(engine) as own:
            heart = make_heart(own, OWNER, unknown=self.unknown, rescued=self.freed.extend)

            def beat(times: int = 1, after: float = 5.0) -> Heartbeat:
                for _ in range(times):
                    self.now += after
                    heart.step()
                return heart

            yield beat


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> Beats:
    return Beats(monkeypatch)


def _stray(engine: Engine, **columns: Any) -> int:
    return make_job(engine, state=JobState.RUNNING, **{"token": TOKEN, "attempted_at": LONG_AGO, **columns})


def test_a_job_that_is_missed_at_two_beats_is_freed_as_by_a_rescue(
    engine: Engine, beats: Beats, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = _stray(engine, attempt=2)
    with beats.of(engine) as beat:
        beat(2)
        assert count_states(engine) == {"running": 1}  # the first beat has no last one, before which it began
        with caplog.at_level(logging.WARNING):
            beat()

    row = read_job(engine, job_id)
    assert (row["state"], row["attempt"], row["finalized_at"], row["token"]) == ("available", 2, None, TOKEN)
    assert timedelta(seconds=-5) < row["delay"] <= timedelta(0)
    assert row["metadata"] == {"river:rescue_count": 1}
    assert row["all_errors"] == [
        {
            "at": "2026-03-01T10:00:00.000000Z",
            "attempt": 2,
            "error": "rescued: its runner lives, and holds it no more",
            "trace": "",
        }
    ]
    assert [(each.id, each.queue, each.kind, each.state, each.suspect, each.ours) for each in beats.freed] == [
        (job_id, "default", row["kind"], "available", False, True)
    ]
    assert f"[{job_id}]" in caplog.text


def test_what_is_missed_only_once_or_only_for_less_than_a_beat_stays(engine: Engine, beats: Beats) -> None:
    job_id = _stray(engine)
    with beats.of(engine) as beat:
        beat(2)
        beat(3, after=1.0)  # somebody woke it
        beats.known = {(job_id, TOKEN)}
        beat()
        beats.known = set()
        beat()
        assert count_states(engine) == {"running": 1}
        beat()

    assert count_states(engine) == {"available": 1}


def test_no_runner_died_so_no_job_is_blamed(engine: Engine, beats: Beats) -> None:
    make_runner(engine, OWNER, alone=_stray(engine))
    with beats.of(engine) as beat:
        beat(3)

    assert suspects(engine) == {}


def test_the_last_attempt_is_discarded_and_a_cancel_that_was_asked_for_cancels(engine: Engine, beats: Beats) -> None:
    last = _stray(engine, attempt=3, max_attempts=3)
    cancelled = _stray(engine, metadata={"cancel_attempted_at": LONG_AGO})
    with beats.of(engine) as beat:
        beat(3)

    assert [read_job(engine, job_id)["state"] for job_id in (last, cancelled)] == ["discarded", "cancelled"]


def test_only_what_is_known_of_that_very_fetch_is_left_alone(engine: Engine, beats: Beats) -> None:
    known, again, theirs = _stray(engine), _stray(engine, token=f"{OWNER}/2"), _stray(engine, token=f"{new_id()}/1")
    beats.known = {(known, TOKEN), (again, TOKEN)}
    with beats.of(engine) as beat:
        beat(4)

    assert {job_id: read_job(engine, job_id)["state"] for job_id in (known, again, theirs)} == {
        known: "running",
        again: "available",
        theirs: "running",
    }


def test_a_job_that_is_fetched_again_before_it_can_be_freed_stays(engine: Engine, beats: Beats) -> None:
    job_id = _stray(engine)

    def fetch_again() -> None:
        with engine.begin() as connection:
            connection.execute(
                text("UPDATE river_job SET attempted_by = attempted_by || :new"), {"new": [f"{OWNER}/2"]}
            )

    with beats.of(engine) as beat:
        beat(2)
        beats.meanwhile = fetch_again
        beat()

    assert (beats.freed, read_job(engine, job_id)["state"]) == ([], "running")


def test_what_began_since_the_last_beat_is_not_even_asked_about(engine: Engine, beats: Beats) -> None:
    with beats.of(engine) as beat:
        beat()
        old = _stray(engine)
        _stray(engine, attempted_at="now")
        ahead = _stray(engine, attempted_at="2100-01-01")  # before the clock was set back
        beat()
        beats.known = {(old, TOKEN), (ahead, TOKEN)}
        assert beats.asked == [[old, ahead]]


def test_a_row_that_somebody_holds_is_not_waited_for_and_freed_later(engine: Engine, beats: Beats) -> None:
    held, free = _stray(engine), _stray(engine)
    with beats.of(engine) as beat:
        beat(2)
        with engine.begin() as theirs:
            theirs.execute(text("SELECT 1 FROM river_job WHERE id = :id FOR UPDATE"), {"id": held})
            beat()
            assert [each.id for each in beats.freed] == [free]
        beat()

    assert count_states(engine) == {"available": 2}


def test_a_row_that_cannot_be_freed_keeps_no_runner_from_its_heartbeat(engine: Engine, beats: Beats) -> None:
    refuse(engine, [_stray(engine)])
    with beats.of(engine) as beat:
        assert beat(4).fresh

    assert count_states(engine) == {"running": 1}


def test_a_stray_that_is_refused_keeps_no_other_and_is_tried_again_after_a_minute(
    engine: Engine, beats: Beats, caplog: pytest.LogCaptureFixture
) -> None:
    strays = make_jobs(engine, 20, state=JobState.RUNNING, token=TOKEN, attempted_at=LONG_AGO)
    refuse(engine, strays[:1])
    with beats.of(engine) as beat, caplog.at_level(logging.WARNING):
        beat(3)
        assert [each.id for each in beats.freed] == strays[1:]
        assert f"job {strays[0]}, which nobody works, cannot be freed" in caplog.text
        relent(engine)
        beat(11)
        assert read_job(engine, strays[0])["state"] == "running"
        beat(2)

    assert [each.id for each in beats.freed] == [*strays[1:], strays[0]]


def test_strays_behind_a_thousand_refused_ones_are_freed(engine: Engine, beats: Beats) -> None:
    refuse(engine, make_jobs(engine, 1_000, state=JobState.RUNNING, token=TOKEN, attempted_at=LONG_AGO))
    behind = _stray(engine)
    with beats.of(engine) as beat:
        beat(4)

    assert [each.id for each in beats.freed] == [behind]


def test_a_beat_that_takes_long_over_strays_leaves_the_rest_to_the_next(
    engine: Engine, beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    strays = make_jobs(engine, 4, state=JobState.RUNNING, token=TOKEN, attempted_at=LONG_AGO)
    refuse(engine, strays[:1])
    freed: list[list[int]] = []
    with beats.of(engine) as beat:
        heart = beat(2)
        free = heart._free_strays

        def slowly(part: Pairs) -> Sequence[Any]:
            beats.now += 6
            return free(part)

        monkeypatch.setattr(heart, "_free_strays", slowly)
        for _ in range(5):
            before = beats.now
            beat()
            assert beats.now - before == 11  # the pause, and one statement
            freed.append([each.id for each in beats.freed])

    assert freed == [[], [], [], strays[1:2], strays[1:]]


def test_strays_are_freed_while_the_queue_of_notifications_is_full(url: str, engine: Engine, beats: Beats) -> None:
    _stray(engine)
    with full_queue(url) as theirs, beats.of(theirs) as beat:
        beat(3)

    assert count_states(engine) == {"available": 1}


def test_many_strays_are_freed_a_thousand_at_a_time(engine: Engine, beats: Beats) -> None:
    make_jobs(engine, 1_500, state=JobState.RUNNING, token=TOKEN, attempted_at=LONG_AGO)
    with beats.of(engine) as beat:
        beat(3)
        assert count_states(engine) == {"available": 1_000, "running": 500}
        beat()

    assert count_states(engine) == {"available": 1_500}


# ---- what a runner knows of ------------------------------------------------------------------------------------------


def test_a_runner_knows_what_it_holds_what_it_has_to_write_and_what_a_fetch_may_have_brought(engine: Engine) -> None:
    gate = Gate()
    stations = incarnation(handling(gate))
    make_jobs(engine, 2)
    with opened(engine) as own:
        held, waiting = fetch(own, "test/1")
    stations._held.deliver([held, waiting])  # one runs, one waits for its slot
    gate.wait()
    stations.completer.put(result(10, states.completed(), "test/3"))
    stations.completer.put(ended(11, None))
    stations.completer._take()  # a write is on its way
    stations.completer.put(result(12, states.interrupted(), "test/3"))
    running = [(held.id, "test/1"), (waiting.id, "test/1"), (10, "test/3"), (11, "test/1"), (12, "test/3")]

    unknown = stations._held.unknown([*running, (held.id, "test/0"), (13, "test/7"), (14, "test/8")], {"test/8"})
    gate.open()
    stations._held.stop()

    assert unknown == [(held.id, "test/0"), (13, "test/7")]


def test_what_is_put_aside_for_another_try_is_known(engine: Engine) -> None:
    stations = incarnation(Workers())
    job_id = make_job(engine, state=JobState.RUNNING, token="test/1")
    with opened(engine) as own, engine.begin() as theirs:
        stations.completer._own = own
        theirs.execute(text("SELECT 1 FROM river_job FOR UPDATE"))
        stations.completer.put(result(job_id, states.interrupted()))
        stations.completer.step()

        assert stations._held.unknown([(job_id, "test/1")], ()) == []


def test_a_fetch_is_unsure_until_what_it_brought_is_delivered(engine: Engine) -> None:
    seen: list[set[str]] = []

    def deliver(_: list[Fetched]) -> None:
        seen.append(fetcher.unsure)

    with opened(engine) as own:
        fetcher: Fetcher = make_fetcher(own, [], deliver=deliver)
        make_job(engine)
        fetcher.step()

    assert seen == [{"test/1"}]
    assert fetcher.unsure == set()


def test_strays_are_found_when_the_clock_was_set_back(url: str, beats: Beats) -> None:
    clock = Clock(url)
    clock.set(timedelta(hours=1))
    with beats.of(clock.engine) as beat, opened(clock.engine) as own:
        make_job(clock.engine)
        beat()
        fetch(own, TOKEN)
        beat()
        clock.set(timedelta(0))
        beat(3)
    freed = count_states(clock.engine)
    clock.dispose()

    assert freed == {"available": 1}
