# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where kexec_file_load(2) puts an image when KHO is on: kernel/kexec_file.c, arch/x86/kernel/kexec-bzimage64.c and
kho_locate_mem_hole(). Each segment goes whole into one scratch area, the first in the kernel's order that has room, as high in
it as alignment and the segments before it allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from khod.abi.bzimage import ELFCOREHDR_ROOM, SetupHeader
from khod.folio.units import PAGE_SIZE, Range

BOOT_PARAMS = 4096
"""sizeof(struct boot_params): the command line follows it."""
EXTRAS = 4096
"""Setup data that travels with them, and the memory map of EFI's runtime: a few hundred bytes, generously rounded."""
PURGATORY = 64 << 10
"""What the purgatory takes at most: a page of stack, a few of code and tables."""
KHO_ALIGN = 64 << 10
"""Of the segment that tells the next kernel where scratch is."""
MIN_LOW, MIN_KERNEL, MIN_INITRD = 0x3000, 0x100000, 0x1000000
"""Below these addresses no purgatory or parameters, no kernel, no initrd."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an image, before it has a place."""

    name: str
    size: int
    align: int = PAGE_SIZE
    minimum: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece of an image, and where it goes; None: nowhere."""

    segment: Segment
    at: Range | None


def segments(header: SetupHeader, areas: int, cmdline: int, initrd: int) -> Iterator[Segment]:
    """What is placed, in order. `areas`: how many scratch areas there are; `cmdline`, `initrd`: bytes, 0 for no initrd."""
    yield Segment("the list of scratch areas", 16 * areas, KHO_ALIGN)
    yield Segment("the purgatory", PURGATORY, minimum=MIN_LOW)
    yield Segment("parameters and command line", BOOT_PARAMS + cmdline + 1 + ELFCOREHDR_ROOM + EXTRAS, minimum=MIN_LOW)
    yield Segment("the kernel", header.init_size, max(header.alignment, PAGE_SIZE), max(header.pref_address, MIN_KERNEL))
    if initrd:
        yield Segment("the initrd", initrd, minimum=MIN_INITRD)


def place(areas: Sequence[Range], wanted: Iterator[Segment]) -> list[Placed]:
    """A place for each, as far as there is one; those that have none take none from the rest. `areas` in the kernel's order."""
    taken: list[Range] = []
    placed = []
    for segment in wanted:
        size = -(-segment.size // PAGE_SIZE) * PAGE_SIZE
        found = next((at for area in areas if (at := _top_down(area, size, segment, taken))), None)
        if found:
            taken.append(found)
        placed.append(Placed(segment, found))
    return placed


def _top_down(area: Range, size: int, segment: Segment, taken: list[Range]) -> Range | None:
    """locate_mem_hole_top_down(), which steps a page at a time; here it steps past what is in the way."""
    align = max(segment.align, PAGE_SIZE)
    end = area.end
    while True:
        start = (end - size) // align * align
        if start < max(area.start, segment.minimum):
            return None
        blocking = [t for t in taken if t.start < start + size and start < t.end]
        if not blocking:
            return Range(start, start + size)
        end = min(t.start for t in blocking)
