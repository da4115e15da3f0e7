# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl preflight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from khod.cli import output, show
from khod.cli.command import Json, Overrides, khod, reporting
from khod.errors import InvalidRequest, Refused


@reporting
def preflight(
    context: typer.Context,
    kernel: Annotated[
        Path | None, typer.Option(metavar="IMAGE", help="Another kernel than the one that was loaded.", show_default=False)
    ] = None,
    initrd: Annotated[Path | None, typer.Option(metavar="PATH", help="Its initial RAM disk.", show_default=False)] = None,
    append: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Its command line; that of the running kernel if not given.", show_default=False),
    ] = None,
    override: Overrides = None,
    json: Json = False,
) -> None:
    """Tell whether an update would go through, and if not, why.

    Nothing is touched and nothing loaded. Ends with status 3 when something stands in the way that is not overridden.

    \b
    Example:
        khoctl preflight
        khoctl preflight --kernel /boot/vmlinuz-7.4.0 --initrd /boot/initrd.img-7.4.0
    """
    if kernel is None and (initrd is not None or append is not None):
        raise InvalidRequest("--initrd and --append belong to a kernel", hint="name it with --kernel")
    # khod opens them, and is somewhere else.
    paths = str(kernel.absolute()) if kernel else "", str(initrd.absolute()) if initrd else ""
    with khod(context) as client:
        view = client.preflight(*paths, append, overrides=override or ())
    if json:
        output.print_json(view)
    else:
        show.preflight(view)
    if view.verdict == "blocker":
        raise typer.Exit(Refused.exit_status)
