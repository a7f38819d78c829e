"""Tables: drawn by rich on a terminal, plain aligned columns elsewhere.

Plain output is not wrapped to a screen's width, so that it can be piped into grep, sort and files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_heading(text: str) -> None:
    """A line that opens a section of output."""
    print(f"\n{text}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` under ``columns``; a column whose title begins with ">" is right-aligned."""
    titles = [title.removeprefix(">") for title in columns]
    rights = [title.startswith(">") for title in columns]
    if sys.stdout.isatty():
        _print_rich(titles, rights, rows)
        return
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row in (titles, ["-" * width for width in widths], *rows):
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, rights, strict=True)
        )
        print("  ".join(cells).rstrip())


def _print_rich(titles: Sequence[str], rights: Sequence[bool], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, right in zip(titles, rights, strict=True):
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
