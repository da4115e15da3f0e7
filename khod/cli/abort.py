# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl abort."""

from __future__ import annotations

import typer

from khod.cli import output
from khod.cli.command import Json, khod, reporting
from khod.core.state import State
from khod.errors import UpdateFailed


@reporting
def abort(context: typer.Context, json: Json = False) -> None:
    """Undo the update under way.

    The workload goes on, and nothing is lost. Returns when that is so.

    \b
    Example:
        khoctl abort
    """
    with khod(context) as client:
        state = client.abort()
    if state == State.FAILED:
        raise UpdateFailed("not everything could be undone", hint="khoctl status says what could not")
    if json:
        output.print_json({"state": state})
    else:
        output.say(f"the update is {state}")
