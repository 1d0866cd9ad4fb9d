"""The fence: who no longer holds a job changes nothing of it."""

from datetime import datetime, timedelta
from typing import Final

import pytest
from sqlalchemy import Engine

from sqla_river import failure, states
from sqla_river.complete import complete_parameters, settle_parameters
from sqla_river.rows import Fetched, Result
from sqla_river.statements import COMPLETE_JOBS, SELECT_HELD, SELECT_LOST, SETTLE_JOBS
from sqla_river.states import AttemptError, JobState, Transition
from sqla_river.store import OwnConnection
from tests.making import ended, fetch, make_completer, make_job, make_jobs, opened, read_job, text_of

ERROR: Final = AttemptError(1, "ValueError: no", "")
SEEN: Final = '{"seen": 1}'
JUST_COMPLETED: Final = "just completed"
OUTCOMES: Final = {
    JUST_COMPLETED: states.completed(),
    "completed": states.completed(),
    "completed with metadata": states.completed(SEEN),
    "errored": states.errored(ERROR, timedelta(seconds=1), SEEN),
    "discarded": states.discarded(ERROR, SEEN),
    "snoozed": states.snoozed(timedelta(seconds=1), SEEN),
    "cancelled": states.cancelled(ERROR, SEEN),
    "interrupted": states.interrupted(SEEN),
}


def _write(own: OwnConnection, job_id: int, token: str, transition: Transition) -> int:
    """How many rows that changed."""
    if transition == states.completed():
        return own.execute(COMPLETE_JOBS, complete_parameters([(job_id, token)])).rowcount
    return own.execute(SETTLE_JOBS, settle_parameters([(job_id, token, transition)])).rowcount


def _ended(job_id: int, outcome: str) -> Result | Fetched:
    return ended(job_id, None if outcome == JUST_COMPLETED else OUTCOMES[outcome])


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_with_another_token_changes_nothing(engine: Engine, outcome: str) -> None:
    job_id = make_job(engine, state=JobState.RUNNING, attempted_by=["yesterday/1", "test/1", "test/2"])
    was = text_of(engine, job_id)

    with opened(engine) as own:
        for token in ("yesterday/1", "test/1", "test/", "", "test/22"):
            changed = _write(own, job_id, token, OUTCOMES[outcome])

            assert changed == 0
    assert text_of(engine, job_id) == was


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_with_the_last_token_applies(engine: Engine, outcome: str) -> None:
    job_id = make_job(engine, state=JobState.RUNNING, attempted_by=["yesterday/1", "test/2"])

    with opened(engine) as own:
        changed = _write(own, job_id, "test/2", OUTCOMES[outcome])

    assert changed == 1


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_attempt_given_back_and_fetched_again_is_another_one(engine: Engine, outcome: str) -> None:
    """The attempt is number 1 both times: only the token tells them apart."""
    job_id = make_job(engine)
    with opened(engine) as own:
        first = fetch(own, "one/1")
        _write(own, job_id, "one/1", states.interrupted())
        second = fetch(own, "one/2")
        was = text_of(engine, job_id)

        changed = _write(own, job_id, "one/1", OUTCOMES[outcome])

    assert first[0].attempt == second[0].attempt == 1
    assert changed == 0
    assert text_of(engine, job_id) == was


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_stale_outcome_is_counted_and_forgotten(engine: Engine, outcome: str) -> None:
    stolen = make_job(engine, state=JobState.RUNNING, attempted_by=["test/1", "thief/1"])
    deleted = stolen + 1_000
    done = make_job(engine, state=JobState.COMPLETED, attempted_by=["test/1", "thief/1"])
    was = text_of(engine, stolen), text_of(engine, done)
    told: list[tuple[int, JobState]] = []

    with opened(engine) as own:
        completer = make_completer(own, lambda job_id, state: told.append((job_id, state)))
        for job_id in (stolen, deleted, done):
            completer.put(_ended(job_id, outcome))
        completer.step()

    assert completer.stale == 3
    assert completer.backlog == 0
    assert told == []
    assert (text_of(engine, stolen), text_of(engine, done)) == was


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_whose_reply_was_lost_is_neither_written_twice_nor_stale(engine: Engine, outcome: str) -> None:
    job_id = make_job(engine, state=JobState.RUNNING)
    told: list[tuple[int, JobState]] = []

    with opened(engine) as own:
        completer = make_completer(own, lambda job_id, state: told.append((job_id, state)))
        _write(own, job_id, "test/1", OUTCOMES[outcome])  # it was committed; the runner never heard of it
        was = text_of(engine, job_id)
        completer.put(_ended(job_id, outcome))
        completer.step()

    assert completer.stale == 0
    assert completer.backlog == 0
    assert text_of(engine, job_id) == was
    assert told == [(job_id, OUTCOMES[outcome].state)]


