"""The bounded form of the fetch: what it reads, and that a bound never loses a job."""

from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, Final, Literal

import pytest
from sqlalchemy import Engine, text

from sqla_river.fetch import Fetcher, bounds, due, fetcher
from sqla_river.rows import JobRow
from sqla_river.statements import FETCH_AVAILABLE, FETCH_BOUNDED, SELECT_BOUNDS
from tests.making import Count, Plan, explain, make_fetcher, make_job, make_jobs, opened, own_settings, read_job

Mode = Literal["generic", "custom"]
MODES: Final[tuple[Mode, ...]] = ("generic", "custom")
SETTINGS: Final = own_settings("fetch")
WAITING: Final = 10
"""Jobs that a fetch finds, behind whatever else there is."""


# ---- what it reads ---------------------------------------------------------------------------------------------------


def _asked(queues: list[str], since: str, slots: int = WAITING) -> dict[str, Any]:
    asked: dict[str, Any] = {"p_queues": queues, "p_slots": [slots] * len(queues), "p_kinds": [Count.kind]}
    return asked | {"p_token": "test/1"} | {f"p_since_{number}": [since] * len(queues) for number in (1, 2, 3, 4)}


def _fetched(engine: Engine, statement: Any, asked: dict[str, Any], mode: Mode) -> Plan:
    with engine.begin() as connection:
        return explain(connection, None, statement, asked, plan=mode, settings=SETTINGS)


