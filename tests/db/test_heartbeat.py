"""The heartbeat: when a runner is fresh, when it may take others for dead, and what it learns after a gap."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from sqla_river import heartbeat, pause
from sqla_river.heartbeat import Fleet
from sqla_river.rows import JobRow
from sqla_river.states import JobState
from tests.crashing import Clock, make_heart, make_runner, new_id, runners, silence, sweep
from tests.making import count_states, fetch, make_job, make_jobs, opened, read_job, text_of


class Monotonic:
    """The local clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Monotonic:
    clock = Monotonic()
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@pytest.fixture
def clock(url: str) -> Iterator[Clock]:
    clock = Clock(url)
    yield clock
    clock.dispose()


class Both:
    """The local clock and the database's, which go together unless said otherwise."""

    def __init__(self, local: Monotonic, clock: Clock) -> None:
        self._local, self._clock = local, clock
        self._ahead = 0.0

    def go(self, seconds: float, *, database: float | None = None) -> None:
        self._local.now += seconds
        self._ahead += seconds if database is None else database
        self._clock.set(timedelta(seconds=self._ahead))


@pytest.fixture
def both(local: Monotonic, clock: Clock) -> Both:
    return Both(local, clock)


# ---- fresh -----------------------------------------------------------------------------------------------------------


def test_a_runner_without_a_beat_is_not_fresh_and_may_nothing(engine: Engine, local: Monotonic) -> None:
    with opened(engine) as own:
        heart = make_heart(own, new_id())

        assert (heart.beaten, heart.fresh, heart.kept) == (False, False, None)


def test_a_runner_is_fresh_until_five_sixths_of_its_lease(engine: Engine, local: Monotonic) -> None:
    with opened(engine) as own:
        heart = make_heart(own, new_id())
        heart.step()
        local.now += 24.9
        assert heart.fresh
        local.now += 0.2
        assert not heart.fresh
        heart.step()
        assert heart.fresh


