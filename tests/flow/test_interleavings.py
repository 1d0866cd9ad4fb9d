"""Every order in which two runners, a rescuer, a scheduler, a canceller, a pruner and a hand can meet on one job.

The real statements run on a real database, one after the other, in one transaction that is rolled back to where the
orders part: so now() stands still, equal rows are equal in every byte, and an order that leads to where another has
been need not be followed again. Orders are counted, all the same. River's own statements, at the end, show that this
finds what it looks for.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

import pytest
from sqlalchemy import Connection, create_engine, text

from sqla_river import states, store
from sqla_river.complete import complete_parameters, settle_parameters
from sqla_river.statements import (
    COMPLETE_JOBS,
    FETCH_AVAILABLE,
    FETCH_SUSPECT,
    INSERT_LOST_RUNNERS,
    PRUNE_CANCELLED,
    PRUNE_COMPLETED,
    PRUNE_DISCARDED,
    RESCUE_STUCK,
    SCHEDULE_DUE,
    SETTLE_JOBS,
)
from sqla_river.states import FINALIZED, AttemptError, Transition
from tests.conftest import _database
from tests.crashing import FOR_EVER
from tests.making import Count, make_job

DEAD: Final = "host:1:00000000000000aa"
"""Runner A: it works on, but its lease has run out."""
ALIVE: Final = "host:1:00000000000000bb"
NO_TIME: Final = timedelta(0)
SUSPICIOUS: Final = 2
"""Deaths after which a job runs only alone."""
UNREADY: Final = ("scheduled", "retryable")
WAITING: Final = ("available", *UNREADY)


class Row(NamedTuple):
    """The job as it stands; `whole` is every byte of it, and what is known of its deaths."""

    state: str
    attempt: int
    max_attempts: int
    token: str | None
    due: bool
    marked: bool
    errors: int
    deaths: int
    whole: str


class Past(NamedTuple):
    """What has happened that a row does not say."""

    fetched: frozenset[str] = frozenset()
    """Tokens under which the job was handed out."""
    ended: str | None = None
    """The terminal state that somebody was told of, until a hand retries the job."""
    completions: int = 0
    """Acknowledged since a hand retried it last."""


NOTHING: Final = Past()
Do = Callable[[Connection, int], bool]
"""One statement on one job; whether it says that it did something."""


class Operation(NamedTuple):
    name: str
    do: Do
    kind: str
    token: str | None = None
    transition: Transition | None = None
    alone: bool = False


def _fetch(token: str, *, alone: bool = False) -> Operation:
    runner = token.partition("/")[0]
    asked = {"p_queues": ["default"], "p_slots": [1], "p_kinds": [Count.kind], "p_token": token, "p_id": runner}
    statement = FETCH_SUSPECT if alone else FETCH_AVAILABLE

    def do(connection: Connection, _: int) -> bool:
        return bool(store.execute(connection, None, statement, asked).all())

    return Operation(f"fetch{' alone' if alone else ''} by {token}", do, "fetch", token, alone=alone)


def _outcome(token: str, name: str, transition: Transition) -> Operation:
    def do(connection: Connection, job_id: int) -> bool:
        if transition is states.completed():
            given = complete_parameters([(job_id, token)])
            if store.execute(connection, None, COMPLETE_JOBS, given).rowcount > 0:
                return True  # else the completer goes the general way; here for each order that was rolled back
        return bool(
            store.execute(connection, None, SETTLE_JOBS, settle_parameters([(job_id, token, transition)])).all()
        )

    return Operation(f"{name} by {token}", do, "outcome", token, transition)


def _insert_lost(connection: Connection, _: int) -> bool:
    store.execute(connection, None, INSERT_LOST_RUNNERS)
    return False


def _rescue(connection: Connection, _: int) -> bool:
    return bool(store.execute(connection, None, RESCUE_STUCK, {"p_schema": None, "p_until": FOR_EVER}).all())


def _schedule(connection: Connection, _: int) -> bool:
    return bool(store.execute(connection, None, SCHEDULE_DUE, {"p_schema": None}).all())


def _prune(connection: Connection, _: int) -> bool:
    over: dict[str, Any] = {"p_age": timedelta(seconds=-1), "p_back": None, "p_queue": None, "p_others": []}
    found = [
        store.execute(connection, None, prune, over).rowcount
        for prune in (PRUNE_COMPLETED, PRUNE_CANCELLED, PRUNE_DISCARDED)
    ]
    return any(found)


def _sql(sql: str) -> Do:
    def do(connection: Connection, job_id: int) -> bool:
        return bool(connection.execute(text(sql), {"id": job_id}).rowcount)

    return do


# As River's own clients do them: JobCancel and JobRetry.
CANCEL: Final = """
    UPDATE river_job SET
        state = CASE WHEN state = 'running' THEN state ELSE 'cancelled' END,
        finalized_at = CASE WHEN state = 'running' THEN finalized_at ELSE now() END,
        metadata = jsonb_set(metadata, '{cancel_attempted_at}', to_jsonb(now()), true)
    WHERE id = :id AND state NOT IN ('cancelled', 'completed', 'discarded') AND finalized_at IS NULL"""
RETRY: Final = """
    UPDATE river_job SET state = 'available', scheduled_at = now(), finalized_at = NULL,
        metadata = metadata - 'cancel_attempted_at',
        max_attempts = CASE WHEN attempt = max_attempts THEN max_attempts + 1 ELSE max_attempts END
    WHERE id = :id AND state <> 'running' AND NOT (state = 'available' AND scheduled_at < now())"""

A, B = f"{DEAD}/1", f"{ALIVE}/1"
BOOM: Final = AttemptError(1, "boom")
OUTCOMES: Final = {
    "complete": states.completed(),
    "fail": states.errored(BOOM, NO_TIME),
    "snooze": states.snoozed(NO_TIME),
    "interrupt": states.interrupted(),
    "discard": states.discarded(BOOM),
    "cancel itself": states.cancelled(BOOM),
}
RESCUE: Final = (Operation("look for lost runners", _insert_lost, "look"), Operation("rescue", _rescue, "rescue"))
SCHEDULE: Final = (Operation("schedule", _schedule, "schedule"),)
ASK: Final = (Operation("cancel", _sql(CANCEL), "cancel"),)
PRUNE: Final = (Operation("prune", _prune, "prune"),)
HAND: Final = (Operation("retry by hand", _sql(RETRY), "retry"),)


def _runner(token: str, outcome: str) -> tuple[Operation, ...]:
    return _fetch(token), _outcome(token, outcome, OUTCOMES[outcome])


STARTS: Final[dict[str, dict[str, Any]]] = {
    "available": {},
    "available, last attempt": {"max_attempts": 1},
    "available, not due": {"due_in": timedelta(hours=1)},
    "available, a suspect": {"attempt": 2, "deaths": 2},
    "scheduled": {"state": "scheduled", "due_in": -timedelta(seconds=1)},
    "scheduled, not due": {"state": "scheduled", "due_in": timedelta(hours=1)},
    "retryable": {"state": "retryable", "due_in": -timedelta(seconds=1), "attempt": 1},
    "pending": {"state": "pending"},
    "running under A": {"state": "running", "token": A},
    "running under A, last attempt": {"state": "running", "token": A, "max_attempts": 1},
    "running under A, to be cancelled": {"state": "running", "token": A, "metadata": {"cancel_attempted_at": "x"}},
    "running under A, which has met a death": {"state": "running", "token": A, "attempt": 2, "deaths": 1},
    "running under B": {"state": "running", "token": B},
    "running under a Go client": {"state": "running", "token": "go", "attempted_at": "2020-01-01"},
    "completed": {"state": "completed", "attempt": 1},
    "cancelled": {"state": "cancelled", "metadata": {"cancel_attempted_at": "x"}},
    "discarded": {"state": "discarded", "attempt": 25},
}

READ: Final = text(
    """
    SELECT j.state::text, j.attempt, j.max_attempts, j.attempted_by[cardinality(j.attempted_by)],
           j.scheduled_at <= now(), j.metadata ? 'cancel_attempted_at', coalesce(cardinality(j.errors), 0),
           coalesce(s.deaths, 0), j::text || coalesce(s::text, '')
    FROM river_job j LEFT JOIN river_suspect s ON s.job_id = j.id WHERE j.id = :id"""
)


def _read(connection: Connection, job_id: int) -> Row | None:
    row = connection.execute(READ, {"id": job_id}).one_or_none()
    return Row(*row) if row is not None else None


# ---- the model -------------------------------------------------------------------------------------------------------


def _expected(operation: Operation, row: Row) -> tuple[str | None, int, str | None, int]:
    """State (None: gone), attempt, token and errors that *operation* leaves of *row*."""
    same = (row.state, row.attempt, row.token, row.errors)
    running, token = row.state == "running", operation.token
    match operation.kind:
        case "fetch" if row.state == "available" and row.due and operation.alone == (row.deaths >= SUSPICIOUS):
            return "running", row.attempt + 1, token, row.errors
        case "outcome" if running and row.token == token and operation.transition is not None:
            wished = operation.transition
            errors = row.errors + (wished.error is not None)
            if row.marked and wished.state in WAITING:
                return "cancelled", row.attempt, token, errors
            return wished.state.value, max(row.attempt - wished.attempt_back, 0), token, errors
        case "rescue" if running and row.token != B:
            to = "cancelled" if row.marked else "discarded" if row.attempt >= row.max_attempts else "available"
            return to, row.attempt, row.token, row.errors + 1
        case "schedule" if row.state in UNREADY and row.due:
            return "available", row.attempt, row.token, row.errors
        case "cancel" if row.state not in FINALIZED and not running:
            return "cancelled", row.attempt, row.token, row.errors
        case "prune" if row.state in FINALIZED:
            return None, 0, None, 0
        case "retry" if not running:
            return "available", row.attempt, row.token, row.errors
        case _:
            return same


def _check(operation: Operation, before: Row, after: Row | None, said: bool, past: Past) -> tuple[Past, str | None]:
    """What is past now, and what *operation* broke, if anything."""
    expected = _expected(operation, before)
    found = (after.state, after.attempt, after.token, after.errors) if after is not None else (None, 0, None, 0)
    if found != expected:
        return past, f"{before.state} became {found}, and not {expected}"
    changed = after is None or (after.state, after.attempt) != (before.state, before.attempt)
    if operation.kind in ("fetch", "outcome", "rescue", "schedule", "prune") and said != changed:
        return past, f"it said {said} and did {changed}"
    if not said and after is not None and after.whole != before.whole:
        return past, "it said nothing and changed the row"
    past, broken = _remember(operation, before, after, said, past)
    return past, broken or (_misfit(operation, before, after, said) if after is not None else None)


def _remember(operation: Operation, before: Row, after: Row | None, said: bool, past: Past) -> tuple[Past, str | None]:
    """What is past now, and what of the past was broken."""
    if operation.kind == "fetch" and said and operation.token is not None:
        if operation.token in past.fetched:
            return past, "a token was used twice"
        past = past._replace(fetched=past.fetched | {operation.token})
    if operation.kind == "retry" and said:
        past = past._replace(ended=None, completions=0)
    if after is None:
        return past, None if before.state in FINALIZED else "the job is lost"
    if past.ended is not None and after.state != past.ended:
        return past, f"{past.ended} was acknowledged and undone"
    if said and after.state in FINALIZED:
        completions = past.completions + (operation.kind == "outcome" and after.state == "completed")
        past = past._replace(ended=after.state, completions=completions)
    return past, "it completed twice" if past.completions > 1 else None


def _misfit(operation: Operation, before: Row, after: Row, said: bool) -> str | None:
    """What may not be, whatever has happened."""
    if operation.kind == "fetch" and said and before.marked:
        return "a job that was to be cancelled began again"
    if after.state == "available" and not after.due and before.state != "available":
        return "available and not due"
    if after.marked and after.state in WAITING:
        return "a job that is to be cancelled waits to begin again"
    if operation.kind == "rescue" and said and before.token == A and after.deaths != before.deaths + 1:
        return "a death was not counted"
    return None


# ---- the orders ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    orders: int
    violations: int


def _orders(left: Sequence[int]) -> int:
    """In how many orders sequences of these lengths can be merged."""
    return math.factorial(sum(left)) // math.prod(map(math.factorial, left))


Check = Callable[[Operation, Row, Row | None, bool, Past], tuple[Past, str | None]]


class Explorer:
    """Follows every merge of the actors' sequences, from one start; with *depth* only its first so many operations."""

    def __init__(
        self,
        connection: Connection,
        job_id: int,
        actors: Sequence[Sequence[Operation]],
        check: Check,
        depth: int | None = None,
    ) -> None:
        self._connection = connection
        self._depth = depth
        self._job_id = job_id
        self._actors = actors
        self._check = check
        self._known: dict[Any, Found] = {}
        self._freed: set[str] = set()
        self.broken: list[str] = []

    def explore(
        self, row: Row | None, path: tuple[str, ...] = (), at: tuple[int, ...] = (), past: Past = NOTHING
    ) -> Found:
        at = at or (0,) * len(self._actors)
        left = [len(actor) - done for actor, done in zip(self._actors, at, strict=True)]
        if row is None:  # nobody finds it any more
            return Found(self._rest(left), 0)
        key = (row.whole, at, past)
        if key in self._known:
            return self._known[key]
        if self._rest(left) == 1 and (not any(left) or len(path) == self._depth):
            self._known[key] = Found(1, int(self._is_stuck(row, path)))
            return self._known[key]
        name = f"at_{len(path)}"
        self._connection.exec_driver_sql(f"SAVEPOINT {name}")
        orders = violations = 0
        for number, actor in enumerate(self._actors):
            if not left[number]:
                continue
            operation = actor[at[number]]
            said = operation.do(self._connection, self._job_id)
            after = _read(self._connection, self._job_id)
            then, broken = self._check(operation, row, after, said, past)
            there = (*at[:number], at[number] + 1, *at[number + 1 :])
            if broken is not None:
                self.broken.append(f"{' > '.join((*path, operation.name))}: {broken}")
                beyond = self._rest([len(each) - done for each, done in zip(self._actors, there, strict=True)])
                found = Found(beyond, beyond)
            else:
                found = self.explore(after, (*path, operation.name), there, then)
            orders, violations = orders + found.orders, violations + found.violations
            self._connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {name}")
        self._connection.exec_driver_sql(f"RELEASE SAVEPOINT {name}")
        self._known[key] = Found(orders, violations)
        return self._known[key]

    def _rest(self, left: Sequence[int]) -> int:
        """In how many orders one can go on."""
        if self._depth is None:
            return _orders(left)
        return math.perm(sum(left), self._depth - (sum(map(len, self._actors)) - sum(left)))

    def _is_stuck(self, row: Row, path: tuple[str, ...]) -> bool:
        """Whether a job that is due stays where it is when everybody dies, and somebody else works what there is."""
        if self._check is not _check or row.state in FINALIZED or row.state == "pending" or not row.due:
            return False
        if row.whole in self._freed:
            return False
        self._connection.exec_driver_sql("SAVEPOINT end_")
        self._connection.execute(text("UPDATE river_runner SET heartbeat_at = now() - interval '1 hour'"))
        fetch, complete = _runner(last := f"{ALIVE}/last", "complete")
        for operation in (*RESCUE, *SCHEDULE, fetch, _fetch(last, alone=True), complete):
            operation.do(self._connection, self._job_id)
        after = _read(self._connection, self._job_id)
        self._connection.exec_driver_sql("ROLLBACK TO SAVEPOINT end_")
        self._connection.exec_driver_sql("RELEASE SAVEPOINT end_")
        if after is not None and after.state in FINALIZED:
            self._freed.add(row.whole)
            return False
        self.broken.append(f"{' > '.join(path)}: at last it is stuck as {after and after.state}")
        return True


