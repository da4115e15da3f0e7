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
    owner: Annotated[str, typer.Option(metavar="OWNER", help="Only those of this one, as user:NAME or unit:NAME.")] = "",
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
    views = [view for view in views if view.owner == (owner or view.owner) and view.name == (name or view.name)]
    if name and not views:
        raise InvalidRequest(f"no instance is called {name!r}", hint="khoctl instances lists them")
    if name and len(views) > 1:
        raise InvalidRequest(f"{len(views)} owners have an instance {name!r}", hint="--owner says which is meant")
    if json:
        output.print_json(views[0] if name else views)
    elif name:
        show.instance(views[0])
    else:
        show.instances(views)
