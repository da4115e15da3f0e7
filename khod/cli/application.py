# SPDX-License-Identifier: LGPL-2.1-or-later
"""The application: the commands in the order of an update, and the one place that turns an error into an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from khod import __version__
from khod.cli import (
    abort,
    claim,
    demo,
    discard,
    finish,
    finished,
    formats,
    history,
    initrd,
    inspection,
    instances,
    load,
    preflight,
    proceed,
    register,
    rehearse,
    status,
    unregister,
    update,
)
from khod.cli.command import Globals
from khod.config import Config

COMMANDS: tuple[tuple[str, Callable[..., object]], ...] = (
    ("status", status.status),
    ("register", register.register),
    ("unregister", unregister.unregister),
    ("instances", instances.instances),
    ("load", load.load),
    ("preflight", preflight.preflight),
    ("rehearse", rehearse.rehearse),
    ("update", update.update),
    ("continue", proceed.proceed),
    ("abort", abort.abort),
    ("claim", claim.claim),
    ("finished", finished.finished),
    ("discard", discard.discard),
    ("finish", finish.finish),
    ("history", history.history),
    ("inspect", inspection.inspect),
    ("formats", formats.formats),
    ("initrd", initrd.initrd),
    ("demo", demo.demo),
)

_SOCKET = Config().socket

app = typer.Typer(
    name="khoctl",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"khoctl {__version__}")
        raise typer.Exit


@app.callback()
def khoctl(
    context: typer.Context,
    socket: Annotated[
        Path, typer.Option("--socket", envvar="KHOD_SOCKET", metavar="PATH", help="Where khod listens.", show_default=True)
    ] = _SOCKET,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which this is.")
    ] = False,
) -> None:
    """Move this host onto another kernel while what runs on it keeps its memory.

    Register what shall come along, load the kernel to jump to, update; in the new kernel, claim and finish.

    Exit status: 0 done; 2 a request that makes no sense; 3 refused, nothing was touched; 4 the kernel said no; 5 damaged
    data; 6 the update failed and was undone; 7 khod is gone or a deadline passed; 8 claim: do not start this instance;
    9 claim: no such instance came, start it from disk; 1 anything else.
    """
    context.obj = Globals(socket)


for _name, _function in COMMANDS:
    app.command(_name)(_function)


def main() -> None:
    """The console script."""
    sys.exit(app())
