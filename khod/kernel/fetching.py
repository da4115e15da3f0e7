# SPDX-License-Identifier: LGPL-2.1-or-later
"""A descriptor out of another process (pidfd_getfd(2)), by a disposable one: whoever takes it has to close it, and if it is a
file of that process's own file system, would wait for that process (`khod.kernel.porter_helper`)."""

from __future__ import annotations

import array
import errno
import os
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from khod.kernel import porter_helper
from khod.kernel.porter_helper import KHOD_TAKES, REPLY

__all__ = ["KHOD_TAKES", "Fetched", "fetch"]

PATIENCE = 10.0
"""Seconds until who does not say what he has is given up."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of it."""

    fd: int = -1
    """Owned, close-on-exec, of a kind that khod can keep; -1 for none."""
    errno: int = 0
    what: str = ""
    """What it is, where it is not of such a kind."""


def fetch(pid: int, number: int) -> Fetched:
    """Descriptor `number` of process `pid`. Blocks, but for nobody's file system."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            helper = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(Path(porter_helper.__file__)), str(pid), str(number)],
                {"LANG": "C.UTF-8"},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
                setsid=True,
            )
        # It may have to wait until it can end; nobody has to wait for it.
        threading.Thread(target=os.waitpid, args=(helper, 0), daemon=True).start()
        ours.settimeout(PATIENCE)
        try:
            packet, beside, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            return Fetched(what="of a file system that does not answer")
    if len(packet) < REPLY.size:
        return Fetched(errno=errno.EIO)
    fds = array.array("i", b"".join(content for *_, content in beside))
    _, failed, length = REPLY.unpack_from(packet)
    return Fetched(fds[0] if fds else -1, failed, packet[REPLY.size : REPLY.size + length].decode("utf-8", "replace"))
