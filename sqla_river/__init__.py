"""River for SQLAlchemy: background jobs that commit with your data.

The names are loaded when they are first used: ``import sqla_river`` needs neither a driver nor an ORM.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqla_river.context import JobContext
    from sqla_river.errors import RiverError
    from sqla_river.models import Job, JobMixin
    from sqla_river.options import InsertOptions, Retention
    from sqla_river.outcomes import Cancel, Snooze
    from sqla_river.policy import Exponential
    from sqla_river.queues import QueueInfo
    from sqla_river.river import (
        River,
        cancel,
        change_priority,
        delete,
        enqueue,
        enqueue_many,
        list_jobs,
        list_queues,
        pause,
        queue_stats,
        reschedule,
        resume,
        retry,
        stats_history,
        update_queue,
        wait_for,
    )
    from sqla_river.runner import Runner
    from sqla_river.schema import create_all
    from sqla_river.states import JobState
    from sqla_river.stats import MinuteStats, QueueStats
    from sqla_river.unique import Unique
    from sqla_river.workers import Workers

__all__ = [
    "Cancel",
    "Exponential",
    "InsertOptions",
    "Job",
    "JobContext",
    "JobMixin",
    "JobState",
    "MinuteStats",
    "QueueInfo",
    "QueueStats",
    "Retention",
    "River",
    "RiverError",
    "Runner",
    "Snooze",
    "Unique",
    "Workers",
    "cancel",
    "change_priority",
    "create_all",
    "delete",
    "enqueue",
    "enqueue_many",
    "list_jobs",
    "list_queues",
    "pause",
    "queue_stats",
    "reschedule",
    "resume",
    "retry",
    "stats_history",
    "update_queue",
    "wait_for",
]

if not TYPE_CHECKING:
    # No module bears the name of a public verb: once imported, it would stand here in the verb's place.
    _HOMES = {
        "context": ("JobContext",),
        "errors": ("RiverError",),
        "models": ("Job", "JobMixin"),
        "options": ("InsertOptions", "Retention"),
        "outcomes": ("Cancel", "Snooze"),
        "policy": ("Exponential",),
        "queues": ("QueueInfo",),
        "river": (
            "River",
            "cancel",
            "change_priority",
            "delete",
            "enqueue",
            "enqueue_many",
            "list_jobs",
            "list_queues",
            "pause",
            "queue_stats",
            "reschedule",
            "resume",
            "retry",
            "stats_history",
            "update_queue",
            "wait_for",
        ),
        "runner": ("Runner",),
        "schema": ("create_all",),
        "states": ("JobState",),
        "stats": ("MinuteStats", "QueueStats"),
        "unique": ("Unique",),
        "workers": ("Workers",),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        home = _HOME.get(name)
        if home is None:
            raise AttributeError(f"module 'sqla_river' has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(f"sqla_river.{home}"), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(__all__)
