# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is noted of an instance's memory in its node, and read back with nothing taken on trust.

v2: ``memory-names``, ``memory-kinds``, ``memory-sizes``, ``memory-seals``, ``memory-page-sizes``, ``memory-carried`` (u32: 0 or
1), ``memory-times`` (nanoseconds that copying took, 0 before) have a value for each file, ``memory-hashes`` 32 bytes for each
that is named in ``memory-hashed``. v1 had sizes and seals, in the order of the preserved descriptors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from khod.abi import cells
from khod.core.carrying import HASH
from khod.core.ports import F_SEAL_EXEC, F_SEAL_FUTURE_WRITE, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE
from khod.errors import FormatError
from khod.folio.units import PAGE_SIZE
from khod.plugin import Instance

KINDS = ("memfd", "hugetlb", "guest_memfd")
_SEALS = {
    F_SEAL_SEAL: "seal",
    F_SEAL_SHRINK: "shrink",
    F_SEAL_GROW: "grow",
    F_SEAL_WRITE: "write",
    F_SEAL_FUTURE_WRITE: "future-write",
    F_SEAL_EXEC: "exec",
}


@dataclass(frozen=True, slots=True)
class Memory:
    """One file of an instance."""

    name: str
    kind: str
    size: int
    seals: int
    page_size: int = PAGE_SIZE
    carried: bool = False
    digest: bytes = b""
    """Of its bytes, in freeze; zeros before, b'' where none is wanted."""
    took: int = 0
    """Nanoseconds for which it was copied."""

    def seen(self, size: int, seals: int, digest: bytes, took: int) -> Memory:
        """As it is when everything stands still."""
        return replace(self, size=size, seals=seals, digest=digest, took=took)


def carrier(name: str) -> str:
    """The state that a file is carried in."""
    return f"carrier-{name}"


def sealed(seals: int) -> str:
    """For people."""
    return ",".join(word for bit, word in _SEALS.items() if seals & bit)


def encode(memories: Sequence[Memory], *, hashed: Collection[str]) -> dict[str, bytes]:
    """The node's properties. Those of `hashed` have a hash, or room for one."""
    chosen = [m for m in memories if m.name in hashed]
    return {
        "memory-names": cells.strings([m.name for m in memories]),
        "memory-kinds": cells.strings([m.kind for m in memories]),
        "memory-sizes": cells.u64s([m.size for m in memories]),
        "memory-seals": cells.u64s([m.seals for m in memories]),
        "memory-page-sizes": cells.u64s([m.page_size for m in memories]),
        "memory-carried": cells.u32s([int(m.carried) for m in memories]),
        "memory-times": cells.u64s([m.took for m in memories]),
        "memory-hashed": cells.strings([m.name for m in chosen]),
        "memory-hashes": b"".join(m.digest or bytes(HASH) for m in chosen),
    }


def decode(instance: Instance) -> list[Memory]:
    """What the properties say. Raises FormatError naming what is wrong with them."""
    sizes = cells.as_u64s(instance, "memory-sizes")
    seals = cells.as_u64s(instance, "memory-seals")
    if "memory-names" not in instance.properties:
        if not len(sizes) == len(seals) == len(instance.fds):
            raise FormatError(f"{instance.name}: {len(sizes)} sizes and {len(seals)} seals for {len(instance.fds)} memfds")
        return [Memory(name, "memfd", size, seal) for name, size, seal in zip(instance.fds, sizes, seals, strict=True)]
    names = cells.as_strings(instance, "memory-names")
    kinds = cells.as_strings(instance, "memory-kinds")
    page_sizes = cells.as_u64s(instance, "memory-page-sizes")
    carried = cells.as_u32s(instance, "memory-carried")
    took = cells.as_u64s(instance, "memory-times")
    lists = (names, kinds, sizes, seals, page_sizes, carried, took)
    if len({len(values) for values in lists}) != 1 or len(set(names)) != len(names):
        raise FormatError(f"{instance.name}: {len(names)} names of memory, and its properties are not of as many")
    hashes = _hashes(instance, names)
    memories = [
        Memory(name, kind, size, seal, page, bool(copied), hashes.get(name, b""), time)
        for name, kind, size, seal, page, copied, time in zip(*lists, strict=True)
    ]
    for memory in memories:
        _check(instance, memory)
    return memories


def _hashes(instance: Instance, names: Sequence[str]) -> dict[str, bytes]:
    hashed = cells.as_strings(instance, "memory-hashed")
    raw = cells.as_bytes(instance, "memory-hashes")
    if len(raw) != HASH * len(hashed) or len(set(hashed)) != len(hashed) or not set(hashed) <= set(names):
        raise FormatError(f"{instance.name}: {len(raw)} bytes of hashes for {list(hashed)}, of {list(names)}")
    return {name: raw[i * HASH : (i + 1) * HASH] for i, name in enumerate(hashed)}


def _check(instance: Instance, memory: Memory) -> None:
    if memory.kind not in KINDS:
        raise FormatError(f"{instance.name}: {memory.name!r} is of a kind {memory.kind!r} that this driver does not know")
    page = memory.page_size
    if page < PAGE_SIZE or page & (page - 1) or (memory.kind == "hugetlb" and memory.size % page):
        raise FormatError(f"{instance.name}: {memory.name!r} has {memory.size} bytes in pages of {page}")
