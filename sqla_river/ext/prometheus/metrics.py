"""`Metrics`: what runners tell, and what is read off them, in one registry."""

import threading
import time
from collections import Counter as Tally
from collections.abc import Iterable, Sequence
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakSet

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric

from sqla_river.duties.figures import Figures
from sqla_river.ext.prometheus import databases
from sqla_river.ext.prometheus.databases import OTHER, Databases, Values, database_of
from sqla_river.ext.prometheus.names import (
    COUNTERS,
    HISTOGRAMS,
    OF_DATABASE,
    OF_RESCUE,
    OF_RUNNER,
    OUTCOMES,
    REFRESHED,
    TIMESTAMP,
)
from sqla_river.ext.prometheus.shared import folder, is_shared
from sqla_river.loop import Loop
from sqla_river.rows import JobRow, Result
from sqla_river.runner import Runner
from sqla_river.states import JobState

REFRESH: Final = 1.0
"""Seconds between two looks at what is read off a runner, where processes share their metrics."""


class Metrics:
    """The metrics in one registry, of any number of runners.

    To the registry it is a collector of all that is read off runners, so that a scrape of some names refreshes them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        if is_shared():
            folder()
        self._counters = {
            name: Counter(name, told, labels, registry=None if name in REFRESHED else registry)
            for name, (told, labels) in COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(name, told, labels, registry=registry, buckets=buckets)
            for name, (told, labels, buckets) in HISTOGRAMS.items()
        }
        self._gauges: dict[str, Gauge] = {} if is_shared() else _gauges()
        self._runners: WeakSet[Runner] = WeakSet()
        self._stale: WeakKeyDictionary[Runner, int] = WeakKeyDictionary()
        self._shown: Values = {}
        self._databases = Databases()
        self._refresher: Loop | None = None
        self._lock = threading.Lock()
        registry.register(self)

    def watch(self, runner: Runner) -> None:
        """Take in *runner*; once is enough."""
        with self._lock:
            if runner in self._runners:
                return
            self._runners.add(runner)
        runner.attach(_OfRunner(self, runner))
        if runner.id is not None:
            self.started()

    def forked(self) -> None:
        """Be in a child by now: without the threads of its parent, and the runners that work there."""
        self._lock = threading.Lock()
        self._refresher = None
        self._runners = WeakSet(runner for runner in self._runners if runner.id is None)
        self._databases.forget(0.0)

    # ---- told by runners --------------------------------------------------------------------------------------------

    def started(self) -> None:
        """Say from now on, where processes share their metrics, how this one does."""
        # Not before: a server that loads the application, forks, and works no job itself would never be ready; and its
        # thread would not come along with the fork.
        with self._lock:
            if is_shared() and self._refresher is None:
                self._refresher = Loop("sqla_river-metrics", self._refresh)
                self._refresher.start()

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

    def rescued(self, freed: Sequence[tuple[str, str, JobState]]) -> None:
        """Count rescues, by queue, kind and state; for some that is the end."""
        for (queue, kind, state), jobs in Tally(freed).items():
            self._counters["sqla_river_jobs_rescued_total"].labels(queue, kind).inc(jobs)
            if state in OF_RESCUE:
                self._counters[OF_RESCUE[state]].labels(queue, kind).inc(jobs)

    def looked(self, database: object, figures: Figures) -> None:
        """Show how *database* stands."""
        with self._lock:
            self._databases.looked(database, figures)
            self._show(self._databases.values())

    # ---- asked by the registry --------------------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """What is read off runners; whatever moves by itself stands in the registry by itself."""
        return [metric for each in self._read_off() for metric in each.describe()]

    def collect(self) -> Iterable[Metric]:
        """The same as it is now."""
        if not is_shared():
            self._refresh()
        return [metric for each in self._read_off() for metric in each.collect()]

    def _read_off(self) -> list[Counter | Gauge]:
        return [*(self._counters[name] for name in sorted(REFRESHED)), *self._gauges.values()]

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
            shown: Values = {
                **{("sqla_river_jobs_in_progress", labels): jobs for labels, jobs in running.items()},
                **{("sqla_river_loop_age_seconds", (loop,)): age for loop, age in ages.items()},
                ("sqla_river_runner_alive", ()): alive,
                ("sqla_river_runner_ready", ()): ready and len(self._runners) > 0,
                (TIMESTAMP, ()): time.time(),  # the last: until it is there, nobody believes the others
            }
            self._shown = {**dict.fromkeys(self._shown, 0.0), **shown}
            self._show(self._shown)
            # Where processes share their metrics the newest value counts, whoever set it.
            if not is_shared():
                self._databases.forget(databases.FRESH_FOR)
                self._show(self._databases.values())
        return REFRESH

    def _show(self, values: Values) -> None:
        if not self._gauges:
            self._gauges = _gauges()
        for (name, labels), value in values.items():
            gauge = self._gauges[name]
            (gauge.labels(*labels) if labels else gauge).set(value)


def _gauges() -> dict[str, Gauge]:
    return {
        name: Gauge(name, told, labels, registry=None, multiprocess_mode=mode)
        for name, (told, labels, mode) in OF_RUNNER.items()
    } | {
        name: Gauge(name, told, labels, registry=None, multiprocess_mode="livemostrecent")
        for name, (told, labels) in OF_DATABASE.items()
    }


class _OfRunner:
    """The `Meter` of one runner: bounds the labels by what it knows."""

    def __init__(self, metrics: Metrics, runner: Runner) -> None:
        self.fetched = metrics.fetched
        self.written = metrics.written
        self._metrics = metrics
        self._runner = runner

    def started(self, _: str) -> None:
        """In whatever process that is."""
        self._metrics.started()

    def rescued(self, freed: Sequence[Any]) -> None:
        """Rescue knows no bounds: it frees jobs of any kind and queue."""
        self._metrics.rescued(
            [
                (
                    row.queue if row.queue in self._runner.queues else OTHER,
                    row.kind if self._runner.workers.get(row.kind) is not None else OTHER,
                    JobState(row.state),
                )
                for row in freed
            ]
        )

    def looked(self, figures: Figures) -> None:
        """Each database has a runner that looks at it."""
        self._metrics.looked(database_of(self._runner), figures)
