# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl unregister."""

from __future__ import annotations

from typing import Annotated

import typer

from khod.cli import output
from khod.cli.command import Json, Owner, khod, reporting


@reporting
def unregister(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The instance.", show_default=False)],
    owner: Owner = "",
    json: Json = False,
) -> None:
    """Forget an instance: khod lets go of its memory.

    What came through a jump and was not claimed is not forgotten: see khoctl discard.

    \b
    Example:
        khoctl unregister vm1
    """
    with khod(context) as client:
        client.unregister(name, owner=owner)
    if json:
        output.print_json({"unregistered": name})
    else:
        output.say(f"{name} is no longer registered")
