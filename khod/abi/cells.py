# SPDX-License-Identifier: LGPL-2.1-or-later
"""Property values of a handover tree: typed on the way in, read back by declared type on the way out.

A device tree does not say what type a property has; whoever reads it must. So a value is bytes between the two, and each
function here is one half of a pair: ``u64(5)`` makes what ``as_u64(node, "name")`` reads. Integers are cells, big-endian, as
dtc writes them: u32 one, u64 two. Writers raise TreeError for a value that does not fit the type (there is no property to
name yet: `khod.abi.tree.encode` never sees it); readers raise it naming node and property.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Protocol

from khod.errors import TreeError

_u32 = Struct(">I")
_u64 = Struct(">Q")


class HasProperties(Protocol):
    """What the readers need of a node."""

    @property
    def path(self) -> str:
        """Where it is, for messages: '/', '/instance@1f'."""
        ...

    @property
    def properties(self) -> Mapping[str, bytes]:
        """Raw values by name."""
        ...


def string(value: str) -> bytes:
    """One string."""
    return strings([value])


def strings(values: Sequence[str]) -> bytes:
    """A list of strings; each may be empty, and so may the list."""
    for value in values:
        if "\0" in value:
            raise TreeError(f"a string with a NUL has no form in a device tree: {value!r}")
    try:
        return b"".join(value.encode() + b"\0" for value in values)
    except UnicodeEncodeError as error:
        raise TreeError(f"a string that is not Unicode has no form in a device tree: {error.object!r}")


def u32(value: int) -> bytes:
    """One cell."""
    return _pack(_u32, [value])


def u64(value: int) -> bytes:
    """Two cells."""
    return _pack(_u64, [value])


def u32s(values: Sequence[int]) -> bytes:
    """A list of cells."""
    return _pack(_u32, values)


def u64s(values: Sequence[int]) -> bytes:
    """A list of pairs of cells."""
    return _pack(_u64, values)


def flag() -> bytes:
    """Empty: the property says what it says by being there."""
    return b""


def as_bytes(node: HasProperties, name: str) -> bytes:
    """The value as it is."""
    try:
        return node.properties[name]
    except KeyError:
        raise TreeError(f"{node.path}: no property {name!r}")


def as_string(node: HasProperties, name: str) -> str:
    """One string."""
    values = as_strings(node, name)
    if len(values) != 1:
        raise _wrong(node, name, f"{len(values)} strings, not one")
    return values[0]


def as_strings(node: HasProperties, name: str) -> tuple[str, ...]:
    """A list of strings."""
    raw = as_bytes(node, name)
    if not raw:
        return ()
    if raw[-1]:
        raise _wrong(node, name, "a string without its NUL")
    try:
        return tuple(raw[:-1].decode().split("\0"))
    except UnicodeDecodeError as error:
        raise _wrong(node, name, f"not UTF-8 at byte {error.start}")


def as_u32(node: HasProperties, name: str) -> int:
    """One cell."""
    return _one(node, name, _u32)


def as_u64(node: HasProperties, name: str) -> int:
    """Two cells."""
    return _one(node, name, _u64)


def as_u32s(node: HasProperties, name: str) -> tuple[int, ...]:
    """A list of cells."""
    return _many(node, name, _u32)


def as_u64s(node: HasProperties, name: str) -> tuple[int, ...]:
    """A list of pairs of cells."""
    return _many(node, name, _u64)


def as_flag(node: HasProperties, name: str) -> bool:
    """Whether the property is there; its value must be empty."""
    if node.properties.get(name):
        raise _wrong(node, name, "a value, where only its being there counts")
    return name in node.properties


def _wrong(node: HasProperties, name: str, what: str) -> TreeError:
    return TreeError(f"{node.path}: property {name!r}: {what}")


def _pack(form: Struct, values: Sequence[int]) -> bytes:
    limit = 1 << (8 * form.size)
    for value in values:
        if not 0 <= value < limit:
            raise TreeError(f"{value} does not fit into {form.size // 4} cell(s)")
    return b"".join(form.pack(value) for value in values)


def _one(node: HasProperties, name: str, form: Struct) -> int:
    values = _many(node, name, form)
    if len(values) != 1:
        raise _wrong(node, name, f"{4 * len(values) * (form.size // 4)} bytes, not {form.size}")
    return values[0]


def _many(node: HasProperties, name: str, form: Struct) -> tuple[int, ...]:
    raw = as_bytes(node, name)
    if len(raw) % form.size:
        raise _wrong(node, name, f"{len(raw)} bytes, not a multiple of {form.size}")
    return tuple(value for (value,) in form.iter_unpack(raw))
