# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes as their kernel sees them: a number, a name, and a table of descriptors."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from khod.simulated.inode import OpenFile

MAX_DESCRIPTORS = 1 << 20


@dataclass(eq=False)
class Task:
    """struct task_struct, as far as it matters here."""

    pid: int
    name: str
    fds: dict[int, OpenFile] = field(default_factory=dict)
    dead: bool = False
    memory_max: int | None = None
    """Its memory cgroup's limit: retrieving a larger file fails."""
    dumpable: bool = True
    """Whether others may take its descriptors (PR_SET_DUMPABLE, ptrace access)."""

    def install(self, file: OpenFile) -> int:
        """The lowest free descriptor, for `file`."""
        fd = 3
        while fd in self.fds:
            fd += 1
        if fd >= MAX_DESCRIPTORS:
            raise OSError(errno.EMFILE, "too many descriptors")
        self.fds[fd] = file.get()
        return fd

    def lookup(self, fd: int) -> OpenFile:
        """The open file behind a descriptor, one opened with O_PATH included. Raises OSError(EBADF)."""
        try:
            return self.fds[fd]
        except KeyError:
            raise OSError(errno.EBADF, f"descriptor {fd} of {self.name}[{self.pid}]")

    def file(self, fd: int) -> OpenFile:
        """The open file behind a descriptor that may be used for more than naming it. Raises OSError(EBADF)."""
        file = self.lookup(fd)
        if file.path_only:
            raise OSError(errno.EBADF, f"descriptor {fd} was opened with O_PATH")
        return file

    def close(self, fd: int) -> None:
        """close(2). Raises OSError(EBADF)."""
        self.lookup(fd)
        self.fds.pop(fd).put()

    def exit(self) -> None:
        """Die: the kernel closes what is open."""
        self.dead = True
        while self.fds:
            self.fds.popitem()[1].put()
