# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kernels hand over, read from memory that was made for it: by the layouts of their headers, with values computed by hand
and seen in Linux 7.3.4, and by hostile ones, which raise FormatError and come to an end."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.abi import chunk_list, kexec_handover, luo, memblock, memfd, radix_tree
from khod.abi.fdt_door import RawNode, flatten
from khod.abi.radix_tree import decode, encode
from khod.errors import FormatError
from khod.folio.units import Folio
from tests.handover import (
    PAGE,
    Memory,
    block,
    chunks,
    everything,
    luo_blob,
    luo_file,
    memfd_v2,
    records,
    region,
    root,
    tree,
    u64,
)

# --- the radix tree: key, levels 5 to 1, bit in the leaf


@pytest.mark.parametrize(
    ("phys", "order", "key", "path", "bit"),
    [
        (0x123456000, 0, 0x10000000123456, (2, 0, 0, 0, 36), 13398),
        (0x2DC8000, 0, 0x10000000002DC8, (2, 0, 0, 0, 0), 11720),  # seen: a page of a memfd
        (0x123400000, 9, 0x8000000091A, (0, 2, 0, 0, 0), 2330),
        (0x3200000, 9, 0x80000000019, (0, 2, 0, 0, 0), 25),  # seen: a huge folio of a memfd
        (0x1F9A00000, 9, 0x80000000FCD, (0, 2, 0, 0, 0), 4045),  # seen: reserve_mem=2M
        (0x180000000, 18, 0x400000006, (0, 0, 2, 0, 0), 6),  # seen: reserve_mem=1G
    ],
)
def test_keys(phys: int, order: int, key: int, path: tuple[int, ...], bit: int) -> None:
    folio = Folio(phys >> 12, order)
    assert encode(folio) == key
    assert decode(key) == folio
    memory = Memory()
    leaf = bytearray(PAGE)
    leaf[bit // 8] |= 1 << bit % 8
    at = memory.new(bytes(leaf))
    for index in reversed(path):
        at, below = memory.new(), at
        memory.set(at + 8 * index, below)
    assert [f for leaf in radix_tree.walk(memory, at) for f in leaf.folios()] == [folio]
    assert radix_tree.totals(memory, at) == {order: 1}
    assert radix_tree.find(memory, at, phys) == radix_tree.find(memory, at, phys + (PAGE << order) - 1) == folio
    assert radix_tree.find(memory, at, phys - 1) is radix_tree.find(memory, at, phys + (PAGE << order)) is None


FOLIOS = st.integers(0, 30).flatmap(lambda o: st.tuples(st.integers(0, (1 << 40 - o) - 1), st.just(o))).map(
    lambda p: Folio(p[0] << p[1], p[1])
)  # fmt: skip


@given(st.lists(FOLIOS, max_size=20))
def test_a_tree_holds_what_was_put_in(folios: list[Folio]) -> None:
    memory = Memory()
    root = tree(memory, folios)
    found = [f for leaf in radix_tree.walk(memory, root) for f in leaf.folios()]
    assert sorted(found) == sorted(set(folios))
    assert sum(radix_tree.totals(memory, root).values()) == len(set(folios))
    for folio in folios:
        assert radix_tree.find(memory, root, folio.pfn << 12) is not None


def test_an_empty_tree_and_keys_that_are_none() -> None:
    assert list(radix_tree.walk(Memory(), 0)) == []
    assert radix_tree.find(Memory(), 0, 0x1000) is None
    for key in (0, 1 << 53, 1 << 60, (1 << 52) | 1 << 51):
        with pytest.raises(FormatError):
            decode(key)


def test_trees_that_lead_nowhere_or_back() -> None:
    memory = Memory()
    root = tree(memory, [Folio(0x1234, 0)])
    memory.set(root + 8 * 100, root)
    with pytest.raises(FormatError, match="in it twice"):
        list(radix_tree.walk(memory, root))
    for address, words in ((0x999000, "no memory"), (0x100001, "no address of a page"), (1 << 53, "no address of a page")):
        memory.set(root + 8 * 100, address)
        with pytest.raises(FormatError, match=words):
            list(radix_tree.walk(memory, root))


# --- the chunk list of kho-v1


@pytest.mark.parametrize("size", [512, 4096])
def test_a_chunk_list_with_either_bitmap(size: int) -> None:
    memory = Memory()
    bits = size * 8
    first = chunks(memory, [(0, 0, b"\x05"), (9, bits << 21, b"\0" * (size - 1) + b"\x80")], size)
    found = list(chunk_list.elements(memory, first))
    assert [e.order for e in found] == [9, 0]
    assert chunk_list.bitmap_size(found) == (512 if size == 512 else None)
    folios = [f for e in found for f in chunk_list.folios(memory, e, size)]
    assert folios == [Folio((2 * bits - 1) << 9, 9), Folio(0, 0), Folio(2, 0)]


def test_bitmap_sizes_are_told_apart_by_starts() -> None:
    """Small bitmaps of order 0 step by 16 MiB, large ones by 128."""
    assert chunk_list.bitmap_size([chunk_list.Element(0, 16 << 20, 0x4000)]) == 512
    assert chunk_list.bitmap_size([chunk_list.Element(0, 128 << 20, 0x4000)]) is None
    assert chunk_list.bitmap_size([]) == 4096


@pytest.mark.parametrize(
    ("chunk", "words"),
    [
        (struct.pack("<QII", 0, 60, 0), "order 60"),
        (struct.pack("<QII", 0, 0, 256), "256 elements"),
        (struct.pack("<QIIQQ", 0, 0, 1, 4096, 0x101000), "for 0x1000"),
        (struct.pack("<QIIQQ", 0, 0, 1, 0, 0x101001), "bitmap at 0x101001"),
        (struct.pack("<QII", 0x101000, 0, 0), "in it twice"),
        (struct.pack("<QII", 0x900000, 0, 0), "no memory"),
    ],
)
def test_chunks_that_are_none(chunk: bytes, words: str) -> None:
    memory = Memory()
    with pytest.raises(FormatError, match=words):
        list(chunk_list.elements(memory, memory.new(chunk)))


# --- sessions and files


def test_two_sessions_of_seventy_files() -> None:
    """As seen in memory: 63 files in the first block, 7 in the second."""
    memory = Memory()
    rest = block(memory, [luo_file(token) for token in range(63, 70)])
    files = block(memory, [luo_file(token) for token in range(63)], rest)
    sessions = block(memory, [struct.pack("<64sQQ", b"khod.1", files, 70), struct.pack("<64sQQ", b"khod", 0, 0)])
    flbs = memory.new(struct.pack("<QQ48sQQ", 1, 1, b"iommu-v1", 0x7000, 2))
    blob = luo_blob(sessions, flbs)
    assert len(blob) == 32
    header = luo.decode(blob)
    assert (header.number, str(header.format)) == (3, "luo-v5")
    first, second = luo.sessions(memory, header)
    assert (first.name, second.name) == (b"khod.1", b"khod")
    assert [f.token for f in luo.files(memory, first)] == list(range(70))
    assert {str(f.compatible) for f in luo.files(memory, first)} == {"memfd-v2"}
    assert list(luo.files(memory, second)) == []
    assert [(str(f.compatible), f.data, f.users) for f in luo.flbs(memory, header)] == [("iommu-v1", 0x7000, 2)]


def test_a_running_kernel_s_header_leads_nowhere_yet() -> None:
    header = luo.decode(luo_blob())
    assert not [*luo.sessions(Memory(), header), *luo.flbs(Memory(), header)]


def test_a_composite_name_takes_its_room() -> None:
    header = luo.decode(luo_blob(0x1000, 0x2000, b"luo-v5;block-v1"))
    assert (header.number, header.sessions, header.flbs) == (3, 0x1000, 0x2000)
    assert header.format.subs == ("block-v1",)


@pytest.mark.parametrize(
    ("blob", "words"),
    [(b"", "no name"), (b"luo-v9\0\0" + bytes(24), "luo-v9"), (luo_blob()[:20], "20 bytes"), (b"x" * 200, "no name")],
)
def test_headers_that_are_none(blob: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        luo.decode(blob)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "0 entries"),
        ([struct.pack("<64sQQ", b"", 0, 0)], "name"),
        ([struct.pack("<64sQQ", b"n" * 64, 0, 0)], "name"),
        ([struct.pack("<64sQQ", b"a", 0x5000, 0)], "0 files"),
        ([struct.pack("<64sQQ", b"a", 0, 1)], "1 files at 0x0"),
    ],
)
def test_sessions_that_are_none(entries: list[bytes], words: str) -> None:
    memory = Memory()
    with pytest.raises(FormatError, match=words):
        list(luo.sessions(memory, luo.decode(luo_blob(block(memory, entries)))))


