# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a connection: what the kernel recorded when it was made, and what can be said of the process now.

User and groups are the kernel's record (SO_PEERCRED, SO_PEERGROUPS), and cannot be forged. The systemd unit is read from
/proc, by a number that could be another process's by now: so it counts only where the kernel gives a pidfd of the peer
itself (SO_PEERPIDFD, since Linux 6.5, older than all that can do live updates), and that process is still there afterwards.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import pwd
import re
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SO_PEERGROUPS = 59  # asm-generic/socket.h
SO_PEERPIDFD = 77
_ROOM = 1024  # the most that socket.getsockopt takes
_ucred = struct.Struct("3i")  # struct ucred, linux/socket.h: pid, uid, gid
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")  # VALID_CHARS_WITH_AT, systemd's unit-name.c
_KINDS = {"system.slice": (".service",), "machine.slice": (".service", ".scope")}


class Credentials(NamedTuple):
    """The kernel's record of who connected."""

    pid: int
    """0 when that process is in no namespace of ours."""
    uid: int
    gid: int


def credentials(sock: socket.socket) -> Credentials:
    """Who made this connection."""
    return Credentials(*_ucred.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)))


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a connection is with."""

    pid: int
    uid: int
    groups: frozenset[int]
    user: str
    """The user's name; '' when there is none of that number."""
    unit: str
    """The systemd unit; '' when there is none that counts."""
    pidfd: int
    """Of the process, owned by whoever has the peer; -1 when it is gone or was never to be seen."""


def identify(sock: socket.socket) -> Peer:
    """Find out. Asks the system's databases, which may block for long. Raises OSError when the peer hung up."""
    pid, uid, gid = credentials(sock)
    pidfd, certain = _pidfd(sock, pid, uid)
    try:
        groups = frozenset({gid, *_groups(sock, pid, pidfd if certain else -1)})
        unit = _unit_of(pidfd, pid) if certain and pidfd >= 0 else ""
        return Peer(pid, uid, groups, _user(uid), unit, pidfd)
    except BaseException:
        if pidfd >= 0:
            os.close(pidfd)
        raise


def _groups(sock: socket.socket, pid: int, pidfd: int) -> set[int]:
    """Supplementary groups. `pidfd`: certainly the peer's, or -1."""
    try:
        return set(array.array("I", sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, _ROOM)))
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
    # More than Python makes room for: then those that the process has now, which needs a privilege to have others.
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return set()
    found = re.search(rb"^Groups:([0-9 \t]*)$", status, re.M)
    return {int(gid) for gid in found[1].split()} if found and pidfd >= 0 and not ended(pidfd) else set()


def _user(uid: int) -> str:
    """A name that can be recorded, or ''."""
    try:
        name = pwd.getpwuid(uid).pw_name
    except (KeyError, UnicodeDecodeError):
        return "root" if uid == 0 else ""
    return name if name.isprintable() else ""