def _explore(
    connection: Connection,
    start: Mapping[str, Any],
    actors: Sequence[Sequence[Operation]],
    check: Check = _check,
    depth: int | None = None,
) -> tuple[Found, list[str]]:
    connection.rollback()
    connection.execute(
        text(
            "INSERT INTO river_runner (id, heartbeat_at) "
            "VALUES (:dead, now() - interval '1 hour'), (:alive, now() + interval '1 hour')"
        ),
        {"dead": DEAD, "alive": ALIVE},
    )
    columns = dict(start)
    deaths = columns.pop("deaths", 0)
    job_id = make_job(connection, **columns)
    if deaths:
        connection.execute(
            text("INSERT INTO river_suspect (job_id, deaths, alone) VALUES (:id, :deaths, 0)"),
            {"id": job_id, "deaths": deaths},
        )
    explorer = Explorer(connection, job_id, actors, check, depth)
    row = _read(connection, job_id)
    past = Past(ended=row.state if row and row.state in FINALIZED else None)
    found = explorer.explore(row, past=past)
    connection.rollback()
    return found, explorer.broken


@pytest.fixture(scope="module")
def connection(server: str, template: str) -> Iterator[Connection]:
    """One database for all: everything is rolled back."""
    for url in _database(server, f"TEMPLATE {template}"):
        engine = create_engine(url)
        with engine.connect() as connection:
            yield connection
        engine.dispose()


