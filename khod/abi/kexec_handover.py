# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/kexec_handover.h: the tree at the root of a handover, kho-v1 to kho-v4.

The container is a flattened device tree and big-endian; numbers in it are raw copies of the CPU's, little-endian where Linux
hands over. What a blob is its child's name says: ``LUO``, ``kexec-metadata``, ``memblock``.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from khod.abi import fdt_door, formats
from khod.errors import FormatError

PROPERTIES = {"kho-v1": ("fdt", ""), "kho-v2": ("preserved-data", ""), "kho-v3": ("preserved-data", "blob-size")}
PROPERTIES["kho-v4"] = PROPERTIES["kho-v3"]
"""By version, the names of a child's address and of its size ('' where it is not said)."""
MAP = "preserved-memory-map"
CHUNK_LIST = "kho-v1"
"""The version whose map is a chunk list; the others have a radix tree."""

_NAME_AT, _MAP_AT = 0x4C, 0x60
"""In the tree that 7.x writes, which debugfs cuts off."""
_U64 = Struct("<Q")


@dataclass(frozen=True, slots=True)
class Blob:
    """What a part of the kernel preserved."""

    name: str
    phys: int
    size: int | None
    """None where the version does not say: it is a tree with a size of its own."""


@dataclass(frozen=True, slots=True)
class Root:
    """The root."""

    format: formats.Format
    map: int
    """Address of the first chunk, or of the radix tree's root; 0 for an empty one."""
    blobs: tuple[Blob, ...]

    @property
    def chunks(self) -> bool:
        """Whether the map is a chunk list."""
        return self.format.base == CHUNK_LIST


def decode(blob: bytes) -> Root:
    """A whole tree. Raises FormatError, also for a version that we do not know."""
    root = fdt_door.unflatten(blob)
    found = formats.parse(string(root, "compatible"))
    names = PROPERTIES.get(found.base)
    if names is None:
        raise FormatError(f"KHO: it is of {found}; we read {', '.join(PROPERTIES)}")
    address, size = names
    blobs = [Blob(child.name, number(child, address), number(child, size) if size else None) for child in root.children]
    return Root(found, number(root, MAP), tuple(blobs))


def map_of(blob: bytes) -> int:
    """The map's address in a tree that debugfs has cut off, as that of 7.1 to 7.3 does. Raises FormatError."""
    if len(blob) < _MAP_AT + _U64.size or blob[_NAME_AT : _NAME_AT + 5] != b"kho-v":
        raise FormatError("KHO: there is no kho-v at 0x4c, where 7.x has it")
    return int(_U64.unpack_from(blob, _MAP_AT)[0])


def string(node: fdt_door.RawNode, name: str) -> str:
    """A property that is one string. Raises FormatError."""
    value = node.properties.get(name, b"")
    if not value.endswith(b"\0"):
        raise FormatError(f"{node.name or '/'}: {name} is no string: {value[:32]!r}")
    return value[:-1].decode("ascii", "replace")


def number(node: fdt_door.RawNode, name: str) -> int:
    """A property that is one u64 in the CPU's order. Raises FormatError."""
    value = node.properties.get(name, b"")
    if len(value) != _U64.size:
        raise FormatError(f"{node.name or '/'}: {name} has {len(value)} bytes, and is a u64")
    return int(_U64.unpack(value)[0])
