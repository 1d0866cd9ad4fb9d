"""How the databases stand behind the runners of one registry."""

import math
import time
from collections import Counter as Tally
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from sqla_river.duties.figures import Figures
from sqla_river.ext.prometheus.names import ADDED_UP, SHOWN
from sqla_river.models import declared_schema
from sqla_river.runner import Runner

OTHER: Final = "other"
MOST_QUEUES: Final = 100
FRESH_FOR: Final = 75.0
"""Seconds for which figures of a database are shown: after that another runner has had its turn, and shows them."""

Values = Mapping[tuple[str, tuple[str, ...]], float]
"""By the name of a metric and its labels."""


def database_of(runner: Runner) -> object:
    """Equal for runners of one database and schema, whoever they log in as."""
    url = runner.engine.url
    said = tuple(str(url.query.get(name)) for name in ("host", "port", "dbname", "service"))
    return url.host, url.port, url.database, said, declared_schema(runner.river.job_class)


class Databases:
    """The last figures of each database."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[float, Values]] = {}
        self._shown: set[tuple[str, tuple[str, ...]]] = set()

    def looked(self, database: object, figures: Figures) -> None:
        """These are the figures of *database* now."""
        _, before = self._found.get(database, (0.0, {}))
        # A queue that is gone is empty: prometheus_client cannot forget it where processes share their metrics.
        self._found[database] = time.monotonic(), {**dict.fromkeys(before, 0.0), **_values(figures)}

    def forget(self, older: float) -> None:
        """Let go of figures that are more than so many seconds old."""
        since = time.monotonic() - older
        self._found = {database: found for database, found in self._found.items() if found[0] >= since}

    def values(self) -> Values:
        """The figures of all of them; NaN for what has been let go of, once."""
        values: dict[tuple[str, tuple[str, ...]], float] = dict.fromkeys(self._shown, math.nan)
        self._shown = {key for _, of_one in self._found.values() for key in of_one}
        for key in self._shown:
            found = [of_one[key] for _, of_one in self._found.values() if key in of_one]
            values[key] = sum(found) if key[0] in ADDED_UP else max(found)
        return values


def _values(figures: Figures) -> Values:
    depth: Tally[tuple[str, tuple[str, ...]]] = Tally()
    oldest: dict[str, float] = {}
    by_depth = sorted(figures.queues, key=lambda each: -sum(each.by_state[state] for state in SHOWN))
    for number, stats in enumerate(by_depth):
        queue = stats.queue if number < MOST_QUEUES else OTHER
        for state in SHOWN:
            depth["sqla_river_queue_depth", (queue, state.value)] += stats.by_state[state]
        oldest[queue] = max(oldest.get(queue, 0.0), _seconds(stats.oldest_available))
    return {
        **depth,
        **{("sqla_river_oldest_available_age_seconds", (queue,)): age for queue, age in oldest.items()},
        ("sqla_river_dead_tuples", ("river_job",)): figures.dead_tuples,
        ("sqla_river_oldest_transaction_age_seconds", ()): _seconds(figures.oldest_transaction),
        ("sqla_river_notification_queue_usage_ratio", ()): figures.notification_usage,
    }


def _seconds(age: timedelta | None) -> float:
    return age.total_seconds() if age is not None else 0.0