def _sql(engine: Engine, *statements: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(text(statement))


def _now(engine: Engine) -> str:
    with engine.connect() as connection:
        return str(connection.execute(text("SELECT clock_timestamp()::text")).scalar_one())


def _with_some_waiting(engine: Engine) -> str:
    """Analyzed, with `WAITING` jobs; the time from which on they are due."""
    since = _now(engine)
    _sql(engine, "ANALYZE river_job")
    make_jobs(engine, WAITING, due_in=timedelta(0))
    return since


def _check(engine: Engine, since: str) -> None:
    """The bounded form walks the fetch index, and touches at most twice what it touches in an empty table, but for the
    rows that it brings.
    """
    for mode in MODES:
        plan = _fetched(engine, FETCH_BOUNDED, _asked(["default"], since), mode)
        scans = {(scan["Node Type"], scan.get("Index Name")) for scan in plan.scans("river_job")}
        assert scans == {("Index Scan", "river_job_fetch_idx"), ("Tid Scan", None)}, plan
        assert plan.removed("Filter") == 0, plan
        assert plan.buffers <= 2 * LEAST[mode], (plan.buffers, LEAST[mode], plan)


LEAST: Final[dict[Mode, int]] = {}
"""Buffers of a bounded fetch of `WAITING` jobs that are alone in the table."""


@pytest.fixture(autouse=True)
def _least(request: pytest.FixtureRequest) -> None:
    if LEAST or "engine" not in request.fixturenames:
        return
    engine: Engine = request.getfixturevalue("engine")
    since = _with_some_waiting(engine)
    LEAST.update((mode, _fetched(engine, FETCH_BOUNDED, _asked(["default"], since), mode).buffers) for mode in MODES)
    _sql(engine, "TRUNCATE river_job")


def _fill(engine: Engine, count: int, what: str) -> None:
    columns = "kind, args, state, priority, finalized_at, scheduled_at"
    _sql(engine, f"INSERT INTO river_job ({columns}) SELECT {what} FROM generate_series(1, {count}) n")


FINISHED: Final = "'count', '{}', 'completed', mod(n, 4) + 1, now(), now() - n * interval '1 millisecond'"
FUTURE: Final = "'count', '{}', 'scheduled', 1, NULL, now() + interval '1 hour' + n * interval '1 millisecond'"
UNKNOWN: Final = "'of_a_newer_deploy', '{}', 'available', mod(n, 4) + 1, NULL, now() - interval '1 hour'"


@pytest.mark.parametrize("what", [FINISHED, FUTURE, UNKNOWN], ids=["finished", "future", "unknown"])
@pytest.mark.parametrize(
    "count", [20_000, pytest.param(200_000, marks=pytest.mark.slow), pytest.param(10_000_000, marks=pytest.mark.slow)]
)
def test_what_is_of_no_use_costs_a_bounded_fetch_nothing(engine: Engine, what: str, count: int) -> None:
    if what == UNKNOWN and count > 200_000:
        pytest.skip("200,000 is what is promised")
    _fill(engine, count, what)

    _check(engine, _with_some_waiting(engine))


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_dead_entries_that_a_long_transaction_pins_cost_a_bounded_fetch_nothing(engine: Engine, count: int) -> None:
    _fill(engine, count, "'count', '{}', 'available', 1, NULL, now() - interval '1 hour'")
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as long:
        long.execute(text("SELECT 1 FROM river_job LIMIT 1"))
        _sql(engine, "UPDATE river_job SET state = 'completed', finalized_at = now()", "VACUUM river_job")
        since = _with_some_waiting(engine)
        plain = _fetched(engine, FETCH_AVAILABLE, _asked(["default"], since), "generic")

        _check(engine, since)
        long.rollback()

    assert plain.buffers > count / 100  # what the bound saves


def test_a_thousand_queues_cost_a_runner_of_ten_nothing(engine: Engine) -> None:
    _sql(engine, "INSERT INTO river_queue (name) SELECT 'q' || n FROM generate_series(1, 1000) n")
    make_jobs_in = "INSERT INTO river_job (kind, args, queue) SELECT 'count', '{}', 'q' || mod(n, 1000)"
    _sql(engine, f"{make_jobs_in} FROM generate_series(1, 20000) n", "ANALYZE river_job", "ANALYZE river_queue")

    for mode in MODES:
        for statement in (FETCH_AVAILABLE, FETCH_BOUNDED):
            plan = _fetched(engine, statement, _asked([f"q{n}" for n in range(1, 11)], "-infinity", 1), mode)
            assert plan.buffers <= 10 * (12 + 30), (plan, plan.buffers)  # ten rows change


@pytest.mark.parametrize("since", ["-infinity", "now"])
def test_a_thousand_queues_on_one_runner_cost_at_most_twelve_buffers_each(engine: Engine, since: str) -> None:
    _fill(engine, 20_000, FINISHED)
    _fill(engine, 20_000, UNKNOWN)
    _sql(engine, "INSERT INTO river_queue (name) SELECT 'q' || n FROM generate_series(1, 1000) n", "ANALYZE")
    asked = _asked([f"q{n}" for n in range(1, 1001)], since, 1)

    for mode in MODES:
        for statement in (FETCH_AVAILABLE, FETCH_BOUNDED):
            plan = _fetched(engine, statement, asked, mode)
            pages = sum(scan["Shared Hit Blocks"] for scan in plan.scans("river_queue"))  # read once, for all
            assert pages < 20
            assert plan.buffers - pages <= 12 * 1_000, (plan, plan.buffers)


def test_the_bounds_are_read_by_the_primary_key(engine: Engine) -> None:
    jobs = make_jobs(engine, 2_000)
    _sql(engine, "ANALYZE river_job")

    for mode in MODES:
        given = {"p_ids": jobs[:10], "p_before": timedelta(seconds=1)}
        plan = _fetched(engine, SELECT_BOUNDS, given, mode)
        assert plan.indexes == {"river_job_pkey"}, plan


# ---- what it brings --------------------------------------------------------------------------------------------------


def _bounded(engine: Engine, since: dict[int, str], slots: int = 100, queue: str = "default") -> list[int]:
    asked = _asked([queue], "-infinity", slots) | {f"p_since_{number}": [at] for number, at in since.items()}
    with opened(engine) as own:
        return sorted(row.id for row in own.execute(FETCH_BOUNDED, asked))


def test_each_priority_begins_at_its_own_bound(engine: Engine) -> None:
    early = [make_job(engine, priority=number, scheduled_at="2026-01-01 00:00Z") for number in (1, 2, 3, 4)]
    late = [make_job(engine, priority=number, scheduled_at="2026-01-03 00:00Z") for number in (1, 2, 3, 4)]

    fetched = _bounded(engine, {1: "2026-01-02 00:00Z", 2: "2026-01-03 00:00Z", 3: "2026-01-03 00:01Z"})

    assert fetched == sorted([late[0], late[1], early[3], late[3]])


def test_a_bounded_fetch_keeps_the_order_and_the_number(engine: Engine) -> None:
    low = make_jobs(engine, 10, priority=3)
    high = make_jobs(engine, 10, priority=2)

    assert _bounded(engine, {}, slots=12) == sorted([*high, *low[:2]])


def test_a_bounded_fetch_locks_no_more_rows_than_it_takes(engine: Engine) -> None:
    jobs = make_jobs(engine, 20)

    with engine.begin() as connection:
        connection.execute(FETCH_BOUNDED, _asked(["default"], "-infinity", 3))
        assert _bounded(engine, {}) == jobs[3:]


def test_a_bounded_fetch_passes_by_what_is_paused_locked_unknown_not_due_or_a_suspect(engine: Engine) -> None:
    _sql(engine, "INSERT INTO river_queue (name, paused_at) VALUES ('paused', now())")
    make_job(engine, queue="paused")
    make_job(engine, kind="of_a_newer_deploy")
    make_job(engine, due_in=timedelta(hours=1))
    suspect = make_job(engine, attempt=2)
    _sql(engine, f"INSERT INTO river_suspect (job_id, deaths, alone) VALUES ({suspect}, 2, 0)")
    locked, free = make_jobs(engine, 2)

    with engine.begin() as theirs:
        theirs.exec_driver_sql(f"SELECT 1 FROM river_job WHERE id = {locked} FOR UPDATE")
        fetched = [*_bounded(engine, {}), *_bounded(engine, {}, queue="paused")]

    assert fetched == [free]


# ---- when it is used -------------------------------------------------------------------------------------------------


class Machine:
    """A local clock, on which a scan from the start takes 20 ms, and a bounded one 1 ms; and a fetcher on it."""

    def __init__(self, own: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.now = 1_000.0
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=float)
        for module in (fetcher, due):
            monkeypatch.setattr(module, "time", clock)
        self.cost = {"full": 0.020, "bounded": 0.001}
        self.sent: list[str] = []
        names = {id(FETCH_AVAILABLE): "full", id(FETCH_BOUNDED): "bounded"}
        execute = own.execute

        def note(statement: Any, *rest: Any) -> Any:
            name = names.get(id(statement))
            if name is not None:
                self.sent.append(name)
                self.now += self.cost[name]
            return execute(statement, *rest)

        setattr(own, "execute", note)  # noqa: B010
        self.delivered: list[JobRow] = []
        self.fetcher: Fetcher = make_fetcher(own, self.delivered, **settings)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + max(self.fetcher.step(), 0.001))

    def learn(self) -> None:
        """Make two scans from the start, after which bounded ones follow."""
        self.fetcher.heard("default")
        self.run(0.1)
        assert self.sent == ["full", "full"]

    @property
    def ids(self) -> list[int]:
        return sorted(row.id for row in self.delivered)


