# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl discard."""

from __future__ import annotations

from typing import Annotated

import typer

from khod.cli import output
from khod.cli.command import Json, Owner, khod, reporting


@reporting
def discard(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The instance.", show_default=False)],
    owner: Owner = "",
    json: Json = False,
) -> None:
    """Let go of something that came through a jump. Its memory is lost.

    Of what nobody claimed, what is damaged, and sessions that a client filled by itself.

    \b
    Example:
        khoctl discard vm1
    """
    with khod(context) as client:
        client.discard(name, owner=owner)
    if json:
        output.print_json({"discarded": name})
    else:
        output.say(f"{name} is discarded")
