"""`health`."""

import json

import click
from rich.console import Console
from rich.table import Table
from sqlalchemy import URL

from sqla_river.check import check_schema
from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.cli.screen import cell, new_console, new_table
from sqla_river.cli.stats import age_of
from sqla_river.errors import SchemaError
from sqla_river.health import RunnerHealth, fleet


@click.command()
@database_option(required=True, meaning="The database that the runners work on.")
@schema_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list of runners.")
def health(url: URL, schema: str | None, as_json: bool) -> None:
    """Say which runners live, by their heartbeats; exit code 1 if none does, or one is late.

    A runner that has stopped is not listed; one that died is, as dead, until others have lived for some minutes.
    """
    with told(), engine_for(url).connect() as connection:
        fatal = [problem for problem in check_schema(connection, schema) if problem.fatal]
        if fatal:
            raise SchemaError(str(fatal[0]))
        runners = fleet(connection, schema)
    if as_json:
        click.echo(json.dumps([_as_json(runner) for runner in runners]))
    elif runners:
        console = new_console()
        console.print(health_table(console, runners))
    if not any(runner.state == "live" for runner in runners):
        click.echo("no runner lives", err=True)
        raise SystemExit(1)
    if any(runner.state == "late" for runner in runners):
        raise SystemExit(1)


def _as_json(runner: RunnerHealth) -> dict[str, object]:
    return {
        "id": runner.id,
        "state": runner.state,
        "silent_seconds": runner.silent.total_seconds(),
        "age_seconds": runner.age.total_seconds(),
        "queues": dict(runner.queues),
        "version": runner.version,
    }


def health_table(console: Console, runners: list[RunnerHealth]) -> Table:
    """One line per runner."""
    table = new_table(console, "runner", "state", "last heartbeat", "up for", "slots")
    for runner in runners:
        slots = " ".join(f"{queue}={slots}" for queue, slots in runner.queues.items())
        cells = (runner.id, runner.state, f"{age_of(runner.silent)} ago", age_of(runner.age), slots)
        table.add_row(*map(cell, cells))
    return table
