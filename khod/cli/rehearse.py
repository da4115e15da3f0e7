# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl rehearse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from khod import config as configuration
from khod.cli import output, show_rehearsal
from khod.cli.command import Json, Overrides, khod, reporting
from khod.core.views import ImageView, InstanceView
from khod.errors import InvalidRequest, Lost


@reporting
def rehearse(
    context: typer.Context,
    kernel: Annotated[
        Path | None, typer.Option(metavar="IMAGE", help="Another kernel than the one that was loaded.", show_default=False)
    ] = None,
    append: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Its command line; that of the running kernel if not given.", show_default=False),
    ] = None,
    running: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGE", help="The running kernel's image; /boot/vmlinuz-RELEASE if not given.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"khod's configuration, instead of {configuration.DEFAULT_PATH}.", show_default=False
        ),
    ] = None,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Of the machine.")] = "2G",
    cpus: Annotated[int, typer.Option(metavar="NUMBER", min=1, max=64, help="Of the machine.")] = 2,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", min=1, max=86400, help="For all of it.")] = 900,
    override: Overrides = None,
    json: Json = False,
) -> None:
    """Make the update in a virtual machine on this host first, and say how it went.

    It goes from the running kernel's image to the target's, with this host's configuration, plugins, and memory of the shapes
    that are registered, scaled to fit. Nothing of the host is touched. Ends with status 0 when everything came through whole, 3
    when it was refused, 6 when it failed or lost anything, 7 when nobody knows.

    \b
    Example:
        khoctl rehearse
        khoctl rehearse --kernel /boot/vmlinuz-7.4.0 --memory 4G
    """
    from khod.rehearsal import rehearse as rehearsal

    try:
        size = configuration.size(memory)
    except ValueError:
        raise InvalidRequest(f"--memory: {memory!r} is not a size", hint="bytes, or a number with K, M, G or T")
    instances, loaded, note = _registered(context)
    target, initrd, cmdline = rehearsal.target_of(kernel, append, loaded)
    plan = rehearsal.Plan(
        target=target,
        initrd=initrd,
        cmdline=cmdline,
        instances=instances,
        note=note,
        running=running,
        config=config,
        overrides=override or (),
        memory=size,
        cpus=cpus,
        deadline=deadline,
    )
    report = rehearsal.rehearse(plan, rehearsal.nothing if json else output.say)
    if json:
        output.print_json(report)
    else:
        show_rehearsal.rehearsal(report)
    if report.verdict.exit_status:
        raise typer.Exit(report.verdict.exit_status)


def _registered(context: typer.Context) -> tuple[Sequence[InstanceView], ImageView | None, str]:
    """What khod has, and which kernel was loaded; a host can be tried before khod runs on it, which is said then."""
    try:
        with khod(context) as client:
            return client.instances(), client.status().image, ""
    except Lost as error:
        return (), None, f"khod was not asked what is registered: {error.message}"
