# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handover tree, ``linux-kho,v1``: what one khod tells the next about an update (docs/folio-map.md).

On the wire it is a flattened device tree followed by the SHA-256 of itself::

    / {
        compatible = "linux-kho,v1";
        phys-addr-size = <64>;  void-p-size = <64>;
        preserved-folio-map = <0xHI 0xLO>;  preserved-folio-map-pages = <0xHI 0xLO>;  preserved-folio-map-sha256 = [...];
        khod,version = "...";  khod,update-id = "...";  khod,boot-id = "...";
        instance@1 { compatible = "..."; khod,name = "..."; ... };
    };

One node per instance, numbered by its hexadecimal unit address. Everything that comes out of `decode` was checked; nothing of
it was guessed: an instance's properties stay bytes until `khod.abi.cells` reads them by the type that their owner declared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from khod.abi import cells, fdt_door
from khod.abi.fdt_door import RawNode
from khod.errors import TreeError

COMPATIBLE: Final = "linux-kho,v1"
MAX_STRING = 127
"""Bytes of each of the strings that this module writes itself: ids, version, name, compatible."""
MAX_UNIT = (1 << 32) - 1

_DIGEST_SIZE = 32
_PHYS_BITS = 52
_PAGE = 4096
_UNIT = re.compile(r"instance@(0|[1-9a-f][0-9a-f]{0,7})")
_ROOT_PROPERTIES = (
    "compatible",
    "phys-addr-size",
    "void-p-size",
    "preserved-folio-map",
    "preserved-folio-map-pages",
    "preserved-folio-map-sha256",
    "khod,version",
    "khod,update-id",
    "khod,boot-id",
)
_OWN = ("compatible", "khod,name")
"""Properties of an instance that are fields of `InstanceNode`."""


@dataclass(frozen=True, kw_only=True)
class InstanceNode:
    """One preserved object. `properties` are all but ``compatible`` and ``khod,name``, made by `khod.abi.cells`."""

    unit: int
    name: str
    compatible: str
    properties: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it is in the tree, for messages."""
        return f"/instance@{self.unit:x} ({self.name})"


@dataclass(frozen=True, kw_only=True)
class HandoverTree:
    """The tree whole. A map without instances, or instances without a map, is an error on both ways."""

    update_id: str
    boot_id: str
    """Of the boot that wrote it."""
    version: str
    """Of the khod that wrote it."""
    map_address: int
    """Physical address of the folio map's first chunk; 0 when nothing is preserved."""
    map_pages: int
    """Pages that the map's chunks and bitmaps occupy."""
    map_sha256: bytes
    """Over chunks and bitmaps, in list order."""
    instances: tuple[InstanceNode, ...] = ()


def encode(tree: HandoverTree) -> bytes:
    """Blob and digest. Raises TreeError for what `decode` would refuse."""
    _check(tree)
    blob = fdt_door.flatten(raw_tree(tree))
    return blob + hashlib.sha256(blob).digest()


def decode(data: bytes) -> HandoverTree:
    """The tree at the start of `data`; what follows its digest is ignored.

    `data` is hostile until it is checked. Every failure is a TreeError that names node and property; a digest that is right
    excuses nothing else.
    """
    size = fdt_door.blob_size(data)
    if len(data) < size + _DIGEST_SIZE:
        raise TreeError(f"digest: the data end {size + _DIGEST_SIZE - len(data)} bytes before it does")
    # One copy, at most 1 MiB: what is checked below is what was hashed here, whoever else can write to `data`.
    blob, digest = bytes(data[:size]), bytes(data[size : size + _DIGEST_SIZE])
    found = hashlib.sha256(blob).digest()
    if found != digest:
        raise TreeError(f"digest: the tree's SHA-256 is {found.hex()}, {digest.hex()} is written after it")
    tree = _typed(fdt_door.unflatten(blob))
    _check(tree)
    return tree


def raw_tree(tree: HandoverTree) -> RawNode:
    """The tree as nodes of bytes, unchecked."""
    root = {
        "compatible": cells.string(COMPATIBLE),
        "phys-addr-size": cells.u32(64),
        "void-p-size": cells.u32(64),
        "preserved-folio-map": cells.u64(tree.map_address),
        "preserved-folio-map-pages": cells.u64(tree.map_pages),
        "preserved-folio-map-sha256": tree.map_sha256,
        "khod,version": cells.string(tree.version),
        "khod,update-id": cells.string(tree.update_id),
        "khod,boot-id": cells.string(tree.boot_id),
    }
    return RawNode("", root, tuple(_raw_instance(instance) for instance in tree.instances))


