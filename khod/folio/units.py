# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pages, frames and ranges: the arithmetic that everything else agrees on.

A *frame* (pfn) is a physical page number, ``phys >> PAGE_SHIFT``. A *folio* is a naturally aligned run of ``2**order``
frames, named by its first one. Ranges are of physical byte addresses, half open and page aligned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
MAX_ORDER = 51
"""The largest order the format can name; what a machine allows is configured, by default `DEFAULT_MAX_ORDER`."""
DEFAULT_MAX_ORDER = 18
PHYS_BITS = 52
"""Physical addresses are below ``2**PHYS_BITS``."""


class Folio(NamedTuple):
    """One folio: `pfn` is its first frame, a multiple of ``2**order``."""

    pfn: int
    order: int


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Physical addresses from `start` up to, not including, `end`; both are multiples of the page size."""

    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x}"


class PhysicalMemory(Protocol):
    """Memory that can be read by physical address."""

    def read(self, phys: int, length: int) -> bytes:
        """`length` bytes from the physical address `phys`; raises ValueError where there is no memory to read."""
        ...


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same addresses as ascending, disjoint, non-adjacent ranges; empty ones vanish."""
    out: list[Range] = []
    for r in sorted(ranges):
        if r.end <= r.start:
            continue
        if out and r.start <= out[-1].end:
            out[-1] = Range(out[-1].start, max(out[-1].end, r.end))
        else:
            out.append(r)
    return tuple(out)


def aligned_folios(start: int, end: int, max_order: int = DEFAULT_MAX_ORDER) -> Iterator[Folio]:
    """The frames from `start` up to, not including, `end` as the fewest naturally aligned folios, ascending."""
    while start < end:
        order = min(max_order, (end - start).bit_length() - 1, (start & -start).bit_length() - 1 if start else max_order)
        yield Folio(start, order)
        start += 1 << order
