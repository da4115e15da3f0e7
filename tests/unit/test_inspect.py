# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inspecting memory that was made for it: whose every page is, in a dump and as a running kernel shows it."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.abi import radix_tree
from khod.abi import tree as abi
from khod.abi.chunk_list import bitmap_size_of
from khod.abi.tree_source import to_source
from khod.core.node import Carried, to_node
from khod.core.registry import ROOT
from khod.core.sample import Sample
from khod.core.views import InspectionView
from khod.errors import FormatError, InvalidRequest
from khod.folio.units import Folio, Range
from khod.inspect.difference import difference, load
from khod.inspect.dump import Dump
from khod.inspect.inspection import Look, Wishes
from khod.inspect.memfds import read
from khod.inspect.owners import address, sessions
from khod.inspect.picture import COLUMNS, draw, png, svg
from khod.inspect.preserved import Preserved, joined, of_chunk_list, of_radix_tree, without
from khod.inspect.source import Deadline, trees_in
from khod.inspect.views import GUESS, KERNEL, KHOD, Inspection
from tests.handover import PAGE, Made, Memory, chunks, raw_dump, records, tree, u64


class Shown:
    """A source that is like a running kernel: debugfs shows blobs, and of some pages it is known that they are a process's."""

    name, live, hands_over = "live", True, True
    incoming_address = 0

    def __init__(self, made: Made, processes: set[int] | None = None, files: dict[str, bytes] | None = None) -> None:
        self.made, self.processes, self.files = made, processes or set(), files or {}

    def read(self, phys: int, length: int) -> bytes:
        return self.made.memory.read(phys, length)

    def ram(self) -> tuple[Range, ...]:
        return (Range(0x100000, 0x10000000),)

    def scratch(self) -> tuple[Range, ...]:
        return (Range(0x6000000, 0x7000000),)

    def trees(self, deadline: Deadline) -> Iterator[int]:
        pages = self.made.memory.pages
        return iter([at for at in pages if pages[at].startswith(b"\xd0\x0d\xfe\xed") and at >> 12 not in self.processes])

    def kernel_pages(self, start: int, end: int) -> Iterator[int]:
        return (pfn for pfn in range(start, end) if pfn not in self.processes)

    def said(self, path: str) -> bytes | None:
        return self.files.get(path)


def test_a_dump_after_serialising_tells_sessions_files_and_frames(tmp_path: Path) -> None:
    made = Made(serialised=True)
    with closing(raw_dump(made, tmp_path / "dump")) as dump:
        look = Look(dump)
        view = look.inspection()
    out = view.outgoing
    assert out is not None
    assert (out.address, out.format, out.map) == (made.root, "kho-v4", made.map)
    assert (out.previous_release, out.kexec_count) == ("7.3.4", 2)
    assert [(r.name, r.start, r.size) for r in out.reservations] == [("log", 0x8000000, 2 << 20)]
    assert out.luo is not None
    assert [(f.session, f.token, f.data) for f in out.luo.files] == [("vm-1", 0, made.structs[0]), ("vm-1", 7, made.structs[1])]
    assert {t.order: t.folios for t in out.totals} == {0: 313, 9: 3}
    first, second = out.memfds
    assert [(page + n, pfn + n) for page, pfn, count in first.extents for n in range(count)] == [
        (p, f) for f, _, p in made.small
    ]
    assert second.extents == [(0, 0x4000, 512), (512, 0x4400, 512)]
    assert (second.orders, second.session, second.by) == ({"9": 2}, "vm-1", KERNEL)
    assert sessions(out) == {"vm-1": (300 + 1024 + 4 + 3) * PAGE}
    assert {o.owner for o in out.owners} >= {"kernel", "reserve_mem 'log'", "unknown"}
    assert sum(o.bytes for o in out.owners) == sum(t.bytes for t in out.totals), "every page has one owner"
    told = address(view, look.preserved, 0x4001000)
    assert (told.preserved, told.order, told.folio) == (True, 9, 0x4000000)
    assert "token 7" in told.owners[0]
    assert address(view, look.preserved, made.map).preserved is False


def test_before_reboot_memfds_are_known_by_their_likeness() -> None:
    made = Made(serialised=False)
    view = Look(Shown(made)).inspection()
    assert view.outgoing
    assert sorted(m.address for m in view.outgoing.memfds) == sorted(made.structs)
    assert {m.by for m in view.outgoing.memfds} == {GUESS}
    assert any(m.what == "sessions and files" for m in view.missing)


