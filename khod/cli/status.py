# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl status."""

from __future__ import annotations

import typer

from khod.cli import output, show
from khod.cli.command import Json, khod, reporting


@reporting
def status(context: typer.Context, json: Json = False) -> None:
    """Show what khod is doing, and what it wants looked at.

    \b
    Example:
        khoctl status
    """
    with khod(context) as client:
        view = client.status()
    if json:
        output.print_json(view)
    else:
        show.status(view)
