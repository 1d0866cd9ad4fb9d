"""`work`."""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import click

from sqla_river.cli.database import told
from sqla_river.cli.serving import metrics_port_option, serve
from sqla_river.runner import Runner

LEVELS = ("debug", "info", "warning", "error")


@click.command()
@click.option(
    "-A",
    "--app",
    required=True,
    metavar="MODULE:NAME",
    envvar="SQLA_RIVER_APP",
    show_envvar=True,
    help="Where the Runner is: an attribute of a module, or a function without arguments that gives one.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS, case_sensitive=False),
    default="info",
    show_default=True,
    envvar="SQLA_RIVER_LOG_LEVEL",
    show_envvar=True,
    help="What is logged, to stderr; 'info' tells of each start and stop.",
)
@metrics_port_option
def work(app: str, log_level: str, metrics_port: int | None) -> None:
    """Work jobs with a Runner of yours, until SIGTERM or Ctrl-C.

    The module is looked for in the current directory first. At the first signal the runner fetches no more and lets
    running jobs finish, for as long as its stop_timeout says; a second one interrupts them, a third leaves them
    behind.

    Exit code 0 after such a stop, 1 for an error, 2 where -A names no Runner.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    runner = find_runner(app)
    if metrics_port is not None:
        serve(runner, metrics_port)
    with told():
        runner.run()


def find_runner(app: str) -> Runner:
    """Import the Runner that *app*, ``module:name``, names.

    Raises:
        click.UsageError: no such module or attribute, or it is something else. What the module raises is left alone.
    """
    module_name, _, path = app.partition(":")
    if not path or not all(part.isidentifier() for part in module_name.split(".")):
        raise click.UsageError(f"-A is MODULE:NAME, as in shop.worker:runner, got '{app}'")
    sys.path.insert(0, str(Path.cwd()))
    found: Any = _module(module_name)
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise click.UsageError(f"'{module_name}' has no '{path}'; NAME is your Runner in -A MODULE:NAME") from None
    if callable(found) and not isinstance(found, type):
        found = found()
    if not isinstance(found, Runner):
        raise click.UsageError(f"'{app}' is {_described(found)}, neither a Runner nor a function that gives one")
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import of the module's own; the traceback says where
        raise click.UsageError(f"there is no module '{error.name}' in the current directory or installed") from None


def _described(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"of type {type(thing).__name__}"