def test_what_a_guest_makes_up_is_no_memfd_and_no_root() -> None:
    made = Made(serialised=False)
    forged = made.structs[1]
    view = Look(Shown(made, processes={forged >> 12, made.root >> 12})).inspection()
    assert view.outgoing is None
    assert any("there is none in memory" in m.why for m in view.missing)
    view = Look(Shown(made, processes={forged >> 12})).inspection()
    assert view.outgoing
    assert [m.address for m in view.outgoing.memfds] == [made.structs[0]]


def test_a_root_that_debugfs_or_its_own_map_contradicts_is_not_believed() -> None:
    made = Made(serialised=False)
    other = struct.pack("=I65sI", 1, b"7.3.4", 3)
    assert Look(Shown(made, files={"out/sub_fdts/kexec-metadata": other})).inspection().outgoing is None
    cut = bytearray(233)
    cut[0x4C:0x54], cut[0x60:0x68] = b"kho-v4\0\0", u64(made.map)
    shown = Look(Shown(made, files={"out/fdt": bytes(cut)})).inspection().outgoing
    assert shown
    assert shown.address == made.root
    cut[0x60:0x68] = u64(0x900000)
    assert Look(Shown(made, files={"out/fdt": bytes(cut)})).inspection().outgoing is None
    # Its own page is not in its map.
    made.map = tree(made.memory, [Folio(at >> 12, 0) for at, _ in made.blobs.values()])
    made.write_root()
    assert Look(Shown(made)).inspection().outgoing is None


def test_without_its_root_the_map_that_debugfs_names_is_read_all_the_same() -> None:
    made = Made(serialised=False)
    cut = bytearray(233)
    cut[0x4C:0x54], cut[0x60:0x68] = b"kho-v4\0\0", u64(made.map)
    shown = Look(Shown(made, processes={made.root >> 12}, files={"out/fdt": bytes(cut)}))
    out = shown.inspection().outgoing
    assert out
    assert (out.address, {t.order: t.folios for t in out.totals}) == (0, {0: 313, 9: 3})
    assert shown.preserved
    assert shown.preserved.find(0x4123) == Folio(0x4000, 9)


def test_two_roots_are_for_somebody_to_choose_from(tmp_path: Path) -> None:
    made = Made(serialised=True)
    twin = made.memory.new(bytes(made.memory.pages[made.root]))
    root = made.map
    made.map = tree(made.memory, [Folio(at >> 12, 0) for at in made.memory.pages if at != root])
    for at in (made.root, twin):
        made.root = at
        made.write_root()
    with closing(raw_dump(made, tmp_path / "dump")) as dump:
        view = Look(dump).inspection()
        assert view.outgoing is None
        assert any(f"{twin:#x}: choose one with --root" in m.why for m in view.missing)
        chosen = Look(dump, Wishes(root=twin)).inspection().outgoing
        assert chosen
        assert chosen.address == twin


def with_khod(made: Made) -> str:
    """khod's tree in a memfd of its own; the tree as khod tells it."""
    digest = hashlib.sha256(struct.pack("<300Q", *(pfn for pfn, _, _ in made.small)) + bytes(300)).digest()
    carried = Carried(
        name="vm-1", driver="guestmemfd", compatible="khod,guestmemfd-v1", owner=ROOT, required=True, requires=(), options={},
        session="khod.u1.1", fds=("ram",), memory=(0,), sizes=(300 * PAGE,), states=(), bounds=(), frames=(digest,),
        sample=Sample((), 0, bytes(32)),
    )  # fmt: skip
    node = to_node(1, carried)
    handed = abi.HandoverTree(
        update_id="u1", boot_id="b", version="1", map_address=0x4000000, map_pages=1, map_sha256=bytes(32), instances=(node,)
    )  # fmt: skip
    blob = abi.encode(handed)
    page = made.memory.new(blob)
    first, pages = records(made.memory, [(page >> 12, 3, 0)])
    made.structs.append(made.memory.new(struct.pack("<QQIIQQIHH", 0, len(blob), 0, 0, 1, first, pages, 1, 0)))
    kept = [Folio(at >> 12, 0) for at in made.memory.pages]
    made.map = tree(made.memory, [*kept, Folio(0x4000, 9), Folio(0x4400, 9), Folio(0x8000, 9)])
    made.write_root()
    return to_source(handed)


