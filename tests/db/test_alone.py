"""The turn of a suspect, and a runner whose slots do not run empty."""

from collections.abc import Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, text

from sqla_river.duties.rescue import Isolate
from sqla_river.fetch import alone
from tests.making import Count, make_job, opened


def _suspect(engine: Engine) -> None:
    suspect = make_job(engine, attempt=2)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO river_suspect VALUES (:id, 2, 0)"), {"id": suspect})


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
