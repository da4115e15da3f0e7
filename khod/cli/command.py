# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every command shares: the connection, ``--json``, and how an error ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from khod.api.client import Client, connect
from khod.cli import output
from khod.errors import KhodError

P = ParamSpec("P")

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", metavar="CHECK", help="A check of `khoctl preflight` to pass over; once for each.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, an error too.")]
Owner = Annotated[
    str,
    typer.Option(
        "--owner", metavar="OWNER", help="Whose it is, as user:NAME or unit:NAME. Needed where two have one of that name.",
        show_default=False,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Globals:
    """What is said before the command's name."""

    socket: Path


def khod(context: typer.Context) -> Client:
    """A connection to khod, to be used as a context manager. Raises Lost, NotPermitted."""
    common = context.find_object(Globals)
    assert common is not None
    return connect(common.socket)


def reporting(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose `KhodError` becomes a message, a hint, and the exit status of its class."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except KhodError as error:
            report(error, as_json=bool(kwargs.get("json", False)))
            raise typer.Exit(error.exit_status)

    return command


def report(error: KhodError, *, as_json: bool) -> None:
    """What went wrong and what to do, to standard error; as JSON also to standard output, for programs."""
    if as_json:
        output.print_json({"error": error_object(error)})
    output.complain(error.message, error.hint)


def error_object(error: KhodError) -> dict[str, Any]:
    """An error for programs."""
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_status": error.exit_status,
    }
