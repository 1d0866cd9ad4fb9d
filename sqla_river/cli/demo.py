"""`demo`."""

import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final

import click
import sqlalchemy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sqlalchemy import URL, Engine

from sqla_river.cli import ground
from sqla_river.cli.database import database_option, told
from sqla_river.cli.interrupts import Interrupts
from sqla_river.cli.tables import state_table
from sqla_river.schema import create_all

HURRY: Final = {"SHOP_PAY_WITHIN": "5", "SHOP_SMS_PAUSE": "1", "SHOP_EMAIL_PAUSE": "1", "SHOP_SENDING_TAKES": "0.05"}
"""The shop's durations for the demo, in seconds, where the environment does not say others."""
PATIENCE: Final = 60.0
"""Seconds after which the demo gives up; it takes about ten."""
LOOK_EVERY: Final = 0.05
STEPS: Final = 4
"""How often a pipe hears how far the notices are."""


@click.command()
@database_option(
    required=False,
    meaning="A server of yours, for a schema of the demo's own; unless said, one is started and thrown away.",
)
@click.option("--orders", type=click.IntRange(3, 100), default=5, show_default=True, help="How many orders to take.")
def demo(url: URL | None, orders: int) -> None:
    """Show a small shop at work for about ten seconds, on a real PostgreSQL.

    Nothing stays: neither the server that it starts nor, on a server of yours, its schema. Ctrl-C ends it at any
    moment. The shop is examples/shop of the source; read there how little it takes.
    """
    interrupts = Interrupts()
    console = Console(highlight=False)
    stack = ExitStack()
    try:
        try:
            with told():
                Demo(console, interrupts, stack).run(url, orders)
        finally:
            interrupts.disarm()
            logging.getLogger("sqla_river").setLevel(logging.CRITICAL + 1)  # the server may go before a thread does
    except KeyboardInterrupt:
        if interrupts.number is None:
            raise
    finally:
        stack.close()
    if interrupts.number is not None:
        click.echo("interrupted; all that was started is stopped and removed", err=True)
        sys.exit(128 + interrupts.number)


class Demo:
    """One run of the demo. What it starts it puts on *stack* before it starts it."""

    def __init__(self, console: Console, interrupts: Interrupts, stack: ExitStack) -> None:
        self._console = console
        self._interrupts = interrupts
        self._stack = stack
        self._began = time.monotonic()

    def run(self, url: URL | None, orders: int) -> None:
        """Tell the story from begin to end."""
        with self._interrupts.shield():
            _find_shop()
            from shop import jobs, story
            from sqla_river.runner import Runner  # which needs libpq; --help does not

        engine = self._engine(url)
        create_all(engine)
        story.open_shop(engine)
        self.say("the tables of sqla_river and of the shop are there")
        self._listen_to_jobs()
        runner = Runner(engine, jobs.workers, queues=jobs.QUEUES)
        self._stack.callback(runner.stop, timedelta(seconds=2))
        with self._interrupts.shield():
            runner.start()
        self.say("a runner works: " + ", ".join(f"{slots} slots for {queue}" for queue, slots in jobs.QUEUES.items()))
        story.sell(orders, self.say)
        self._drain(story.enqueue_notices, story.notices_left, story.NOTICES)
        self.say("waiting for the checks of payment, which are due 5 s after their orders")
        self._wait_until(lambda: not story.count_unfinished())
        self._console.print(state_table(self._console, "kind", story.by_kind()))
        self.say(story.balance())
        with self._interrupts.shield():
            runner.stop()
        self.say("the runner has stopped; the database goes with it")

    def say(self, line: str, style: str = "") -> None:
        """Print *line* with its second."""
        self._console.print(
            f"{time.monotonic() - self._began:5.1f} s  {line}", style=style, markup=False, soft_wrap=True
        )

    def _engine(self, url: URL | None) -> Engine:
        engine, where = ground.prepare(url, "demo", self._stack)
        version = ground.server_version(engine)
        self.say(f"PostgreSQL {version} is ready: {where}; SQLAlchemy {sqlalchemy.__version__}")
        return engine

    def _listen_to_jobs(self) -> None:
        """Let what handlers and runner log be part of the story."""
        logger = logging.getLogger("sqla_river")
        logger.addHandler(_Told(self.say))
        logger.propagate = False
        logger.setLevel(logging.WARNING)
        logging.getLogger("sqla_river.job").setLevel(logging.INFO)

    def _drain(self, enqueue: Callable[[], None], left: Callable[[], int], count: int) -> None:
        began = time.monotonic()
        enqueue()
        self.say(f"{count:,} notices enqueued in one transaction, in {time.monotonic() - began:.2f} s")
        columns = (TextColumn("         notices"), BarColumn(), MofNCompleteColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            task = progress.add_task("notices", total=count)
            told = 0

            def drained() -> bool:
                nonlocal told
                done = count - left()
                progress.update(task, completed=done)
                if not self._console.is_terminal and done * STEPS // count > told:
                    told = done * STEPS // count
                    self.say(f"{done:,} of {count:,} notices sent")
                return done >= count

            self._wait_until(drained)
        self.say(f"{count:,} notices sent, {count / (time.monotonic() - began):,.0f} a second")

    def _wait_until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > deadline:
                raise click.ClickException(f"the jobs are not done after {PATIENCE:.0f} s; is the machine very busy?")
            time.sleep(LOOK_EVERY)
            self._interrupts.check()


class _Told(logging.Handler):
    """Hands log records on as lines of the story."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage(), "yellow" if record.levelno >= logging.WARNING else "")


def _find_shop() -> None:
    """Let ``import shop`` find the example, in a hurry: in a wheel it lies beside us, in a clone beside the package."""
    package = Path(__file__).resolve().parents[1]
    for examples in (package / "examples", package.parent / "examples"):
        if (examples / "shop").is_dir():
            os.environ |= {**HURRY, **os.environ}
            sys.path.insert(0, str(examples))
            return
    raise click.ClickException("examples/shop is missing; run the demo from a clone, or from a wheel of sqla-river")
