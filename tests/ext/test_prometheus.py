"""Metrics: they move with the commit of what they count, labels are bounded, and one runner looks at a database."""

import asyncio
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, create_engine, text

from sqla_river import Cancel, JobContext, Runner, Snooze
from sqla_river.duties import turns
from sqla_river.duties.figures import Figures
from sqla_river.ext.prometheus import databases, make_asgi_app, make_wsgi_app, names, watch
from sqla_river.ext.prometheus.metrics import Metrics
from sqla_river.stats import all_stats
from tests.database import emptied, shared_database
from tests.making import Count, Gate, count_states, eventually, make_jobs
from tests.working import HOUR, after, handling, nothing, put

ROOT = Path(__file__).parents[2]
NAMES = {*names.COUNTERS, *names.HISTOGRAMS, *names.OF_RUNNER, *names.OF_DATABASE}
OF_JOB = {"queue": "default", "kind": "count"}


@pytest.fixture(scope="module")
def shared(server: str, template: str) -> Iterator[str]:
    yield from shared_database(server, template)


@pytest.fixture
def engine(shared: str) -> Iterator[Engine]:
    for engine in emptied(shared):
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE river_counter, river_history, river_queue, river_duty"))
        yield engine


@pytest.fixture
def other(server: str, template: str) -> Iterator[Engine]:
    for url in shared_database(server, template):
        yield from emptied(url)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def read(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """A sample as a scrape would see it; 0 where there is none yet."""
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return float(sample.value)
    return 0.0


def samples(registry: CollectorRegistry, name: str) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        tuple(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


# ---- jobs -----------------------------------------------------------------------------------------------------------


def _each_in_its_way(job: JobContext[Count]) -> Any:
    match job.args.number:
        case 1:
            raise ValueError("it failed")
        case 2:
            return Cancel("no")
        case 3:
            return Snooze(HOUR)
        case _:
            return None


def test_what_becomes_of_jobs_is_counted_by_queue_and_kind(engine: Engine, registry: CollectorRegistry) -> None:
    put(engine, *[0] * 20, 1, 1, 2, 3)
    put(engine, 1, max_attempts=1)
    workers = handling(_each_in_its_way, retry=after(HOUR))
    runner = Runner(engine, workers, queues={"default": 30})  # none is fetched ahead, which might go back again
    watch(runner, registry)
    watch(runner, registry)  # which changes nothing
    with runner:
        eventually(lambda: read(registry, "sqla_river_job_duration_seconds_count", **OF_JOB) == 25, what="all of them")

    expected = {"started": 25, "completed": 20, "failed": 3, "discarded": 1, "cancelled": 1, "snoozed": 1}
    assert {name: read(registry, f"sqla_river_jobs_{name}_total", **OF_JOB) for name in (*expected, "interrupted")} == {
        **expected,
        "interrupted": 0,
    }
    for batches in ("fetch", "completion"):
        assert read(registry, f"sqla_river_{batches}_batch_jobs_sum") == 25
        assert 1 <= read(registry, f"sqla_river_{batches}_batch_jobs_count") <= 25


def test_a_counter_moves_with_the_commit_and_not_before(engine: Engine, registry: CollectorRegistry) -> None:
    """The outcome of a job whose row is locked by somebody waits, and so does its count."""
    gate = Gate()
    (job_id,) = put(engine, 0)
    runner = Runner(engine, handling(gate), queues={"default": 1})
    watch(runner, registry)
    with runner, engine.begin() as holder:
        gate.wait()
        assert read(registry, "sqla_river_jobs_in_progress", **OF_JOB) == 1
        assert read(registry, "sqla_river_jobs_started_total", **OF_JOB) == 1
        holder.execute(text("SELECT id FROM river_job WHERE id = :id FOR UPDATE"), {"id": job_id})
        gate.open()
        eventually(lambda: read(registry, "sqla_river_jobs_in_progress", **OF_JOB) == 0, what="the handler's end")
        eventually(lambda: runner._incarnation is not None and runner._incarnation.completer._again, what="a try")
        before = read(registry, "sqla_river_jobs_completed_total", **OF_JOB)
        holder.rollback()
        eventually(lambda: read(registry, "sqla_river_jobs_completed_total", **OF_JOB) == 1, what="its count")

    assert before == 0
    assert count_states(engine) == {"completed": 1}


def test_a_stop_counts_what_it_interrupts(engine: Engine, registry: CollectorRegistry) -> None:
    gate = Gate()
    put(engine, 0, 1)
    runner = Runner(engine, handling(gate), queues={"default": 2}, stop_timeout=timedelta(0))
    watch(runner, registry)
    with runner:
        gate.wait(2)

    assert read(registry, "sqla_river_jobs_interrupted_total", **OF_JOB) == 2
    assert read(registry, "sqla_river_jobs_failed_total", **OF_JOB) == 0


def test_rescued_jobs_of_unknown_kinds_and_queues_are_others(engine: Engine, registry: CollectorRegistry) -> None:
    make_jobs(engine, 3, state="running", token="go-client", attempted_at="2020-01-01")
    make_jobs(engine, 2, state="running", token="go-client", attempted_at="2020-01-01", kind="theirs", queue="theirs")
    quick: dict[str, Any] = {"heartbeat": timedelta(milliseconds=200), "lease": timedelta(milliseconds=600)}
    runner = Runner(engine, handling(nothing), queues={"default": 2}, **quick)
    watch(runner, registry)
    with runner:
        eventually(lambda: sum(samples(registry, "sqla_river_jobs_rescued_total").values()) >= 5, what="a rescue")
        rescued = samples(registry, "sqla_river_jobs_rescued_total")

    assert rescued == {("count", "default"): 3, ("other", "other"): 2}  # kind, queue


def test_jobs_that_end_by_rescue_count_as_discarded_or_cancelled(engine: Engine, registry: CollectorRegistry) -> None:
    theirs: dict[str, Any] = {"state": "running", "token": "go-client", "attempted_at": "2020-01-01"}
    make_jobs(engine, 3, **theirs, attempt=5, max_attempts=5)
    make_jobs(engine, 2, **theirs, metadata={"cancel_attempted_at": "2020-01-01T00:00:00Z"})
    make_jobs(engine, 1, **theirs, scheduled_at="2020-01-01")
    quick: dict[str, Any] = {"heartbeat": timedelta(milliseconds=200), "lease": timedelta(milliseconds=600)}
    runner = Runner(engine, handling(nothing), queues={"default": 2}, **quick)
    watch(runner, registry)
    with runner:
        eventually(lambda: read(registry, "sqla_river_jobs_rescued_total", **OF_JOB) == 6, 20, "a rescue")

    assert read(registry, "sqla_river_jobs_discarded_total", **OF_JOB) == 3
    assert read(registry, "sqla_river_jobs_cancelled_total", **OF_JOB) == 2
    assert read(registry, "sqla_river_jobs_failed_total", **OF_JOB) == 0


def test_a_meter_that_raises_disturbs_nobody(engine: Engine, registry: CollectorRegistry) -> None:
    class Broken:
        def started(self, told: Any, /) -> None:
            raise RuntimeError("it broke")

        fetched = written = rescued = looked = started

    runner = Runner(engine, handling(nothing), queues={"default": 2})
    runner.attach(Broken())
    watch(runner, registry)
    put(engine, *range(10))
    with runner:
        eventually(lambda: count_states(engine) == {"completed": 10}, what="all of them")

    assert read(registry, "sqla_river_jobs_completed_total", **OF_JOB) == 10


# ---- the database ---------------------------------------------------------------------------------------------------


def test_one_runner_of_a_fleet_looks_at_the_database(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LONGEST_LOOK", 0.2)  # 5 s to users
    make_jobs(engine, 7, kind="nobody-works-this", due_in=timedelta(minutes=-5))
    make_jobs(engine, 2, state="scheduled", due_in=HOUR, queue="mail")
    registries = [CollectorRegistry() for _ in range(3)]
    runners = [Runner(engine, handling(nothing), queues={"default": 1}) for _ in registries]
    for runner, registry in zip(runners, registries, strict=True):
        watch(runner, registry)
    for runner in runners:
        runner.start()
    try:
        looked = eventually(
            lambda: [registry for registry in registries if samples(registry, "sqla_river_queue_depth")],
            what="a look",
        )
        # Everybody has had the chance.
        eventually(lambda: all(runner.duties.get("figures") for runner in runners), what="word of it")
        again = [registry for registry in registries if samples(registry, "sqla_river_queue_depth")]
    finally:
        for runner in runners:
            runner.stop()

    assert again == looked
    assert len(looked) == 1
    depth = samples(looked[0], "sqla_river_queue_depth")
    assert depth["default", "available"] == 7
    assert depth["mail", "scheduled"] == 2
    assert 300 <= read(looked[0], "sqla_river_oldest_available_age_seconds", queue="default") < 400
    assert 0 <= read(looked[0], "sqla_river_notification_queue_usage_ratio") < 1
    for name in NAMES & set(names.OF_DATABASE):
        assert samples(looked[0], name), name


def test_an_open_transaction_and_dead_rows_show(engine: Engine, registry: CollectorRegistry) -> None:
    runner = Runner(engine, handling(nothing), queues={"default": 1})
    watch(runner, registry)
    with engine.begin() as holder:
        holder.execute(text("SELECT pg_sleep(0.2)"))
        with runner:
            eventually(lambda: samples(registry, "sqla_river_oldest_transaction_age_seconds"), what="a look")
            age = eventually(lambda: read(registry, "sqla_river_oldest_transaction_age_seconds"), what="an age")

    assert age >= 0.2


def test_figures_that_are_anothers_by_now_are_not_shown(
    engine: Engine, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_jobs(engine, 3)
    metrics = Metrics(registry)
    with engine.connect() as connection:
        found = all_stats(connection, None)
    metrics.looked("here", Figures(found, 5, timedelta(seconds=3), 0.25))
    assert read(registry, "sqla_river_queue_depth", queue="default", state="available") == 3
    monkeypatch.setattr(databases, "FRESH_FOR", 0.0)

    assert math.isnan(read(registry, "sqla_river_queue_depth", queue="default", state="available"))
    assert math.isnan(read(registry, "sqla_river_oldest_transaction_age_seconds"))


def test_runners_of_two_databases_are_added_up(engine: Engine, other: Engine, registry: CollectorRegistry) -> None:
    make_jobs(engine, 7, queue="here", kind="nobody-works-this")
    make_jobs(other, 5, queue="there", kind="nobody-works-this")
    for number, each in enumerate((engine, other), start=1):
        make_jobs(each, number, queue="both", kind="nobody-works-this", due_in=timedelta(minutes=-5 * number))
    runners = [Runner(each, handling(nothing), queues={"default": 1}) for each in (engine, other)]
    for runner in runners:
        watch(runner, registry)
    with runners[0], runners[1]:
        eventually(lambda: samples(registry, "sqla_river_queue_depth").get(("both", "available")) == 3, what="both")
    depth = samples(registry, "sqla_river_queue_depth")

    assert (depth["here", "available"], depth["there", "available"]) == (7, 5)
    assert 600 <= read(registry, "sqla_river_oldest_available_age_seconds", queue="both") < 700


def test_runners_of_one_database_are_counted_once_whoever_they_log_in_as(
    engine: Engine, registry: CollectorRegistry
) -> None:
    make_jobs(engine, 3)
    metrics = Metrics(registry)
    with engine.connect() as connection:
        figures = Figures(all_stats(connection, None), 5, timedelta(0), 0.0)
    elsewhere = create_engine(engine.url.set(username="another", password="x"))
    for each in (engine, elsewhere):
        metrics.looked(databases.database_of(Runner(each, handling(nothing), queues={"default": 1})), figures)

    assert read(registry, "sqla_river_queue_depth", queue="default", state="available") == 3


def test_a_hundred_queues_are_named_and_the_others_added_up(engine: Engine, registry: CollectorRegistry) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO river_job (kind, args, queue) "
                "SELECT 'kind-' || n || '-' || m, '{}', 'queue' || n FROM generate_series(1, 150) n, "
                "generate_series(1, n) m"
            )
        )
        found = all_stats(connection, None)
    Metrics(registry).looked("here", Figures(found, 0, timedelta(0), 0.0))

    depth = samples(registry, "sqla_river_queue_depth")
    assert len({queue for queue, _ in depth}) == 101
    assert depth["other", "available"] == sum(range(1, 51))
    assert depth["queue150", "available"] == 150


# ---- exposition -----------------------------------------------------------------------------------------------------


def test_names_follow_prometheus_practice(registry: CollectorRegistry) -> None:
    Metrics(registry)
    told = text_string_to_metric_families(generate_latest(registry).decode())
    families = [family for family in told if not family.name.endswith("_created")]  # which the library adds

    assert {f"{family.name}_total" if family.type == "counter" else family.name for family in families} == NAMES
    for name in NAMES:
        assert re.fullmatch(r"sqla_river_[a-z_]+", name)
        assert name.endswith("_total") == (name in names.COUNTERS)
        assert not re.search(r"_(ms|millis|minutes)", name)


def test_the_apps_answer_with_the_metrics(registry: CollectorRegistry) -> None:
    Metrics(registry)
    said: list[str] = []

    def answered(status: str, _: object) -> None:
        said.append(status)

    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": ""}

    plain = b"".join(make_wsgi_app(registry)(environ, answered))
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": "/metrics",
            "query_string": b"",
            "headers": [],
        }
        await make_asgi_app(registry)(scope, receive, send)

    asyncio.run(ask())

    assert said == ["200 OK"]
    assert b"sqla_river_stale_outcomes_total 0.0" in plain
    assert b"sqla_river_stale_outcomes_total 0.0" in sent[1]["body"]


def test_a_scrape_of_some_names_is_as_fresh_as_one_of_all(engine: Engine, registry: CollectorRegistry) -> None:
    runner = Runner(engine, handling(nothing), queues={"default": 1})
    watch(runner, registry)
    query = "name[]=sqla_river_runner_ready&name[]=sqla_river_stale_outcomes_total"
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics", "QUERY_STRING": query}

    def answered(status: str, _: object) -> None:
        assert status == "200 OK"

    with runner:
        said = b"".join(make_wsgi_app(registry)(environ, answered)).decode()

    assert [line for line in said.splitlines() if not line.startswith("#")] == [
        "sqla_river_stale_outcomes_total 0.0",
        "sqla_river_runner_ready 1.0",
    ]


def test_the_core_knows_nothing_of_prometheus() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None; import sqla_river.runner, sqla_river.cli.app; print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "ok\n"
