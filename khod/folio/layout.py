# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bytes of the folio map, ``linux-kho,v1``: a linked list of one-page chunks that point at 512-byte bitmaps.

========  ====  ===================================================================
offset    type  field (little-endian; pointers are physical addresses, 0 is none)
========  ====  ===================================================================
0         u32   order, of every bitmap of this chunk
4         u32   num_elms, 1..255
8         u64   next chunk, or 0
16+16*i   u64   phys_start of bitmap i: ``block_index * 4096 << (12 + order)``
24+16*i   u64   physical address of bitmap i
========  ====  ===================================================================
"""

from __future__ import annotations

import struct

from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PHYS_BITS

BITMAP_BYTES = 512
BLOCK_SHIFT = 12
BLOCK_BITS = 1 << BLOCK_SHIFT
"""Folios that one bitmap speaks for (PRESERVE_BITS)."""
BITMAPS_PER_PAGE = PAGE_SIZE // BITMAP_BYTES
HEADER = struct.Struct("<IIQ")
ELEMENT = struct.Struct("<QQ")
CHUNK_ELEMENTS = (PAGE_SIZE - HEADER.size) // ELEMENT.size
TOP = 1 << PHYS_BITS
"""The end of physical address space, in bytes."""


def block_shift(order: int) -> int:
    """log2 of the bytes of memory that one bitmap of `order` covers."""
    return BLOCK_SHIFT + PAGE_SHIFT + order


def chunks_for(bitmaps: int) -> int:
    """Chunks that the bitmaps of one order need."""
    return -(-bitmaps // CHUNK_ELEMENTS)


def pages_needed(bitmaps: int, orders: int) -> int:
    """Pages that surely hold a map of `bitmaps` bitmaps in `orders` orders, once its own pages are listed in it too.

    The least P with ``P = ceil((B+P)/8) + ceil((B+P)/255) + orders``: each of the P pages may need a bitmap of its own, and
    each order may end in a chunk that is not full. Grows in P, so stepping up from 0 finds the least; the slope is below
    1/7, so it ends after a few steps.
    """
    pages = 0
    while True:
        held = bitmaps + pages
        needed = -(-held // BITMAPS_PER_PAGE) + chunks_for(held) + orders
        if needed == pages:
            return pages
        pages = needed
