"""Prometheus: metrics of runners and of the database behind them, with ``prometheus_client``.

::

    from sqla_river.ext.prometheus import make_wsgi_app, watch

    watch(runner)            # before or after its start; in the default registry
    app = make_wsgi_app()    # or make_asgi_app(): /metrics, to be mounted where you like

``sqla-river work --metrics-port 9100`` does both.

Labels are bounded: kinds are those that the runner has a worker for, queues those that it works, and of the database's
queues the hundred with most jobs; whatever else there is, is ``other``.

Several processes share one /metrics where ``PROMETHEUS_MULTIPROC_DIR`` names a folder, as prometheus_client has it.
"""

import math
import os
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Metric, multiprocess

from sqla_river.duties.figures import Figures
from sqla_river.health import LIMIT, Health
from sqla_river.loop import Loop
from sqla_river.rows import JobRow, Result
from sqla_river.runner import Runner
from sqla_river.states import JobState

OTHER: Final = "other"
MOST_QUEUES: Final = 100
DURATIONS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
BATCHES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
REFRESH: Final = 1.0
"""Seconds between two looks at what is read off a runner, where processes share their metrics."""
FRESH_FOR: Final = 75.0
"""Seconds for which figures of the database are shown: after that another runner has had its turn, and shows them."""

JOB: Final = ("queue", "kind")
COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "sqla_river_jobs_started_total": (
        "Jobs fetched, for slots that are free or soon will be; what goes back unbegun counts as interrupted.",
        JOB,
    ),
    "sqla_river_jobs_completed_total": ("Jobs completed.", JOB),
    "sqla_river_jobs_failed_total": ("Attempts that failed, the last of a job included.", JOB),
    "sqla_river_jobs_discarded_total": ("Jobs discarded: their last attempt failed.", JOB),
    "sqla_river_jobs_cancelled_total": ("Jobs cancelled while they ran, or by their handler.", JOB),
    "sqla_river_jobs_snoozed_total": ("Attempts that asked for a later time.", JOB),
    "sqla_river_jobs_interrupted_total": (
        "Attempts that a stop of the runner ended, and jobs given back before they began; they do not count.",
        JOB,
    ),
    "sqla_river_jobs_rescued_total": ("Jobs of dead runners that this one freed.", JOB),
    "sqla_river_stale_outcomes_total": ("Outcomes that came too late and changed nothing.", ()),
}
HISTOGRAMS: Final[Mapping[str, tuple[str, tuple[str, ...], tuple[float, ...]]]] = {
    "sqla_river_job_duration_seconds": ("How long handlers ran.", JOB, DURATIONS),
    "sqla_river_fetch_batch_jobs": ("Jobs per fetch that found some.", (), BATCHES),
    "sqla_river_completion_batch_jobs": ("Outcomes per batch that was written.", (), BATCHES),
}
OF_RUNNER: Final[Mapping[str, tuple[str, tuple[str, ...], Any]]] = {
    "sqla_river_jobs_in_progress": ("Handlers that run now.", JOB, "livesum"),
    "sqla_river_loop_age_seconds": ("For how long an inner loop has not done well.", ("loop",), "livemax"),
    "sqla_river_runner_alive": ("0 while an inner loop hangs: what /healthz says.", (), "livemin"),
    "sqla_river_runner_ready": ("0 before the start, and while a loop does not do well: /readyz.", (), "livemin"),
    "sqla_river_refresh_timestamp_seconds": ("When these were read, in seconds of the epoch.", (), "livemin"),
}
OF_DATABASE: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "sqla_river_queue_depth": ("Jobs that wait or run; estimated where there are over 10,000.", ("queue", "state")),
    "sqla_river_oldest_available_age_seconds": ("For how long the first available job has been due.", ("queue",)),
    "sqla_river_dead_tuples": ("Dead rows of a table, as PostgreSQL estimates.", ("table",)),
    "sqla_river_oldest_transaction_age_seconds": ("Age of the oldest open transaction.", ()),
    "sqla_river_notification_queue_usage_ratio": ("How full the server's queue of notifications is, 0 to 1.", ()),
}
"""Exported by one runner at a time: ask for ``max by (...)`` of them. NaN once it was another's turn."""

OUTCOMES: Final[Mapping[JobState, tuple[str, ...]]] = {
    JobState.COMPLETED: ("sqla_river_jobs_completed_total",),
    JobState.RETRYABLE: ("sqla_river_jobs_failed_total",),
    JobState.DISCARDED: ("sqla_river_jobs_failed_total", "sqla_river_jobs_discarded_total"),
    JobState.CANCELLED: ("sqla_river_jobs_cancelled_total",),
    JobState.SCHEDULED: ("sqla_river_jobs_snoozed_total",),
    JobState.AVAILABLE: ("sqla_river_jobs_interrupted_total",),
}
SHOWN: Final = (
    JobState.AVAILABLE,
    JobState.PENDING,
    JobState.RUNNING,
    JobState.RETRYABLE,
    JobState.SCHEDULED,
)
WSGIApp = Callable[..., Any]
ASGIApp = Callable[..., Any]


