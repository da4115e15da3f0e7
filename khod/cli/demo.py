# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl demo."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from khod.cli.command import Json


def demo(
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the simulated host, a power of two from 16G; guests are scaled with it.")
    ] = "1T",
    json: Json = False,
) -> None:
    """Watch a live update of a simulated host with 100 guests.

    Needs no khod, no privileges, and a few hundred megabytes of memory.

    \b
    Example:
        khoctl demo
        khoctl demo --memory 64G
    """
    # khoctl knows nothing of what drives an update; the demo is a program of its own, and takes this one's place.
    command = [sys.executable, "-m", "khod.demo", "--memory", memory, *(["--json"] if json else [])]
    os.execv(sys.executable, command)