def told_by_khod(tree: str) -> InspectionView:
    return InspectionView(source="outgoing", tree=tree, map_address=0, map_pages=0, map_sha256="", orders=())


def test_khod_s_own_records_name_owners_by_their_frames() -> None:
    made = Made(serialised=False)
    source = with_khod(made)
    view = Look(Shown(made), khod=told_by_khod(source)).inspection()
    assert view.outgoing
    by_address = {m.address: m for m in view.outgoing.memfds}
    mine = by_address[made.structs[0]]
    assert (mine.session, mine.by) == ("khod.u1.1", KHOD)
    assert mine.owner.startswith("vm-1 of ")
    assert by_address[made.structs[1]].owner == "khod, its folio map"
    assert by_address[made.structs[2]].owner == "khod, its handover tree"
    other = Look(Shown(made), khod=told_by_khod("/dts-v1/;")).inspection()
    assert other.outgoing
    assert {m.by for m in other.outgoing.memfds} == {GUESS}, "a tree that khod does not tell is nobody's word"
    assert any("none of the preserved memfds holds the tree" in m.why for m in other.missing)


def test_the_previous_kernel_s_root_is_read_but_not_its_map() -> None:
    made = Made(serialised=True)
    shown = Shown(made)
    shown.incoming_address = made.root
    view = Look(shown).inspection()
    assert view.outgoing is None, "the incoming root is no root of a handover to the next kernel"
    incoming = view.incoming
    assert incoming
    assert (incoming.address, incoming.previous_release, incoming.kexec_count) == (made.root, "7.3.4", 2)
    assert [r.name for r in incoming.reservations] == ["log"]
    assert (incoming.luo, incoming.totals, incoming.owners) == (None, (), ())
    assert "reserve_mem 'log', incoming" in address(view, None, 0x8000000).owners
    assert {m.what for m in view.missing} >= {"incoming map of preserved folios", "incoming sessions and files"}
    shown.files = {"in/fdt": bytes(100)}
    assert Look(shown).inspection().incoming is None


@pytest.mark.parametrize("name", ["LUO", "kexec-metadata", "memblock"])
def test_a_root_whose_blob_is_not_preserved_is_not_believed(name: str) -> None:
    made = Made(serialised=False)
    kept = [Folio(at >> 12, 0) for at in made.memory.pages if at != made.blobs[name][0]]
    made.map = tree(made.memory, kept)
    made.write_root()
    assert Look(Shown(made)).inspection().outgoing is None


@pytest.mark.parametrize(
    ("word", "value", "words"),
    [
        (1, 301 * PAGE, "300 of 301"),
        (1, 299 * PAGE, "300 folios"),
        (1, (1 << 64) - 1, "300 folios"),
        (1, 0, "300 folios"),
        (3, 0, "0 folios"),
        (3, 1 << 40, "folios in 2 pages"),
    ],
)
def test_a_struct_that_is_not_a_whole_file(word: int, value: int, words: str) -> None:
    made = Made(serialised=False)
    preserved = of_radix_tree(made.memory, made.map)
    assert read(made.memory, preserved, "memfd-v2", made.structs[0]).struct.folios == 300
    made.memory.set(made.structs[0] + 8 * word, value)
    with pytest.raises(FormatError, match=words):
        read(made.memory, preserved, "memfd-v2", made.structs[0])