def test_a_neighbour_in_the_same_batch_does_not_share_a_stale_outcomes_fate(engine: Engine) -> None:
    ours, theirs = make_job(engine, state=JobState.RUNNING), make_job(engine, state=JobState.RUNNING, token="thief/1")

    with opened(engine) as own:
        own.execute(COMPLETE_JOBS, complete_parameters([(theirs, "test/1"), (ours, "test/1")]))

    assert read_job(engine, ours)["state"] == "completed"
    assert read_job(engine, theirs)["state"] == "running"


def test_two_jobs_never_answer_for_each_other(engine: Engine) -> None:
    """Ids and tokens belong together, in every statement that takes both."""
    one, two = (
        make_job(engine, state=JobState.RUNNING, token="a/1"),
        make_job(engine, state=JobState.RUNNING, token="b/1"),
    )
    crossed = {"p_ids": [one, two], "p_tokens": ["b/1", "a/1"]}

    with opened(engine) as own:
        completed = own.execute(COMPLETE_JOBS, complete_parameters([(one, "b/1"), (two, "a/1")])).rowcount
        held = own.execute(SELECT_HELD, crossed).all()
        settled = own.execute(
            SETTLE_JOBS, settle_parameters([(one, "b/1", states.interrupted()), (two, "a/1", states.interrupted())])
        ).all()

    assert (completed, held, settled) == (0, [], [])


def test_of_many_fetches_in_one_batch_each_job_answers_to_its_own(engine: Engine) -> None:
    tokens = [f"test/{1 + number % 7 % 3}" for number in range(60)]
    given = [(make_job(engine, state=JobState.RUNNING, token=token), token) for token in tokens]
    wrong = {job_id: "test/9" if job_id % 2 else "test/1" for job_id, token in given[::4] if token == "test/2"}

    with opened(engine) as own:
        asked = complete_parameters((job_id, wrong.get(job_id, token)) for job_id, token in reversed(given))
        completed = own.execute(COMPLETE_JOBS, asked).rowcount

    assert 0 < completed == len(given) - len(wrong) < len(given)
    for job_id, _ in given:
        assert read_job(engine, job_id)["state"] == ("running" if job_id in wrong else "completed")


def test_a_lost_fetch_is_looked_for_by_its_own_token(engine: Engine) -> None:
    ours = make_job(engine, state=JobState.RUNNING, attempted_by=["thief/1", "test/7"])
    make_job(engine, state=JobState.RUNNING, attempted_by=["test/7", "thief/1"])
    make_job(engine, state=JobState.COMPLETED, attempted_by=["test/7"])

    with opened(engine) as own:
        found = own.execute(SELECT_LOST, {"p_tokens": ["test/7", "test/8"]}).all()

    assert [(row[0], row[-1]) for row in found] == [(ours, "test/7")]


# ---- what is kept -------------------------------------------------------------------


def test_errors_have_the_shape_of_river(engine: Engine) -> None:
    job_id = make_job(engine, state=JobState.RUNNING, attempt=2, attempted_at="2026-03-04 05:06:07.089+02")

    with opened(engine, TimeZone="Asia/Tokyo") as own:
        _write(own, job_id, "test/1", states.discarded(AttemptError(2, "ValueError: 'no'", "line 1\nline 2")))

    (error,) = read_job(engine, job_id)["all_errors"]
    assert error == {
        "at": "2026-03-04T03:06:07.089000Z",
        "attempt": 2,
        "error": "ValueError: 'no'",
        "trace": "line 1\nline 2",
    }


