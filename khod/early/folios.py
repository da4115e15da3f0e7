# SPDX-License-Identifier: LGPL-2.1-or-later
"""One page's frame and folio, by /proc/PID/pagemap and /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

import os
from struct import unpack

PM_PRESENT = 1 << 63
PM_PFN = (1 << 55) - 1
KPF_COMPOUND_HEAD = 1 << 15
KPF_COMPOUND_TAIL = 1 << 16
"""include/uapi/linux/kernel-page-flags.h; pagemap's are in fs/proc/task_mmu.c."""

_ENTRY = 8
"""Bytes of an entry in both files."""
_SPAN = 512
"""Frames of kpageflags that are read at once when one folio is looked for: most folios have at most as many."""
_MAX_FOLIO = 1 << 18
"""Frames of the largest folio that Linux has (1 GiB)."""


class NoFolio(Exception):
    """There is no frame to be found, or no folio; the message says why, `hint` what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def frame(entry: int, index: int) -> int:
    """The frame in one entry of pagemap, of page `index` of a file. Raises NoFolio."""
    if not entry & PM_PRESENT:
        raise NoFolio(f"page {index} of the file has no frame", "it was truncated or punched while it was read")
    if not (pfn := entry & PM_PFN):
        raise NoFolio("the kernel hides frame numbers", "pagemap shows them to CAP_SYS_ADMIN only: run khod as root")
    return pfn


def folio(kpageflags: int, pfn: int) -> tuple[int, int]:
    """First frame and order of the folio that holds a frame. Raises NoFolio."""
    head = _head(kpageflags, pfn)
    if head is None:
        return pfn, 0
    frames, at = 1, head + 1
    while frames < _MAX_FOLIO:
        tails = 0
        for flags in (read := entries(kpageflags, at, _SPAN)):
            if not flags & KPF_COMPOUND_TAIL:
                break
            tails += 1
        frames, at = frames + tails, at + tails
        if tails < len(read) or not read:
            break
    return head, frames.bit_length() - 1


def _head(kpageflags: int, pfn: int) -> int | None:
    """The first frame of the compound page that `pfn` is in; None when it is in none."""
    (flags,) = entries(kpageflags, pfn, 1)
    if flags & KPF_COMPOUND_HEAD:
        return pfn
    if not flags & KPF_COMPOUND_TAIL:
        return None
    lowest = pfn & ~(_MAX_FOLIO - 1)
    end = pfn
    while end > lowest:
        start = max(lowest, end - _SPAN)
        for i, flags in enumerate(reversed(entries(kpageflags, start, end - start))):
            if flags & KPF_COMPOUND_HEAD:
                return end - 1 - i
        end = start
    raise NoFolio(f"frame {pfn:#x} is in a compound page that has no head")


def entries(file: int, first: int, count: int) -> tuple[int, ...]:
    """`count` entries of pagemap or kpageflags; fewer at the end of memory only."""
    data = raw(file, first, count)
    return unpack(f"={len(data) // _ENTRY}Q", data)


def raw(file: int, first: int, count: int) -> bytes:
    """The same, as bytes."""
    parts = []
    offset, left = first * _ENTRY, count * _ENTRY
    while left and (part := os.pread(file, left, offset)):
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    return b"".join(parts)
