# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl history."""

from __future__ import annotations

from typing import Annotated

import typer

from khod.cli import output, show
from khod.cli.command import Json, khod, reporting
from khod.errors import InvalidRequest

EVERY = (1 << 31) - 1


@reporting
def history(
    context: typer.Context,
    update: Annotated[str, typer.Argument(metavar="[UPDATE]", help="Show this one with its ledger.", show_default=False)] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    json: Json = False,
) -> None:
    """List the updates of the past.

    How they ended, and how long everything stood still.

    \b
    Example:
        khoctl history
        khoctl history 3f29c1d2
    """
    with khod(context) as client:
        views = client.history(EVERY if update else limit)
    if update:
        views = [view for view in views if view.update.startswith(update)]
        if len(views) != 1:
            raise InvalidRequest(f"{len(views)} updates are called {update!r}", hint="khoctl history lists them")
    if json:
        output.print_json(views[0] if update else views)
    elif update:
        show.one_update(views[0])
    else:
        show.history(views)
