# SPDX-License-Identifier: LGPL-2.1-or-later
"""What descriptors lead to: open files, and the inodes behind them.

An inode lives as long as an open file leads to it, an open file as long as a descriptor (or a session) holds it: `put` of
the last one frees what is behind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from khod.core.ports import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FileStat,
)

IMPLIED_BY_EXEC = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
"""What F_SEAL_EXEC on an executable file seals as well (mm/memfd.c, memfd_add_seals)."""
_numbers = itertools.count(1000)
_DEVICE = 1


@dataclass(eq=False)
class Inode:
    """A file that has nothing but a kind: a pipe, an iommufd, a linked file, the device."""

    kind: str
    size: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    users: int = 0
    """Open files that lead here."""
    frozen: bool = False
    """Preserved: of a file in memory, size and holes may not change (shmem_freeze)."""

    def stat(self) -> FileStat:
        """See `khod.core.ports.FileStat`."""
        return FileStat(self.kind, self.size, 0, (_DEVICE, self.number), 0)

    def inside(self, place: Callable[[OpenFile], tuple[str, int]]) -> str:
        """What there is to be preserved besides frames; `place` tells session and token of another file."""
        return ""

    def builds_on(self) -> Inode | None:
        """The file that has to be preserved before it, if there is one."""
        return None

    def free(self) -> None:
        """The last open file is gone."""


@dataclass(eq=False)
class OpenFile:
    """struct file: what dup(2) and SCM_RIGHTS share."""

    inode: Inode
    position: int = 0
    readable: bool = True
    writable: bool = True
    path_only: bool = False
    """Opened with O_PATH: names the file and may do nothing with it."""
    holders: int = 0

    def __post_init__(self) -> None:
        self.inode.users += 1

    def get(self) -> OpenFile:
        """One more holder."""
        self.holders += 1
        return self

    def put(self) -> None:
        """One holder less."""
        self.holders -= 1
        if self.holders == 0:
            self.inode.users -= 1
            if self.inode.users == 0:
                self.inode.free()


def sealed_by(seals: int, executable: bool) -> int:
    """All seals that adding `seals` sets."""
    return seals | IMPLIED_BY_EXEC if executable and seals & F_SEAL_EXEC else seals
