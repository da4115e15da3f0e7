# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl continue."""

from __future__ import annotations

import typer

from khod.cli import output
from khod.cli.command import Json, khod, reporting


@reporting
def proceed(context: typer.Context, json: Json = False) -> None:
    """Go on with an update that is held.

    \b
    Example:
        khoctl update --hold-at frozen && khoctl continue
    """
    with khod(context) as client:
        client.proceed()
    if json:
        output.print_json({"continued": True})
    else:
        output.say("the update goes on: khoctl status says how far")
