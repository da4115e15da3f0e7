# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from khod.api.client import Client
from khod.cli import output, show
from khod.cli.command import Json, Overrides, khod, reporting
from khod.core.state import HOLDABLE, State
from khod.core.views import EventView
from khod.errors import InvalidRequest, Lost, Refused


@reporting
def update(
    context: typer.Context,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, what it needs, and what the jump ends; do nothing.")
    ] = False,
    hold_at: Annotated[
        str | None,
        typer.Option(metavar="STATE", help=f"Stop there, and leave: {', '.join(HOLDABLE)}.", show_default=False),
    ] = None,
    jump: Annotated[
        str, typer.Option(metavar="WAY", help="direct, or systemd; what is configured if not given.", show_default=False)
    ] = "",
    override: Overrides = None,
    json: Json = False,
) -> None:
    """Preserve what is registered, and jump into the kernel that was loaded.

    Until the jump everything can be undone, and is undone when something fails. With --json, one event a line.

    \b
    Example:
        khoctl update --dry-run
        khoctl update --hold-at frozen && khoctl continue
        khoctl update --override format:kho
    """
    if dry_run and override:
        raise InvalidRequest("--dry-run passes over nothing", hint="`khoctl preflight --override` shows what is left")
    with khod(context) as client:
        if dry_run:
            _dry_run(client, json)
        else:
            _update(client.update(hold_at, jump=jump, overrides=override or ()), hold_at, json)


def _dry_run(client: Client, json: bool) -> None:
    plan = client.plan()
    if json:
        output.print_json(plan)
    else:
        show.plan(plan)
    if plan.blockers:
        raise typer.Exit(Refused.exit_status)


def _update(events: Iterator[EventView], hold_at: str | None, json: bool) -> None:
    state = ""
    with _shown(json) as shown:
        try:
            for event in events:
                shown(event)
                state = event.state
                if event.kind == "held":
                    break
        except Lost:
            if state != State.EXECUTING:
                raise
    if json:
        return
    if state == State.EXECUTING:
        output.say("the jump: khoctl status, in the new kernel, says how it went")
    elif hold_at is not None:
        output.say(f"held at {state}: khoctl continue, or khoctl abort")


@contextmanager
def _shown(json: bool) -> Iterator[Callable[[EventView], None]]:
    """What an event is shown by, for the length of an update."""
    if json:
        yield output.print_json
    elif output.on_terminal():
        with _live() as live:
            yield live
    else:
        yield _Lines()


class _Lines:
    """An event a line, timed from the first."""

    def __init__(self) -> None:
        self._start = 0

    def __call__(self, event: EventView) -> None:
        self._start = self._start or event.time
        output.say(show.event(event, self._start))


@contextmanager
def _live() -> Iterator[Callable[[EventView], None]]:
    """Lines, and below them how far the phase is that is under way."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    start = 0
    columns = (SpinnerColumn(), TextColumn("{task.description:<10}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=1.0)

        def shown(event: EventView) -> None:
            nonlocal start
            start = start or event.time
            progress.console.print(Text(show.event(event, start)))
            progress.update(task, description=event.state, completed=event.fraction)

        yield shown
