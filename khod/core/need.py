# SPDX-License-Identifier: LGPL-2.1-or-later
"""How much memory an update needs, before anything is touched (decision 8).

The kernel kills the caller of a preserve that does not fit, so the sum errs upwards: every page might be a folio of its own,
and every resident page might have to leave CMA or ZONE_MOVABLE as far as these are in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from khod.core.driver import StateArea
from khod.core.ports import Files, MemoryFigures
from khod.core.registry import Entry
from khod.core.views import MemoryView
from khod.folio.units import PAGE_SIZE

PER_PAGE = 8
"""Bytes that the kernel allocates a page while it pins a file."""
PER_FOLIO = 16
"""Bytes of a folio record, kept until the jump (struct memfd_luo_folio_ser)."""


@dataclass(frozen=True, slots=True)
class Need:
    """The sum and what there is for it, in bytes."""

    parts: dict[str, int]
    have: int

    @property
    def total(self) -> int:
        """What must be free."""
        return sum(self.parts.values())

    @property
    def enough(self) -> bool:
        """Whether there is."""
        return self.total <= self.have

    def view(self) -> MemoryView:
        """For people."""
        return MemoryView(need=self.total, have=self.have, parts=dict(self.parts), holes_filled=self.parts["holes"])

    def sentence(self) -> str:
        """Why it is refused, with the numbers."""
        parts = ", ".join(f"{name} {size}" for name, size in self.parts.items() if size)
        return f"not enough memory: {self.total} bytes are needed ({parts}) and {self.have} can be had"


def reckon(entries: Iterable[Entry], files: Files, figures: MemoryFigures, reserve: int) -> Need:
    """What preserving these instances needs. `reserve` bytes are kept for everybody else."""
    holes = swapped = resident = pages = states = 0
    for entry in entries:
        for preserve in entry.declaration.fds:
            if not preserve.folios:
                continue
            stat = files.stat(preserve.fd)
            size = -(-stat.size // PAGE_SIZE) * PAGE_SIZE
            holes += max(0, size - stat.allocated)
            here = files.resident(preserve.fd)
            swapped += max(0, stat.allocated - here)
            resident += here
            pages += size // PAGE_SIZE
        # A copy touches all of what is copied. Huge pages come out of their pool.
        for fd in (entry.fds[name] for name in entry.declaration.made if name in entry.fds):
            stat = files.stat(fd)
            if stat.kind == "guest_memfd":  # of one that is larger than memory, it does not matter how much of it is here
                holes += stat.size - (files.resident(fd) if stat.size <= figures.total else 0)
        for bound in entry.bounds:
            states += StateArea.file_size(bound)
            pages += StateArea.file_size(bound) // PAGE_SIZE
    parts = {
        "holes": holes,
        "swapped": swapped,
        "outside-cma": min(resident, figures.cma_used + figures.movable_used),
        "pages": PER_PAGE * pages,
        "folios": PER_FOLIO * pages,
        "states": states,
    }
    return Need(parts, max(0, figures.available - figures.cma_free - reserve))
