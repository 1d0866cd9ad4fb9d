"""`bench`."""

import json
import logging
import os
import platform
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from typing import Final

import click
import sqlalchemy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from sqlalchemy import URL

from sqla_river.cli import ground
from sqla_river.cli.database import database_option, told
from sqla_river.cli.interrupts import Interrupts
from sqla_river.cli.profiles import PROFILES, Figure, Handlers, Settings, Viewer, run, unseen
from sqla_river.cli.screen import new_console, new_table
from sqla_river.schema import create_all

POOL: Final = 5


@click.command()
@click.argument("profiles", nargs=-1, type=click.Choice(list(PROFILES)))
@database_option(
    required=False,
    meaning="A server of yours, for a schema of the bench's own; unless said, one is started and thrown away.",
)
@click.option("--jobs", type=click.IntRange(100), default=50_000, show_default=True, help="For insert and work.")
@click.option("--slots", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Of the runner.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="For latency and mixed.")
@click.option("--rate", type=click.FloatRange(1.0), default=300.0, show_default=True, help="Jobs a second in latency.")
@click.option("--handlers", type=click.Choice(["threads", "asyncio"]), default="threads", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the settings, the versions, and a list of figures.")
def bench(
    profiles: tuple[str, ...],
    url: URL | None,
    jobs: int,
    slots: int,
    seconds: float,
    rate: float,
    handlers: Handlers,
    as_json: bool,
) -> None:
    """Measure what this machine and a PostgreSQL can do: how fast jobs go in and are worked, how soon they start.

    All PROFILES are measured unless some are named. Each begins with empty tables, in a schema that is dropped at the
    end, and jobs that do nothing. The client and, unless --database-url says another, the server share this machine.
    A server that is started here does not wait for the disk (fsync is off): for figures of yours name your own.
    """
    interrupts = Interrupts()
    settings = Settings(jobs, slots, seconds, rate, handlers)
    logging.getLogger("sqla_river").setLevel(logging.ERROR)
    with ExitStack() as stack:
        try:
            with told():
                _measure(profiles or tuple(PROFILES), url, settings, stack, interrupts, as_json=as_json)
        except TimeoutError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            if interrupts.number is None:
                raise
        finally:
            interrupts.disarm()
    if interrupts.number is not None:
        click.echo("interrupted; all that was made is removed", err=True)
        sys.exit(128 + interrupts.number)


def _measure(
    profiles: tuple[str, ...],
    url: URL | None,
    settings: Settings,
    stack: ExitStack,
    interrupts: Interrupts,
    *,
    as_json: bool,
) -> None:
    engine, where = ground.prepare(url, "bench", stack, pool_size=POOL)
    create_all(engine)
    versions = {
        "postgresql": ground.server_version(engine),
        "sqlalchemy": sqlalchemy.__version__,
        "psycopg": metadata.version("psycopg"),
        "python": platform.python_version(),
    }
    told_to = Console(stderr=True, highlight=False)
    figures: list[Figure] = []
    try:
        for profile in profiles:
            interrupts.check()
            with _shown(told_to, profile, interrupts) as viewer:
                figures.extend(run(profile, engine, settings, viewer))
    except Exception:  # what was found before took its time
        if figures:
            _print(figures, settings, versions, where, as_json=as_json)
        raise
    _print(figures, settings, versions, where, as_json=as_json)


def _print(figures: list[Figure], settings: Settings, versions: dict[str, str], where: str, *, as_json: bool) -> None:
    if as_json:
        found = [figure._asdict() for figure in figures]
        click.echo(json.dumps({"settings": settings._asdict(), "versions": versions, "figures": found}, indent=2))
    else:
        console = new_console()
        console.print(_table(console, figures))
        said = ", ".join(f"{name} {version}" for name, version in versions.items())
        console.print(f"{said}; {where}; {os.cpu_count()} cores", markup=False, soft_wrap=True)


@contextmanager
def _shown(console: Console, profile: str, interrupts: Interrupts) -> Generator[Viewer]:
    """A bar for *profile*, on a terminal."""
    if not console.is_terminal:
        yield unseen(interrupts.check)
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(profile, total=1)

        def tell(done: int, of: int) -> None:
            interrupts.check()
            progress.update(task, completed=done, total=of)

        yield Viewer(tell, interrupts.check)


def _table(console: Console, figures: list[Figure]) -> Table:
    table = new_table(console, "profile")
    table.add_column("what", no_wrap=True)
    table.add_column("figure", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    before = ""
    for figure in figures:
        shown = f"{figure.value:,.0f}" if figure.value >= 100 else f"{figure.value:.1f}"  # noqa: PLR2004
        table.add_row(figure.profile if figure.profile != before else "", figure.name, shown, figure.unit)
        before = figure.profile
    return table
