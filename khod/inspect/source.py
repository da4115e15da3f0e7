# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where an inspection reads: physical memory, and what else tells of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from khod.folio.units import PAGE_SIZE, PhysicalMemory, Range

MAGIC = b"\xd0\x0d\xfe\xed"
"""The first bytes of a flattened device tree."""
STRETCH = 4 << 20
"""Bytes that are read at once when memory is searched."""


class Deadline:
    """Until when a search may go on. `passed` stays true once it was."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self.passed = False

    def over(self) -> bool:
        """Whether it is time to stop."""
        self.passed = self.passed or time.monotonic() >= self._until
        return self.passed


class Source(PhysicalMemory, Protocol):
    """A machine's memory."""

    @property
    def name(self) -> str:
        """'live', or a path."""
        ...

    @property
    def live(self) -> bool:
        """Whether it changes while we read."""
        ...

    @property
    def hands_over(self) -> bool:
        """Whether there may be a handover to the next kernel in it."""
        ...

    @property
    def incoming_address(self) -> int:
        """Of the tree that this kernel was handed; 0 when it was not, or nobody says."""
        ...

    def ram(self) -> tuple[Range, ...]:
        """System RAM."""
        ...

    def scratch(self) -> tuple[Range, ...]:
        """Scratch areas; () when nobody says."""
        ...

    def trees(self, deadline: Deadline) -> Iterator[int]:
        """Addresses of pages of the kernel's that begin with a device tree's magic; ends when the deadline passes."""
        ...

    def kernel_pages(self, start: int, end: int) -> Iterator[int]:
        """Which of these frames may be the kernel's own, and not memory of a process (which can look like anything)."""
        ...

    def said(self, path: str) -> bytes | None:
        """A file of debugfs' directory of KHO; None when there is none."""
        ...


def trees_in(memory: PhysicalMemory, ram: Sequence[Range], deadline: Deadline) -> Iterator[int]:
    """All pages of `ram` that begin with the magic; those that cannot be read are passed over."""
    for area in ram:
        for start in range(area.start, area.end, STRETCH):
            if deadline.over():
                return
            try:
                data = memory.read(start, min(STRETCH, area.end - start))
            except ValueError:
                continue
            at = data.find(MAGIC)
            while at >= 0:
                if at % PAGE_SIZE == 0:
                    yield start + at
                at = data.find(MAGIC, at + 1)
