# SPDX-License-Identifier: LGPL-2.1-or-later
"""Preserved memfds: what their structs list, held against the map of preserved folios."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from khod.abi import memfd
from khod.core.ports import WINDOW
from khod.errors import FormatError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PhysicalMemory
from khod.inspect.preserved import Frames, Preserved, joined, without
from khod.inspect.source import Deadline, Source
from khod.inspect.views import Span

VERSIONS = ("memfd-v2", "memfd-v1")
_STRUCT = 48
_NONE = 0xFF
_FILE_PAGES = (1 << 32) - 1
"""Of the largest file that the kernel preserves."""


@dataclass(frozen=True, slots=True)
class Memfd:
    """One of them: its struct, and its folios in the order of the file."""

    address: int
    compatible: str
    struct: memfd.Memfd
    pages: Frames
    """Of the file, at which each folio begins."""
    pfns: Frames
    orders: NDArray[np.uint8]
    storage: tuple[Span, ...]
    """Where the kernel keeps this."""

    def extents(self) -> list[tuple[int, int, int]]:
        """Page of the file, first frame, pages; the last folio may reach over the file's end."""
        if not self.pages.size:
            return []
        lengths = np.left_shift(1, self.orders.astype(np.int64))
        goes_on = (self.pages[1:] == self.pages[:-1] + lengths[:-1]) & (self.pfns[1:] == self.pfns[:-1] + lengths[:-1])
        starts = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
        counts = np.add.reduceat(lengths, starts)
        return list(zip(self.pages[starts].tolist(), self.pfns[starts].tolist(), counts.tolist(), strict=True))

    def spans(self) -> tuple[Span, ...]:
        """Its memory."""
        return joined((pfn << PAGE_SHIFT, pfn + count << PAGE_SHIFT) for _, pfn, count in self.extents())

    def folios(self) -> dict[str, int]:
        """How many of each order."""
        orders, counts = np.unique(self.orders, return_counts=True)
        return {str(order): count for order, count in zip(orders.tolist(), counts.tolist(), strict=True)}

    def digest(self) -> bytes:
        """As `khod.core.learning.FramesDigest` makes it of the same file."""
        digest, window = hashlib.sha256(), self.pages // (WINDOW >> PAGE_SHIFT)
        for number in np.unique(window).tolist():
            inside = window == number
            digest.update(self.pfns[inside].astype(np.uint64).tobytes())
            digest.update(self.orders[inside].tobytes())
        return digest.digest()

    def content(self, memory: PhysicalMemory, limit: int) -> bytes:
        """Its first bytes, at most `limit`. Raises ValueError where memory cannot be read."""
        parts, left = [], min(limit, self.struct.size)
        for _, pfn, count in self.extents():
            parts.append(memory.read(pfn << PAGE_SHIFT, min(left, count << PAGE_SHIFT)))
            if (left := left - len(parts[-1])) <= 0:
                break
        return b"".join(parts)


def read(memory: PhysicalMemory, preserved: Preserved, compatible: str, address: int) -> Memfd:
    """The memfd whose struct is at `address`. Raises FormatError, also where some of it is not preserved, or missing."""
    struct = memfd.decode(compatible, memory, address)
    total = -(-struct.size // PAGE_SIZE)
    if total > _FILE_PAGES or struct.folios > min(total, preserved.count) or bool(struct.folios) != bool(total):
        raise FormatError(f"memfd at {address:#x}: {struct.folios} folios for {struct.size} bytes")
    parts, at = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))], 0
    for raw in memfd.record_pages(memory, struct):
        parts.append(_records(address, preserved, raw, at))
        at = int(parts[-1][0][-1]) + (1 << int(parts[-1][2][-1]))
    if at < total:
        raise FormatError(f"memfd at {address:#x}: its folios end at page {at} of {total}")
    pages, pfns, orders = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    piece = PAGE_SIZE << struct.records.order
    spans = [(address, address + PAGE_SIZE)]
    spans += [(at, at + (PAGE_SIZE if chunk else piece)) for at, chunk in memfd.storage(memory, struct.records)]
    return Memfd(address, compatible, struct, pages, pfns, orders, joined(spans))


def _records(address: int, preserved: Preserved, raw: bytes, at: int) -> tuple[Frames, Frames, NDArray[np.uint8]]:
    """Pages of the file, frames and orders of one page of records, which goes on at page `at` of the file. Checked page by
    page: what is no memfd is not read to an end that may be far away. Raises FormatError."""
    words = np.frombuffer(raw, "<u8").reshape(-1, 2)
    if (words[:, 1] > _FILE_PAGES).any():
        raise FormatError(f"memfd at {address:#x}: a folio at page {int(words[:, 1].max())} of the file")
    pfns, pages = (words[:, 0] & np.uint64(memfd.PFN_MASK)).astype(np.int64), words[:, 1].astype(np.int64)
    orders = np.full(pfns.size, _NONE, np.uint8)
    for each in preserved.orders:
        orders[preserved.has(each, pfns) & (pfns & (1 << each) - 1 == 0)] = each
    if (lost := np.flatnonzero(orders == _NONE)).size:
        raise FormatError(f"memfd at {address:#x}: the folio at {int(pfns[lost[0]]) << PAGE_SHIFT:#x} is not preserved")
    ends = pages + np.left_shift(1, orders.astype(np.int64))
    if pages[0] != at or (pages[1:] != ends[:-1]).any():
        raise FormatError(f"memfd at {address:#x}: its folios are not the file from its first page to its last")
    return pages, pfns, orders


def look(source: Source, preserved: Preserved, deadline: Deadline) -> Iterator[Memfd]:
    """Those whose structs nothing leads to yet: every preserved single page of the kernel's is looked at. What is found leads
    to preserved memory alone, and makes a whole file of it; an empty file cannot be told from an empty page."""
    for start, end in preserved.runs(0):
        for pfn in source.kernel_pages(start, end):
            if deadline.over():
                return
            if found := _at(source, preserved, pfn << PAGE_SHIFT):
                yield found


def _at(source: Source, preserved: Preserved, phys: int) -> Memfd | None:
    try:
        if not any(source.read(phys, _STRUCT)):
            return None
    except ValueError:
        return None
    for compatible in VERSIONS:
        try:
            found = read(source, preserved, compatible, phys)
        except FormatError:
            continue
        if found.struct.folios and not without(found.storage, preserved.spans):
            return found
    return None
