"""Whose turn it is: duties are claimed by one, retried when they fail, and safe in any company."""

import logging
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from sqla_river.duties import turns
from sqla_river.duties.rescue import Isolate, Rescue
from sqla_river.duties.turns import Duty, Turns
from sqla_river.store import OwnConnection
from tests.crashing import FOR_EVER, make_runner
from tests.making import eventually, make_job, opened, read_job

HOUR = timedelta(hours=1)


class Chore:
    """A duty that counts how often it is done, or does what it is told."""

    def __init__(
        self,
        name: str = "chore",
        every: timedelta = HOUR,
        do: Callable[[OwnConnection], bool] = lambda own: False,
        entitled: Callable[[], bool] = lambda: True,
    ) -> None:
        self.name = name
        self.every = self.turn = every
        self.entitled = entitled
        self._do = do
        self.done = 0

    def do(self, own: OwnConnection) -> bool:
        self.done += 1
        return self._do(own)


def _fails(own: OwnConnection) -> bool:
    raise RuntimeError("it broke")


def _make_due(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE river_duty SET due_at = now()"))


def _due_in(engine: Engine, name: str = "chore") -> float:
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT extract(epoch FROM due_at - now())::float8 FROM river_duty WHERE name = :name"), {"name": name}
        )
        return float(found.scalar_one())