def _pidfd(sock: socket.socket, pid: int, uid: int) -> tuple[int, bool]:
    """A pidfd, -1 for none, and whether it is certainly the peer's."""
    try:
        (pidfd,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return -1, False  # it has been waited for already
        return _pidfd_by_number(pid, uid), False
    os.set_inheritable(pidfd, False)
    return pidfd, True


def _pidfd_by_number(pid: int, uid: int) -> int:
    """For kernels without SO_PEERPIDFD: the process of that number, unless it is seen to be another than connected."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        pidfd = os.pidfd_open(pid) if pid > 0 else -1
    except OSError:
        return -1
    if pidfd < 0:
        return -1
    try:
        same = Path(f"/proc/{pid}").stat().st_uid == uid and 0 < _began(pid) <= now * os.sysconf("SC_CLK_TCK")
    except OSError:
        same = False
    if same and not ended(pidfd):
        return pidfd
    os.close(pidfd)
    return -1


def _began(pid: int) -> int:
    """When a process began, in clock ticks since boot; 0 when that cannot be seen."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])  # field 22, proc_pid_stat(5)
    except (OSError, ValueError, IndexError):
        return 0


def ended(pidfd: int) -> bool:
    """Whether the process has ended, waited for or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _unit_of(pidfd: int, pid: int) -> str:
    try:
        text = Path(f"/proc/{pid}/cgroup").read_bytes()
    except OSError:
        return ""
    # Its number was not given to another while we read if it has not ended yet.
    return "" if ended(pidfd) else unit_in(text)


def unit_in(cgroup: bytes) -> str:
    """The unit that /proc/PID/cgroup names, or ''.

    Only a process that is directly in the unit's control group counts: what lies below is the unit's to make (Delegate=), or
    a container's. Only the unified hierarchy counts, and only slices as systemd nests them.
    """
    paths = [line.removeprefix(b"0::") for line in cgroup.split(b"\n") if line.startswith(b"0::")]
    if len(paths) != 1 or not paths[0].startswith(b"/"):
        return ""
    try:
        first, *slices, unit = [_unescaped(part) for part in paths[0][1:].decode("ascii").split("/")]
    except (UnicodeDecodeError, ValueError):
        return ""
    parent = first.removesuffix(".slice")
    for name in slices:
        stem, last = name.removesuffix(".slice").rpartition("-")[::2]
        if not name.endswith(".slice") or stem != parent or not last or not _NAME.fullmatch(name):
            return ""
        parent = f"{stem}-{last}"
    stem, _, kind = unit.rpartition(".")
    return unit if f".{kind}" in _KINDS.get(first, ()) and stem and _NAME.fullmatch(unit) else ""


def _unescaped(part: str) -> str:
    """A name of a unit from that of its control group: systemd puts a '_' before those that the kernel could take amiss."""
    return part.removeprefix("_")


class Presence:
    """A connection's; and what a process's has in common with it. See `khod.core.callers.Presence`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._there = True
        self._told: list[Callable[[], None]] = []

    @property
    def there(self) -> bool:
        """Whether it still is."""
        return self._there

    @property
    def since(self) -> int:
        """A connection is not told from another by when it began."""
        return 0

    @property
    def kept(self) -> bool:
        """Whether something hangs on it."""
        return bool(self._told)

    def on_end(self, told: Callable[[], None]) -> None:
        """Call `told` in the event loop, once, when it ends; soon if it has ended already."""
        if self.there:
            self._told.append(told)
        else:
            self._loop.call_soon(told)

    def end(self) -> None:
        """It has ended. Again: no effect."""
        self._there = False
        told, self._told = self._told, []
        for function in told:
            self._loop.call_soon(function)


class ProcessPresence(Presence):
    """A process's, by its pidfd, which is owned; -1 for one that is gone. The connections of one process share it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, pidfd: int, forget: Callable[[], None]) -> None:
        super().__init__(loop)
        self.connections = 0
        self._since = _began(pid) if pidfd >= 0 else 0
        self._pidfd = pidfd
        self._forget = forget
        self._there = pidfd >= 0
        if self._there:
            loop.add_reader(pidfd, self.end)

    @property
    def since(self) -> int:
        """When the process began."""
        return self._since

    @property
    def there(self) -> bool:
        """Whether it still is: asked, not remembered."""
        if self._there and ended(self._pidfd):
            self.end()
        return self._there

    def end(self) -> None:
        """It has ended."""
        self.close()
        super().end()

    def close(self) -> None:
        """Look no longer. Nobody is told."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            self._there = False
            self._forget()


class Processes:
    """Processes that are connected, and those that something hangs on: a descriptor for each, however often it comes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_pid: dict[int, ProcessPresence] = {}

    def __len__(self) -> int:
        return len(self._by_pid)

    def enter(self, peer: Peer) -> ProcessPresence:
        """The presence of a peer's process, whose pidfd is consumed. A `leave` belongs to it."""
        known = self._by_pid.get(peer.pid)
        # A process that has not ended has its number to itself: two pidfds of one number that both live are of one process.
        if known is not None and known.there and peer.pidfd >= 0 and not ended(peer.pidfd):
            os.close(peer.pidfd)
        else:
            known = ProcessPresence(self._loop, peer.pid, peer.pidfd, lambda: self._forget(peer.pid))
            if known.there and peer.pid:
                self._by_pid[peer.pid] = known
        known.connections += 1
        return known

    def watch(self, pid: int) -> ProcessPresence | None:
        """The presence of any process, by its number; None when there is none. It is given up when nothing hangs on it by the
        time that the loop comes round."""
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        found = self.enter(Peer(pid, -1, frozenset(), "", "", pidfd))
        self._loop.call_soon(self.leave, found)
        return found if found.there else None

    def _forget(self, pid: int) -> None:
        self._by_pid.pop(pid, None)

    def leave(self, process: ProcessPresence) -> None:
        """A connection of it has ended."""
        process.connections -= 1
        if not process.connections and not process.kept:
            process.close()

    def close(self) -> None:
        """Look at none any longer. Nobody is told."""
        for process in list(self._by_pid.values()):
            process.close()
