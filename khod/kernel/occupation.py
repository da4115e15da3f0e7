# SPDX-License-Identifier: LGPL-2.1-or-later
"""One khod to a state directory."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from khod.errors import MachineError, Refused

ROOM = 1 << 20
"""Bytes that should be free where the journal lies: many updates' worth."""


def occupy(directory: Path) -> int:
    """Take a directory for this process, which is made if it is missing: a descriptor that keeps it taken as long as it is
    open, in this process or in a child. Touches nothing in it.

    Raises Refused when another process has it, MachineError when there is none and none can be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MachineError(
            f"the state directory {directory} cannot be had", errno=error.errno, hint="make it, or set `state_directory`"
        )
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Refused(f"another khod uses {directory}", hint="`systemctl status khod`, or give this one a `state_directory`")
    return fd


def trouble(directory: Path) -> str:
    """Why the journal could not be written to in this directory, with what to do; '' when it could."""
    try:
        figures = os.statvfs(directory)
    except OSError as error:
        return f"the state directory {directory} cannot be looked at: {error.strerror}"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"the state directory {directory} cannot be written to: remount it read-write; until then no update starts"
    if (free := figures.f_bavail * figures.f_frsize) < ROOM:
        return f"the disk of the state directory {directory} has {free} bytes left: free some; without, no update starts"
    return ""