class Metrics:
    """The metrics in one registry, of any number of runners; see `watch`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)  # before the gauges: what is collected first is asked first
        self._counters = {
            name: Counter(name, told, labels, registry=registry) for name, (told, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, told, labels, registry=registry, buckets=buckets)
            for name, (told, labels, buckets) in HISTOGRAMS.items()
        }
        self._gauges = {
            name: Gauge(name, told, labels, registry=registry, multiprocess_mode=mode)
            for name, (told, labels, mode) in OF_RUNNER.items()
        }
        self._gauges |= {
            name: Gauge(name, told, labels, registry=registry, multiprocess_mode="livemostrecent")
            for name, (told, labels) in OF_DATABASE.items()
        }
        self._runners: WeakSet[Runner] = WeakSet()
        self._stale: WeakKeyDictionary[Runner, int] = WeakKeyDictionary()
        self._shown: dict[tuple[str, tuple[str, ...]], float] = {}
        self._of_database: dict[tuple[str, tuple[str, ...]], float] = {}
        self._looked_at = -math.inf
        self._lock = threading.Lock()
        if _is_shared():
            Loop("sqla_river-metrics", self._refresh).start()

    def watch(self, runner: Runner) -> None:
        """Take in *runner*; once is enough."""
        with self._lock:
            if runner in self._runners:
                return
            self._runners.add(runner)
        runner.attach(_OfRunner(self, runner))

    # ---- told by runners --------------------------------------------------------------------------------------------

    def fetched(self, rows: Sequence[JobRow]) -> None:
        """Count starts."""
        self._histograms["sqla_river_fetch_batch_jobs"].observe(len(rows))
        for (queue, kind), jobs in Tally((row.queue, row.kind) for row in rows).items():
            self._counters["sqla_river_jobs_started_total"].labels(queue, kind).inc(jobs)

    def written(self, written: Sequence[tuple[Result, JobState]]) -> None:
        """Count ends, and how long they took."""
        self._histograms["sqla_river_completion_batch_jobs"].observe(len(written))
        outcomes = Tally((result.job.queue, result.job.kind, state) for result, state in written)
        for (queue, kind, state), jobs in outcomes.items():
            for name in OUTCOMES.get(state, ()):
                self._counters[name].labels(queue, kind).inc(jobs)
        durations: dict[tuple[str, str], list[float]] = {}
        for result, _ in written:
            if result.seconds:  # else no handler has run, or its end is not known
                durations.setdefault((result.job.queue, result.job.kind), []).append(result.seconds)
        for (queue, kind), seconds in durations.items():
            observe = self._histograms["sqla_river_job_duration_seconds"].labels(queue, kind).observe
            for each in seconds:
                observe(each)

    def rescued(self, freed: Sequence[tuple[str, str]]) -> None:
        """Count rescues, by queue and kind."""
        for (queue, kind), jobs in Tally(freed).items():
            self._counters["sqla_river_jobs_rescued_total"].labels(queue, kind).inc(jobs)

    def looked(self, figures: Figures) -> None:
        """Show how the database stands."""
        shown: Tally[tuple[str, tuple[str, ...]]] = Tally()
        oldest: dict[str, float] = {}
        by_depth = sorted(figures.queues, key=lambda each: -sum(each.by_state[state] for state in SHOWN))
        for number, stats in enumerate(by_depth):
            queue = stats.queue if number < MOST_QUEUES else OTHER
            for state in SHOWN:
                shown["sqla_river_queue_depth", (queue, state.value)] += stats.by_state[state]
            oldest[queue] = max(oldest.get(queue, 0.0), _seconds(stats.oldest_available))
        values: dict[tuple[str, tuple[str, ...]], float] = {
            **shown,
            **{("sqla_river_oldest_available_age_seconds", (queue,)): age for queue, age in oldest.items()},
            ("sqla_river_dead_tuples", ("river_job",)): figures.dead_tuples,
            ("sqla_river_oldest_transaction_age_seconds", ()): _seconds(figures.oldest_transaction),
            ("sqla_river_notification_queue_usage_ratio", ()): figures.notification_usage,
        }
        with self._lock:
            # A queue that is gone is empty: prometheus_client cannot forget it where processes share their metrics.
            self._of_database = {**dict.fromkeys(self._of_database, 0.0), **values}
            self._looked_at = time.monotonic()
            self._show(self._of_database)

    # ---- asked by the registry --------------------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """Nothing: the metrics stand in the registry by themselves."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Bring the gauges up to date, before they are asked."""
        self._refresh()
        return []

    # ---- read off runners -------------------------------------------------------------------------------------------

    def _refresh(self) -> float:
        with self._lock:
            running: Tally[tuple[str, ...]] = Tally()
            ages: dict[str, float] = {}
            alive = ready = True
            for runner in list(self._runners):
                health = runner.health()
                alive, ready = alive and health.alive, ready and health.ready
                running.update(runner.in_progress)
                for loop, age in runner.loops.items():
                    ages[loop] = max(ages.get(loop, 0.0), age.total_seconds())
                stale = runner.stale
                new = stale - self._stale.get(runner, 0)
                self._counters["sqla_river_stale_outcomes_total"].inc(max(0, new))
                self._stale[runner] = stale
            shown: dict[tuple[str, tuple[str, ...]], float] = {
                **{("sqla_river_jobs_in_progress", labels): jobs for labels, jobs in running.items()},
                **{("sqla_river_loop_age_seconds", (loop,)): age for loop, age in ages.items()},
                ("sqla_river_runner_alive", ()): alive,
                ("sqla_river_runner_ready", ()): ready and len(self._runners) > 0,
                ("sqla_river_refresh_timestamp_seconds", ()): time.time(),
            }
            self._shown = {**dict.fromkeys(self._shown, 0.0), **shown}
            self._show(self._shown)
            over = time.monotonic() - self._looked_at > FRESH_FOR
            # Where processes share their metrics the newest value counts, whoever set it.
            if over and self._of_database and not _is_shared():
                self._show(dict.fromkeys(self._of_database, math.nan))
                self._of_database = {}
        return REFRESH

    def _show(self, values: Mapping[tuple[str, tuple[str, ...]], float]) -> None:
        for (name, labels), value in values.items():
            gauge = self._gauges[name]
            (gauge.labels(*labels) if labels else gauge).set(value)


