"""What the tables show of text that anybody may have written, on terminals of any width and in a pipe."""

import io
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from sqla_river.cli.app import app
from sqla_river.cli.health import health_table
from sqla_river.cli.screen import WIDE
from sqla_river.cli.stats import stats_table
from sqla_river.cli.tables import state_table
from sqla_river.health import RunnerHealth
from sqla_river.states import UNFINISHED, JobState
from sqla_river.stats import QueueStats

EVIL = "[red]a[/] :bomb: [/x]\x1b[31m\n"
SHOWN = r"[red]a[/] :bomb: [/x]\x1b[31m\n"
INSERT = text("INSERT INTO river_job (kind, args, queue, state) VALUES ('a', '{}', '[/q]', :state)")
MANY = dict.fromkeys(JobState, 1_234_567)


def stats(queue: str) -> QueueStats:
    return QueueStats(queue, 0, 0, 0, 0, MANY, timedelta(hours=5), 12.5, 0.1, frozenset())


def shown(make: Callable[[Console], Table], width: int, *, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)
    console.print(make(console))
    file: Any = console.file
    return str(file.getvalue())


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, WIDE])
def test_stats_show_each_queue_and_each_figure_on_a_terminal_of_any_width(width: int) -> None:
    said = shown(lambda console: stats_table(console, [stats("emails"), stats("default")]), width)

    assert max(map(len, said.splitlines())) <= width
    for word in ("emails", "default", *(state.value for state in JobState), "oldest", "done/s", "failed/s"):
        assert word in said
    assert [said.count(figure) for figure in ("1,234,567", "5 h", "12.5", "0.1")] == [2 * len(JobState), 2, 2, 2]
    assert "…" not in said


def stats_of(console: Console) -> Table:
    return stats_table(console, [stats(EVIL)])


def states_of(console: Console) -> Table:
    return state_table(console, "kind", {EVIL: {"completed": 1}})


def health_of(console: Console) -> Table:
    return health_table(console, [RunnerHealth(EVIL, "live", timedelta(0), timedelta(0), {"a": 1}, "1")])


@pytest.mark.parametrize("width", [80, WIDE])
@pytest.mark.parametrize("make", [stats_of, states_of, health_of])
def test_names_are_shown_as_they_are(make: Callable[[Console], Table], width: int) -> None:
    assert SHOWN in shown(make, width)


def test_stats_in_a_pipe_are_a_line_for_each_queue(url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(INSERT, [{"state": state.value} for state in UNFINISHED])

    ended = CliRunner().invoke(app, ["stats", "--database-url", url], env={"COLUMNS": "80"})

    assert ended.exit_code == 0, ended.output
    head, _, *lines = [line for line in ended.stdout.splitlines() if line.strip()]
    assert head.startswith("| queue | pending | scheduled | available | running | retryable |")
    assert [line.split("|")[1] for line in lines] == [" [/q]  "]
