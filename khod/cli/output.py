# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where output goes: to a terminal by rich, to anything else as plain text that tools can cut, to programs as JSON."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec
import typer


def on_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout.isatty()


def say(text: str = "") -> None:
    """A line."""
    typer.echo(text)


def print_json(value: Any) -> None:
    """A view, or anything made of plain values, as one JSON document in one line."""
    typer.echo(msgspec.json.encode(value).decode())


def complain(message: str, hint: str = "") -> None:
    """What went wrong, and what to do about it, to standard error."""
    typer.echo(f"khoctl: {message}", err=True)
    if hint:
        typer.echo(f"khoctl: hint: {hint}", err=True)


def print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Names and values; rows without a value are left out."""
    shown = [(name, value) for name, value in rows if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name:<{width}}  {value}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table. `right` names the columns whose values are aligned to the right."""
    if on_terminal():
        _print_rich(headers, rows, right)
    else:
        _print_plain(headers, rows, right)


def _print_plain(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    table = [[header.upper() for header in headers], *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers))]
    for row in table:
        cells = zip(row, widths, headers, strict=True)
        say("  ".join(f"{cell:>{width}}" if header in right else f"{cell:<{width}}" for cell, width, header in cells).rstrip())


def _print_rich(headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