class _OfRunner:
    """The `Meter` of one runner: bounds the labels by what it knows."""

    def __init__(self, metrics: Metrics, runner: Runner) -> None:
        self.fetched = metrics.fetched
        self.written = metrics.written
        self.looked = metrics.looked
        self._metrics = metrics
        self._runner = runner

    def rescued(self, freed: Sequence[Any]) -> None:
        """Rescue knows no bounds: it frees jobs of any kind and queue."""
        self._metrics.rescued(
            [
                (
                    row.queue if row.queue in self._runner.queues else OTHER,
                    row.kind if self._runner.workers.get(row.kind) is not None else OTHER,
                )
                for row in freed
            ]
        )


def _is_shared() -> bool:
    """Whether processes share their metrics, by files: then nobody asks this process for its gauges."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _seconds(age: timedelta | None) -> float:
    return age.total_seconds() if age is not None else 0.0


_metrics: Final[WeakKeyDictionary[CollectorRegistry, Metrics]] = WeakKeyDictionary()
_lock: Final = threading.Lock()


def watch(runner: Runner, registry: CollectorRegistry = REGISTRY) -> None:
    """Export metrics of *runner* in *registry*; several runners in one registry are added up.

    It costs a few microseconds per job, in the thread that writes the results, and none of the handlers'. The figures
    of the database are looked at by one runner of the fleet at a time, every 30 s.
    """
    with _lock:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = Metrics(registry)
    metrics.watch(runner)


def make_wsgi_app(registry: CollectorRegistry = REGISTRY) -> WSGIApp:
    """A WSGI app that answers with the metrics in *registry*; with those of all processes in multi-process mode."""
    client: Any = prometheus_client  # whose types are loose
    app: WSGIApp = client.make_wsgi_app(_all_of(registry))
    return app


def make_asgi_app(registry: CollectorRegistry = REGISTRY) -> ASGIApp:
    """The same as an ASGI app."""
    client: Any = prometheus_client
    app: ASGIApp = client.make_asgi_app(_all_of(registry))
    return app


def shared_health(limit: timedelta = LIMIT) -> Health:
    """The health of all processes that share their metrics, as they say it every second.

    Args:
        limit: how long one may say nothing.
    """
    said = {
        sample.name: sample.value
        for family in _Shared().collect()
        for sample in family.samples
        if sample.name in OF_RUNNER and not sample.labels
    }
    if not said:
        return Health(True, False, ("no process has started yet",))
    silent = time.time() - said["sqla_river_refresh_timestamp_seconds"]
    problems: list[str] = []
    if silent > limit.total_seconds():
        problems.append(f"a process has said nothing for {silent:.0f} s")
    if not said["sqla_river_runner_alive"]:
        problems.append("an inner loop of a process hangs")
    alive = not problems
    if not said["sqla_river_runner_ready"]:
        problems.append("a process is not ready")
    return Health(alive, not problems, tuple(problems))


def _all_of(registry: CollectorRegistry) -> CollectorRegistry:
    if not _is_shared():
        return registry
    shared = CollectorRegistry()
    shared.register(_Shared())
    return shared


class _Shared:
    """The metrics of all processes that share them; the gauges of those that have ended are taken away."""

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        shared: Any = multiprocess
        folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        for path in folder.glob("gauge_live*_*.db"):
            pid = path.stem.rpartition("_")[2]
            if pid.isdecimal() and not _lives(int(pid)):
                shared.mark_process_dead(pid, str(folder))
        # One that has just been made is empty for an instant, and reading it would raise.
        files = [str(path) for path in folder.glob("*.db") if _size(path)]
        found: Iterable[Metric] = shared.MultiProcessCollector.merge(files)
        return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
