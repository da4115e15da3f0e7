# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl claim."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from khod.cli import adopt, output
from khod.cli.command import Json, Owner, khod, reporting
from khod.core.views import ClaimView
from khod.errors import Held, InvalidRequest, MachineError

COLD = 9
"""Exit status: no such instance came through, start it from disk."""
FIRST = 3
"""SD_LISTEN_FDS_START, systemd/sd-daemon.h."""


@reporting
def claim(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The instance.", show_default=False)],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="What to run.", show_default=False)],
    owner: Owner = "",
    lifetime: Annotated[
        str | None,
        typer.Option(
            metavar="LIFETIME",
            help="Of the instance from now on: persistent, or process (that of COMMAND); if not given the one that it had, "
            "process for connection.",
            show_default=False,
        ),
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Hand it out even if khod cannot vouch for its memory. This is recorded.")
    ] = False,
    shared: Annotated[
        bool,
        typer.Option(
            "--shared", help="Even if another process has it that lives: for a COMMAND that looks and starts no second life."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run COMMAND with an instance's descriptors.

    COMMAND takes khoctl's place. Descriptors are passed as systemd passes sockets: they are 3 and following, LISTEN_FDS
    says how many, LISTEN_FDNAMES their names with ":" between, LISTEN_PID to whom. KHOD_STATES are those of the names that are
    states of its client, KHOD_HANDLE is for khoctl finished. Nothing is run when the instance did
    not come (exit status 9: start it from disk), or came and must not be started (exit status 8: a second life would
    ruin its disk), which is so too while a process has it that lives. If the initrd has started that one, it becomes the main
    process of a unit of Type=notify that khoctl runs in, and khoctl is done; elsewhere that is status 8.

    \b
    Example:
        khoctl claim vm1 -- /usr/local/bin/start-vm --memory-fd 3
    """
    # Before the claim: what is handed out to a command that does not exist is handed out to nobody.
    if lifetime == "connection":
        raise InvalidRequest("khoctl's connection ends when COMMAND begins", hint="--lifetime process is COMMAND's")
    program = shutil.which(command[0])
    if program is None:
        raise InvalidRequest(f"there is no command {command[0]!r}", hint="nothing was claimed")
    with khod(context) as client:
        view = client.claim(name, owner=owner, lifetime=lifetime, unverified=unverified, exclusive=not shared)
        if view.lifetime == "connection":  # that of ours, which ends when COMMAND begins: it shall hang on COMMAND
            for fd in view.fds:
                os.close(fd)
            view = client.claim(name, owner=owner, lifetime="process", unverified=unverified, exclusive=not shared)
        if json:
            output.print_json(
                {
                    "answer": view.answer,
                    "reason": view.reason,
                    "names": view.names,
                    "states": view.states,
                    "handle": view.handle,
                    "process": view.process,
                    "early": view.early,
                }
            )
        if view.answer == "fds":
            execute(program, command, view)
    if view.answer == "cold":
        output.complain(view.reason, "start it from disk")
        raise typer.Exit(COLD)
    if view.early and (manager := adopt.wanted()):
        adopt.adopt(view.process, manager)
        return
    hint = "do not start it from disk; khoctl claim --unverified hands it out as it is"
    raise Held(view.reason, hint="do not start it again; --shared is for a COMMAND that only looks" if view.process else hint)


def execute(program: str, command: Sequence[str], view: ClaimView) -> NoReturn:
    """Become `command`. The descriptors are taken over."""
    # Out of the way first: their numbers here may be those that others have to get.
    spare = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FIRST + len(view.fds)) for fd in view.fds]
    for index, fd in enumerate(spare):
        os.dup2(fd, FIRST + index, inheritable=True)
    passed = {
        "LISTEN_FDS": str(len(view.fds)),
        "LISTEN_FDNAMES": ":".join(name.replace(":", "-") for name in view.names),
        "LISTEN_PID": str(os.getpid()),
        "KHOD_STATES": ":".join(name.replace(":", "-") for name in view.states),
        "KHOD_HANDLE": view.handle,
    }
    try:
        os.execve(program, list(command), {**os.environ, **passed})
    except OSError as error:
        raise MachineError(f"{program} cannot be run", errno=error.errno, hint="claim again: khod holds the memory until then")
