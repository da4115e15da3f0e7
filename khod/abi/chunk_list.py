# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which folios are preserved, in kho-v1: kernel/kexec_handover.c of 6.16 to 7.0, struct khoser_mem_chunk.

A list of pages, each for one order, of bitmaps. These had 512 bytes up to some 6.17 and have a page since, under the same name:
`bitmap_size` tells them apart where it can, and else one has to know the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from khod.abi import pages
from khod.errors import FormatError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PHYS_BITS, Folio, PhysicalMemory

SMALL, LARGE = 512, PAGE_SIZE
"""Bytes of a bitmap."""
ELEMENTS = 255
"""Of one chunk."""
MAX_CHUNKS = 1 << 16

_HEADER = Struct("<QII")  # next, order, num_elms
_ELEMENT = Struct("<QQ")  # phys_start, bitmap


@dataclass(frozen=True, slots=True)
class Element:
    """One bitmap: where it is, and the address that its first bit stands for."""

    order: int
    start: int
    bitmap: int

    def span(self, size: int) -> int:
        """Bytes of memory that a bitmap of `size` bytes stands for."""
        return size * 8 << self.order + PAGE_SHIFT


def elements(memory: PhysicalMemory, first: int) -> Iterator[Element]:
    """Every bitmap, in the order of the list; nothing for a first chunk of 0. Raises FormatError."""
    visited = pages.Visited(memory, "chunk list", MAX_CHUNKS)
    at = first
    while at:
        page = visited.page(at)
        following, order, count = _HEADER.unpack_from(page)
        if order > PHYS_BITS - PAGE_SHIFT or count > ELEMENTS:
            raise FormatError(f"chunk list: the chunk at {at:#x} has {count} elements of order {order}")
        for number in range(count):
            start, bitmap = _ELEMENT.unpack_from(page, _HEADER.size + number * _ELEMENT.size)
            if bitmap == 0 or bitmap % SMALL or start % Element(order, 0, 0).span(SMALL) or start >= 1 << PHYS_BITS:
                raise FormatError(f"chunk list: element {number} of {at:#x} has its bitmap at {bitmap:#x}, for {start:#x}")
            yield Element(order, start, bitmap)
        at = following


def bitmap_size(found: list[Element]) -> int | None:
    """`SMALL` or `LARGE`; None when nothing in these elements tells. No element at all: `LARGE`, it is the same."""
    if any(e.bitmap % LARGE or e.start % e.span(LARGE) for e in found):
        return SMALL
    return None if found else LARGE


def bitmap_size_of(release: str) -> int | None:
    """That which a kernel of this release writes; None for 6.17, which changed on its way, and for what is no release."""
    match release.split("-")[0].split(".")[:2]:
        case [major, minor] if major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) != (6, 17):
            return SMALL if (int(major), int(minor)) < (6, 17) else LARGE
    return None


def folios(memory: PhysicalMemory, element: Element, size: int) -> Iterator[Folio]:
    """The folios of one bitmap of `size` bytes, ascending. Raises FormatError."""
    for number in pages.set_bits(pages.read(memory, element.bitmap, size, "chunk list")):
        pfn = (element.start >> PAGE_SHIFT) + (number << element.order)
        if pfn + (1 << element.order) > 1 << PHYS_BITS - PAGE_SHIFT:
            raise FormatError(f"chunk list: frame {pfn:#x}, order {element.order}: beyond physical memory")
        yield Folio(pfn, element.order)
