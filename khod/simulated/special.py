# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory that is no ordinary memfd: guest_memfds (virt/kvm/guest_memfd.c) and hugetlb memfds (fs/hugetlbfs/inode.c).

Neither is written by pwrite(2), and a guest_memfd not read either: they are reached through mappings. The pages of hugetlb
memfds come out of a pool that is made at boot.
"""

from __future__ import annotations

import errno

import numpy as np

from khod.folio.units import PAGE_SHIFT
from khod.simulated.buddy import Pfns
from khod.simulated.inode import Inode
from khod.simulated.pages import Pages
from khod.simulated.shmem import Shmem

HUGE_ORDER = 9
HUGE_SIZE = 1 << (HUGE_ORDER + PAGE_SHIFT)
"""The one size of huge pages here."""
BARE = ("iommufd", "vfio", "other")
"""Files without memory."""
KINDS = ("hugetlb", "guest_memfd", *BARE)


class Pool(Pages):
    """Huge pages, and who asks for them: memory as hugetlb memfds see it."""

    def __init__(self, pages: Pages, count: int) -> None:
        """`count` of them are taken from `pages`, or as many as there are."""
        super().__init__(pages.ram, pages.buddy)
        self.pool = pages.take(HUGE_ORDER, min(count, pages.buddy.free >> HUGE_ORDER)) if count else np.empty(0, dtype=np.int64)

    def take(self, order: int, count: int = 1, *, movable: bool = False, scatter: int | None = None) -> Pfns:
        """From the pool alone. Raises OSError(ENOMEM), and then takes nothing."""
        if count > len(self.pool):
            raise OSError(errno.ENOMEM, f"{count - len(self.pool)} huge pages are missing")
        taken, self.pool = self.pool[:count], self.pool[count:]
        self._clear(taken, order)
        return taken

    def give_back(self, pfns: Pfns, order: int) -> None:
        """Into the pool; zeros in `pfns` are holes and skipped."""
        pfns = pfns[pfns != 0]
        for _, phys, length in list(self.written(pfns, order)):
            self.ram.destroy(phys, phys + length)
        self.pool = np.concatenate((self.pool, pfns))


class Special:
    """Makes such files."""

    def __init__(self, pages: Pages, huge_pages: int) -> None:
        self.pages = pages
        self.pool = Pool(pages, huge_pages)

    def make(self, kind: str, size: int, *, private: bool = False) -> Inode:
        """A file of any kind. Raises OSError(EINVAL) for a kind that there is not."""
        if kind not in KINDS:
            raise OSError(errno.EINVAL, kind)
        if kind in BARE:
            return Inode(kind, size)
        return self.shmem(kind, size, order=HUGE_ORDER if kind == "hugetlb" else 0, private=private)

    def shmem(self, kind: str, size: int = 0, *, order: int = 0, private: bool = False) -> Shmem:
        """A file in memory. `private`: a guest_memfd that only the guest may look into."""
        inode = Shmem(self.pool if kind == "hugetlb" else self.pages, size, order=order)
        inode.kind, inode.private = kind, private
        return inode
