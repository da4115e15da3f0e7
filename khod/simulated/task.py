# SPDX-License-Identifier: LGPL-2.1-or-later
"""Processes as their kernel sees them: a number, a name, a table of descriptors, and a memory control group."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from khod.simulated.inode import OpenFile

MAX_DESCRIPTORS = 1 << 20


@dataclass(eq=False)
class Table:
    """struct files_struct: descriptors, which several processes may share (CLONE_FILES)."""

    files: dict[int, OpenFile] = field(default_factory=dict)
    sharers: int = 1
    limit: int = MAX_DESCRIPTORS
    """RLIMIT_NOFILE."""
    _lowest: int = 3
    """No lower number is free."""

    def install(self, file: OpenFile) -> int:
        """The lowest free descriptor, for `file`. Raises OSError(EMFILE)."""
        if len(self.files) >= self.limit:
            raise OSError(errno.EMFILE, f"{self.limit} descriptors are open")
        fd = self._lowest
        while fd in self.files:
            fd += 1
        self._lowest = fd + 1
        self.files[fd] = file.get()
        return fd

    def close(self, fd: int) -> None:
        """Close one that is open."""
        self._lowest = min(self._lowest, fd)
        self.files.pop(fd).put()

    def leave(self) -> None:
        """One sharer less: the last one's descriptors close."""
        self.sharers -= 1
        while self.sharers == 0 and self.files:
            self.files.popitem()[1].put()


@dataclass(eq=False)
class Cgroup:
    """A memory control group. What a process retrieves is charged to it, until the file is gone."""

    memory_max: int | None = None
    charged: int = 0

    def admits(self, size: int) -> bool:
        """Whether so many more bytes may be charged."""
        return self.memory_max is None or self.charged + size <= self.memory_max


@dataclass(eq=False)
class Task:
    """struct task_struct, as far as it matters here."""

    pid: int
    name: str
    table: Table = field(default_factory=Table)
    cgroup: Cgroup = field(default_factory=Cgroup)
    dead: bool = False
    dumpable: bool = True
    """Whether others may take its descriptors (PR_SET_DUMPABLE, ptrace access)."""
    custodian: int = 0
    """Which custodian it talks to, by number; 0 before it first did (`khod.simulated.custodian`)."""

    @property
    def fds(self) -> dict[int, OpenFile]:
        """Its descriptors."""
        return self.table.files

    def clone(self, pid: int) -> Task:
        """Another process with the same table, in the same control group: clone(CLONE_FILES)."""
        self.table.sharers += 1
        return Task(pid, self.name, self.table, self.cgroup, dumpable=self.dumpable)

    def install(self, file: OpenFile) -> int:
        """The lowest free descriptor, for `file`. Raises OSError(EMFILE)."""
        return self.table.install(file)

    def lookup(self, fd: int) -> OpenFile:
        """The open file behind a descriptor, one opened with O_PATH included. Raises OSError(EBADF)."""
        try:
            return self.table.files[fd]
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
        self.table.close(fd)

    def exit(self) -> None:
        """Die: the kernel closes what is open, unless somebody shares the table."""
        self.dead = True
        self.table.leave()
