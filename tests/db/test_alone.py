"""The turn of a suspect, and a runner whose slots do not run empty."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, Executable, text
from sqlalchemy.exc import DBAPIError

from sqla_river.duties.rescue import Isolate
from sqla_river.fetch import alone, due, fetcher
from sqla_river.statements import FETCH_AVAILABLE, FETCH_SUSPECT, POSTPONE_DUTY, SELECT_LOST
from sqla_river.store import OwnConnection
from tests.making import Count, make_fetcher, make_job, make_jobs, opened


def _suspect(engine: Engine) -> int:
    suspect = make_job(engine, attempt=2)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect VALUES (:id, 2, 0)"), {"id": suspect})
    return suspect


def _asked() -> Mapping[str, Any]:
    return {"p_queues": ["default"], "p_kinds": [Count.kind]}


def test_a_runner_waits_longer_for_its_slots_to_run_empty_after_each_turn_in_vain_and_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1_000.0]
    monkeypatch.setattr(alone, "time", SimpleNamespace(monotonic=lambda: now[0]))
    _suspect(engine)
    waited: list[float] = []
    with opened(engine) as own:
        turn = alone.Turn(own, "test", _asked, lambda: None)
        for _ in range(6):
            while not turn.begin(own):
                now[0] += 1
            began, longest = now[0], turn.longest
            while turn.on:
                now[0] += 1
                turn.step(busy=True, fetch=lambda: pytest.fail("a slot is busy"))
            waited.append(now[0] - began)
            assert timedelta(seconds=waited[-1]) < longest < Isolate.turn

    assert waited == [30, 60, 120, 240, 480, 480]
    assert caplog.text.count("waits to run alone") == 1


def test_a_turn_whose_suspect_somebody_has_locked_is_not_taken_again_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1_000.0]
    monkeypatch.setattr(alone, "time", SimpleNamespace(monotonic=lambda: now[0]))
    _suspect(engine)
    with opened(engine) as own:
        turn = alone.Turn(own, "test", _asked, lambda: None)
        assert turn.begin(own)
        now[0] += 5  # for the slots to run empty
        turn.step(busy=False, fetch=lambda: False)
        assert not turn.on
        again = [turn.begin(own)]
        now[0] += 46
        again.append(turn.begin(own))

    assert again == [False, True]
    assert "waits to run alone" not in caplog.text


# ---- a fetch whose reply is lost -----------------------------------------------------------------------------------


class _Severed(OwnConnection):
    """Its server ends it before it executes one of *sever*, or, if *late*, when it has; and it counts what was sent."""

    sever: tuple[Executable, ...] = ()
    late = False

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, None, "test", {"enable_seqscan": "off"})
        self._other = engine
        self.sent: list[Executable] = []

    def execute(self, statement: Executable, parameters: Mapping[str, Any] | None = None) -> Any:
        self.sent.append(statement)
        if statement not in self.sever:
            return super().execute(statement, parameters)
        self.sever = ()
        if self.late:
            super().execute(statement, parameters).all()
        with self._other.connect() as connection:
            pid = self.raw.info.backend_pid
            connection.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        return super().execute(statement, parameters)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The local clock, which goes on only as the test says."""
    now = [1_000.0]

    def sleep(_: float) -> None: ...

    for module in (fetcher, due, alone):
        clock = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
        monkeypatch.setattr(module, "time", clock)
    return now


@contextmanager
def _severed(engine: Engine, **said: Any) -> Generator[tuple[_Severed, fetcher.Fetcher, list[int]]]:
    own = _Severed(engine)
    delivered: list[int] = []

    def deliver(found: list[Any]) -> None:
        delivered.extend(row.id for row in found)

    rows: Any = SimpleNamespace(extend=deliver)
    try:
        yield own, make_fetcher(own, rows, **said), delivered
    finally:
        own.close()


def _lose(own: _Severed, fetcher: fetcher.Fetcher, statement: Executable, *, late: bool = False) -> None:
    own.sever, own.late = (statement,), late
    with pytest.raises(DBAPIError):
        fetcher.step()


