# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/memblock.h, memblock-v1: the regions of ``reserve_mem=`` that the next kernel finds again."""

from __future__ import annotations

from dataclasses import dataclass

from khod.abi import fdt_door
from khod.abi.kexec_handover import number, string
from khod.errors import FormatError
from khod.folio.units import PHYS_BITS

VERSION, REGION_VERSION = "memblock-v1", "reserve-mem-v1"


@dataclass(frozen=True, slots=True)
class Region:
    """One region, by the name that the command line gave it."""

    name: str
    start: int
    size: int


def decode(blob: bytes) -> tuple[Region, ...]:
    """The regions in the blob ``memblock``. Raises FormatError, also for a version that we do not know."""
    root = fdt_door.unflatten(blob)
    _check(root, VERSION)
    regions = []
    for child in root.children:
        _check(child, REGION_VERSION)
        start, size = number(child, "start"), number(child, "size")
        if size == 0 or start + size > 1 << PHYS_BITS:
            raise FormatError(f"{child.name}: {size} bytes at {start:#x} are no region")
        regions.append(Region(child.name, start, size))
    return tuple(regions)


def _check(node: fdt_door.RawNode, version: str) -> None:
    if (found := string(node, "compatible")) != version:
        raise FormatError(f"{node.name or '/'}: it is of {found[:48]!r}, and {version} is what we read")
