"""``flask river``: the commands of an operator, on the app's own database."""

import contextlib
import json
import logging
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
from flask import current_app
from flask.cli import AppGroup
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from sqla_river import ddl
from sqla_river import schema as schemas
from sqla_river.check import check_schema
from sqla_river.errors import RiverError
from sqla_river.models import declared_schema
from sqla_river.stats import all_stats

if TYPE_CHECKING:
    from sqla_river.ext.flask.extension import FlaskRiver

log: Final = logging.getLogger(__name__)

LEVELS: Final = ("debug", "info", "warning", "error")

commands = AppGroup("river", help="Background jobs: work them, look at them, and what they need.")


def _river() -> "FlaskRiver[Any]":
    extension: FlaskRiver[Any] = current_app.extensions["sqla_river"]
    return extension


def _schema() -> str | None:
    return declared_schema(_river().river.job_class)


@contextlib.contextmanager
def _told() -> Generator[None]:
    """Tell our errors and the database's in a line each, without a traceback; they end the command with exit code 1."""
    try:
        yield
    except RiverError as error:
        raise click.ClickException(str(error)) from error
    except DBAPIError as error:
        raise click.ClickException(f"the database says: {str(error.orig).strip()}") from error


@contextlib.contextmanager
def _changing() -> Generator[Session]:
    """A session whose changes are committed at the end, or told why not."""
    with _told(), Session(_river().engine) as session, session.begin():
        yield session


def parse_slots(queues: str) -> dict[str, int]:
    """``default=10,emails=50``; raises ValueError for what says something else."""
    return {name.strip(): int(slots) for name, _, slots in (each.partition("=") for each in queues.split(","))}


def _slots(_ctx: click.Context, _option: click.Parameter, value: str | None) -> dict[str, int] | None:
    try:
        return None if value is None else parse_slots(value)
    except ValueError:
        raise click.BadParameter(f"write NAME=SLOTS,..., as in default=10,emails=50, got '{value}'") from None


@commands.command()
@click.option(
    "--queues", metavar="NAME=SLOTS,...", callback=_slots, help="Which queues to work, in place of SQLA_RIVER_QUEUES."
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged, unless the app has set up its logging.",
)
def work(queues: dict[str, int] | None, log_level: str) -> None:
    """Work jobs until SIGTERM or Ctrl-C.

    At the first signal the runner fetches no more and lets running jobs finish, for as long as SQLA_RIVER_STOP_TIMEOUT
    says; a second one interrupts them, a third leaves them behind.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    river = _river()
    if not river.workers.kinds:
        log.warning("no handler is registered: import the modules of your jobs where the app is made")
    with _told():
        (river.runner() if queues is None else river.runner(queues=queues)).run()


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object of queues, each an object of states.")
def stats(as_json: bool) -> None:
    """Show how many jobs of each queue are in each state."""
    with _told(), _river().engine.connect() as connection:
        found = all_stats(connection, _schema())
    queues = {each.queue: {state.value: jobs for state, jobs in each.by_state.items() if jobs} for each in found}
    if as_json:
        click.echo(json.dumps(queues))
        return
    width = max((len(queue) for queue in queues), default=0)
    for queue, states in queues.items():
        for state, jobs in states.items():
            click.echo(f"{queue:<{width}}  {state:<9}  {jobs:>11,}")
    if not any(queues.values()):
        click.echo("no jobs")


@commands.command()
@click.argument("queue")
def pause(queue: str) -> None:
    """Start no more jobs of QUEUE, on whatever runner, until it is resumed; '*' means all queues. What runs goes on."""
    with _changing() as session:
        paused = _river().river.pause(session, queue)
    for each in paused:
        click.echo(f"queue '{each.name}' is paused since {each.paused_at:%Y-%m-%d %H:%M:%S} UTC")


@commands.command()
@click.argument("queue")
def resume(queue: str) -> None:
    """End the pause of QUEUE; '*' means all queues."""
    with _changing() as session:
        resumed = _river().river.resume(session, queue)
    for each in resumed:
        click.echo(f"queue '{each.name}' is worked")


@commands.command()
@click.argument("job_id", metavar="JOB...", type=int, nargs=-1, required=True)
def retry(job_id: Sequence[int]) -> None:
    """Make each JOB, named by its id, available at once, whatever became of it; all of them, or none."""
    with _changing() as session:
        lines = [f"job {each} ({_river().river.retry(session, each).kind}) is available" for each in sorted(job_id)]
    click.echo("\n".join(lines))


@commands.command("check-db")
def check_db() -> None:
    """Say whether the tables are there, and as this library needs them; exit code 1 if a runner would not start."""
    with _told(), _river().engine.connect() as connection:
        problems = check_schema(connection, _schema())
    for problem in problems:
        click.echo(f"{'problem' if problem.fatal else 'warning'}: {problem}")
    if any(problem.fatal for problem in problems):
        raise SystemExit(1)
    if not problems:
        click.echo(f"the tables are as sqla_river needs them, version {ddl.LATEST}")


@commands.command()
def migrate() -> None:
    """Create the tables, or bring them to the version of this library.

    Safe to run again, from many places at once, and while runners work. Those who use Flask-Migrate do not need it.
    """
    with _told():
        done = schemas.migrate(_river().engine, _schema())
    click.echo(f"schema '{done.schema}': version {done.version}, in {len(done.statements)} statements")
