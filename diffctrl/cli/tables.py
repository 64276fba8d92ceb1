"""Tables of the commands; rich is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffctrl.cli.output import printable

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def as_text(value: str) -> Text:
    """Foreign text as it stands, without markup or control characters."""
    from rich.text import Text

    return Text("\n".join(printable(line) for line in value.splitlines()))


def new_table(title: str, *headings: str) -> Table:
    """An empty table; two columns without headings where none are given."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left", show_header=bool(headings), box=SIMPLE_HEAD)
    for heading in headings or ("", ""):
        table.add_column(heading, overflow="fold")
    return table
