"""`work`."""

import importlib
import logging
import math
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sqla_river.cli.child import Line
from sqla_river.cli.crew import MIB, Crew, Limits
from sqla_river.cli.database import told
from sqla_river.cli.reload import Watch
from sqla_river.cli.serving import metrics_port_option, serve, serve_processes, share
from sqla_river.cli.supervise import Supervisor
from sqla_river.errors import ConfigError, InvalidOptionError
from sqla_river.live import Queues
from sqla_river.signals import taken

if TYPE_CHECKING:
    from sqla_river.runner import Runner

LEVELS = ("debug", "info", "warning", "error")
UNITS = {"": MIB, "K": 1024, "M": MIB, "G": 1024 * MIB}


def parse_queues(_ctx: click.Context, _option: click.Parameter, value: str | None) -> dict[str, int] | None:
    """``default=10,emails=50``."""
    if value is None:
        return None
    queues: dict[str, int] = {}
    for each in value.split(","):
        name, equals, slots = (part.strip() for part in each.partition("="))
        if not equals or not slots.isdecimal():
            raise click.BadParameter(f"write NAME=SLOTS,..., as in default=10,emails=50, got '{each}'")
        if name in queues:
            raise click.BadParameter(f"queue '{name}' is named twice")
        queues[name] = int(slots)
    try:
        Queues(queues)
    except (ConfigError, InvalidOptionError) as error:
        raise click.BadParameter(str(error)) from error
    return queues


def parse_size(_ctx: click.Context, _option: click.Parameter, value: str | None) -> float:
    """``512M``, ``1.5G``, ``400000K``; a bare number is MiB."""
    if value is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)(?:i?B)?", value.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise click.BadParameter(f"write a size of memory, as in 512M or 1.5G, got '{value}'")
    return float(match[1]) * UNITS[match[2].upper()]


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
    "--processes",
    type=click.IntRange(1, 1_000),
    default=1,
    show_default=True,
    metavar="N",
    envvar="SQLA_RIVER_PROCESSES",
    show_envvar=True,
    help="How many processes to work in, each with a Runner and an engine of its own.",
)
@click.option(
    "--queues",
    callback=parse_queues,
    metavar="NAME=SLOTS,...",
    envvar="SQLA_RIVER_QUEUES",
    show_envvar=True,
    help="What each process works, instead of the Runner's own queues: default=10,emails=50.",
)
@click.option(
    "--max-jobs",
    type=click.IntRange(1),
    metavar="N",
    envvar="SQLA_RIVER_MAX_JOBS",
    show_envvar=True,
    help="Replace a process that has worked about so many jobs.",
)
@click.option(
    "--max-rss",
    callback=parse_size,
    metavar="SIZE",
    envvar="SQLA_RIVER_MAX_RSS",
    show_envvar=True,
    help="Replace a process that holds so much memory: 512M, 1.5G; MiB without a unit.",
)
@click.option("--reload", is_flag=True, help="For development: start anew when a Python file changes.")
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
def work(
    app: str,
    processes: int,
    queues: dict[str, int] | None,
    max_jobs: int | None,
    max_rss: float,
    reload: bool,
    log_level: str,
    metrics_port: int | None,
) -> None:
    """Work jobs with a Runner of yours, until SIGTERM or Ctrl-C.

    The module is looked for in the current directory first. At the first signal no more is fetched and running jobs
    may finish, for as long as the Runner's stop_timeout says; a second one interrupts them, a third leaves them
    behind.

    One process works alone. More of them, or limits, get a supervisor: it starts another process for each that
    crashes, after 1 s doubling to 30 s; at SIGHUP it replaces all, one after the other, each once its successor works;
    what has not stopped 10 s after its stop_timeout it kills. A process is never replaced for its limits before it has
    lived for three leases.

    Exit code 0 after a clean stop, 1 for an error, or where a process had to be killed, 2 where -A names no Runner.
    """
    line = Line.found(files=reload)
    logging.basicConfig(
        level=log_level.upper(),
        format=f"%(asctime)s %(levelname)-7s {'[%(process)d] ' if line is not None else ''}%(name)s: %(message)s",
    )
    limits = Limits(math.inf if max_jobs is None else max_jobs, max_rss)
    if line is None and (processes > 1 or limits != Limits() or reload):
        watch = Watch(Path.cwd()) if reload else None
        if metrics_port is not None:
            serve_processes(metrics_port)
        sys.exit(Supervisor(Crew(processes, limits, waits=reload), watch).run())
    runner = find_runner(app)
    if queues is not None:
        runner.queues.replace(queues)
    if metrics_port is not None:
        if line is None:
            serve(runner, metrics_port)
        else:
            share(runner)
    _work(runner, line)


def _work(runner: "Runner", line: Line | None) -> None:
    """One process of work, whether it is alone or one of a supervisor's: set up here what each of them needs."""
    if line is not None:
        line.runner = runner

    def hang_up(*_: object) -> None:
        if line is None:  # else it is for the supervisor to decide
            signal.raise_signal(signal.SIGTERM)

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with taken(() if ignored else (signal.SIGHUP,), hang_up), told():
        runner.run()


def find_runner(app: str) -> "Runner":
    """Import the Runner that *app*, ``module:name``, names.

    Raises:
        click.UsageError: no such module or attribute, or it is something else. What the module raises is left alone.
    """
    from sqla_river.runner import Runner  # which needs libpq; --help does not

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