def _raw_instance(instance: InstanceNode) -> RawNode:
    for name in _OWN:
        if name in instance.properties:
            raise TreeError(f"{instance.path}: property {name!r} is not the instance's to give")
    own = {"compatible": cells.string(instance.compatible), "khod,name": cells.string(instance.name)}
    return RawNode(f"instance@{instance.unit:x}", own | dict(instance.properties))


@dataclass(frozen=True, slots=True)
class _Node:
    """A raw node that `khod.abi.cells` can read."""

    path: str
    properties: Mapping[str, bytes]


def _typed(raw: RawNode) -> HandoverTree:
    root = _Node("/", raw.properties)
    compatible = cells.as_string(root, "compatible")
    if compatible != COMPATIBLE:
        raise TreeError(f"/: property 'compatible': {compatible!r} is not known, {COMPATIBLE!r} is")
    for name in ("phys-addr-size", "void-p-size"):
        if (bits := cells.as_u32(root, name)) != 64:
            raise TreeError(f"/: property {name!r}: {bits} bits, not 64")
    # A layout that says more says so by another compatible string: what is not known here is damage.
    for name in raw.properties:
        if name not in _ROOT_PROPERTIES:
            raise TreeError(f"/: property {name!r} is not known")
    return HandoverTree(
        update_id=cells.as_string(root, "khod,update-id"),
        boot_id=cells.as_string(root, "khod,boot-id"),
        version=cells.as_string(root, "khod,version"),
        map_address=cells.as_u64(root, "preserved-folio-map"),
        map_pages=cells.as_u64(root, "preserved-folio-map-pages"),
        map_sha256=cells.as_bytes(root, "preserved-folio-map-sha256"),
        instances=tuple(_typed_instance(child) for child in raw.children),
    )


def _typed_instance(raw: RawNode) -> InstanceNode:
    match = _UNIT.fullmatch(raw.name)
    if match is None:
        raise TreeError(f"/{raw.name}: not the name of an instance")
    if raw.children:
        raise TreeError(f"/{raw.name}: node {raw.children[0].name!r} inside an instance")
    node = _Node(f"/{raw.name}", raw.properties)
    return InstanceNode(
        unit=int(match[1], 16),
        name=cells.as_string(node, "khod,name"),
        compatible=cells.as_string(node, "compatible"),
        properties={name: value for name, value in raw.properties.items() if name not in _OWN},
    )


def _check(tree: HandoverTree) -> None:
    """What must hold of the values themselves, read or about to be written."""
    for name in ("update_id", "boot_id", "version"):
        _check_string("/", f"khod,{name.replace('_', '-')}", getattr(tree, name))
    if tree.map_address % _PAGE or not 0 <= tree.map_address < 1 << _PHYS_BITS:
        raise TreeError(f"/: property 'preserved-folio-map': {tree.map_address:#x} is no page's physical address")
    if not 0 <= tree.map_pages <= (1 << _PHYS_BITS) // _PAGE:
        raise TreeError(f"/: property 'preserved-folio-map-pages': {tree.map_pages} pages do not exist")
    if len(tree.map_sha256) != _DIGEST_SIZE:
        raise TreeError(f"/: property 'preserved-folio-map-sha256': {len(tree.map_sha256)} bytes, not {_DIGEST_SIZE}")
    if bool(tree.map_address) != bool(tree.map_pages):
        raise TreeError(f"/: property 'preserved-folio-map': {tree.map_address:#x} with {tree.map_pages} pages")
    if bool(tree.map_address) != bool(tree.instances):
        raise TreeError(f"/: property 'preserved-folio-map': {tree.map_address:#x} with {len(tree.instances)} instances")
    for instance in tree.instances:  # that no two have one unit is the door's to see: their nodes would have one name
        if not 0 <= instance.unit <= MAX_UNIT:
            raise TreeError(f"/instance@{instance.unit}: the unit address is not 32 bits")
        _check_string(instance.path, "khod,name", instance.name)
        _check_string(instance.path, "compatible", instance.compatible)


def _check_string(path: str, name: str, value: str) -> None:
    if not 1 <= len(value.encode(errors="replace")) <= MAX_STRING:
        raise TreeError(f"{path}: property {name!r}: {len(value)} characters, not 1 to {MAX_STRING} bytes")