def test_no_turn_begins_while_the_reply_to_a_fetch_is_lost_and_fetching_goes_on(
    engine: Engine, now: list[float]
) -> None:
    _suspect(engine)
    with _severed(engine) as (own, fetcher, delivered), opened(engine) as duties:
        _lose(own, fetcher, FETCH_AVAILABLE)
        fetcher.step()
        begun = [fetcher.turn.begin(duties)]
        for second in range(1, 32):
            (job_id,) = make_jobs(engine)
            fetcher.heard("default")
            now[0] += 1
            fetcher.step()
            assert delivered[-1:] == [job_id], f"after {second} s"
        now[0] += 1
        fetcher.step()
        begun.append(fetcher.turn.begin(duties))

    assert begun == [False, True]


def test_a_turn_into_which_a_reply_was_lost_is_called_off_and_begins_again_when_all_is_known(
    engine: Engine, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """A fetch was on its way when it began."""
    suspect = _suspect(engine)
    with _severed(engine) as (own, fetcher, delivered), opened(engine) as duties:

        def fetch(statement: Executable, parameters: Any) -> Any:
            if not fetcher.turn.on:
                assert fetcher.turn.begin(duties)
            return OwnConnection.fetch(own, statement, parameters)

        setattr(own, "fetch", fetch)  # noqa: B010
        _lose(own, fetcher, FETCH_AVAILABLE)
        delattr(own, "fetch")
        others = make_jobs(engine, 5)
        for _ in range(3):
            fetcher.step()
        beside = sorted(delivered)
        for _ in others:
            fetcher.freed("default")
        now[0] += 32
        fetcher.step()
        begun = fetcher.turn.begin(duties)
        fetcher.step()

    assert beside == others
    assert begun
    assert delivered[-1] == suspect
    assert "waits to run alone" not in caplog.text


@pytest.mark.parametrize("late", [True, False], ids=["the suspect runs", "it does not"])
def test_a_suspect_whose_fetch_got_no_reply_is_looked_for_once_a_second_and_its_turn_is_not_in_vain(
    engine: Engine, now: list[float], caplog: pytest.LogCaptureFixture, late: bool
) -> None:
    suspect = _suspect(engine)
    with _severed(engine) as (own, fetcher, delivered), opened(engine) as duties:
        assert fetcher.turn.begin(duties)
        _lose(own, fetcher, FETCH_SUSPECT, late=late)
        began = now[0]
        while not delivered:
            now[0] += max(0.001, fetcher.step())
        found = now[0] - began
        others = make_jobs(engine, 3)
        while now[0] < began + 59:
            now[0] += max(0.001, fetcher.step())
            assert delivered == [suspect]
        looked = own.sent.count(SELECT_LOST)
        fetcher.freed("default")
        while fetcher.turn.on:
            now[0] += max(0.001, fetcher.step())
        fetcher.step()
        _suspect(engine)
        again = fetcher.turn.begin(duties)

    assert found <= (1.1 if late else 33)
    assert looked <= 33
    assert sorted(delivered) == [suspect, *others]
    assert again
    assert "waits to run alone" not in caplog.text


# ---- what the server refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [FETCH_SUSPECT, POSTPONE_DUTY], ids=["the suspect", "the end of the turn"])
def test_a_turn_that_the_server_refuses_something_is_over_and_fetching_goes_on(
    engine: Engine, now: list[float], refused: Executable
) -> None:
    suspect = _suspect(engine)
    with _severed(engine) as (own, fetcher, delivered), opened(engine) as duties:
        assert fetcher.turn.begin(duties)
        execute = own.execute

        def refuse(statement: Executable, *rest: Any) -> Any:
            return execute(text("SELECT 1 / 0") if statement is refused else statement, *rest)

        setattr(own, "execute", refuse)  # noqa: B010
        for _ in range(3):
            fetcher.step()
            if suspect in delivered:
                fetcher.freed("default")
        others = make_jobs(engine, 3)
        fetcher.heard("default")
        fetcher.step()

    assert sorted(set(delivered) - {suspect}) == others
    assert not fetcher.unsure


def test_a_thousand_turns_in_vain_and_more_break_nothing(engine: Engine, now: list[float]) -> None:
    _suspect(engine)
    with opened(engine) as own:
        turn = alone.Turn(own, "test", _asked, lambda: None)
        turn._in_vain = 5_000
        assert turn.begin(own)
        now[0] += alone.LONGEST
        turn.step(busy=True, fetch=lambda: pytest.fail("a slot is busy"))

    assert not turn.on
    assert turn.longest < Isolate.turn