@pytest.mark.parametrize(
    ("number", "word", "value", "words"),
    [
        (0, 1, 1, "first page to its last"),
        (255, 1, 254, "first page to its last"),
        (256, 1, 257, "first page to its last"),
        (7, 1, (1 << 64) - 1, "at page"),
        (7, 0, 0xFFFFF, "is not preserved"),
        (7, 0, 0x4001, "is not preserved"),  # in the middle of a preserved folio
    ],
)
def test_records_that_are_not_a_whole_file(number: int, word: int, value: int, words: str) -> None:
    made = Made(serialised=False)
    preserved = of_radix_tree(made.memory, made.map)
    chunk = int.from_bytes(made.memory.read(made.structs[0] + 32, 8), "little")
    page = int.from_bytes(made.memory.read(chunk + 8 * (1 + number // 256), 8), "little")
    made.memory.set(page + 16 * (number % 256) + 8 * word, value)
    with pytest.raises(FormatError, match=words):
        read(made.memory, preserved, "memfd-v2", made.structs[0])


def test_a_struct_whose_lists_are_not_preserved_is_none() -> None:
    made = Made(serialised=False)
    chunk = int.from_bytes(made.memory.read(made.structs[1] + 32, 8), "little")
    kept = [Folio(at >> 12, 0) for at in made.memory.pages if at != chunk]
    made.map = tree(made.memory, [*kept, Folio(0x4000, 9), Folio(0x4400, 9)])
    made.write_root()
    view = Look(Shown(made)).inspection()
    assert view.outgoing
    assert [m.address for m in view.outgoing.memfds] == [made.structs[0]]


# --- dumps


def elf(segments: list[tuple[int, bytes]], kind: int = 4) -> bytes:
    at = 64 + 56 * len(segments)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", kind, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    table = b""
    for phys, data in segments:
        table += struct.pack("<IIQQQQQQ", 1, 0, at, 0xFFFF888000000000, phys, len(data), len(data), 0)
        at += len(data)
    return head + table + b"".join(data for _, data in segments)


def test_an_elf_core_is_read_by_physical_address(tmp_path: Path) -> None:
    path = tmp_path / "vmcore"
    path.write_bytes(elf([(0x1000, b"a" * PAGE), (0x2000, b"b" * PAGE), (0x9000, b"c" * PAGE), ((1 << 64) - 1, b"notes")]))
    with closing(Dump(path)) as dump:
        assert dump.read(0x1FFE, 4) == b"aabb"
        assert dump.ram() == (Range(0x1000, 0x3000), Range(0x9000, 0xA000))
        with pytest.raises(ValueError, match="no memory at 0x3000"):
            dump.read(0x2FFF, 2)
    path.write_bytes(path.read_bytes()[: -5 - PAGE // 2])
    with closing(Dump(path)) as dump, pytest.raises(ValueError, match="no memory at 0x9800"):
        dump.read(0x9000, PAGE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "--base"),
        (b"KDUMP   " + bytes(100), "makedumpfile -E"),
        (elf([], kind=4), "0 program headers"),
        (elf([(0, b"x")], kind=2), "type 2"),
        (elf([((1 << 64) - 1, b"x")]), "no memory"),
        (elf([(1 << 52, b"x")]), "beyond physical memory"),
        (elf([(0, b"x")])[:70], "beyond the file"),
    ],
)
def test_files_that_are_no_dumps(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FormatError, match=words):
        Dump(tmp_path / "x")


def test_dumps_that_cannot_be_opened_or_begin_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="No such file"):
        Dump(tmp_path / "none")
    (tmp_path / "raw").write_bytes(bytes(PAGE))
    for base in (-PAGE, 1, 1 << 52):
        with pytest.raises(InvalidRequest, match="no address"):
            Dump(tmp_path / "raw", base)


def test_a_search_ends_when_its_time_is_over() -> None:
    made = Made(serialised=False)
    area = (Range(0x101000, max(made.memory.pages) + PAGE),)
    assert made.root in list(trees_in(made.memory, area, Deadline(60)))
    over = Deadline(0)
    assert list(trees_in(made.memory, area, over)) == []
    assert over.passed


# --- ranges, pictures, differences


def test_runs_are_found_by_order_and_frame() -> None:
    preserved = Preserved([(0, 5, 7), (0, 100, 101), (9, 512, 1536)])
    assert preserved.find(6) == Folio(6, 0)
    assert preserved.find(7) is preserved.find(4) is None
    assert preserved.find(1200) == Folio(1024, 9)
    assert [(t.order, t.folios) for t in preserved.totals()] == [(0, 3), (9, 2)]
    assert preserved.spans == ((0x5000, 0x7000), (0x64000, 0x65000), (0x200000, 0x600000))
    assert joined([(3, 4), (1, 2), (2, 3), (9, 9)]) == ((1, 4),)
    assert without([(0, 10), (20, 30)], [(2, 4), (8, 22), (29, 40)]) == ((0, 2), (4, 8), (22, 29))


def test_a_picture_has_every_owner_in_it(tmp_path: Path) -> None:
    view = Look(Shown(Made(serialised=True))).inspection()
    drawn = draw(view)
    assert view.outgoing
    seen = {drawn.names[number] for number in drawn.cells}
    assert seen >= {"no RAM", "rest", "scratch", "reserve_mem 'log'", f"memfd at {view.outgoing.memfds[1].address:#x}"}
    at = 0x6800000 // drawn.cell
    assert drawn.names[drawn.cells[at]] == "scratch"
    from xml.etree import ElementTree

    picture = ElementTree.fromstring(svg(drawn))
    titles = [e.text for e in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert any(t and t.startswith("scratch: 0x6000000-") for t in titles)
    data = png(drawn)
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24])[0] == COLUMNS * 6
    with pytest.raises(InvalidRequest, match="nothing to draw"):
        draw(Inspection(source="khod", time=0))


def test_two_inspections_are_compared_after_a_way_through_a_file() -> None:
    made = Made(serialised=True)
    before = load(msgspec.json.encode(Look(Shown(made)).inspection()), "before.json")
    again = Look(Shown(made)).inspection()
    assert difference(before, again) == []
    made.memory.set(made.structs[1] + 8, 512 * PAGE)  # the huge one ends earlier
    made.memory.pages[made.structs[1]][24:32] = u64(1)
    lines = difference(before, Look(Shown(made)).inspection())
    assert lines == [
        f"outgoing memfd at {made.structs[1]:#x}: token 7, session 'vm-1': "
        "2097152 bytes in the same place, 2097152 gone, 0 new",
        "outgoing unknown: blocks of sessions and files, or what nothing here reads: "
        "8192 bytes in the same place, 0 gone, 2097152 new (0x4400000-0x4600000)",
    ]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", json.dumps({"source": "x", "time": 0, "version": 9}).encode(), b'{"source": 1}', b"[" * 100000]
)
def test_files_that_are_no_inspections(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"other\.json"):
        load(data, "other.json")


# --- hostile memory


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.integers(0, 20), st.integers(0, 511), st.sampled_from([0, 1, (1 << 64) - 1, 1 << 63, 0x900000, 0x101000])),
        min_size=1,
        max_size=4,
    ),
)
def test_whatever_memory_holds_can_be_inspected_and_written_down(serialised: bool, changes: list[tuple[int, int, int]]) -> None:
    made = MADE[serialised]
    pages = made.special()
    before = {at: bytes(made.memory.pages[at]) for at in pages}
    try:
        for page, word, value in changes:
            made.memory.set(pages[page % len(pages)] + 8 * (word % 16 if word < 400 else word), value)
        for wishes in (Wishes(), Wishes(root=made.root)):
            view = Look(Shown(made), wishes).inspection()
            assert load(msgspec.json.encode(view), "x").missing == list(view.missing)
    finally:
        for at, data in before.items():
            made.memory.pages[at][:] = data


