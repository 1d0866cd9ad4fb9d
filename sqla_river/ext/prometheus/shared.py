"""Processes that share their metrics by files in a folder, as prometheus_client has it."""

import json
import os
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from prometheus_client import Metric, multiprocess
from prometheus_client.mmap_dict import MmapedDict

from sqla_river.errors import ConfigError
from sqla_river.ext.prometheus.names import OF_RUNNER, TIMESTAMP
from sqla_river.health import LIMIT, Health

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"


def is_shared() -> bool:
    """Whether processes share their metrics: then nobody asks this one for its gauges."""
    return FOLDER in os.environ


def folder() -> Path:
    """Where the files are; raises `ConfigError` if that is no folder."""
    named = os.environ[FOLDER]
    if not (named and Path(named).is_dir()):
        raise ConfigError(f"{FOLDER} must name a folder, got {named!r}; make it before the processes start")
    return Path(named)


def shared_health(limit: timedelta = LIMIT) -> Health:
    """The health of all processes that share their metrics and have started a runner, as they say it every second.

    Args:
        limit: how long one may say nothing.
    """
    said = {
        sample.name: sample.value
        for family in Shared().collect()
        for sample in family.samples
        if sample.name in OF_RUNNER and not sample.labels
    }
    if not said:
        return Health(True, False, ("no process has started yet",))
    silent = time.time() - said[TIMESTAMP]
    problems: list[str] = []
    if silent > limit.total_seconds():
        problems.append(f"a process has said nothing for {silent:.0f} s")
    if not said["sqla_river_runner_alive"]:
        problems.append("an inner loop of a process hangs")
    alive = not problems
    if not said["sqla_river_runner_ready"]:
        problems.append("a process is not ready")
    return Health(alive, not problems, tuple(problems))


class Shared:
    """The metrics of all processes that share them; the gauges of those that have ended are taken away."""

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is, is known only when it is collected."""
        return []

    def collect(self) -> Iterable[Metric]:
        """All of it, added up as each metric says."""
        shared: Any = multiprocess
        where = folder()
        for path in where.glob("gauge_live*_*.db"):
            pid = path.stem.rpartition("_")[2]
            if pid.isdecimal() and not _lives(int(pid)):
                shared.mark_process_dead(pid, str(where))
        # One that has just been made is empty for an instant, and reading it would raise.
        files = [str(path) for path in where.glob("*.db") if _size(path) and not _only_inherited(path)]
        found: Iterable[Metric] = shared.MultiProcessCollector.merge(files)
        return found


def _only_inherited(path: Path) -> bool:
    """Whether a process says what it has yet to look at. Who is forked off one that has a runner (by multiprocessing in
    a handler, say) has its gauges too, and prometheus_client writes them anew, at 0, with the first metric that moves.
    """
    if not path.name.startswith("gauge_livemin_"):
        return False
    read: Any = MmapedDict
    try:
        said = {json.loads(key)[1]: value for key, value, *_ in read.read_all_values_from_file(str(path))}
    except FileNotFoundError:
        return True
    return not said.keys().isdisjoint(OF_RUNNER) and not said.get(TIMESTAMP)


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
