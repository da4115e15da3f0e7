# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/radix_tree.h: which folios are preserved, in kho-v2 to kho-v4, with pages of 4 KiB.

A key is one bit that says the order, above the folio's number in folios of that order. Five levels of tables of 512 physical
addresses lead to a page of bits. The *outgoing* tree of a running kernel can be read while it changes (nodes are not freed);
the incoming one must not be: its nodes are not preserved, and something else by the time that anybody looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from khod.abi import pages
from khod.errors import FormatError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PHYS_BITS, Folio, PhysicalMemory

ORDER_0 = 64 - PAGE_SHIFT
"""The bit that stands for order 0; that of order n is n lower."""
LEAF_BITS = 15
"""A leaf is a page of bits."""
TABLE_BITS = 9
DEPTH = 6
"""Levels, the leaf included."""
MAX_NODES = 1 << 18
"""A gibibyte of nodes: 8 TiB of single pages."""

_TABLE = Struct("<512Q")
_WORD = Struct("<Q")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A page of bits: `first` is the key of its first one."""

    first: int
    bits: bytes

    def __len__(self) -> int:
        """How many folios."""
        return int.from_bytes(self.bits, "little").bit_count()

    def folios(self) -> Iterator[Folio]:
        """Those whose bits are set, by key. Raises FormatError for a key that is none."""
        return (decode(self.first + bit) for bit in pages.set_bits(self.bits))

    def totals(self) -> Iterator[tuple[int, int]]:
        """Order and number of folios; but for the highest orders, all of a leaf are of one."""
        if self.first:
            yield order_of(self.first), len(self)
            return
        counts: dict[int, int] = {}
        for folio in self.folios():
            counts[folio.order] = counts.get(folio.order, 0) + 1
        yield from counts.items()


def encode(folio: Folio) -> int:
    """The key of a folio."""
    return (1 << ORDER_0 - folio.order) | folio.pfn >> folio.order


def order_of(key: int) -> int:
    """The order that a key says. Raises FormatError when it says none."""
    order = ORDER_0 - (key.bit_length() - 1)
    if key <= 0 or order < 0:
        raise FormatError(f"{key:#x} is no key of the radix tree")
    return order


def decode(key: int) -> Folio:
    """The folio of a key. Raises FormatError for one of none."""
    order = order_of(key)
    pfn = (key ^ (1 << ORDER_0 - order)) << order
    if pfn + (1 << order) > 1 << PHYS_BITS - PAGE_SHIFT:
        raise FormatError(f"{key:#x} is the key of frame {pfn:#x}, order {order}: beyond physical memory")
    return Folio(pfn, order)


def walk(memory: PhysicalMemory, root: int) -> Iterator[Leaf]:
    """Every leaf, by key; nothing for a root of 0. Raises FormatError."""
    if root:
        yield from _below(pages.Visited(memory, "radix tree", MAX_NODES), root, DEPTH - 1, 0)


def _below(visited: pages.Visited, phys: int, level: int, key: int) -> Iterator[Leaf]:
    page = visited.page(phys)
    if level == 0:
        order_of(key or 1)
        yield Leaf(key, page)
        return
    shift = LEAF_BITS + TABLE_BITS * (level - 1)
    for index, child in enumerate(_TABLE.unpack(page)):
        if child:
            yield from _below(visited, child, level - 1, key | index << shift)


def totals(memory: PhysicalMemory, root: int) -> dict[int, int]:
    """Folios by order, ascending. Raises FormatError."""
    found: dict[int, int] = {}
    for leaf in walk(memory, root):
        for order, count in leaf.totals():
            found[order] = found.get(order, 0) + count
    return {order: found[order] for order in sorted(found) if found[order]}


def find(memory: PhysicalMemory, root: int, phys: int) -> Folio | None:
    """The preserved folio that this address is in, if it is in one: at most a path for each order. Raises FormatError."""
    pfn = phys >> PAGE_SHIFT
    for order in range(ORDER_0 + 1):
        folio = Folio(pfn >> order << order, order)
        if root and _has(memory, root, encode(folio)):
            return folio
    return None


def _has(memory: PhysicalMemory, root: int, key: int) -> bool:
    at = root
    for level in range(DEPTH - 1, 0, -1):
        pages.check_page(at, "radix tree")
        index = key >> LEAF_BITS + TABLE_BITS * (level - 1) & (1 << TABLE_BITS) - 1
        (at,) = _WORD.unpack(pages.read(memory, at + 8 * index, 8, "radix tree"))
        if not at:
            return False
    pages.check_page(at, "radix tree")
    bit = key & PAGE_SIZE * 8 - 1
    return bool(pages.read(memory, at + bit // 8, 1, "radix tree")[0] >> bit % 8 & 1)
