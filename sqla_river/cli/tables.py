"""`migrate`, `check-db` and `stats`."""

import json
from collections.abc import Iterable

import click
from rich import box
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL

from sqla_river import ddl
from sqla_river import schema as schemas
from sqla_river.check import check_schema
from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.errors import SchemaError
from sqla_river.schema import installed_version
from sqla_river.states import JobState
from sqla_river.stats import StateCount, count_states

LIFE = (
    JobState.PENDING,
    JobState.SCHEDULED,
    JobState.AVAILABLE,
    JobState.RUNNING,
    JobState.RETRYABLE,
    JobState.COMPLETED,
    JobState.CANCELLED,
    JobState.DISCARDED,
)
"""The states in the order in which a job may pass through them."""


@click.command()
@database_option(required=True, meaning="The database to migrate.")
@schema_option
def migrate(url: URL, schema: str | None) -> None:
    """Create the tables, or bring them to the version of this library.

    Safe to run again, from many places at once, and while runners work. Those who use Alembic do not need it.
    """
    with told():
        done = schemas.migrate(engine_for(url), schema)
    where = f"schema '{done.schema}'"
    if done.found == done.version:
        mended = f"repaired, in {len(done.statements)} statements" if done.statements else "already, nothing to do"
        click.echo(f"{where}: version {done.found} {mended}")
    elif done.found:
        click.echo(f"{where}: upgraded from version {done.found} to {done.version}")
    else:
        click.echo(f"{where}: created the tables, version {done.version}")


@click.command("check-db")
@database_option(required=True, meaning="The database to look at.")
@schema_option
def check_db(url: URL, schema: str | None) -> None:
    """Say whether the tables are there, and as this library needs them; exit code 1 if a runner would not start."""
    with told(), engine_for(url).connect() as connection:
        problems = check_schema(connection, schema)
    for problem in problems:
        click.echo(f"{'problem' if problem.fatal else 'warning'}: {problem}")
    if any(problem.fatal for problem in problems):
        raise SystemExit(1)
    if not problems:
        click.echo(f"the tables are as sqla_river needs them, version {ddl.LATEST}")


@click.command()
@database_option(required=True, meaning="The database to look at.")
@schema_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object of queues, each an object of states.")
def stats(url: URL, schema: str | None, as_json: bool) -> None:
    """Show how many jobs of each queue are in each state."""
    with told(), engine_for(url).connect() as connection:
        if not installed_version(connection, schema):
            where = f"schema '{schema}'" if schema else "the search_path"
            raise SchemaError(
                f"the tables are missing in {where}; run 'sqla-river migrate', or name their schema with --schema"
            )
        counts = count_states(connection, schema)
    if as_json:
        click.echo(json.dumps(by_queue(counts)))
    elif counts:
        console = Console(highlight=False)
        console.print(state_table(console, "queue", by_queue(counts)))
    else:
        click.echo("no jobs")


def by_queue(counts: Iterable[StateCount]) -> dict[str, dict[str, int]]:
    """Each queue's states and their jobs."""
    queues: dict[str, dict[str, int]] = {}
    for count in counts:
        queues.setdefault(count.queue, {})[count.state] = count.jobs
    return queues


def state_table(console: Console, what: str, rows: dict[str, dict[str, int]]) -> Table:
    """One line per row, one column per figure that occurs, states first; plain ASCII in a pipe."""
    given = {figure for row in rows.values() for figure in row}
    figures = [state.value for state in LIFE if state in given] + sorted(given.difference(LIFE))
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    table.add_column(what)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[figure]:,}" if figure in row else "" for figure in figures))
    return table
