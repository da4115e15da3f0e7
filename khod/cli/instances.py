# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl instances."""

from __future__ import annotations

from typing import Annotated

import typer

from khod.cli import output, show
from khod.cli.command import Json, khod, reporting
from khod.errors import InvalidRequest


@reporting
def instances(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[NAME]", help="Show this one in full.", show_default=False)] = "",
    json: Json = False,
) -> None:
    """List what is registered, and what came through a jump.

    \b
    Example:
        khoctl instances
        khoctl instances vm1
    """
    with khod(context) as client:
        views = client.instances()
    if name:
        views = [view for view in views if view.name == name]
        if not views:
            raise InvalidRequest(f"no instance is called {name!r}", hint="khoctl instances lists them")
    if json:
        output.print_json(views[0] if name else views)
    elif name:
        show.instance(views[0])
    else:
        show.instances(views)