def test_a_lease_counts_from_before_the_beat_is_sent(
    engine: Engine, local: Monotonic, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(engine) as own:
        heart = make_heart(own, new_id())
        execute = own.execute

        def slow(*arguments: Any) -> Any:
            local.now += 26
            return execute(*arguments)

        monkeypatch.setattr(own, "execute", slow)
        heart.step()

        assert not heart.fresh


def test_nothing_may_be_fetched_before_the_runner_knows_of_deaths(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    with opened(engine) as own:
        heart = make_heart(own, new_id(), learnt=lambda fleet: seen.append(heart.beaten))
        heart.step()

    assert seen == [False]
    assert heart.beaten


def test_a_beat_says_who_the_runner_is(engine: Engine) -> None:
    runner_id = new_id()
    with opened(engine) as own:
        heart = make_heart(own, runner_id)
        heart.step()
        with engine.connect() as connection:
            (row,) = connection.execute(text("SELECT *, now() - heartbeat_at AS silent FROM river_runner"))
        silence(engine)
        heart.step()
        with engine.connect() as connection:
            (again,) = connection.execute(text("SELECT *, now() - heartbeat_at AS silent FROM river_runner"))

    assert (row.id, row.queues, row.slots, row.lease) == (runner_id, ["default"], [1], timedelta(seconds=30))
    assert again.started_at == row.started_at
    assert row.silent < timedelta(seconds=5) > again.silent


def test_a_beat_comes_as_often_as_asked_however_long_it_took(engine: Engine, local: Monotonic) -> None:
    with opened(engine) as own:
        assert make_heart(own, new_id(), every=5.0).step() == 5.0


# ---- may it rescue ---------------------------------------------------------------------------------------------------


def test_a_runner_may_rescue_once_it_has_kept_its_own_heartbeat_for_a_lease(both: Both, clock: Clock) -> None:
    with opened(clock.engine) as own:
        heart = make_heart(own, new_id())
        heart.step()
        may: list[bool] = []
        for _ in range(6):
            both.go(5)
            heart.step()
            may.append(heart.kept is not None)

    assert may == [False] * 5 + [True]


def _kept(heart: heartbeat.Heartbeat, both: Both) -> None:
    heart.step()
    for _ in range(6):
        both.go(5)
        heart.step()
    assert heart.kept is not None


def test_a_gap_of_more_than_two_beats_takes_a_whole_lease_to_make_good(both: Both, clock: Clock) -> None:
    with opened(clock.engine) as own:
        heart = make_heart(own, new_id())
        _kept(heart, both)
        both.go(9)
        heart.step()
        assert heart.kept is not None
        both.go(11)
        assert heart.kept is None  # at once, not only with the next beat
        heart.step()
        both.go(5)
        heart.step()
        assert heart.kept is None
        for _ in range(5):
            both.go(5)
            heart.step()
        assert heart.kept is not None


@pytest.mark.parametrize("jump", [timedelta(hours=1), timedelta(hours=-1)], ids=["forward", "back"])
def test_a_clock_of_the_database_that_was_set_frees_nobody_who_lives(both: Both, clock: Clock, jump: timedelta) -> None:
    living = new_id()
    with opened(clock.engine) as own, opened(clock.engine) as theirs:
        heart, other = make_heart(own, new_id()), make_heart(theirs, living)
        heart.step()
        other.step()
        make_job(clock.engine)
        fetch(theirs, f"{living}/1")
        for _ in range(6):
            both.go(5)
            heart.step()
            other.step()
        assert heart.kept is not None

        both.go(2, database=jump.total_seconds())
        assert sweep(own, heart.kept) == []  # before anybody's next beat
        both.go(3)
        heart.step()
        assert sweep(own, heart.kept) == []  # after its own, before the other's
        both.go(2)
        other.step()
        for _ in range(6):
            both.go(5)
            heart.step()
            other.step()
            assert sweep(own, heart.kept) == []
        assert heart.kept is not None

    assert count_states(clock.engine) == {"running": 1}


def test_the_dead_are_still_found_after_the_clock_was_set_back(both: Both, clock: Clock) -> None:
    dead = new_id()
    with opened(clock.engine) as own, opened(clock.engine) as theirs:
        make_heart(theirs, dead).step()
        both.go(1)
        make_heart(theirs, dead).step()  # the first beat inserts, with a default that is not shadowed
        make_job(clock.engine)
        fetch(theirs, f"{dead}/1")
        heart = make_heart(own, new_id())
        _kept(heart, both)
        both.go(0, database=-3_600)
        freed: list[Any] = []
        for _ in range(14):  # a lease until it may rescue again, and another for the dead
            both.go(5)
            heart.step()
            freed += sweep(own, heart.kept)

    assert len(freed) == 1


# ---- after a gap -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [False, True], ids=["the database was away", "the machine slept"])
def test_after_a_gap_a_runner_learns_which_jobs_it_lost_and_keeps_the_others(
    both: Both, clock: Clock, asleep: bool
) -> None:
    owner = new_id()
    told: list[list[int]] = []
    unfinished: list[JobRow] = []
    with opened(clock.engine) as own, opened(clock.engine) as other:
        heart = make_heart(
            own, owner, unfinished=unfinished, lost=lambda rows: told.append(sorted(row.id for row in rows))
        )
        heart.step()
        lost, again, kept, ended = make_jobs(clock.engine, 4)
        unfinished += fetch(own, f"{owner}/1")
        both.go(5)
        heart.step()
        assert told == []
        both.go(0.0 if asleep else 60.0, database=60.0)
        with clock.engine.begin() as connection:  # what a rescuer made of them meanwhile
            connection.execute(
                text("UPDATE river_job SET state = 'available' WHERE id IN (:a, :b)"), {"a": lost, "b": again}
            )
            connection.execute(
                text("UPDATE river_job SET state = 'completed', finalized_at = now() WHERE id = :a"), {"a": ended}
            )
        fetch(other, "other/1", slots={"default": 1})
        heart.step()

    assert told == [[lost, again, ended]]
    assert read_job(clock.engine, kept)["state"] == "running"


def test_a_gap_is_made_good_only_once_the_lost_are_known(
    engine: Engine, local: Monotonic, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Sequence[JobRow]] = []
    owner = new_id()
    with opened(engine) as own:
        make_job(engine)
        rows = fetch(own, f"{owner}/1")
        heart = make_heart(own, owner, unfinished=rows, lost=told.append)
        heart.step()
        told.clear()
        local.now += 60
        with monkeypatch.context() as broken:
            broken.setattr(heartbeat, "SELECT_OWN", text("SELECT 1 / 0"))
            with pytest.raises(Exception, match="division by zero"):
                heart.step()
        assert not heart.fresh
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_job SET state = 'available'"))
        heart.step()

    assert [len(rows) for rows in told] == [1]
    assert heart.fresh


# ---- what it learns --------------------------------------------------------------------------------------------------


def test_a_beat_learns_the_rank_the_suspects_the_deaths_and_what_is_to_be_cancelled(engine: Engine) -> None:
    first, second, third = (f"host:1:{number:016x}" for number in (1, 2, 3))
    make_runner(engine, first)
    make_runner(engine, third)
    make_runner(engine, "host:1:0000000000000000", silent=timedelta(minutes=1))
    asked = {"cancel_attempted_at": "2026-03-01T10:00:00Z"}
    cancelled = make_job(engine, state=JobState.RUNNING, token=f"{second}/1", metadata=asked)
    make_job(engine, state=JobState.RUNNING, token=f"{second}/1")
    make_job(engine, state=JobState.RUNNING, token=f"{first}/1", metadata=asked)
    told: list[Fleet] = []

    with opened(engine) as own:
        heart = make_heart(own, second, learnt=told.append)
        heart.step()
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (1, 1, 0)"))
        heart.step()
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_suspect SET deaths = 2"))
        heart.step()
        with engine.begin() as connection:  # it waits for its retry
            connection.execute(text("UPDATE river_job SET state = 'retryable' WHERE id = 1"))
        heart.step()

    assert [(fleet.rank, fleet.suspects, fleet.deaths, list(fleet.cancelled)) for fleet in told] == [
        (1, False, False, [cancelled]),
        (1, False, True, [cancelled]),
        (1, True, True, [cancelled]),
        (1, True, False, []),
    ]


def test_long_jobs_are_kept_fresh_for_rivers_rescuer_while_a_go_client_leads(engine: Engine) -> None:
    owner = new_id()
    long, young, others = (
        make_job(engine, state=JobState.RUNNING, token=token, attempted_at=at)
        for token, at in ((f"{owner}/1", "2026-01-01"), (f"{owner}/1", "now"), ("some_go_client", "2026-01-01"))
    )
    before = {job_id: text_of(engine, job_id) for job_id in (long, young, others)}

    with opened(engine) as own:
        make_heart(own, owner).step()
        assert {job_id: text_of(engine, job_id) for job_id in before} == before  # nobody leads
        with engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO river_leader (leader_id, elected_at, expires_at) "
                    "VALUES ('go', now(), now() + interval '15 seconds')"
                )
            )
        make_heart(own, owner).step()

    assert {job_id: text_of(engine, job_id) == before[job_id] for job_id in before} == {
        long: False,
        young: True,
        others: True,
    }
    assert read_job(engine, long)["token"] == f"{owner}/1"


