"""`python -m tests.bench`: sqla_river and other job queues, side by side on this machine."""

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from sqlalchemy import make_url

from tests.bench.catalog import CATALOG, LOOP, OURS
from tests.bench.environments import python_of, versions_in
from tests.bench.report import as_json, as_svg, show
from tests.bench.rounds import ROOT, Amounts, Outcome, measure
from tests.bench.servers import SETTINGS, Servers

WIDE: Final = 200
"""Columns of a table that no terminal shows: as many as it needs."""
NAMES: Final = [each.name for each in CATALOG]


@click.command()
@click.argument("peers", nargs=-1, type=click.Choice(NAMES), metavar="[PEER]...")
@click.option(
    "--jobs", type=click.IntRange(10), default=50_000, show_default=True, help="Slow peers get a share of them."
)
@click.option("--singles", type=click.IntRange(10), default=2_000, show_default=True, help="Jobs put in one by one.")
@click.option("--pings", type=click.IntRange(10), default=200, show_default=True, help="Jobs for the idle latency.")
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True, help="Rounds; the median counts.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Folder for bench.json and bench.svg.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "bench",
    show_default="build/bench",
    help="Folder for the environments of the peers, which are made once.",
)
@click.option(
    "--database-url",
    help="A PostgreSQL of yours, as a superuser, for databases of the bench's own; else one is started.",
)
def main(
    peers: tuple[str, ...],
    jobs: int,
    singles: int,
    pings: int,
    repetitions: int,
    markdown: bool,
    output: Path | None,
    cache: Path,
    database_url: str | None,
) -> None:
    """Measure the PEERs, or all: how fast jobs go in and are worked, and how soon one starts when nothing else is.

    The hand-written loop and sqla_river in threads always take part, for only ratios within one run say anything.
    """
    chosen = [each for each in CATALOG if not peers or each.name in {*peers, LOOP, OURS}]
    amounts = Amounts(jobs, singles, pings, repetitions)
    told = Console(stderr=True, highlight=False)
    with Servers(make_url(database_url) if database_url else None) as servers, told.status("") as status:
        outcomes = measure(chosen, amounts, servers, cache.resolve(), status.update)
        about = _about(outcomes, amounts, servers, cache.resolve(), own_server=database_url is None)
    caption = f"medians of {repetitions}, {about['machine']['cores']} cores, PostgreSQL {about['postgresql']}"
    console = Console(highlight=False)
    if markdown or not console.is_terminal:
        console.width = WIDE
    show(outcomes, console, markdown=markdown)
    console.print(f"\n{caption}; {about['machine']['processor']}", markup=False, soft_wrap=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "bench.json").write_text(json.dumps(as_json(outcomes, about), indent=2) + "\n")
        (output / "bench.svg").write_text(as_svg(outcomes, caption))
        told.print(f"written: {output / 'bench.json'}, {output / 'bench.svg'}")


def _about(
    outcomes: dict[str, Outcome], amounts: Amounts, servers: Servers, cache: Path, *, own_server: bool
) -> dict[str, Any]:
    """Tell what ran on what."""
    ran = {name: each.entry for name, each in outcomes.items() if each.rounds}
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "amounts": {name: getattr(amounts, name) for name in ("jobs", "singles", "pings", "repetitions")},
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "postgresql": servers.version(),
        "settings": SETTINGS if own_server else None,
        "versions": {name: versions_in(python_of(entry, cache)) for name, entry in ran.items()},
    }


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
