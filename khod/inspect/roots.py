# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a handover begins: its root, found in memory where nothing says where it is.

debugfs shows the root to the next kernel on cold boots only, and cut off. But any page can look like a root: an old one that
nobody has written over, or one that a guest has made up. So a root is believed that is in a page of the kernel's, that its own
map says is preserved, with its blobs, and whose blobs are those that debugfs shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from khod.abi import fdt_door, kexec_handover
from khod.abi.kexec_handover import Blob, Root
from khod.errors import FormatError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, PhysicalMemory
from khod.inspect import preserved
from khod.inspect.preserved import Preserved
from khod.inspect.source import Deadline, Source

MAX_BLOB = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A root, and the folios that its map says are preserved."""

    address: int
    root: Root
    preserved: Preserved


def at(memory: PhysicalMemory, address: int) -> Root:
    """The root at an address. Raises FormatError."""
    try:
        page = memory.read(address, PAGE_SIZE)
    except ValueError as error:
        raise FormatError(f"the root at {address:#x}: {error}")
    return kexec_handover.decode(page[: fdt_door.blob_size(page)])


def map_of(memory: PhysicalMemory, root: Root, bitmaps: int | None) -> Preserved:
    """What a root's map lists. Raises FormatError."""
    if root.chunks:
        return preserved.of_chunk_list(memory, root.map, bitmaps)
    return preserved.of_radix_tree(memory, root.map)


def blob(memory: PhysicalMemory, one: Blob) -> bytes:
    """The contents of a blob; where its root does not say how long it is, its own header does. Raises FormatError."""
    try:
        size = one.size
        if size is None:
            size = fdt_door.blob_size(memory.read(one.phys, fdt_door.HEADER_SIZE).ljust(fdt_door.MAX_BLOB, b"\0"))
        if size > MAX_BLOB:
            raise FormatError(f"{one.name}: a blob of {size} bytes, {MAX_BLOB} are the limit")
        return memory.read(one.phys, size)
    except ValueError as error:
        raise FormatError(f"{one.name}: {error}")


def outgoing(
    source: Source, deadline: Deadline, *, incoming: int, wanted_map: int | None, bitmaps: int | None
) -> Iterator[Found]:
    """Roots of handovers to the next kernel. `incoming` is the address of the one that came from the previous kernel (0: none),
    `wanted_map` where debugfs says that the map is."""
    for address in source.trees(deadline):
        if address == incoming:
            continue
        try:
            root = at(source, address)
            if wanted_map is None or root.map == wanted_map:
                found = Found(address, root, map_of(source, root, bitmaps))
                if _holds_itself(source, found):
                    yield found
        except FormatError:
            continue


def _holds_itself(source: Source, found: Found) -> bool:
    if found.preserved.find(found.address >> PAGE_SHIFT) is None:
        return False
    for one in found.root.blobs:
        if found.preserved.find(one.phys >> PAGE_SHIFT) is None:
            return False
        said = source.said(f"out/sub_fdts/{one.name}")
        if said is not None and blob(source, one)[: len(said)] != said[: one.size]:
            return False
    return True
