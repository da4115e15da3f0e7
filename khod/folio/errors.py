# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every way in which a folio map is refused when it is made, or rejected when it is read.

::

    Refused                       MapError
    └── FolioRefused              ├── MapRejected: names chunk, element and value
        ├── OrderAboveLimit       │   ├── ChunkUnaligned, ChunkNotRam, ChunkInScratch, ChunkCycle, ChunkNotFull
        ├── FolioUnaligned        │   ├── BitmapNull, BitmapUnaligned, BitmapNotRam, BitmapInScratch, BitmapEmpty
        ├── NotRam                │   ├── StorageOverlap, Unreadable, TooManyPages
        ├── InScratch             │   ├── ElementCount, OrdersNotAscending, OrderTooHigh
        ├── AlreadyTracked        │   ├── StartUnaligned, StartBeyondTop, ElementsNotAscending
        ├── Overlaps              │   └── FolioBeyondTop, FolioNotRam, FolioInScratch, FolioOverlap
        ├── NotTracked            └── DigestMismatch, PagesWithoutMap
        ├── EmptyRange
        ├── Finalized
        │   └── AlreadySerialized
        └── TooFewFrames, UnusableFrame
"""

from __future__ import annotations

from typing import ClassVar

from khod.errors import MapError, Refused
from khod.folio.units import PAGE_SHIFT, Folio, Range


def folio_text(folio: Folio) -> str:
    """A folio as people read it: frame, order and the physical address that follows from the frame."""
    return f"folio pfn {folio.pfn:#x} order {folio.order} at physical {folio.pfn << PAGE_SHIFT:#x}"


class FolioRefused(Refused):
    """The tracker or the writer will not do that. Nothing was changed."""


class OrderAboveLimit(FolioRefused):
    """An order above what the machine allows, or below zero."""

    def __init__(self, folio: Folio, limit: int) -> None:
        super().__init__(f"{folio_text(folio)}: the order is not in 0..{limit}")


class FolioUnaligned(FolioRefused):
    """The first frame is not a multiple of 2^order."""

    def __init__(self, folio: Folio) -> None:
        super().__init__(f"{folio_text(folio)}: not aligned to its order, {folio.pfn % (1 << folio.order)} frames off")


class NotRam(FolioRefused):
    """Part of the folio is not RAM. `at` is the first frame that is not."""

    def __init__(self, folio: Folio, at: int) -> None:
        super().__init__(f"{folio_text(folio)}: physical {at << PAGE_SHIFT:#x} is not RAM")


class InScratch(FolioRefused):
    """Part of the folio is scratch, in which the next kernel boots."""

    def __init__(self, folio: Folio, region: Range) -> None:
        super().__init__(f"{folio_text(folio)}: inside scratch {region}")


class AlreadyTracked(FolioRefused):
    """The same folio, of the same order, is preserved already, or named twice in one call."""

    def __init__(self, folio: Folio, *, twice: bool = False) -> None:
        super().__init__(f"{folio_text(folio)}: " + ("named twice in one call" if twice else "already preserved"))


class Overlaps(FolioRefused):
    """The folio shares frames with a preserved one of another order."""

    def __init__(self, folio: Folio, other: Folio) -> None:
        super().__init__(f"{folio_text(folio)}: overlaps preserved {folio_text(other)}")


class NotTracked(FolioRefused):
    """Unpreserving what is not preserved."""

    def __init__(self, folio: Folio, *, twice: bool = False) -> None:
        super().__init__(f"{folio_text(folio)}: " + ("named twice in one call" if twice else "not preserved"))


class EmptyRange(FolioRefused):
    """A range without frames, or one that ends before it starts."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(f"range of pfn {start:#x} to {end:#x}: {'empty' if start == end else 'negative'}")


class Finalized(FolioRefused):
    """A change after serialize: what was written would no longer be true."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: the map is finalized", hint="reopen the tracker first, as an abort does")


class AlreadySerialized(Finalized):
    """A second serialize while one is in force."""

    def __init__(self) -> None:
        super().__init__("serialize")


class TooFewFrames(FolioRefused):
    """The memory that was set aside for the map is smaller than the map."""

    def __init__(self, needed: int, given: int) -> None:
        super().__init__(f"the folio map needs {needed} pages and was given {given} frames")


class UnusableFrame(FolioRefused):
    """A frame that no chunk or bitmap may live in: not RAM, in scratch, frame 0, or given twice."""

    def __init__(self, pfn: int, why: str) -> None:
        super().__init__(f"frame pfn {pfn:#x} at physical {pfn << PAGE_SHIFT:#x} for the folio map: {why}")


class MapRejected(MapError):
    """Something in the map is wrong. `chunk` is the physical address of the chunk, `element` its index in it or None
    where the chunk itself is meant, `value` what was found."""

    problem: ClassVar[str] = ""

    def __init__(self, chunk: int, element: int | None, value: int, detail: str = "") -> None:
        self.chunk = chunk
        self.element = element
        self.value = value
        where = f"chunk at {chunk:#x}" + ("" if element is None else f" element {element}")
        super().__init__(f"folio map, {where}: {self.problem}: {value:#x}" + (f" ({detail})" if detail else ""))


class ChunkUnaligned(MapRejected):
    """A chunk is one page, and page aligned."""

    problem = "chunk address is not page aligned"


class ChunkNotRam(MapRejected):
    """The first chunk, or a next pointer, leads out of RAM."""

    problem = "chunk address is not RAM"


class ChunkInScratch(MapRejected):
    """The next kernel has overwritten what lay in scratch."""

    problem = "chunk lies in scratch"


class ChunkCycle(MapRejected):
    """A next pointer leads back."""

    problem = "the list of chunks comes back to a chunk that it has passed"


class ChunkNotFull(MapRejected):
    """Only the last chunk of an order may hold fewer than 255 elements."""

    problem = "a chunk that is not full is followed by one of the same order; its num_elms"


class ElementCount(MapRejected):
    """num_elms is 1..255."""

    problem = "num_elms is not in 1..255"


class OrdersNotAscending(MapRejected):
    """Chunks come in ascending order of order."""

    problem = "order below that of the chunk before"


class OrderTooHigh(MapRejected):
    """An order above the machine's limit."""

    problem = "order above the limit"


class StartUnaligned(MapRejected):
    """phys_start is where a block starts."""

    problem = "phys_start is not a multiple of the block size"


class StartBeyondTop(MapRejected):
    """phys_start lies beyond the end of physical address space."""

    problem = "phys_start is beyond the physical address space"


class ElementsNotAscending(MapRejected):
    """Elements of one order ascend; none comes twice."""

    problem = "phys_start does not ascend"


class BitmapNull(MapRejected):
    """A pointer to a bitmap cannot be none."""

    problem = "bitmap address is none"


class BitmapUnaligned(MapRejected):
    """A bitmap is 512 bytes, and so aligned."""

    problem = "bitmap address is not a multiple of 512"


class BitmapNotRam(MapRejected):
    """A pointer to a bitmap leads out of RAM."""

    problem = "bitmap address is not RAM"


class BitmapInScratch(MapRejected):
    """The next kernel has overwritten what lay in scratch."""

    problem = "bitmap lies in scratch"


class BitmapEmpty(MapRejected):
    """A bitmap without a set bit says nothing, and is never written."""

    problem = "bitmap has no set bit; its address"


class StorageOverlap(MapRejected):
    """Two of the map's own chunks and bitmaps share memory."""

    problem = "overlaps another chunk or bitmap"


class Unreadable(MapRejected):
    """The memory has nothing to read there."""

    problem = "memory cannot be read"


class TooManyPages(MapRejected):
    """Chunks and bitmaps occupy more pages than the tree announced."""

    problem = "more pages than announced; the page beyond"


class FolioBeyondTop(MapRejected):
    """A folio that ends beyond the physical address space."""

    problem = "folio ends beyond the physical address space; its bit"


class FolioNotRam(MapRejected):
    """A folio that is not RAM, whole or in part."""

    problem = "folio is not RAM"


class FolioInScratch(MapRejected):
    """A folio in scratch, whole or in part: the next kernel has overwritten it."""

    problem = "folio lies in scratch"


class FolioOverlap(MapRejected):
    """Two folios of different order share frames."""

    problem = "folio overlaps one of a higher order"


class DigestMismatch(MapError):
    """The map is not the one that the tree was written with."""

    def __init__(self, found: bytes, announced: bytes) -> None:
        super().__init__(f"folio map: its sha256 is {found.hex()}, announced was {announced.hex()}")


class PagesWithoutMap(MapError):
    """An empty map occupies no pages."""

    def __init__(self, pages: int) -> None:
        super().__init__(f"folio map: its address is none, yet it is said to occupy {pages} pages")