def test_a_wasteful_scan_is_followed_by_bounded_ones_and_by_another_each_poll(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        for _ in range(50):
            machine.fetcher.heard("default")
            machine.run(0.1)

    assert 4 <= machine.sent.count("full") <= 12  # a poll is jittered, and a bound holds for one without
    assert machine.sent.count("bounded") >= 35


def test_a_bound_is_forgotten_when_a_scan_was_not_wasteful(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        machine.learn()
        machine.cost["full"] = 0.001
        machine.run(1.2)
        machine.sent.clear()
        for _ in range(5):
            machine.fetcher.heard("default")
            machine.run(0.1)

    assert set(machine.sent) == {"full"}


def test_one_wasteful_scan_is_no_reason_for_a_bound(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        for cost in (0.020, 0.001) * 5:
            machine.cost["full"] = cost
            machine.run(1.2)

    assert set(machine.sent) == {"full"}


def test_a_bound_that_saves_nothing_is_forgotten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a crowded machine every statement takes long."""
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        machine.cost["bounded"] = 0.020
        machine.learn()
        machine.fetcher.heard("default")
        machine.run(0.1)

    assert machine.sent == ["full", "full", "bounded", "full"]


def test_under_load_a_queue_is_scanned_from_its_start_once_each_poll(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that never ends does not put off the look at what lies before the bound."""
    make_jobs(engine, 2_000, scheduled_at="2026-01-02 00:00Z")
    with opened(engine) as own:
        machine = Machine(own, monkeypatch, slots={"default": 2})
        for _ in range(4):
            machine.fetcher.freed("default")
            machine.fetcher.step()
        before = make_job(engine, scheduled_at="2026-01-01 00:00Z")
        began = machine.now
        while before not in machine.ids:
            machine.fetcher.freed("default")
            machine.now += 0.005
            machine.fetcher.step()
            assert machine.now < began + 1.5

    assert machine.sent.count("bounded") > 50


def _committed_late(engine: Engine) -> Callable[[], int]:
    connection = engine.connect()
    (row,) = make_jobs(connection, 1, scheduled_at="now")
    _sql(engine, "SELECT pg_sleep(0.01)")

    def commit() -> int:
        connection.commit()
        connection.close()
        return row

    return commit


def _retried(engine: Engine) -> Callable[[], int]:
    job_id = make_job(engine, state="discarded", scheduled_at="2026-01-01 00:00Z")

    def retry() -> int:
        _sql(engine, f"UPDATE river_job SET state = 'available', finalized_at = NULL WHERE id = {job_id}")
        return job_id

    return retry


def _promoted(engine: Engine) -> Callable[[], int]:
    job_id = make_job(engine, kind="of_a_newer_deploy", priority=4, scheduled_at="2026-01-01 00:00Z")

    def promote() -> int:
        _sql(engine, f"UPDATE river_job SET priority = 1, kind = 'count' WHERE id = {job_id}")
        return job_id

    return promote


def _stepped_back(engine: Engine) -> Callable[[], int]:
    return lambda: make_job(engine, due_in=timedelta(hours=-2))  # the database's clock was set back two hours


def _unlocked(engine: Engine) -> Callable[[], int]:
    job_id = make_job(engine, scheduled_at="2026-01-01 00:00Z")
    connection = engine.connect()
    connection.execute(text(f"SELECT 1 FROM river_job WHERE id = {job_id} FOR UPDATE"))

    def unlock() -> int:
        connection.close()
        return job_id

    return unlock


@pytest.mark.parametrize(
    "appears", [_committed_late, _retried, _promoted, _stepped_back, _unlocked], ids=lambda each: each.__name__
)
def test_what_appears_before_the_bound_starts_within_one_poll(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, appears: Callable[[Engine], Callable[[], int]]
) -> None:
    appear = appears(engine)
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        monkeypatch.setattr(bounds, "MARGIN", 0.0)
        machine.learn()
        job_id = appear()
        machine.fetcher.heard("default")
        machine.run(0.1)
        before = machine.ids
        machine.run(1.1)

    assert before == []
    assert machine.ids == [job_id]
    assert read_job(engine, job_id)["state"] == "running"


def test_a_job_of_a_transaction_that_took_a_while_is_found_at_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound keeps a second's distance, so that what is announced is also found."""
    commit = _committed_late(engine)
    with opened(engine) as own:
        machine = Machine(own, monkeypatch)
        machine.learn()
        job_id = commit()
        machine.fetcher.heard("default")
        machine.run(0.1)

    assert machine.sent[-1] == "bounded"
    assert machine.ids == [job_id]
