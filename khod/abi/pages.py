# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading what a kernel left in physical memory: bounded, aligned, and never twice the same page of one list.

A list that comes back to itself, or that shares a page with another, is not what a kernel writes; each reader of one keeps a
`Visited` and counts its pages against a limit, so that every walk ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct

from khod.errors import FormatError
from khod.folio.units import PAGE_SIZE, PHYS_BITS, PhysicalMemory

_WORD = Struct("<Q")


class Visited:
    """The pages of one structure. `what` names it in errors, `limit` is how many it may have."""

    def __init__(self, memory: PhysicalMemory, what: str, limit: int) -> None:
        self._memory, self._what, self._limit = memory, what, limit
        self._seen: set[int] = set()

    def page(self, phys: int) -> bytes:
        """A whole page, for the first time. Raises FormatError where it cannot be one of the structure's."""
        check_page(phys, self._what)
        if phys in self._seen:
            raise FormatError(f"{self._what}: the page at {phys:#x} is in it twice")
        if len(self._seen) >= self._limit:
            raise FormatError(f"{self._what}: more than {self._limit} pages")
        self._seen.add(phys)
        return read(self._memory, phys, PAGE_SIZE, self._what)


def set_bits(bitmap: bytes) -> Iterator[int]:
    """Numbers of the bits that are set, ascending; the lowest bit of a byte is the first. `bitmap` is of whole words."""
    for at, (word,) in enumerate(_WORD.iter_unpack(bitmap)):
        while word:
            low = word & -word
            yield at * 64 + low.bit_length() - 1
            word ^= low


def check_page(phys: int, what: str) -> None:
    """Raises FormatError for what is no address of a page."""
    if phys == 0 or phys % PAGE_SIZE or phys >= 1 << PHYS_BITS:
        raise FormatError(f"{what}: {phys:#x} is no address of a page")


def read(memory: PhysicalMemory, phys: int, length: int, what: str) -> bytes:
    """Raises FormatError where there is no memory."""
    try:
        data = memory.read(phys, length)
    except ValueError as error:
        raise FormatError(f"{what}: {error}")
    if len(data) != length:
        raise FormatError(f"{what}: {len(data)} of {length} bytes at {phys:#x}")
    return data
