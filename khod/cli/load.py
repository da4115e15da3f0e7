# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from khod.cli import output, show
from khod.cli.command import Json, khod, reporting


@reporting
def load(
    context: typer.Context,
    kernel: Annotated[Path, typer.Argument(metavar="KERNEL", help="The kernel image.", show_default=False)],
    initrd: Annotated[Path | None, typer.Option(metavar="PATH", help="Its initial RAM disk.", show_default=False)] = None,
    reuse_cmdline: Annotated[
        bool, typer.Option("--reuse-cmdline", help="The running kernel's command line; so it is without --append, too.")
    ] = False,
    append: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="The command line; with --reuse-cmdline, what is added to it.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Choose the kernel to jump to.

    It is checked and kept open; the update itself loads it.

    \b
    Example:
        khoctl load /boot/vmlinuz-7.3.1 --initrd /boot/initrd.img-7.3.1
        khoctl load /boot/vmlinuz-7.3.1 --reuse-cmdline --append "loglevel=7"
    """
    # khod opens them, and is somewhere else.
    paths = str(kernel.absolute()), str(initrd.absolute()) if initrd else ""
    with khod(context) as client:
        if append is None:
            view = client.load(*paths)
        elif reuse_cmdline:
            view = client.load(*paths, f"{client.load(*paths).cmdline} {append}".strip())
        else:
            view = client.load(*paths, append)
    if json:
        output.print_json(view)
    else:
        show.image(view)