@pytest.mark.parametrize(
    ("count", "entries", "words"),
    [
        (1, [luo_file(1), luo_file(2)], "more than its 1"),
        (3, [luo_file(1)], "1 of its 3"),
        (1, [luo_file(1, compatible=b"x" * 48)], "does not end"),
        (1, [luo_file(1, compatible=b"memfd-v2\0junk")], "does not end"),
        (1, [luo_file(1, compatible=b"memfd")], "not the name"),
    ],
)
def test_files_that_are_none(count: int, entries: list[bytes], words: str) -> None:
    memory = Memory()
    with pytest.raises(FormatError, match=words):
        list(luo.files(memory, luo.Session(b"a", block(memory, entries), count)))


# --- memfds


def test_a_memfd_and_its_folios() -> None:
    memory = Memory()
    folios = [(0x3200 + n, 3, n) for n in range(600)]  # three pages of records
    found = memfd.decode("memfd-v2", memory, memfd_v2(memory, folios))
    assert (found.position, found.size, found.seals, found.folios) == (5, 600 * PAGE, 1, 600)
    assert list(memfd.folios(memory, found)) == folios


def test_an_old_memfd_has_no_seals() -> None:
    memory = Memory()
    first, pages = records(memory, [(7, 3, 0)])
    found = memfd.decode("memfd-v1", memory, memory.new(struct.pack("<QQQQIHH", 0, PAGE, 1, first, pages, 1, 0)))
    assert (found.seals, list(memfd.folios(memory, found))) == (None, [(7, 3, 0)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": 1000}, "1000 folios in 1 pages"),
        ({"order": 60}, "order 60"),
        ({"first": 0x900000}, "no memory"),
        ({"first": 0}, "have no record"),
        ({"pages": 9, "count": 600}, "have no record"),
    ],
)
def test_memfds_that_are_none(changes: dict[str, int], words: str) -> None:
    memory = Memory()
    with pytest.raises(FormatError, match=words):
        list(memfd.folios(memory, memfd.decode("memfd-v2", memory, memfd_v2(memory, [(1, 3, 0)], **changes))))
    with pytest.raises(FormatError, match="memfd-v1, memfd-v2"):
        memfd.decode("memfd-v9", memory, 0x1000)