def test_runs_of_a_bitmap_are_those_of_its_bits() -> None:
    made = MADE[True]
    preserved = of_radix_tree(made.memory, made.map)
    one_by_one = {f for leaf in radix_tree.walk(made.memory, made.map) for f in leaf.folios()}
    as_runs = {Folio(pfn, o) for o in preserved.orders for a, b in preserved.runs(o) for pfn in range(a, b, 1 << o)}
    assert as_runs == one_by_one


@pytest.mark.parametrize(
    ("release", "size"),
    [("6.16.12", 512), ("6.17.3-arch1", None), ("6.18.0-rc1", 4096), ("7.0.2+deb14-amd64", 4096), ("next", None), ("7", None)],
)
def test_the_release_tells_the_size_of_bitmaps(release: str, size: int | None) -> None:
    assert bitmap_size_of(release) == size


@pytest.mark.parametrize(("size", "told"), [(512, 4096), (4096, None)])
def test_bitmaps_of_a_chunk_list(size: int, told: int | None) -> None:
    memory = Memory()
    bits = size * 8
    rows = [(0, bits << 12, b"\x07"), (9, 0, b"\x80")]
    first = chunks(memory, rows, size)
    found = of_chunk_list(memory, first, told if size == 512 else 4096)
    assert [list(found.runs(o)) for o in found.orders] == [[(bits, bits + 3)], [(7 << 9, 8 << 9)]]
    if size == 4096:
        with pytest.raises(FormatError, match="nothing in it tells"):
            of_chunk_list(memory, first, None)


MADE = {serialised: Made(serialised=serialised) for serialised in (False, True)}
