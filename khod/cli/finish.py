# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl finish."""

from __future__ import annotations

import typer

from khod.cli import output
from khod.cli.command import Json, khod, reporting


@reporting
def finish(context: typer.Context, json: Json = False) -> None:
    """End the update that brought this kernel here.

    Once everything is restored, and before another can start.

    \b
    Example:
        khoctl finish
    """
    with khod(context) as client:
        unclaimed = client.finish()
    if json:
        output.print_json({"unclaimed": unclaimed})
        return
    output.say("finished")
    for name in unclaimed:
        output.say(f"not claimed yet, registered again: {name}")