def test_an_error_says_when_its_attempt_began(engine: Engine) -> None:
    job_id = make_job(engine)

    with opened(engine) as own:
        fetch(own)
        _write(own, job_id, "test/1", states.errored(ERROR, timedelta(0)))

    row = read_job(engine, job_id)
    assert datetime.fromisoformat(row["all_errors"][0]["at"]) == row["attempted_at"]


def test_the_last_25_errors_are_kept(engine: Engine) -> None:
    kept = [{"attempt": number} for number in range(25)]
    job_id = make_job(engine, state=JobState.RUNNING, errors=kept)

    with opened(engine) as own:
        _write(own, job_id, "test/1", states.discarded(AttemptError(26, "the last", "")))

    errors = read_job(engine, job_id)["all_errors"]
    assert [error["attempt"] for error in errors] == [*range(1, 25), 26]


def test_the_last_100_tokens_are_kept(engine: Engine) -> None:
    job_id = make_job(engine, attempted_by=[f"old/{number}" for number in range(150)])

    with opened(engine) as own:
        fetch(own, "new/1")

    tokens = read_job(engine, job_id)["attempted_by"]
    assert tokens == [*(f"old/{number}" for number in range(51, 150)), "new/1"]


@pytest.mark.parametrize(
    "message",
    ["", "NUL \0 and \ud800 half a pair", "x" * 1_000_000, "quotes ' \" \\ %s %(p_ids)s :p {}", "\x1b[31m\r\n"],
    ids=["empty", "unstorable", "long", "quotes", "escapes"],
)
def test_whatever_an_exception_says_can_be_stored(engine: Engine, message: str) -> None:
    job_id = make_job(engine, state=JobState.RUNNING)

    with opened(engine) as own:
        _write(own, job_id, "test/1", states.discarded(failure.attempt_error(1, ValueError(message))))

    (error,) = read_job(engine, job_id)["all_errors"]
    assert error["error"].startswith("ValueError")
    assert len(error["error"]) + len(error["trace"]) <= failure.LONGEST + 1_000


def test_many_snoozes_and_errors_leave_a_small_row(engine: Engine) -> None:
    """One that was fetched 95 times and failed 20 times, and goes on like that."""
    failed = {"at": "2026-01-01T00:00:00Z", "attempt": 1, "error": "E" * 2_000, "trace": "T" * 8_000}
    job_id = make_job(engine, attempted_by=[f"old/{number}" for number in range(95)], errors=[failed] * 20)
    again = "UPDATE river_job SET state = 'available', scheduled_at = now()"
    with opened(engine) as own, engine.connect() as connection:
        for number in range(12):
            fetch(own, f"test/{number}")
            error = AttemptError(number, "E" * 2_000, "T" * 8_000)
            _write(
                own,
                job_id,
                f"test/{number}",
                states.snoozed(timedelta(0)) if number % 2 else states.errored(error, timedelta(0)),
            )
            connection.exec_driver_sql(again)
            connection.commit()

    row = read_job(engine, job_id)
    assert len(row["all_errors"]) == 25
    assert len(row["attempted_by"]) == 100
    assert row["metadata"] == {"snoozes": 6}
    assert len(str(dict(row))) < 600 * 1_024


def test_ids_beyond_32_bits_work(engine: Engine) -> None:
    job_id = make_job(engine, id=2**40, state=JobState.RUNNING)

    with opened(engine) as own:
        changed = _write(own, job_id, "test/1", states.completed())

    assert changed == 1


def test_a_batch_may_hold_every_kind_of_outcome(engine: Engine) -> None:
    jobs = make_jobs(engine, len(OUTCOMES), state=JobState.RUNNING)
    told: list[tuple[int, JobState]] = []

    with opened(engine) as own:
        completer = make_completer(own, lambda job_id, state: told.append((job_id, state)))
        for job_id, outcome in zip(jobs, OUTCOMES, strict=True):
            completer.put(_ended(job_id, outcome))
        completer.step()

    assert sorted(told) == [
        (job_id, transition.state) for job_id, transition in zip(jobs, OUTCOMES.values(), strict=True)
    ]
    assert [read_job(engine, job_id)["state"] for job_id in jobs] == [
        transition.state for transition in OUTCOMES.values()
    ]