# --- the root, and memblock


@pytest.mark.parametrize("version", kexec_handover.PROPERTIES)
def test_the_root_of_every_version(version: str) -> None:
    found = kexec_handover.decode(flatten(root(version)))
    assert (str(found.format), found.map, found.chunks) == (version, 0x627000, version == "kho-v1")
    sized = bool(kexec_handover.PROPERTIES[version][1])
    assert found.blobs[0] == kexec_handover.Blob("LUO", 0x624000, 32 if sized else None)


def test_a_root_that_is_cut_off_still_says_where_the_map_is() -> None:
    """Bytes as debugfs shows them on 7.3: the name at 0x4c, the map at 0x60, both little-endian."""
    blob = bytearray(233)
    blob[0x4C:0x54] = b"kho-v4\0\0"
    blob[0x60:0x68] = bytes.fromhex("0070620000000000")
    assert kexec_handover.map_of(bytes(blob)) == 0x627000
    for wrong in (bytes(233), bytes(blob[:0x64])):
        with pytest.raises(FormatError):
            kexec_handover.map_of(wrong)


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"compatible": b"kho-v9\0"}, "kho-v9"),
        ({"compatible": b"kho-v4"}, "no string"),
        ({"preserved-memory-map": b"\0\0\0\0"}, "4 bytes"),
        ({"preserved-memory-map": b""}, "0 bytes"),
    ],
)
def test_roots_that_are_none(properties: dict[str, bytes], words: str) -> None:
    good = root()
    with pytest.raises(FormatError, match=words):
        kexec_handover.decode(flatten(RawNode("", {**good.properties, **properties}, good.children)))


def test_the_regions_of_reserve_mem() -> None:
    blob = flatten(RawNode("", {"compatible": b"memblock-v1\0"}, (region(),)))
    assert memblock.decode(blob) == (memblock.Region("log", 0x1F9A00000, 2 << 20),)
    for child in (region(compatible=b"reserve-mem-v2\0"), region(size=u64(0)), region(start=u64(1 << 60)), region(size=b"")):
        with pytest.raises(FormatError):
            memblock.decode(flatten(RawNode("", {"compatible": b"memblock-v1\0"}, (child,))))
    with pytest.raises(FormatError, match="memblock-v2"):
        memblock.decode(flatten(RawNode("", {"compatible": b"memblock-v2\0"})))


# --- hostile memory


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 511), st.integers(0, 7), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_mutated_memory_raises_format_errors_only(changes: list[tuple[int, int, int, int]]) -> None:
    memory = Memory()
    readers = everything(memory)
    pages = list(memory.pages.values())
    for page, word, byte, value in changes:
        pages[page % len(pages)][(word % 16 if page % 2 else word) * 8 + byte] = value
    for reader in readers:
        with suppress(FormatError):
            reader()


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["root", "memblock", "luo"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_mutated_blobs_raise_format_errors_only(kind: str, changes: list[tuple[int, int]]) -> None:
    blobs: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
        "root": (flatten(root()), kexec_handover.decode),
        "memblock": (flatten(RawNode("", {"compatible": b"memblock-v1\0"}, (region(),))), memblock.decode),
        "luo": (luo_blob(0x1000), luo.decode),
    }
    blob, reader = blobs[kind]
    mutated = bytearray(blob)
    for at, value in changes:
        mutated[at % len(mutated)] = value
    with suppress(FormatError):
        reader(bytes(mutated))


def test_a_block_of_more_entries_than_fit() -> None:
    memory = Memory()
    whole = [struct.pack("<64sQQ", b"s%d" % number, 0, 0) for number in range(51)]
    assert len(list(luo.sessions(memory, luo.decode(luo_blob(block(memory, whole)))))) == 51
    full = memory.new(struct.pack("<QQ", 0, 52) + b"".join(whole))
    with pytest.raises(FormatError, match="52 entries, of at most 51"):
        list(luo.sessions(memory, luo.decode(luo_blob(full))))
