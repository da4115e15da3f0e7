# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl finished."""

from __future__ import annotations

from typing import Annotated

import typer

from khod.cli import output
from khod.cli.command import Json, khod, reporting


@reporting
def finished(
    context: typer.Context,
    handle: Annotated[
        str,
        typer.Argument(metavar="HANDLE", envvar="KHOD_HANDLE", help="The instance's, as claiming it said.", show_default=False),
    ],
    json: Json = False,
) -> None:
    """Say of an instance that was claimed that it lives.

    Nothing of the jump is needed for it any more. When all are finished, the update is.

    \b
    Example:
        khoctl finished "$KHOD_HANDLE"
    """
    with khod(context) as client:
        client.finished(handle)
    if json:
        output.print_json({"finished": True})
    else:
        output.say("finished")