@contextmanager
def _put_off(engine: Engine, seconds: float, name: str = "chore") -> Generator[None]:
    """The block lets the duty be due so many seconds after a moment inside of it, however long it takes."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        before = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        yield
        due, after = connection.execute(
            text("SELECT due_at, clock_timestamp() FROM river_duty WHERE name = :name"), {"name": name}
        ).one()
    assert before <= due - timedelta(seconds=seconds) <= after


def _take_turn(turns_: Turns) -> float:
    """One step, and before it those that only make the rows."""
    while (pause := turns_.step()) == 0.0 and not turns_._unfinished:
        pass
    return pause


def test_a_duty_is_due_at_once_and_then_after_its_interval(engine: Engine) -> None:
    chore = Chore()
    with opened(engine) as own:
        mine = Turns(own, [chore])
        pauses = [_take_turn(mine) for _ in range(3)]

    assert chore.done == 1
    assert 3_590 < _due_in(engine) <= 3_600
    assert max(pauses) <= 5.25  # it looks again: somebody may have made it due


def test_whoever_claims_a_duty_does_it_alone(engine: Engine) -> None:
    chores = [Chore(every=timedelta(minutes=1)) for _ in range(8)]
    barrier = threading.Barrier(8)

    def run(chore: Chore) -> None:
        with opened(engine) as own:
            mine = Turns(own, [chore])
            for _ in range(20):
                barrier.wait(20)
                _take_turn(mine)
                barrier.wait(20)
                if chore is chores[0]:
                    _make_due(engine)
                barrier.wait(20)

    threads = [threading.Thread(target=run, args=(chore,)) for chore in chores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sum(chore.done for chore in chores) == 20


def test_one_that_is_not_entitled_leaves_the_duty_to_others(engine: Engine) -> None:
    idle, busy = Chore(entitled=lambda: False), Chore()
    with opened(engine) as own, opened(engine) as other:
        pause = _take_turn(Turns(own, [idle]))
        assert _due_in(engine) <= 0
        _take_turn(Turns(other, [busy]))

    assert (idle.done, busy.done) == (0, 1)
    assert 0 < pause <= 5.25


def test_one_that_loses_its_entitlement_stops_in_the_middle(engine: Engine) -> None:
    entitled = [True]
    chore = Chore(do=lambda own: True, entitled=lambda: entitled[0])
    with opened(engine) as own:
        mine = Turns(own, [chore])
        _take_turn(mine)
        _take_turn(mine)
        entitled[0] = False
        _take_turn(mine)
        entitled[0] = True
        _take_turn(mine)

    assert chore.done == 2


def test_a_duty_with_more_to_do_goes_on_at_once_and_others_have_their_turn_in_between(engine: Engine) -> None:
    left = [5]

    def batch(own: OwnConnection) -> bool:
        left[0] -= 1
        return left[0] > 0

    long, other = Chore("long", do=batch), Chore("other")
    with opened(engine) as own:
        mine = Turns(own, [long, other])
        pauses: list[float] = []
        for number in range(6):
            pauses.append(_take_turn(mine))
            if number == 1:
                _make_due(engine)

    assert long.done - 1 == 5  # it was made due once more
    assert other.done == 2
    assert pauses[:4] == [0.0] * 4


def test_the_most_urgent_duty_comes_first(engine: Engine) -> None:
    order: list[str] = []

    def note(name: str) -> Duty:
        def do(own: OwnConnection) -> bool:
            order.append(name)
            return False

        return Chore(name, do=do)

    with opened(engine) as own:
        _take_turn(Turns(own, [note("z_rescue"), note("m_prune"), note("a_clean")]))

    assert order == ["z_rescue", "m_prune", "a_clean"]


def test_a_failing_duty_is_tried_again_after_one_second_doubling_to_sixty_and_the_others_go_on(
    engine: Engine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqla_river.logs.REPEAT_EVERY", 0.0)
    broken, healthy = Chore("chore", do=_fails), Chore("healthy")
    with opened(engine) as own:
        mine = Turns(own, [broken, healthy])
        for seconds in (1, 2, 4, 8, 16, 32, 60, 60, 60):
            with _put_off(engine, seconds):
                _take_turn(mine)
            _make_due(engine)

    assert healthy.done == 9
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 9
    assert "duty chore failed (3 in a row)" in said[2]
    assert "it broke; due again in 4 s" in said[2]


def test_a_success_ends_the_row_of_failures(engine: Engine) -> None:
    fails = [True]
    chore = Chore(do=lambda own: _fails(own) if fails[0] else False)
    with opened(engine) as own:
        mine = Turns(own, [chore])
        for wanted in (True, True, False):
            fails[0] = wanted
            _take_turn(mine)
            _make_due(engine)
        fails[0] = True
        with _put_off(engine, 1):
            _take_turn(mine)


def test_the_loop_looks_again_when_a_failed_duty_is_due(engine: Engine) -> None:
    with opened(engine) as own:
        pause = _take_turn(Turns(own, [Chore(do=_fails)]))

    assert 0.9 < pause <= 1.25


def test_a_statement_that_takes_too_long_fails_its_duty_only(engine: Engine) -> None:
    def slow(own: OwnConnection) -> bool:
        own.execute(text("SELECT pg_sleep(30)"))
        return False

    healthy = Chore("healthy")
    with opened(engine, statement_timeout="1s") as own:  # for those of the turn itself, too
        _take_turn(Turns(own, [Chore(do=slow), healthy]))

    assert healthy.done == 1
    assert turns.STATEMENT_TIMEOUT == "10s"


def test_a_duty_whose_runner_dies_in_the_middle_is_done_by_another_after_its_interval(engine: Engine) -> None:
    def die(own: OwnConnection) -> bool:
        own.raw.close()
        own.execute(text("SELECT 1"))
        return False

    other = Chore(every=timedelta(minutes=1))
    with opened(engine) as own:
        broken = Turns(own, [Chore(every=timedelta(minutes=1), do=die)])
        _take_turn(broken)
        # its connection broke, and it postponed the duty on a new one; had it died, the claim alone would stand
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_duty SET due_at = now() + interval '1 minute'"))
    with opened(engine) as own:
        mine = Turns(own, [other])
        _take_turn(mine)
        assert other.done == 0
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_duty SET due_at = due_at - interval '1 minute'"))
        _take_turn(mine)

    assert other.done == 1


def test_a_duty_that_failed_as_the_database_went_away_is_taken_up_only_by_a_new_claim(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entitled = [True]
    chore = Chore(do=_fails, entitled=lambda: entitled[0])
    with opened(engine) as own:
        mine = Turns(own, [chore])
        mine.step()
        with monkeypatch.context() as away:
            away.setattr(turns, "POSTPONE_DUTY", text("SELECT 1 / 0"))
            with pytest.raises(Exception, match="division by zero"):
                mine.step()
        entitled[0] = False  # as rescue is after an outage
        _take_turn(mine)

    assert chore.done == 1


def test_rows_that_were_deleted_are_made_anew(engine: Engine) -> None:
    chore = Chore()
    with opened(engine) as own:
        mine = Turns(own, [chore])
        _take_turn(mine)
        with engine.begin() as connection:
            connection.execute(text("DELETE FROM river_duty"))
        _take_turn(mine)

    assert chore.done == 2


def test_duties_of_others_are_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_duty (name, due_at) VALUES ('of a newer deploy', '2020-01-01')"))

    with opened(engine) as own:
        _take_turn(Turns(own, [Chore()]))

    with engine.connect() as connection:
        row = connection.execute(text("SELECT due_at::text, done_at FROM river_duty WHERE name <> 'chore'")).one()
    assert (row.due_at[:10], row.done_at) == ("2020-01-01", None)


@pytest.mark.parametrize(("every", "turn", "furthest"), [(5, 5, 70), (5, 130, 140), (3_600, 5, 3_610)])
def test_a_duty_that_was_postponed_before_the_clock_was_set_back_is_done(
    engine: Engine, every: int, turn: int, furthest: int
) -> None:
    chore = Chore(every=timedelta(seconds=every))
    chore.turn = timedelta(seconds=turn)
    done: list[int] = []
    with opened(engine) as own:
        mine = Turns(own, [chore])
        _take_turn(mine)
        for due_in in (furthest - 1, furthest + 10):  # as far as it may be put off; and further
            with engine.begin() as connection:
                connection.execute(
                    text("UPDATE river_duty SET due_at = now() + :due_in"), {"due_in": timedelta(seconds=due_in)}
                )
            _take_turn(mine)
            done.append(chore.done)

    assert done == [1, 2]


def test_the_dead_are_found_soon_after_the_clock_was_set_back_by_some_minutes(engine: Engine) -> None:
    job_id = make_job(engine, state="running", token=f"{make_runner(engine, silent=HOUR)}/1")
    with opened(engine) as own:
        mine = Turns(own, [Rescue(lambda: FOR_EVER, lambda _: None)])
        mine.step()  # makes the row
        with engine.begin() as connection:  # 5 s ahead of what the clock was
            connection.execute(text("UPDATE river_duty SET due_at = now() + interval '4 minutes 5 seconds'"))
        _take_turn(mine)

    assert read_job(engine, job_id)["state"] == "available"


def test_the_age_of_the_last_success_grows_wherever_that_was_and_whatever_fails(engine: Engine) -> None:
    broken = Chore(do=_fails)
    with opened(engine) as own, opened(engine) as other:
        mine, theirs = Turns(own, [broken, Chore("unheard")]), Turns(other, [Chore()])
        assert mine.ages() == {"chore": None, "unheard": None}
        _take_turn(theirs)
        with engine.begin() as connection:
            connection.execute(text("UPDATE river_duty SET done_at = done_at - interval '1 minute', due_at = now()"))
        _take_turn(mine)
        age = mine.ages()["chore"] or timedelta(0)
        eventually(lambda: (mine.ages()["chore"] or age) > age, what="it to grow while the loop stands still")

    assert timedelta(seconds=60) <= age < timedelta(seconds=70)
    assert mine.ages()["unheard"] is None


def test_the_age_starts_anew_with_a_success_and_not_before_the_last_batch(engine: Engine) -> None:
    left = [2]

    def batch(own: OwnConnection) -> bool:
        left[0] -= 1
        return left[0] > 0

    with opened(engine) as own:
        mine = Turns(own, [Chore(do=batch)])
        _take_turn(mine)
        _take_turn(Turns(own, [Chore(entitled=lambda: False)]))
        with engine.connect() as connection:
            assert connection.execute(text("SELECT done_at FROM river_duty")).scalar() is None
        _take_turn(mine)
        with engine.connect() as connection:
            assert connection.execute(text("SELECT done_at FROM river_duty")).scalar() is not None


def test_a_look_fails_loudly_while_the_database_is_away(engine: Engine) -> None:
    with opened(engine) as own:
        mine = Turns(own, [Chore()])
        _take_turn(mine)
        own.raw.close()

        with pytest.raises(OperationalError):
            mine.step()
        mine.step()  # on a new connection


# ---- isolation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [True, False])
def test_one_runner_at_a_time_has_the_turn_of_running_suspects_alone(engine: Engine, begun: bool) -> None:
    asked: list[Any] = []

    def begin(own: OwnConnection) -> bool:
        asked.append(own)
        return begun

    with opened(engine) as own:
        mine = Turns(own, [Isolate(lambda: True, begin, lambda: timedelta(seconds=130))])
        with _put_off(engine, 130 if begun else 5, "isolate"):
            _take_turn(mine)

    assert len(asked) == 1


def test_without_suspects_nobody_takes_that_turn(engine: Engine) -> None:
    make_job(engine)
    with opened(engine) as own:
        _take_turn(Turns(own, [Isolate(lambda: False, lambda own: pytest.fail("there is none"), timedelta)]))

    assert _due_in(engine, "isolate") <= 0