# ---- the campaigns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("start", ["available", "retryable"])
def test_no_order_of_two_runners_a_rescuer_and_a_scheduler_breaks_anything(
    connection: Connection, start: str, outcome: str
) -> None:
    actors = (_runner(A, outcome), RESCUE, SCHEDULE, _runner(B, "complete"))

    found, broken = _explore(connection, STARTS[start], actors)

    assert found == Found(630, 0), broken[:5]


def _everything(outcome: str, other: str) -> list[Sequence[Operation]]:
    return [_runner(A, outcome), RESCUE[1:], SCHEDULE, _runner(B, other), ASK, PRUNE, HAND]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["available", "scheduled", "running under A", "running under A, last attempt"])
@pytest.mark.parametrize("other", ["complete", "fail"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_nor_any_order_with_a_cancel_a_prune_and_a_retry_by_hand(
    connection: Connection, outcome: str, other: str, start: str
) -> None:
    found, broken = _explore(connection, STARTS[start], _everything(outcome, other))

    assert found == Found(_orders([2, 1, 1, 2, 1, 1, 1]), 0), broken[:5]


def test_nor_any_order_with_a_cancel(connection: Connection) -> None:
    for outcome in ("fail", "interrupt"):
        found, broken = _explore(
            connection, STARTS["available"], (_runner(A, outcome), RESCUE[1:], SCHEDULE, _runner(B, "complete"), ASK)
        )

        assert found == Found(_orders([2, 1, 1, 2, 1]), 0), broken[:5]


ALL: Final = [
    _fetch(A),
    *(_outcome(A, name, transition) for name, transition in OUTCOMES.items()),
    _fetch(B),
    _fetch(B, alone=True),
    _outcome(B, "complete", OUTCOMES["complete"]),
    _outcome(B, "fail", OUTCOMES["fail"]),
    *RESCUE[1:],
    *SCHEDULE,
    *ASK,
    *PRUNE,
    *HAND,
]


@pytest.mark.parametrize("start", STARTS)
def test_no_two_operations_break_anything_in_any_state(connection: Connection, start: str) -> None:
    found, broken = _explore(connection, STARTS[start], [(operation,) for operation in ALL], depth=2)

    assert found == Found(math.perm(len(ALL), 2), 0), broken[:5]


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_no_three_operations_break_anything_in_any_state(connection: Connection, start: str) -> None:
    found, broken = _explore(connection, STARTS[start], [(operation,) for operation in ALL], depth=3)

    assert found == Found(math.perm(len(ALL), 3), 0), broken[:5]


# ---- the control -----------------------------------------------------------------------------------------------------


def _rivers(*, fenced: bool, guarded: bool) -> list[Sequence[Operation]]:
    """River's own: a rescue that reads and then writes by id, and an outcome that asks only whether the job runs."""
    stuck = f"state = 'running' AND attempted_by[cardinality(attempted_by)] = '{A}'"

    def complete(token: str) -> Operation:
        ours = f" AND attempted_by[cardinality(attempted_by)] = '{token}'" if fenced else ""
        done = (
            f"UPDATE river_job SET state = 'completed', finalized_at = now() WHERE id = :id AND state = 'running'{ours}"
        )

        def do(connection: Connection, job_id: int) -> bool:
            # Unfenced, it returns the row whether it changed or not: the caller commits its effect.
            return _sql(done)(connection, job_id) or not fenced

        return Operation(f"complete by {token}", do, "outcome", token, states.completed())

    read = f"INSERT INTO seen SELECT id FROM river_job WHERE id = :id AND {stuck}"
    write = "UPDATE river_job SET state = 'retryable', scheduled_at = now(), finalized_at = NULL "
    write += "WHERE id = (SELECT id FROM seen)"
    write += f" AND {stuck}" if guarded else ""
    rescue = (Operation("read the stuck", _sql(read), "read"), Operation("free the stuck", _sql(write), "write"))
    work = Operation("work", _insert_lost, "look")
    return [(work, complete(A)), rescue, SCHEDULE, (_fetch(B), complete(B))]


def _check_rivers(
    operation: Operation, before: Row, after: Row | None, said: bool, past: Past
) -> tuple[Past, str | None]:
    """Only what every queue must promise: what was acknowledged stays, and no job completes twice."""
    if operation.kind == "read" and said:
        past = past._replace(fetched=past.fetched | {"seen"})
    if operation.kind == "fetch" and said and operation.token is not None:
        past = past._replace(fetched=past.fetched | {operation.token})
    if operation.kind == "outcome" and said and operation.token in past.fetched | {A}:
        past = past._replace(completions=past.completions + 1, ended="completed")
    if past.completions > 1:
        return past, "it completed twice"
    if past.ended is not None and after is not None and after.state != past.ended:
        return past, "a completion was acknowledged and undone"
    return past, None


@pytest.mark.parametrize(
    ("fenced", "guarded", "violations"), [(False, False, 462), (False, True, 210), (True, False, 210), (True, True, 0)]
)
def test_rivers_own_statements_are_found_out(
    connection: Connection, fenced: bool, guarded: bool, violations: int
) -> None:
    connection.rollback()
    connection.execute(text("CREATE TEMP TABLE IF NOT EXISTS seen (id bigint)"))
    connection.commit()

    found, _ = _explore(connection, STARTS["running under A"], _rivers(fenced=fenced, guarded=guarded), _check_rivers)

    assert found == Found(630, violations)
