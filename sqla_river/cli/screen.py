"""What the commands print on: tables that lose nothing, of text that anybody may have put into the database."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 10_000
"""Columns of a pipe: a line is never broken there."""


def new_console() -> Console:
    """As wide as the terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    return console


def new_table(console: Console, *columns: str) -> Table:
    """One with *columns* of text, which is broken where it is too long; plain ASCII in a pipe."""
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN)
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def fits(console: Console, table: Table) -> bool:
    """Whether *console* is as wide as *table* would be."""
    return console.measure(table, options=console.options.update(width=WIDE)).maximum <= console.width


def printable(text: str) -> str:
    """*text* on one line, without what would steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def cell(text: str) -> Text:
    """*text* as it is: what looks like markup is none."""
    return Text(printable(text))
