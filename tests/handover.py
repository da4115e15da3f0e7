# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kernels leave in memory, made for tests by the layouts of their headers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path

from khod.abi import chunk_list, kexec_handover, luo, luo_older, memfd, radix_tree
from khod.abi.fdt_door import RawNode, flatten
from khod.abi.radix_tree import encode
from khod.folio.units import Folio
from khod.inspect.dump import Dump

PAGE = 4096


class Memory:
    """Pages at their addresses, and none anywhere else."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self._next = 0x100000

    def new(self, data: bytes = b"") -> int:
        """A page that begins with `data`; its address."""
        self._next += PAGE
        self.pages[self._next] = bytearray(data.ljust(PAGE, b"\0"))
        return self._next

    def read(self, phys: int, length: int) -> bytes:
        out = b""
        while len(out) < length:
            at = phys + len(out)
            page = self.pages.get(at // PAGE * PAGE)
            if page is None:
                raise ValueError(f"no memory at {at:#x}")
            out += page[at % PAGE :][: length - len(out)]
        return out

    def set(self, phys: int, word: int) -> None:
        struct.pack_into("<Q", self.pages[phys // PAGE * PAGE], phys % PAGE, word)


def tree(memory: Memory, folios: Iterable[Folio]) -> int:
    """A radix tree as kho_radix_add_page makes it."""
    root = memory.new()
    for folio in folios:
        key, at = encode(folio), root
        for level in range(5, 0, -1):
            slot = at + 8 * (key >> 15 + 9 * (level - 1) & 511)
            (child,) = struct.unpack("<Q", memory.read(slot, 8))
            if not child:
                child = memory.new()
                memory.set(slot, child)
            at = child
        bit = key & 0x7FFF
        memory.pages[at][bit // 8] |= 1 << bit % 8
    return root


def chunks(memory: Memory, rows: Iterable[tuple[int, int, bytes]], size: int) -> int:
    """A list with a chunk for each (order, start, bitmap)."""
    first = 0
    for order, start, bits in rows:
        bitmap = memory.new(bits) + (512 if size == 512 else 0)
        if size == 512:
            memory.pages[bitmap // PAGE * PAGE] = bytearray(bytes(512) + bits.ljust(PAGE - 512, b"\0"))
        first = memory.new(struct.pack("<QIIQQ", first, order, 1, start, bitmap))
    return first


def luo_blob(sessions: int = 0, flbs: int = 0, name: bytes = b"luo-v5") -> bytes:
    return name.ljust(-(-(len(name) + 1) // 8) * 8, b"\0") + struct.pack("<QQQ", 3, sessions, flbs)


def block(memory: Memory, entries: list[bytes], following: int = 0) -> int:
    return memory.new(struct.pack("<QQ", following, len(entries)) + b"".join(entries))


def luo_file(token: int, data: int = 0x5000, compatible: bytes = b"memfd-v2") -> bytes:
    return struct.pack("<48sQQ", compatible, data, token)


def records(memory: Memory, folios: list[tuple[int, int, int]]) -> tuple[int, int]:
    """The vmalloc area of these (pfn, flags, page): its first chunk, and its pages."""
    raw = b"".join(struct.pack("<QQ", pfn | flags << 52, page) for pfn, flags, page in folios)
    parts = [raw[at : at + PAGE] for at in range(0, len(raw), PAGE)]
    first = memory.new(struct.pack("<Q", 0) + b"".join(struct.pack("<Q", memory.new(part)) for part in parts))
    return first, len(parts)


def memfd_v2(memory: Memory, folios: list[tuple[int, int, int]], **changes: int) -> int:
    first, pages = records(memory, folios)
    fields = {
        "pos": 5,
        "size": len(folios) * PAGE,
        "seals": 1,
        "flags": 0,
        "count": len(folios),
        "first": first,
        "pages": pages,
    }
    fields |= {"area": 1, "order": 0} | changes
    return memory.new(struct.pack("<QQIIQQIHH", *fields.values()))


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def root(version: str = "kho-v4") -> RawNode:
    address, size = kexec_handover.PROPERTIES[version]
    blobs = {"LUO": (0x624000, 32), "kexec-metadata": (0x625000, 73)}
    children = (
        RawNode(name, ({size: u64(length)} if size else {}) | {address: u64(at)}) for name, (at, length) in blobs.items()
    )
    return RawNode(
        "", {"preserved-memory-map": u64(0x627000), "compatible": version.encode() + b"\0"}, tuple(children)
    )  # fmt: skip


def region(**changes: bytes) -> RawNode:
    return RawNode("log", {"compatible": b"reserve-mem-v1\0", "start": u64(0x1F9A00000), "size": u64(2 << 20)} | changes)


def everything(memory: Memory) -> list[Callable[[], None]]:
    """One of each structure in one memory, and a reader of each."""
    first, pages = records(memory, [(9, 3, n) for n in range(300)])
    data = memory.new(struct.pack("<QQIIQQIHH", 0, 300 * PAGE, 0, 0, 300, first, pages, 1, 0))
    files = block(memory, [luo_file(1, data), luo_file(2, data)])
    sessions = block(memory, [struct.pack("<64sQQ", b"khod", files, 2)])
    flbs = memory.new(struct.pack("<QQ48sQQ", 1, 1, b"iommu-v1", 0x7000, 2))
    header = luo.decode(luo_blob(sessions, flbs))
    files_flat = memory.new(luo_file(1, data) + luo_file(2, data))
    flat = memory.new(u64(1) + struct.pack("<64sQQ", b"khod", files_flat, 2))
    older = b"luo-v3\0\0" + struct.pack("<QQQ", 3, flat, flbs)
    map_root = tree(memory, [Folio(0x1234, 0), Folio(0x3200, 9)])
    list_first = chunks(memory, [(0, 0, b"\x05"), (9, 0, b"\x01")], 4096)

    def luo_walk() -> None:
        for session in luo.sessions(memory, header):
            for file in luo.files(memory, session):
                if str(file.compatible) == "memfd-v2":
                    list(memfd.folios(memory, memfd.decode("memfd-v2", memory, file.data)))
        list(luo.flbs(memory, header))

    def older_walk() -> None:
        luo_older.decode(memory, older)

    def map_walk() -> None:
        for leaf in radix_tree.walk(memory, map_root):
            list(leaf.folios())
        radix_tree.find(memory, map_root, 0x1234000)

    def list_walk() -> None:
        for element in chunk_list.elements(memory, list_first):
            list(chunk_list.folios(memory, element, 4096))

    return [luo_walk, older_walk, map_walk, list_walk]


class Made:
    """A handover of 7.3: root, metadata, memblock, LUO; two memfds, one of huge folios."""

    def __init__(self, *, serialised: bool) -> None:
        memory = self.memory = Memory()
        self.small = [(memory.new(bytes([n & 255 | 1]) * PAGE) >> 12, 3, n) for n in range(300)]
        self.huge = [(0x4000, 3, 0), (0x4400, 3, 512)]
        self.structs = [memfd_v2(memory, self.small), self._huge()]
        files = block(memory, [luo_file(0, self.structs[0]), luo_file(7, self.structs[1])])
        entries = block(memory, [struct.pack("<64sQQ", b"vm-1", files, 2)])
        header = memory.new(luo_blob(entries if serialised else 0))
        metadata = memory.new(struct.pack("=I65sI", 1, b"7.3.4", 2))
        region = RawNode("log", {"compatible": b"reserve-mem-v1\0", "start": u64(0x8000000), "size": u64(2 << 20)})
        reserved = flatten(RawNode("", {"compatible": b"memblock-v1\0"}, (region,)))
        self.blobs = {"LUO": (header, 32), "kexec-metadata": (metadata, 73), "memblock": (memory.new(reserved), len(reserved))}
        self.root = memory.new()
        kept = [Folio(at >> 12, 0) for at in memory.pages]
        self.map = tree(memory, [*kept, Folio(0x4000, 9), Folio(0x4400, 9), Folio(0x8000, 9)])
        self.write_root()

    def _huge(self) -> int:
        memory = self.memory
        first, pages = records(memory, self.huge)
        return memory.new(struct.pack("<QQIIQQIHH", 0, 1024 * PAGE, 0, 0, 2, first, pages, 1, 0))

    def special(self) -> list[int]:
        """All pages that something is read out of."""
        small = {pfn << 12 for pfn, _, _ in self.small}
        return [at for at in self.memory.pages if at not in small]

    def write_root(self) -> None:
        children = [RawNode(n, {"blob-size": u64(size), "preserved-data": u64(at)}) for n, (at, size) in self.blobs.items()]
        root = RawNode("", {"compatible": b"kho-v4\0", "preserved-memory-map": u64(self.map)}, tuple(children))
        blob = flatten(root)
        self.memory.pages[self.root][: len(blob)] = blob


def raw_dump(made: Made, path: Path) -> Dump:
    """The memory in a file of bytes, from 1 MiB on."""
    with path.open("wb") as file:
        for at, page in made.memory.pages.items():
            file.seek(at - 0x100000)
            file.write(page)
        file.truncate(max(made.memory.pages) + PAGE - 0x100000)
    return Dump(path, 0x100000)
