# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folios that a kernel preserves, as runs of frames: by numpy, for a host has tens of millions of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from khod.abi import chunk_list, pages, radix_tree
from khod.errors import FormatError
from khod.folio.units import PAGE_SHIFT, PHYS_BITS, Folio, PhysicalMemory
from khod.inspect.views import Span, TotalInfo

Frames = NDArray[np.int64]
_END = 1 << PHYS_BITS - PAGE_SHIFT


class Preserved:
    """Runs of folios by order, ascending in each."""

    def __init__(self, runs: Iterable[tuple[int, int, int]]) -> None:
        """Of (order, first frame, frame behind the last)."""
        by_order: dict[int, list[tuple[int, int]]] = {}
        for order, start, end in runs:
            by_order.setdefault(order, []).append((start, end))
        self._runs: dict[int, Frames] = {
            order: np.array(sorted(found), np.int64).reshape(-1, 2) for order, found in sorted(by_order.items())
        }

    def totals(self) -> tuple[TotalInfo, ...]:
        """Folios by order, ascending."""
        out = []
        for order, runs in self._runs.items():
            frames = int((runs[:, 1] - runs[:, 0]).sum())
            out.append(TotalInfo(order=order, folios=frames >> order, bytes=frames << PAGE_SHIFT))
        return tuple(out)

    def runs(self, order: int) -> Iterator[tuple[int, int]]:
        """Of one order: first frame, frame behind the last."""
        for run in self._runs.get(order, np.empty((0, 2), np.int64)):
            yield int(run[0]), int(run[1])

    @property
    def orders(self) -> tuple[int, ...]:
        """Those that there are, ascending."""
        return tuple(self._runs)

    @cached_property
    def count(self) -> int:
        """How many folios."""
        return sum(total.folios for total in self.totals())

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """All of it in bytes, ascending, joined."""
        return joined((start << PAGE_SHIFT, end << PAGE_SHIFT) for order in self._runs for start, end in self.runs(order))

    def find(self, pfn: int) -> Folio | None:
        """The folio that a frame is in."""
        for order in self._runs:
            if self.has(order, np.array([pfn], np.int64))[0]:
                return Folio(pfn >> order << order, order)
        return None

    def has(self, order: int, pfns: Frames) -> NDArray[np.bool_]:
        """Which of these frames are in folios of that order."""
        runs = self._runs.get(order)
        if runs is None or not runs.size:
            return np.zeros(pfns.size, np.bool_)
        at = np.searchsorted(runs[:, 0], pfns, "right") - 1
        found: NDArray[np.bool_] = (at >= 0) & (pfns < runs[np.maximum(at, 0), 1])
        return found


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same addresses as few ranges, ascending."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        elif start < end:
            out.append((start, end))
    return tuple(out)


def without(spans: Iterable[Span], taken: Iterable[Span]) -> tuple[Span, ...]:
    """What is in the first and not in the second; both ascending and joined."""
    out: list[Span] = []
    others, number = list(taken), 0
    for start, end in spans:
        while number < len(others) and others[number][1] <= start:
            number += 1
        at = number
        while start < end and at < len(others) and others[at][0] < end:
            if others[at][0] > start:
                out.append((start, others[at][0]))
            start, at = max(start, others[at][1]), at + 1
        if start < end:
            out.append((start, end))
    return tuple(out)


def of_radix_tree(memory: PhysicalMemory, root: int) -> Preserved:
    """kho-v2 to kho-v4. Raises FormatError."""
    return Preserved(run for leaf in radix_tree.walk(memory, root) for run in _of_leaf(leaf))


def _of_leaf(leaf: radix_tree.Leaf) -> Iterator[tuple[int, int, int]]:
    if not leaf.first:  # several orders in one leaf, each of folios of a hundred TiB
        for folio in leaf.folios():
            yield folio.order, folio.pfn, folio.pfn + (1 << folio.order)
        return
    order = radix_tree.order_of(leaf.first)
    base = (leaf.first ^ 1 << radix_tree.ORDER_0 - order) << order
    yield from _runs_of_bits(leaf.bits, order, base)


def _runs_of_bits(bits: bytes, order: int, base: int) -> Iterator[tuple[int, int, int]]:
    flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(flags, prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        if base + (end << order) > _END:
            raise FormatError(f"frames {base + (start << order):#x} and on, order {order}: beyond physical memory")
        yield order, base + (start << order), base + (end << order)


def of_chunk_list(memory: PhysicalMemory, first: int, size: int | None) -> Preserved:
    """kho-v1, with bitmaps of `size` bytes; None: find out. Raises FormatError, also where that cannot be found out."""
    elements = list(chunk_list.elements(memory, first))
    size = chunk_list.bitmap_size(elements) or size
    if size is None:
        raise FormatError(
            "chunk list: its bitmaps have 512 bytes (6.16, early 6.17) or 4096 (later ones), and nothing in it tells",
            hint="say it with --bitmaps, by the release of the kernel that wrote it",
        )
    if len({element.bitmap for element in elements}) != len(elements):
        raise FormatError("chunk list: a bitmap is in it twice")
    return Preserved(
        run
        for element in elements
        for run in _runs_of_bits(
            pages.read(memory, element.bitmap, size, "chunk list"), element.order, element.start >> PAGE_SHIFT
        )
    )
