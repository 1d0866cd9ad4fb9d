"""`queues`: list, pause, resume."""

import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import click
from sqlalchemy import URL, Connection

from sqla_river.cli.database import database_option, engine_for, schema_option, told
from sqla_river.cli.screen import cell, new_console, new_table
from sqla_river.errors import SchemaError
from sqla_river.queues import EVERY_QUEUE, QueueInfo
from sqla_river.river import list_queues, pause, resume
from sqla_river.schema import installed_version

F = TypeVar("F", bound=Callable[..., Any])


@click.group("queues")
def queues() -> None:
    """List, pause and resume queues."""


def _common(command: F) -> F:
    """The options that each of them takes."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON: an array of queues.")
    return database_option(required=True, meaning="The database of the queues.")(schema_option(as_json(command)))


@queues.command("list")
@_common
def list_(url: URL, schema: str | None, as_json: bool) -> None:
    """Show which queues there are, and since when they are paused.

    A queue is listed while a runner works it, for 24 hours after that, and for as long as it is paused.
    """
    with _transaction(url, schema) as connection:
        found = list_queues(connection)
    _show(found, as_json)


@queues.command("pause")
@click.argument("queue")
@click.option("--yes", is_flag=True, help="Do not ask before every queue is paused.")
@_common
def pause_(queue: str, yes: bool, url: URL, schema: str | None, as_json: bool) -> None:
    """Start no more jobs of QUEUE, on any runner, until it is resumed; '*' is every queue that there is.

    What runs goes on. A queue that no runner has worked yet can be paused in advance.
    """
    if queue == EVERY_QUEUE and not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("pausing every queue needs --yes where nobody can be asked")
        if not click.confirm("Pause every queue?", err=True):
            raise SystemExit(1)
    with _transaction(url, schema) as connection:
        changed = pause(connection, queue)
    _show(changed, as_json)


@queues.command("resume")
@click.argument("queue")
@_common
def resume_(queue: str, url: URL, schema: str | None, as_json: bool) -> None:
    """End the pause of QUEUE; '*' is every queue. Runners go on at once."""
    with _transaction(url, schema) as connection:
        changed = resume(connection, queue)
    _show(changed, as_json)


@contextmanager
def _transaction(url: URL, schema: str | None) -> Generator[Connection]:
    """A transaction on which the verbs mean the tables in *schema*."""
    with told(), engine_for(url).begin() as connection:
        if not installed_version(connection, schema):
            where = f"schema '{schema}'" if schema else "the search_path"
            raise SchemaError(
                f"the tables are missing in {where}; run 'sqla-river migrate', or name their schema with --schema"
            )
        yield connection.execution_options(schema_translate_map={None: schema})


def _show(found: Sequence[QueueInfo], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_as_json(info) for info in found], indent=2))
        return
    if not found:
        click.echo("no queues")
        return
    console = new_console()
    table = new_table(console, "queue", "paused since (UTC)", "last touched (UTC)", "metadata")
    for info in found:
        cells = (info.name, _moment(info.paused_at), _moment(info.updated_at), _noted(info.metadata))
        table.add_row(*(cell(each) for each in cells))
    console.print(table)


def _as_json(info: QueueInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "paused_at": info.paused_at.isoformat() if info.paused_at is not None else None,
        "metadata": info.metadata,
        "created_at": info.created_at.isoformat(),
        "updated_at": info.updated_at.isoformat(),
    }


def _moment(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"


def _noted(metadata: object) -> str:
    return json.dumps(metadata) if metadata else ""
