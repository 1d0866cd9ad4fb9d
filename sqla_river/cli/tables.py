"""`migrate` and `check-db`; and tables on the terminal."""

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL

from sqla_river import ddl
from sqla_river import schema as schemas
from sqla_river.check import check_schema
from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.cli.screen import cell, new_table
from sqla_river.states import JobState

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


def state_table(console: Console, what: str, rows: dict[str, dict[str, int]]) -> Table:
    """One line per row, one column per figure that occurs, states first."""
    given = {figure for row in rows.values() for figure in row}
    figures = [state.value for state in LIFE if state in given] + sorted(given.difference(LIFE))
    table = new_table(console, what)
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(cell(name), *(f"{row[figure]:,}" if figure in row else "" for figure in figures))
    return table
