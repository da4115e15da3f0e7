# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that runs already, made the main process of the unit that was to start it (sd_notify(3), MAINPID=)."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from khod.errors import Held

GROUPS = Path("/sys/fs/cgroup")


def wanted() -> str:
    """Where this unit's manager listens; '' outside of a unit that tells it anything."""
    return os.environ.get("NOTIFY_SOCKET", "")


def adopt(pid: int, address: str, *, groups: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> None:
    """Move a process into our control group, and tell the manager that it is the unit's main one, which is ready. Raises Held
    when that cannot be."""
    try:
        path = next(line for line in own.read_text().splitlines() if line.startswith("0::"))[3:]
        (groups / path.lstrip("/") / "cgroup.procs").write_text(str(pid))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.connect("\0" + address[1:] if address[0] == "@" else address)
            out.send(f"READY=1\nMAINPID={pid}\nSTATUS=Started in the initrd, before this unit".encode())
    except (OSError, StopIteration) as error:
        raise Held(
            f"process {pid}, which the initrd started, cannot be made this unit's: {error}",
            hint="it runs on; the unit must be root's, of Type=notify, on a host with control groups of version 2",
        )
