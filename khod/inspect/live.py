# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running kernel: /proc/kcore for memory, /proc/kpageflags for whose a page is, debugfs for what the kernel tells.

Not drgn: without the kernel's debug information, which hosts do not have, it reads physical memory as /proc/kcore is read
here, and no more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from khod.errors import KhodError
from khod.folio.units import PAGE_SHIFT, Range
from khod.inspect.source import MAGIC, Deadline, trees_in
from khod.kernel.boot import DEBUGFS, kho_setup_data
from khod.kernel.memory import KernelMemory

_DEVICE = Path("/dev/liveupdate")
_STRETCH = 1 << 18
"""Frames whose flags are read at once."""
# lru, slab, buddy, mmap, anon, swapbacked, huge, nopage, thp, offline, zero page, page table.
_NOT = sum(1 << bit for bit in (5, 7, 10, 11, 12, 14, 17, 20, 22, 23, 24, 26))
"""Flags (linux/kernel-page-flags.h) that no page has which a kernel took for a structure of a handover."""


class Live:
    """The source that the running kernel is. Raises MachineError where /proc/kcore must not be read."""

    name, live = "live", True

    def __init__(self, memory: KernelMemory | None = None, debugfs: Path = DEBUGFS) -> None:
        self._memory, self._debugfs = memory or KernelMemory(), debugfs
        self._flags = -1
        self._ram = self._memory.ram()
        self._memory.read(self._ram[0].start, 1)

    def close(self) -> None:
        """Close what was opened."""
        if self._flags >= 0:
            os.close(self._flags)
            self._flags = -1

    def read(self, phys: int, length: int) -> bytes:
        """See PhysicalMemory."""
        return self._memory.read(phys, length)

    def ram(self) -> tuple[Range, ...]:
        """See Source."""
        return self._ram

    def scratch(self) -> tuple[Range, ...]:
        """See Source."""
        return self._memory.scratch()

    def trees(self, deadline: Deadline) -> Iterator[int]:
        """See Source. Of most pages nothing is read but their flags: the kernel's own are few."""
        try:
            self._open_flags()
        except OSError:
            yield from trees_in(self, self._ram, deadline)
            return
        for area in self._ram:
            first, last = area.start >> PAGE_SHIFT, area.end >> PAGE_SHIFT
            for start in range(first, last, _STRETCH):
                for pfn in self.kernel_pages(start, min(start + _STRETCH, last)):
                    if deadline.over():
                        return
                    if self._begins(pfn << PAGE_SHIFT):
                        yield pfn << PAGE_SHIFT

    def kernel_pages(self, start: int, end: int) -> Iterator[int]:
        """See Source."""
        try:
            self._open_flags()
        except OSError:
            yield from range(start, end)
            return
        for at in range(start, end, _STRETCH):
            raw = os.pread(self._flags, 8 * min(_STRETCH, end - at), 8 * at)
            flags = np.frombuffer(raw[: len(raw) // 8 * 8], np.uint64)
            yield from (np.flatnonzero(flags & np.uint64(_NOT) == 0) + at).tolist()

    def said(self, path: str) -> bytes | None:
        """See Source."""
        try:
            return (self._debugfs / path).read_bytes()
        except OSError:
            return None

    @property
    def hands_over(self) -> bool:
        """See Source."""
        return (self._debugfs / "out").exists() or _DEVICE.exists()

    @property
    def incoming_address(self) -> int:
        """See Source."""
        data = kho_setup_data()
        return int.from_bytes(data[:8], "little") if data else 0

    def _begins(self, phys: int) -> bool:
        try:
            return self._memory.read(phys, len(MAGIC)) == MAGIC
        except (ValueError, OSError, KhodError):
            return False

    def _open_flags(self) -> None:
        if self._flags < 0:
            self._flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
