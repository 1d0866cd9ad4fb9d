"""`stats`."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from sqlalchemy import URL, Connection

from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.cli.screen import cell, fits, new_console, new_table
from sqla_river.cli.tables import LIFE
from sqla_river.errors import SchemaError
from sqla_river.schema import installed_version
from sqla_river.states import JobState
from sqla_river.stats import MinuteStats, QueueStats, all_stats, history

CHART: Final = timedelta(minutes=59)
"""What the chart of `--watch` shows, besides the minute that has begun."""
BARS: Final = " ▁▂▃▄▅▆▇█"


@click.command()
@database_option(required=True, meaning="The database to look at.")
@schema_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object of queues; with --watch a line each time.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C, with a chart of the last hour.")
@click.option(
    "--every",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How often --watch looks.",
)
def stats(url: URL, schema: str | None, as_json: bool, watch: bool, every: float) -> None:
    """Show how many jobs of each queue are in each state, and how fast they are worked.

    What waits or runs is counted, where there is much of it estimated (~). What is finished is what runners have
    counted, with a lag of some seconds; finished rows are not looked at. "done/s" and "failed/s" are of the last five
    minutes, "oldest" is how long the first available job has been due.
    """
    console = new_console()
    with told(), engine_for(url).connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")  # a watch must hold no snapshot
        if not installed_version(connection, schema):
            where = f"schema '{schema}'" if schema else "the search_path"
            raise SchemaError(
                f"the tables are missing in {where}; run 'sqla-river migrate', or name their schema with --schema"
            )
        if watch:
            _watch(console, connection, schema, as_json, every)
            return
        found = all_stats(connection, schema)
    if as_json:
        click.echo(json.dumps(_as_json(found)))
    elif any(map(_is_used, found)):
        console.print(stats_table(console, found))
    else:
        click.echo("no jobs")


def _watch(console: Console, connection: Connection, schema: str | None, as_json: bool, every: float) -> None:
    """Look again and again, until Ctrl-C: on a terminal in one place, in a pipe one after the other."""
    try:
        if as_json:
            for found, _ in _looks(connection, schema, every):
                click.echo(json.dumps(_as_json(found)))
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for found, minutes in _looks(connection, schema, every):
                    live.update(Group(stats_table(console, found), *chart(minutes)), refresh=True)
        else:
            for found, _ in _looks(connection, schema, every):
                console.print(stats_table(console, found))
    except KeyboardInterrupt:
        return


def _looks(
    connection: Connection, schema: str | None, every: float
) -> Iterator[tuple[list[QueueStats], list[MinuteStats]]]:
    while True:
        yield all_stats(connection, schema), history(connection, schema, None, CHART)
        time.sleep(every)


def _is_used(stats: QueueStats) -> bool:
    return any(stats.by_state.values())


def _as_json(found: Sequence[QueueStats]) -> dict[str, dict[str, Any]]:
    return {
        stats.queue: {
            **{state.value: stats.by_state[state] for state in LIFE if stats.by_state[state]},
            "oldest_available_seconds": stats.oldest_available.total_seconds() if stats.oldest_available else None,
            "throughput": round(stats.throughput, 3),
            "failures": round(stats.failures, 3),
            "estimated": sorted(stats.estimated),
        }
        for stats in found
    }


def stats_table(console: Console, found: Sequence[QueueStats]) -> Table:
    """One line per queue, one column per state that occurs; where that is too wide, one line per figure."""
    states = [state for state in LIFE if any(stats.by_state[state] for stats in found)]
    rows = {stats.queue: _figures(stats, states) for stats in found}
    table = new_table(console, "queue")
    for name in (*(state.value for state in states), "oldest", "done/s", "failed/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for queue, figures in rows.items():
        table.add_row(cell(queue), *figures.values())
    return table if fits(console, table) else _tall(console, rows)


def _tall(console: Console, rows: Mapping[str, Mapping[str, str]]) -> Table:
    table = new_table(console, "queue")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for queue, figures in rows.items():
        name = queue
        for what, figure in figures.items():
            if figure:
                table.add_row(cell(name), what, figure)
                name = ""
    return table


def _figures(stats: QueueStats, states: Sequence[JobState]) -> dict[str, str]:
    return {
        **{state.value: _figure(stats, state) for state in states},
        "oldest": "" if stats.oldest_available is None else age_of(stats.oldest_available),
        "done/s": f"{stats.throughput:,.1f}" if stats.throughput else "",
        "failed/s": f"{stats.failures:,.1f}" if stats.failures else "",
    }


def _figure(stats: QueueStats, state: JobState) -> str:
    jobs = stats.by_state[state]
    roughly = "~" if state in stats.estimated and state in LIVE else ""
    return f"{roughly}{jobs:,}" if jobs else ""


LIVE: Final = frozenset(
    {JobState.AVAILABLE, JobState.PENDING, JobState.RUNNING, JobState.SCHEDULED, JobState.RETRYABLE}
)


def age_of(age: timedelta) -> str:
    """*age* in its largest unit."""
    seconds = int(age.total_seconds())
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:,} {unit}"
    return f"{seconds} s"


def chart(minutes: Sequence[MinuteStats]) -> list[Text]:
    """Two lines of bars, one bar per minute: jobs completed, and attempts failed."""
    lines = {
        "completed": [minute.completed for minute in minutes],
        "failed": [minute.by_state[JobState.RETRYABLE] + minute.failed for minute in minutes],
    }
    return [
        Text(f"{name:>9}  {bars(values)}  at most {max(values, default=0):,} a minute", no_wrap=True)
        for name, values in lines.items()
    ]


def bars(values: Sequence[int]) -> str:
    """A bar for each value: the largest is whole, and none but zero is empty."""
    largest = max(values, default=0)
    return "".join(BARS[-(-value * (len(BARS) - 1) // largest)] if largest else BARS[0] for value in values)
