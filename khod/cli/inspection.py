# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl inspect."""

from __future__ import annotations

import typer

from khod.cli import output, show
from khod.cli.command import Json, khod, reporting


@reporting
def inspect(context: typer.Context, json: Json = False) -> None:
    """Show the handover tree and the folio map in force.

    The tree as its source, the map as totals of each order.

    \b
    Example:
        khoctl inspect
    """
    with khod(context) as client:
        view = client.inspect()
    if json:
        output.print_json(view)
    else:
        show.inspection(view)
