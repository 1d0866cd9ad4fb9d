"""What was found, as a table, as JSON, and as a plot."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Final, NamedTuple

import attrs
from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.catalog import LOOP, OURS
from tests.bench.rounds import Outcome


class Column(NamedTuple):
    title: str
    figure: str
    show: Callable[[float], str]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _millis(value: float) -> str:
    return f"{value:.1f}"


COLUMNS: Final = (
    Column("put in /s, batches", "bulk", _count),
    Column("put in /s, single", "single", _count),
    Column("worked /s", "work", _count),
    Column("x loop", f"by_{LOOP}", _ratio),
    Column("x sqla_river", f"by_{OURS}", _ratio),
    Column("CPU us/job", "cpu", _count),
    Column("idle p50 ms", "p50", _millis),
    Column("idle p95 ms", "p95", _millis),
)


def show(outcomes: Mapping[str, Outcome], console: Console, *, markdown: bool) -> None:
    """Print the table, and below it why some are missing."""
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    table.add_column("peer", no_wrap=True)
    table.add_column("jobs", justify="right")
    for column in COLUMNS:
        table.add_column(column.title, justify="right")
    problems: list[str] = []
    for name, outcome in outcomes.items():
        found = outcome.medians()
        cells = [column.show(found[column.figure]) if column.figure in found else "" for column in COLUMNS]
        if outcome.problem:
            problems.append(f"{name}: {outcome.problem}")
            cells[0] = cells[0] or "see below"
        table.add_row(name, f"{outcome.jobs:,}", *cells)
    console.print(table)
    for problem in problems:
        console.print(problem, markup=False, soft_wrap=True)


def as_json(outcomes: Mapping[str, Outcome], about: Mapping[str, Any]) -> dict[str, Any]:
    """Give all that was found, each round of it."""
    peers = {
        name: {
            "jobs": each.jobs,
            "medians": each.medians(),
            "rounds": each.rounds,
            "problem": each.problem or None,
            "entry": attrs.asdict(each.entry),
        }
        for name, each in outcomes.items()
    }
    return {**about, "peers": peers}


PANELS: Final = (
    ("no-op jobs worked a second", "work", _count),
    ("jobs put in a second, in batches of 1,000", "bulk", _count),
    ("idle: from the call that puts a job in to its handler, p50, ms", "p50", _millis),
)
WIDTH, LABELS, BAR, GAP, TITLE = 860, 170, 18, 6, 34


def as_svg(outcomes: Mapping[str, Outcome], caption: str) -> str:
    """Draw bars, on a scale of powers of ten, longest first."""
    parts: list[str] = []
    top = 0
    for title, figure, shown in PANELS:
        found = [(name, each.medians()[figure]) for name, each in outcomes.items() if figure in each.medians()]
        parts += _panel(title, sorted(found, key=lambda bar: -bar[1]), shown, top)
        top += TITLE + len(found) * (BAR + GAP) + TITLE // 2
    parts.append(f'<text x="10" y="{top + 10}" class="small">{escape(caption)}; the scale is logarithmic</text>')
    style = (
        "text{font:13px sans-serif;fill:#222}.title{font-weight:bold}.small{font-size:11px;fill:#666}"
        "rect{fill:#9db4c8}rect.ours{fill:#1f6f8b}rect.limit{fill:#cccccc}"
    )
    size = f'width="{WIDTH}" height="{top + 24}" viewBox="0 0 {WIDTH} {top + 24}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>'
    ground = '<path d="M0 0h100000v100000H0z" fill="#fff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _panel(title: str, bars: Sequence[tuple[str, float]], shown: Callable[[float], str], top: int) -> list[str]:
    parts = [f'<text x="10" y="{top + 22}" class="title">{escape(title)}</text>']
    if not bars:
        return parts
    lowest = math.floor(math.log10(min(value for _, value in bars)))
    decades = math.log10(max(value for _, value in bars)) - lowest or 1
    for number, (name, value) in enumerate(bars):
        y = top + TITLE + number * (BAR + GAP)
        length = max((math.log10(value) - lowest) / decades * (WIDTH - LABELS - 90), 2)
        kind = "limit" if name == LOOP else "ours" if name.startswith("sqla_river") else "other"
        parts += [
            f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LABELS}" y="{y}" width="{length:.0f}" height="{BAR}" class="{kind}"/>',
            f'<text x="{LABELS + length + 6:.0f}" y="{y + 14}">{shown(value)}</text>',
        ]
    return parts
