# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memfds, and what is made like them: files whose pages are folios of simulated memory (mm/shmem.c, mm/memfd.c).

All folios of a file have one order, chosen when it is made as shmem_enabled= and a mount's huge= choose it on Linux. A file
that was adopted from the host, or exported to it, keeps its bytes in a memfd of the host until the jump, so that the stores of
whoever holds that are seen; its frames are simulated from the beginning, and `settle` fills them at the last moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace

import numpy as np

from khod.core.ports import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FileStat,
)
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE
from khod.simulated.buddy import Pfns
from khod.simulated.inode import Inode, sealed_by
from khod.simulated.pages import Pages
from khod.simulated.ram import data, punch
from khod.simulated.task import Cgroup

_NOTHING: Pfns = np.empty(0, dtype=np.int64)


class Shmem(Inode):
    """A memfd. `pfns` has the first frame of each folio in file order, 0 for a hole; behind its end are holes only."""

    def __init__(self, pages: Pages, size: int = 0, *, order: int = 0, executable: bool = True) -> None:
        super().__init__("memfd")
        self.pages = pages
        self.order = order
        self.executable = executable
        self.scatter: int | None = None
        """Seed: take frames at random from all that are free."""
        self.seals = 0
        self.private = False
        """A guest_memfd that cannot be mapped."""
        self.backing = -1
        """The host's memfd that holds the bytes of an adopted or exported file."""
        self.charge: Cgroup | None = None
        """The control group that a retrieved file is charged to, with its size of then."""
        self.charged = 0
        self.pfns = _NOTHING
        self._resize(size)

    def stat(self) -> FileStat:
        """An adopted file has the size and the seals that its owner gave it."""
        page_size = PAGE_SIZE << self.order if self.kind == "hugetlb" else PAGE_SIZE
        base = replace(super().stat(), seals=self.seals, mappable=not self.private, page_size=page_size)
        if self.backing >= 0:
            real = os.fstat(self.backing)
            return replace(base, size=real.st_size, allocated=max(real.st_blocks * 512, self.present()))
        return replace(base, size=self.size, allocated=0 if self.kind == "guest_memfd" else self.present())

    def present(self) -> int:
        """Bytes that have a page; nothing is swapped out here."""
        return int(np.count_nonzero(self.pfns)) << (self.order + PAGE_SHIFT)

    def read(self, offset: int, length: int) -> bytes:
        """Up to the end of the file."""
        if self.backing >= 0:
            return os.pread(self.backing, length, offset)
        length = max(0, min(length, self.size - offset))
        present = max(0, min(length, (len(self.pfns) << (self.order + PAGE_SHIFT)) - offset))
        return self.pages.read(self.pfns, self.order, offset, present) + bytes(length - present)

    def write(self, offset: int, contents: bytes | memoryview) -> None:
        """pwrite(2) of everything. EPERM where a seal or preservation forbids it, as shmem_write_begin does."""
        end = offset + len(contents)
        if self.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise OSError(errno.EPERM, "sealed against writing")
        if self.backing >= 0:
            _pwrite(self.backing, offset, contents)
            return
        if end > self.size:
            if self.frozen or self.seals & F_SEAL_GROW:
                raise OSError(errno.EPERM, "may not grow")
            self._resize(end)
        if end > offset:
            shift = self.order + PAGE_SHIFT
            self._populate(offset >> shift, ((end - 1) >> shift) + 1)
            self.pages.write(self.pfns, self.order, offset, contents)

    def truncate(self, size: int) -> None:
        """ftruncate(2). The same size is always allowed."""
        if self.backing >= 0:
            os.ftruncate(self.backing, size)
            return
        if size != self.size and self.frozen:
            raise OSError(errno.EPERM, "preserved")
        if self.seals & (F_SEAL_SHRINK if size < self.size else F_SEAL_GROW if size > self.size else 0):
            raise OSError(errno.EPERM, "sealed")
        if size < self.size:
            self._zero(size, self.size)
        self._resize(size)

    def punch(self, offset: int, length: int) -> None:
        """fallocate(2) with FALLOC_FL_PUNCH_HOLE: whole folios are freed, parts of others zeroed."""
        if self.frozen or self.seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
            raise OSError(errno.EPERM, "preserved or sealed")
        if self.backing >= 0:
            punch(self.backing, offset, length)
            return
        end = min(offset + length, self.size)
        shift = self.order + PAGE_SHIFT
        first, last = -(-offset >> shift), self._slots() if end == self.size else end >> shift
        if first < last:
            self._zero(offset, min(end, first << shift))
            self.pages.give_back(self.pfns[first:last], self.order)
            self.pfns[first:last] = 0
            self._zero(min(last << shift, end), end)
        else:
            self._zero(offset, end)

    def add_seals(self, seals: int) -> None:
        """F_ADD_SEALS; allowed on a preserved file, and lost there."""
        if self.seals & F_SEAL_SEAL:
            raise OSError(errno.EPERM, "sealing is sealed")
        if self.backing >= 0:
            fcntl.fcntl(self.backing, fcntl.F_ADD_SEALS, seals)
        self.seals |= sealed_by(seals, self.executable)

    def _zero(self, start: int, end: int) -> None:
        """Clear a range inside folios that stay."""
        shift = self.order + PAGE_SHIFT
        last = min(-(-end >> shift), len(self.pfns))
        for slot in range(start >> shift, last) if start < end else ():
            if head := int(self.pfns[slot]):
                low, high = max(start, slot << shift), min(end, (slot + 1) << shift)
                self.pages.ram.zero((head << PAGE_SHIFT) + low - (slot << shift), high - low)

    def _resize(self, size: int) -> None:
        shift = self.order + PAGE_SHIFT
        slots = -(-size >> shift)
        if slots < len(self.pfns):
            self.pages.give_back(self.pfns[slots:], self.order)
            self.pfns = self.pfns[:slots].copy()
        self.size = size

    def _reach(self, slots: int) -> None:
        """Lengthen the list of folios: only as far as something has to be put there."""
        if slots > len(self.pfns):
            self.pfns = np.concatenate((self.pfns, np.zeros(slots - len(self.pfns), dtype=np.int64)))

    def _slots(self) -> int:
        return -(-self.size >> (self.order + PAGE_SHIFT))

    def _populate(self, first: int, last: int) -> None:
        """Give each hole among these slots a folio. Raises OSError(ENOMEM)."""
        self._reach(last)
        holes = np.flatnonzero(self.pfns[first:last] == 0) + first
        if len(holes):
            self.pfns[holes] = self.pages.take(self.order, len(holes), movable=True, scatter=self.scatter)

    def fault_in(self, offset: int, length: int) -> None:
        """What a touch of these bytes through a mapping does. Raises OSError(ENOMEM)."""
        if length and self.backing < 0:
            shift = self.order + PAGE_SHIFT
            self._populate(offset >> shift, ((offset + length - 1) >> shift) + 1)

    def populate(self) -> None:
        """fallocate(2) of the whole file."""
        self._populate(0, self._slots())

    def pin(self) -> None:
        """memfd_pin_folios with FOLL_LONGTERM: fill every hole, and move what lies in scratch out of it.

        Raises OSError(ENOMEM) when memory does not hold that much; what was filled by then stays filled.
        """
        if self.backing >= 0:
            self._resize(os.fstat(self.backing).st_size)
        missing = self._slots() - int(np.count_nonzero(self.pfns))
        room = min(missing, self.pages.buddy.free >> self.order)
        self._reach(min(self._slots(), len(self.pfns) + room))
        if room:
            self.pfns[np.flatnonzero(self.pfns == 0)[:room]] = self.pages.take(self.order, room, scatter=self.scatter)
        if room < missing:
            raise OSError(errno.ENOMEM, f"{missing - room} folios of order {self.order} are missing")
        inside = np.flatnonzero(self.pages.buddy.in_scratch(self.pfns))
        if len(inside):
            moved, old = self.pages.take(self.order, len(inside)), self.pfns[inside]
            self.pages.copy(old, moved, self.order)
            self.pfns[inside] = moved
            self.pages.give_back(old, self.order)

    def adopt(self, real: int) -> None:
        """Take the bytes from a memfd of the host, which becomes ours, whatever its size does from now on."""
        self.backing = real
        self.seals = fcntl.fcntl(real, fcntl.F_GET_SEALS)
        self._resize(os.fstat(real).st_size)
        for begin, end in data(real, 0, self.size):
            self._populate(begin // PAGE_SIZE, -(-end // PAGE_SIZE))

    def settle(self) -> None:
        """Bring the bytes of an adopted file into its frames: the last thing that happens before a jump."""
        if self.backing >= 0:
            self.pages.load(self.backing, self.pfns, self.order, self.size)

    def free(self) -> None:
        """Its folios go back, and so does the host's memfd."""
        self.pages.give_back(self.pfns, self.order)
        self.pfns = _NOTHING
        if self.charge is not None:
            self.charge.charged -= self.charged
        if self.backing >= 0:
            os.close(self.backing)


def _pwrite(fd: int, offset: int, contents: bytes | memoryview) -> None:
    view = memoryview(contents)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
