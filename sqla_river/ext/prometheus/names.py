"""What is exported: names, what they mean, labels."""

from collections.abc import Mapping
from typing import Any, Final

from sqla_river.states import JobState

DURATIONS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
BATCHES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

JOB: Final = ("queue", "kind")
COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "sqla_river_jobs_started_total": (
        "Jobs fetched, for slots that are free or soon will be; what goes back unbegun counts as interrupted.",
        JOB,
    ),
    "sqla_river_jobs_completed_total": ("Jobs completed.", JOB),
    "sqla_river_jobs_failed_total": ("Attempts that failed, the last of a job included.", JOB),
    "sqla_river_jobs_discarded_total": ("Jobs discarded: their last attempt failed, or its runner died.", JOB),
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
TIMESTAMP: Final = "sqla_river_refresh_timestamp_seconds"
OF_RUNNER: Final[Mapping[str, tuple[str, tuple[str, ...], Any]]] = {
    "sqla_river_jobs_in_progress": ("Handlers that run now.", JOB, "livesum"),
    "sqla_river_loop_age_seconds": ("For how long an inner loop has not done well.", ("loop",), "livemax"),
    "sqla_river_runner_alive": ("0 while an inner loop hangs: what /healthz says.", (), "livemin"),
    "sqla_river_runner_ready": ("0 while nothing can be fetched, or written: /readyz.", (), "livemin"),
    TIMESTAMP: ("When these were read, in seconds of the epoch.", (), "livemin"),
}
OF_DATABASE: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "sqla_river_queue_depth": ("Jobs that wait or run; estimated where there are over 10,000.", ("queue", "state")),
    "sqla_river_oldest_available_age_seconds": ("For how long the first available job has been due.", ("queue",)),
    "sqla_river_dead_tuples": ("Dead rows of a table, as PostgreSQL estimates.", ("table",)),
    "sqla_river_oldest_transaction_age_seconds": ("Age of the oldest open transaction.", ()),
    "sqla_river_notification_queue_usage_ratio": ("How full the server's queue of notifications is, 0 to 1.", ()),
}
"""Exported by one runner at a time: ask for ``max by (...)`` of them. NaN once it was another's turn."""
ADDED_UP: Final = frozenset({"sqla_river_queue_depth", "sqla_river_dead_tuples"})
"""Of several databases; of the others the largest counts."""
REFRESHED: Final = frozenset({"sqla_river_stale_outcomes_total"})
"""Counters that nobody moves: they are read off runners, as the gauges are."""

OUTCOMES: Final[Mapping[JobState, tuple[str, ...]]] = {
    JobState.COMPLETED: ("sqla_river_jobs_completed_total",),
    JobState.RETRYABLE: ("sqla_river_jobs_failed_total",),
    JobState.DISCARDED: ("sqla_river_jobs_failed_total", "sqla_river_jobs_discarded_total"),
    JobState.CANCELLED: ("sqla_river_jobs_cancelled_total",),
    JobState.SCHEDULED: ("sqla_river_jobs_snoozed_total",),
    JobState.AVAILABLE: ("sqla_river_jobs_interrupted_total",),
}
OF_RESCUE: Final[Mapping[JobState, str]] = {
    JobState.DISCARDED: "sqla_river_jobs_discarded_total",
    JobState.CANCELLED: "sqla_river_jobs_cancelled_total",
}
SHOWN: Final = (
    JobState.AVAILABLE,
    JobState.PENDING,
    JobState.RUNNING,
    JobState.RETRYABLE,
    JobState.SCHEDULED,
)