def test_a_first_pause_in_an_open_transaction_holds_up_no_beat_and_no_other_queue(engine: Engine) -> None:
    def rows() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(text("SELECT name FROM river_queue ORDER BY name")).scalars())

    with opened(engine, lock_timeout="30s", statement_timeout="20s") as own, Session(engine) as session:
        heart = make_heart(own, new_id())
        heart.slots = {"a": 1, "b": 1, "c": 1}
        pause(session, "b")  # it has no row yet
        session.flush()
        heart.step()
        assert (heart.beaten, heart.fresh, set(heart.touched), rows()) == (True, True, {"a", "c"}, ["a", "c"])
        bound = own.execute(text("SHOW lock_timeout")).scalar_one()
        session.commit()
        heart.step()

    assert (set(heart.touched), rows(), bound) == ({"a", "b", "c"}, ["a", "b", "c"], "30s")


def test_a_runner_that_leaves_takes_its_row_along_unless_a_job_names_it(engine: Engine) -> None:
    with opened(engine) as own:
        heart = make_heart(own, new_id())
        heart.step()
        heart.leave()
    assert runners(engine) == []

    owner = new_id()
    make_job(engine, state=JobState.RUNNING, token=f"{owner}/1")
    with opened(engine) as own:
        heart = make_heart(own, owner)
        heart.step()
        heart.leave()
    assert runners(engine) == [owner]
