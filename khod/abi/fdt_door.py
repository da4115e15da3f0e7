# SPDX-License-Identifier: LGPL-2.1-or-later
"""Flattened device trees, version 17, between bytes and raw nodes: the door in front of the ``fdt`` package.

The package (0.3.3) is good at laying a tree out and a danger to read one with: it guesses the type of every property,
answers hostile bytes with assertions, bare exceptions, IndexError or a walk without end, keeps reservations of one tree in
the next (a mutable default), and takes 80 ms for 300 nodes of 10 properties where the restore path has none to spare. So
it *writes* here, is given raw bytes alone, and *reading* is done by the walk that would have had to check the bytes anyway:
one pass, linear in the size of the blob, every bound checked before the slice that it guards. Tests hold the walk, the
package and dtc to the same answer.

Out of scope: NOP tags, memory reservations, labels and phandles. Nobody writes them into a handover tree; they are refused.

Layout: Devicetree Specification v0.4, chapter 5; libfdt's fdt.h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from typing import Final

from khod.errors import TreeError

MAX_BLOB = 1 << 20
MAX_NODES = 4096
MAX_DEPTH = 4
"""The root is at depth 1."""
MAX_PROPERTIES = 256
"""Of one node: bounds what any reader that searches a node property by property has to do."""
HEADER_SIZE = 40
RESERVATIONS_SIZE = 16
"""One entry, all zero: the end of an empty list."""

_MAGIC: Final = 0xD00DFEED
_VERSION: Final = 17
_LAST_COMPATIBLE: Final = 16
_BEGIN_NODE, _END_NODE, _PROP, _END = 1, 2, 3, 9

_header = Struct(">10I")
_cell = Struct(">I")
_two_cells = Struct(">II")

# The charsets of the specification; lengths are ours (it says 31, and dtc only warns).
_NODE_NAME = re.compile(rb"[0-9A-Za-z,._+-]{1,31}(@[0-9A-Za-z,._+-]{1,31})?\0")
_PROPERTY_NAME = re.compile(rb"[0-9A-Za-z,._+?#-]{1,63}\0")
# What the package takes for a note to itself and silently leaves out of the blob.
_SWALLOWED = "_with_references"


@dataclass(frozen=True, slots=True)
class RawNode:
    """A node as the blob has it. `name` is '' for the root; property values are bytes of no type yet."""

    name: str
    properties: Mapping[str, bytes] = field(default_factory=dict)
    children: tuple[RawNode, ...] = ()


def flatten(root: RawNode) -> bytes:
    """The blob of a tree. Raises TreeError for what `unflatten` would not take back."""
    import fdt  # not before it is needed: the restore path only reads

    tree = fdt.FDT(header=fdt.Header(), entries=[])
    count = _fill(tree.root, root, "/", depth=1)
    if count > MAX_NODES:
        raise TreeError(f"the tree has {count} nodes, {MAX_NODES} are the limit")
    blob: bytes = tree.to_dtb(version=_VERSION, last_comp_version=_LAST_COMPATIBLE, boot_cpuid_phys=0)
    if len(blob) > MAX_BLOB:
        raise TreeError(f"the tree takes {len(blob)} bytes, {MAX_BLOB} are the limit")
    return blob


def _fill(into: object, node: RawNode, path: str, depth: int) -> int:
    import fdt

    if depth > MAX_DEPTH:
        raise TreeError(f"{path}: deeper than {MAX_DEPTH} nodes")
    if len(node.properties) > MAX_PROPERTIES:
        raise TreeError(f"{path}: {len(node.properties)} properties, {MAX_PROPERTIES} are the limit")
    for name, value in node.properties.items():
        if not _PROPERTY_NAME.fullmatch(name.encode("ascii", "backslashreplace") + b"\0") or name.endswith(_SWALLOWED):
            raise TreeError(f"{path}: {name!r} is no name of a property")
        # Appended past `append()`, which would search all there are for a namesake: a mapping has none.
        into.props.append(fdt.PropBytes(name, data=value))  # type: ignore[attr-defined]
    count = 1
    seen = set()
    for child in node.children:
        if not _NODE_NAME.fullmatch(child.name.encode("ascii", "backslashreplace") + b"\0"):
            raise TreeError(f"{path}: {child.name!r} is no name of a node")
        if child.name in seen:
            raise TreeError(f"{path}: two nodes named {child.name!r}")
        seen.add(child.name)
        made = fdt.Node(child.name)
        into.nodes.append(made)  # type: ignore[attr-defined]
        count += _fill(made, child, f"{path.rstrip('/')}/{child.name}", depth + 1)
    return count


def blob_size(data: bytes) -> int:
    """How many bytes from the start of `data` are the blob, by its header. Raises TreeError."""
    if len(data) < HEADER_SIZE:
        raise TreeError(f"header: {len(data)} bytes are no device tree, {HEADER_SIZE} is the least")
    magic, total = _two_cells.unpack_from(data)
    if magic != _MAGIC:
        raise TreeError(f"header: magic is {magic:#x}, not {_MAGIC:#x}")
    if not HEADER_SIZE <= total <= min(len(data), MAX_BLOB):
        raise TreeError(f"header: total size {total} is outside {HEADER_SIZE}..{min(len(data), MAX_BLOB)}")
    return int(total)


def unflatten(blob: bytes) -> RawNode:
    """The tree in a blob of exactly `blob_size` bytes. Raises TreeError naming node and property, and nothing else."""
    total = blob_size(blob)
    _, _, at_struct, at_strings, at_reservations, version, last, _, size_strings, size_struct = _header.unpack_from(blob)
    if version != _VERSION or last != _LAST_COMPATIBLE:
        raise TreeError(f"header: version {version}, compatible with {last}; not {_VERSION} and {_LAST_COMPATIBLE}")
    blocks = (
        ("reservations", at_reservations, RESERVATIONS_SIZE, 8),
        ("structure", at_struct, size_struct, 4),
        ("strings", at_strings, size_strings, 1),
    )
    for name, start, size, alignment in blocks:
        if start < HEADER_SIZE or start + size > total or start % alignment or size % alignment:
            raise TreeError(f"header: the {name} block at {start}+{size} does not fit into {total} bytes")
    if any(blob[at_reservations : at_reservations + RESERVATIONS_SIZE]):
        raise TreeError("header: the tree reserves memory")
    return _Walk(blob[at_struct : at_struct + size_struct], blob[at_strings : at_strings + size_strings], at_struct).root()


@dataclass(slots=True)
class _Open:
    """A node whose end has not been seen."""

    name: str
    path: str
    properties: dict[str, bytes] = field(default_factory=dict)
    children: dict[str, RawNode] = field(default_factory=dict)


class _Walk:
    """One pass over a structure block. `base` is where it begins in the blob, for messages."""

    def __init__(self, block: bytes, strings: bytes, base: int) -> None:
        self._block, self._strings, self._base = block, strings, base
        self._position = 0
        self._nodes = 0
        self._names: dict[int, str] = {}
        self._stack: list[_Open] = []

    def root(self) -> RawNode:
        """The whole block, which is one node and the end."""
        root: RawNode | None = None
        while (tag := self._next_cell()) != _END:
            if root is not None:
                raise self._error("something follows the root node")
            if tag == _BEGIN_NODE:
                self._begin()
            elif tag == _PROP:
                self._property()
            elif tag == _END_NODE:
                root = self._finish()
            else:
                raise self._error(f"unknown tag {tag:#x} at {self._base + self._position - 4}")
        if root is None:
            raise self._error("the block ends inside a node")
        if self._position != len(self._block):
            raise self._error(f"{len(self._block) - self._position} bytes follow the end")
        return root

    def _error(self, what: str) -> TreeError:
        return TreeError(f"{self._stack[-1].path if self._stack else 'structure'}: {what}")

    def _next_cell(self) -> int:
        if self._position + 4 > len(self._block):
            raise self._error("the structure block has no end")
        (value,) = _cell.unpack_from(self._block, self._position)
        self._position += 4
        return int(value)

    def _take(self, length: int) -> bytes:
        """`length` bytes, and the padding after them, which must be zero."""
        end = self._position + length
        padded = (end + 3) & ~3
        if padded > len(self._block):
            raise self._error(f"{length} bytes at {self._base + self._position} reach over the structure block")
        taken = self._block[self._position : end]
        if any(self._block[end:padded]):
            raise self._error(f"padding at {self._base + end} is not zero")
        self._position = padded
        return taken

    def _begin(self) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._error(f"more than {MAX_NODES} nodes")
        if not self._stack:
            if self._take(1) != b"\0":
                raise self._error("the root node has a name")
            self._stack.append(_Open("", "/"))
            return
        if len(self._stack) == MAX_DEPTH:
            raise self._error(f"deeper than {MAX_DEPTH} nodes")
        match = _NODE_NAME.match(self._block, self._position)
        if match is None:
            raise self._error(f"no name of a node at {self._base + self._position}")
        name = self._take(match.end() - match.start())[:-1].decode("ascii")
        parent = self._stack[-1]
        if name in parent.children:
            raise self._error(f"two nodes named {name!r}")
        self._stack.append(_Open(name, f"{parent.path.rstrip('/')}/{name}"))

    def _property(self) -> None:
        if not self._stack:
            raise self._error("a property outside of any node")
        node = self._stack[-1]
        length, at = self._next_cell(), self._next_cell()
        name = self._name(at)
        if node.children:
            raise self._error(f"property {name!r} follows a node")
        if name in node.properties:
            raise self._error(f"property {name!r} is there twice")
        if len(node.properties) == MAX_PROPERTIES:
            raise self._error(f"more than {MAX_PROPERTIES} properties")
        node.properties[name] = self._take(length)

    def _name(self, at: int) -> str:
        name = self._names.get(at)
        if name is None:
            match = _PROPERTY_NAME.match(self._strings, at) if at < len(self._strings) else None
            if match is None:
                raise self._error(f"no name of a property at {at} of the strings")
            name = self._names[at] = match[0][:-1].decode("ascii")
        return name

    def _finish(self) -> RawNode | None:
        """Close the innermost node; the root when it was that."""
        if not self._stack:
            raise self._error("the end of a node that never began")
        done = self._stack.pop()
        node = RawNode(done.name, done.properties, tuple(done.children.values()))
        if not self._stack:
            return node
        self._stack[-1].children[node.name] = node
        return None
