# SPDX-License-Identifier: LGPL-2.1-or-later
"""Learning which folios back a preserved file (decision 10): the same walk in both kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from khod.core.ports import FolioWindow, Machine


def windows(machine: Machine, fd: int) -> Iterator[FolioWindow]:
    """The folios behind a preserved file, each named once: one that reaches over a window's end stays in the first."""
    last = None
    for window in machine.frames.windows(fd):
        pfns, orders = window.pfns, window.orders
        if len(pfns) and (pfns[0], orders[0]) == last:
            window = FolioWindow(window.offset, pfns[1:], orders[1:])
        if len(pfns):
            last = (pfns[-1], orders[-1])
        yield window


class FramesDigest:
    """SHA-256 over a file's folios in file order: of every window its first frames (u64 each), then its orders (u8 each)."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, window: FolioWindow) -> None:
        """The next window."""
        self._hash.update(window.pfns)
        self._hash.update(window.orders)

    def digest(self) -> bytes:
        """Of all that was added."""
        return self._hash.digest()
