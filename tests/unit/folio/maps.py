# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of the folio map share: a small machine, memory that counts its reads, and a second, naive writer."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from khod.folio.units import Folio, Range

GIB = 1 << 30
RAM = (Range(1 << 20, 3 * GIB), Range(4 * GIB, 68 * GIB))
SCRATCH = (Range(64 << 20, 96 << 20), Range(5 * GIB, 5 * GIB + (128 << 20)))
FRAMES = range((2 * GIB) >> 12, (2 * GIB >> 12) + 4096)
"""RAM that no test preserves: maps are written there."""


@dataclass
class Memory:
    """Pages by physical address. Counts what is read, and refuses anything but whole pages."""

    pages: dict[int, bytes] = field(default_factory=dict)
    reads: int = 0

    def read(self, phys: int, length: int) -> bytes:
        self.reads += 1
        assert length == 4096
        if phys not in self.pages:
            raise ValueError(f"no memory at {phys:#x}")
        return self.pages[phys]

    def put(self, content: bytes | memoryview, frames: Sequence[int]) -> None:
        for i in range(0, len(content), 4096):
            self.pages[frames[i // 4096] << 12] = bytes(content[i : i + 4096])


@dataclass
class RawChunk:
    """A chunk as somebody else would write it, well or badly."""

    order: int
    elements: list[tuple[int, int]]
    """phys_start and the bitmap's address."""
    address: int
    next: int = 0
    num_elms: int | None = None

    def encode(self) -> bytes:
        count = len(self.elements) if self.num_elms is None else self.num_elms
        body = b"".join(struct.pack("<QQ", *element) for element in self.elements)
        return (struct.pack("<IIQ", self.order, count, self.next) + body).ljust(4096, b"\0")


def bitmap(*bits: int) -> bytes:
    return sum(1 << bit for bit in bits).to_bytes(512, "little")


@dataclass
class RawMap:
    """A map made by hand: chunks, and 512-byte bitmaps by physical address."""

    chunks: list[RawChunk]
    bitmaps: dict[int, bytes]
    memory: Memory = field(default_factory=Memory)

    def build(self) -> tuple[Memory, int, int, bytes]:
        """Memory, address, pages and digest, as the readers take them."""
        pages: dict[int, bytearray] = {}
        for address, bits in self.bitmaps.items():
            page = pages.setdefault(address & ~4095, bytearray(4096))
            page[address & 4095 : (address & 4095) + 512] = bits
        digest = hashlib.sha256()
        for chunk in self.chunks:
            pages[chunk.address] = bytearray(chunk.encode())
        for chunk in self.chunks:
            digest.update(pages[chunk.address])
            for _, address in chunk.elements:
                digest.update(self.bitmaps.get(address, b""))
        self.memory.pages.update({address: bytes(page) for address, page in pages.items()})
        return self.memory, self.chunks[0].address if self.chunks else 0, len(pages), digest.digest()


def window(folios: Iterable[tuple[int, int]]) -> tuple[array[int], array[int]]:
    """Folios as the arrays that a window of frames brings."""
    pairs = list(folios)
    return array("Q", [pfn for pfn, _ in pairs]), array("B", [order for _, order in pairs])


def sorted_as_map(folios: Iterable[Folio]) -> list[Folio]:
    return sorted(folios, key=lambda folio: (folio.order, folio.pfn))
