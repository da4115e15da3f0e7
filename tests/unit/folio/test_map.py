# SPDX-License-Identifier: LGPL-2.1-or-later
"""The map as bytes: what the writer writes, both readers read; what is not a map, both reject alike."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.errors import MapError, Refused
from khod.folio import errors as e
from khod.folio.bulk import read_map
from khod.folio.layout import TOP
from khod.folio.tracker import Tracker
from khod.folio.units import Folio, Range, aligned_folios
from khod.folio.walk import FolioMap, validate
from khod.folio.writer import SerializedMap, pages_needed, serialize
from tests.unit.folio.maps import FRAMES, GIB, RAM, SCRATCH, Memory, RawChunk, RawMap, bitmap, sorted_as_map, window

PAGE = FRAMES.start << 12
SHUFFLED = [FRAMES[i * 1117 % len(FRAMES)] for i in range(len(FRAMES))]


def read_both(
    memory: Memory,
    address: int,
    pages: int,
    sha256: bytes,
    *,
    ram: Sequence[Range] = RAM,
    scratch: Sequence[Range] = SCRATCH,
    max_order: int = 18,
) -> FolioMap:
    """The map by the restore path's reader, once the bulk one has said the same: the same folios or the same rejection."""
    verdicts: list[list[Folio] | MapError] = []
    walked = None
    for reader in (validate, read_map):
        memory.reads = 0
        try:
            found = reader(memory, address, pages, sha256, ram=ram, scratch=scratch, max_order=max_order)
        except MapError as rejection:
            verdicts.append(rejection)
        else:
            verdicts.append(list(found.blocks if isinstance(found, FolioMap) else found))
            walked = found if isinstance(found, FolioMap) else walked
        assert memory.reads <= max(pages, 0)
    by_walk, by_bulk = verdicts
    if isinstance(by_walk, MapError):
        assert type(by_bulk) is type(by_walk), (by_walk, by_bulk)
        if not isinstance(by_walk, e.FolioOverlap):  # the one rule that is not checked element by element
            assert str(by_bulk) == str(by_walk)
        raise by_walk
    assert by_walk == by_bulk
    assert walked is not None
    return walked


def written(tracker: Tracker, frames: Sequence[int] = SHUFFLED) -> tuple[Memory, SerializedMap]:
    memory = Memory()
    done = serialize(tracker, frames)
    memory.put(done.pages, frames)
    return memory, done


@st.composite
def folio_sets(draw: st.DrawFn) -> list[Folio]:
    """Disjoint folios on good ground: runs of frames here and there, each cut in its own way."""
    out = []
    for slot in draw(st.sets(st.integers(0, 60), max_size=8)):
        start = (6 * GIB >> 12) + slot * (1 << 18) + draw(st.integers(0, 1 << 17))
        length = draw(st.one_of(st.integers(1, 40), st.integers(1, 1 << 17)))
        cut = list(aligned_folios(start, start + length, draw(st.integers(6, 18))))
        kept = draw(st.lists(st.sampled_from(cut), max_size=30, unique=True)) if len(cut) > 1 else cut
        for folio in kept:
            low = draw(st.integers(0, min(folio.order, 4)))
            halves = [Folio(folio.pfn + (i << folio.order - low), folio.order - low) for i in range(1 << low)]
            out += draw(st.sampled_from([[folio], halves, halves[::2]]))
    return out


@settings(max_examples=100, deadline=None)
@given(folio_sets())
def test_any_folios_that_can_be_tracked_come_back(folios: list[Folio]) -> None:
    t = Tracker(ram=RAM, scratch=SCRATCH)
    for folio in folios:
        t.preserve(*folio)
    memory, done = written(t)
    assert done.page_count <= pages_needed(t.blocks(), len(t.totals()))
    found = read_both(memory, done.address, done.page_count, done.sha256)
    assert list(found.blocks) == sorted_as_map(folios)
    assert found.folio_count == len(folios)
    assert all(found.contains(*folio) for folio in folios)
    assert {o: tuple(c) for o, c in found.totals().items()} == {o: tuple(c) for o, c in t.totals().items()}


def seeded() -> Tracker:
    """Two chunks of order 0, one of order 3 and one of order 9, of which blocks share pages."""
    t = Tracker(ram=RAM, scratch=SCRATCH)
    rng = np.random.default_rng(5)
    blocks = (8 * GIB >> 12) + (np.arange(300, dtype=np.uint64) << np.uint64(12))
    t.preserve_array(np.concatenate([blocks + rng.integers(0, 2048, 300, np.uint64) + np.uint64(n) for n in (0, 2048)]), 0)
    t.preserve_array((24 * GIB >> 12) + 8 * rng.choice(1 << 12, 50, replace=False).astype(np.uint64), 3)
    t.preserve_array((32 * GIB >> 12) + 512 * rng.choice(1 << 12, 50, replace=False).astype(np.uint64), 9)
    return t


CONTENT = serialize(seeded(), SHUFFLED)
CHUNK_PAGES = 4
POINTERS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 8, 511, 512, 4095, TOP, TOP - 1, 1 << 63, 2**64 - 512, 64 << 20, 4 * GIB]),
    st.sampled_from(SHUFFLED[: CONTENT.page_count + 3]).map(lambda pfn: pfn << 12),
    st.builds(lambda pfn, at: (pfn << 12) + at * 512, st.sampled_from(SHUFFLED[: CONTENT.page_count]), st.integers(0, 7)),
    st.builds(lambda block: block << 24, st.integers(0, 1 << 28)),
)
MUTATION = st.one_of(
    # any bit anywhere; a field of a header; a field of an element
    st.tuples(st.just("flip"), st.integers(0, 8 * len(CONTENT.pages) - 1), st.just(0)),
    st.tuples(st.just("order"), st.integers(0, CHUNK_PAGES - 1), st.one_of(st.integers(0, 55), st.integers(0, 2**32 - 1))),
    st.tuples(st.just("num_elms"), st.integers(0, CHUNK_PAGES - 1), st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))),
    st.tuples(st.just("next"), st.integers(0, CHUNK_PAGES - 1), POINTERS),
    st.tuples(st.just("field"), st.integers(0, CHUNK_PAGES * 510 - 1), POINTERS),
    st.tuples(st.just("blank"), st.integers(0, len(CONTENT.pages) // 512 - 1), st.sampled_from([0, 255])),
)


def mutate(content: bytearray, kind: str, place: int, value: int) -> None:
    match kind:
        case "flip":
            content[place // 8] ^= 1 << place % 8
        case "order":
            struct.pack_into("<I", content, place * 4096, value)
        case "num_elms":
            struct.pack_into("<I", content, place * 4096 + 4, value)
        case "next":
            struct.pack_into("<Q", content, place * 4096 + 8, value)
        case "field":
            chunk, field = divmod(place, 510)
            struct.pack_into("<Q", content, chunk * 4096 + 16 + 8 * field, value)
        case "blank":
            content[place * 512 : place * 512 + 512] = bytes([value]) * 512


def digest_as_walked(content: bytearray) -> bytes:
    """The digest that belongs to these bytes, as far as a list can be followed in them; its own walk, of the fewest words."""
    page_of = {pfn << 12: i * 4096 for i, pfn in enumerate(SHUFFLED)}
    digest, address, seen = hashlib.sha256(), SHUFFLED[0] << 12, set()
    while address in page_of and address not in seen and page_of[address] < len(content):
        seen.add(address)
        chunk = content[page_of[address] : page_of[address] + 4096]
        digest.update(chunk)
        for i in range(min(struct.unpack_from("<I", chunk, 4)[0], 255)):
            bits = struct.unpack_from("<Q", chunk, 24 + 16 * i)[0]
            at = page_of.get(bits & ~4095, len(content)) + (bits & 4095)
            digest.update(content[at : at + 512])
        address = struct.unpack_from("<Q", chunk, 8)[0]
    return digest.digest()


@settings(max_examples=1000, deadline=None)
@given(st.lists(MUTATION, min_size=1, max_size=3), st.booleans(), st.integers(-CONTENT.page_count, 3), st.integers(0, 51))
def test_any_mutation_is_rejected_as_a_map_or_is_a_map(
    mutations: list[tuple[str, int, int]], signed: bool, spare: int, max_order: int
) -> None:
    content = bytearray(CONTENT.pages)
    for mutation in mutations:
        mutate(content, *mutation)
    memory = Memory()
    memory.put(bytes(content), SHUFFLED)
    sha256 = digest_as_walked(content) if signed else CONTENT.sha256
    pages = CONTENT.page_count + (spare if spare > -3 else 0)
    try:
        found = read_both(memory, CONTENT.address, pages, sha256, max_order=max(max_order, 9))
    except MapError as rejection:
        assert str(rejection).startswith("folio map")
        return
    # Accepted: nothing that is covered by the digest has changed, or all of it is a good map again, as the tracker judges.
    if not signed:
        assert list(found.blocks) == list(seeded())
    Tracker(ram=RAM, scratch=SCRATCH, max_order=51).preserve_folios(*window(found.blocks))


@pytest.mark.parametrize("start", range(0, len(CONTENT.pages), 1021))
def test_no_byte_of_the_map_can_change_unnoticed(start: int) -> None:
    content = bytearray(CONTENT.pages)
    content[start] ^= 0x10
    memory = Memory()
    memory.put(bytes(content), SHUFFLED)
    used = seeded().blocks() * 512 + CHUNK_PAGES * 4096
    if start >= used:
        assert len(list(read_both(memory, CONTENT.address, CONTENT.page_count, CONTENT.sha256).blocks)) == 700
        return
    with pytest.raises(MapError):
        read_both(memory, CONTENT.address, CONTENT.page_count, CONTENT.sha256)


BITS, CHUNK = PAGE + 8192, PAGE
BLOCK0 = 8 * GIB
GOOD = {"order": 0, "elements": [(BLOCK0, BITS)], "address": CHUNK}
FULL = [(BLOCK0 + (i << 24), BITS + 512 * i) for i in range(255)]
FULL_BITMAPS = {address: bitmap(0) for _, address in FULL}


def one(order: int, start: int, *bits: int, **more: object) -> RawMap:
    return RawMap([RawChunk(order, [(start, BITS)], CHUNK, **more)], {BITS: bitmap(*bits)})  # type: ignore[arg-type]


def two(order: int, start: int, *bits: int) -> RawMap:
    """A good chunk of order 3, then another chunk."""
    return RawMap(
        [RawChunk(3, [(BLOCK0, BITS)], CHUNK, CHUNK + 4096), RawChunk(order, [(start, BITS + 512)], CHUNK + 4096)],
        {BITS: bitmap(0), BITS + 512: bitmap(*bits)},
    )


def elements(*pairs: tuple[int, int]) -> RawMap:
    return RawMap([RawChunk(0, list(pairs), CHUNK)], {address: bitmap(0) for _, address in pairs if address})


REJECTIONS: list[tuple[str, RawMap, type[MapError], str]] = [
    ("next unaligned", one(0, BLOCK0, 0, next=CHUNK + 8), e.ChunkUnaligned, f"chunk at {CHUNK:#x}: .*{CHUNK + 8:#x}"),
    ("next not RAM", one(0, BLOCK0, 0, next=3 * GIB), e.ChunkNotRam, f"chunk at {CHUNK:#x}: .*{3 * GIB:#x}"),
    ("next in scratch", one(0, BLOCK0, 0, next=64 << 20), e.ChunkInScratch, f"chunk at {CHUNK:#x}: .*0x4000000"),
    ("next is itself", one(0, BLOCK0, 0, next=CHUNK), e.ChunkCycle, f"chunk at {CHUNK:#x}: .*{CHUNK:#x}"),
    ("next is a page of bitmaps", one(0, BLOCK0, 0, next=BITS), e.StorageOverlap, f"chunk at {CHUNK:#x}: .*{BITS:#x}"),
    ("next is nowhere", one(0, BLOCK0, 0, next=CHUNK + 4096), e.TooManyPages, f"{CHUNK + 4096:#x}.*announced are 2"),
    ("num_elms 0", one(0, BLOCK0, 0, num_elms=0), e.ElementCount, f"chunk at {CHUNK:#x}: .*: 0x0"),
    ("num_elms 256", one(0, BLOCK0, 0, num_elms=256), e.ElementCount, f"chunk at {CHUNK:#x}: .*: 0x100"),
    ("not full", two(3, BLOCK0 + (1 << 27), 0), e.ChunkNotFull, f"chunk at {CHUNK:#x}: .*: 0x1$"),
    ("orders descend", two(2, BLOCK0 + (1 << 27), 0), e.OrdersNotAscending, f"chunk at {CHUNK + 4096:#x}: .*0x2 "),
    ("order", one(19, 0, 2), e.OrderTooHigh, f"chunk at {CHUNK:#x}: .*: 0x13 .*18"),
    ("phys_start", one(0, BLOCK0 + 4096, 0), e.StartUnaligned, f"element 0: .*{BLOCK0 + 4096:#x}"),
    ("phys_start of order 3", one(3, BLOCK0 + (1 << 24), 0), e.StartUnaligned, f"element 0: .*{BLOCK0 + (1 << 24):#x}"),
    ("phys_start beyond", one(0, TOP + (1 << 24), 0), e.StartBeyondTop, f"element 0: .*{TOP + (1 << 24):#x}"),
    ("twice", elements((BLOCK0, BITS), (BLOCK0, BITS + 512)), e.ElementsNotAscending, f"element 1: .*{BLOCK0:#x}"),
    ("descending", elements((BLOCK0 + (1 << 24), BITS), (BLOCK0, BITS + 512)), e.ElementsNotAscending, "element 1"),
    ("no bitmap", elements((BLOCK0, BITS), (BLOCK0 + (1 << 24), 0)), e.BitmapNull, "element 1: .*: 0x0"),
    ("bitmap unaligned", elements((BLOCK0, BITS + 8)), e.BitmapUnaligned, f"element 0: .*{BITS + 8:#x}"),
    ("bitmap not RAM", elements((BLOCK0, 3 * GIB)), e.BitmapNotRam, f"element 0: .*{3 * GIB:#x}"),
    ("bitmap in scratch", elements((BLOCK0, 5 * GIB)), e.BitmapInScratch, f"element 0: .*{5 * GIB:#x}"),
    ("bitmap shared", elements((BLOCK0, BITS), (BLOCK0 + (1 << 24), BITS)), e.StorageOverlap, f"element 1: .*{BITS:#x}"),
    ("bitmap in its chunk", elements((BLOCK0, CHUNK + 1024)), e.StorageOverlap, f"element 0: .*{CHUNK + 1024:#x}"),
    ("no bit", one(0, BLOCK0), e.BitmapEmpty, f"element 0: .*{BITS:#x}"),
    ("bit at the top", one(0, TOP, 0), e.FolioBeyondTop, "element 0: .*: 0x0"),
    ("not RAM", one(0, 3 * GIB, 5), e.FolioNotRam, f"element 0: .*{3 * GIB + 5 * 4096:#x}"),
    ("not RAM in part", one(18, 0, 4, 3), e.FolioNotRam, f"element 0: .*{3 * GIB:#x}"),
    ("in scratch", one(0, 5 * GIB, 0), e.FolioInScratch, f"element 0: .*{5 * GIB:#x}"),
    ("in scratch in part", one(18, 0, 5), e.FolioInScratch, f"element 0: .*{5 * GIB:#x}"),
    ("overlap", two(4, BLOCK0, 0), e.FolioOverlap, f"chunk at {CHUNK:#x} element 0: .*{BLOCK0:#x}"),
    ("far overlap", two(18, 0, 8), e.FolioOverlap, f"chunk at {CHUNK:#x} element 0: .*{BLOCK0:#x}"),
]


@pytest.mark.parametrize(("raw", "rejection", "words"), [r[1:] for r in REJECTIONS], ids=[r[0] for r in REJECTIONS])
def test_rejections(raw: RawMap, rejection: type[MapError], words: str) -> None:
    with pytest.raises(rejection, match=words) as caught:
        read_both(*raw.build())
    assert type(caught.value) is rejection


def test_a_bitmap_at_address_0_is_none_even_where_that_is_ram() -> None:
    with pytest.raises(e.BitmapNull):
        read_both(*elements((BLOCK0, BITS), (BLOCK0 + (1 << 24), 0)).build(), ram=[Range(0, 68 * GIB)])


@pytest.mark.parametrize("up", range(1, 16))
def test_orders_do_not_overlap(up: int) -> None:
    """Order 3 and every order above it: the last folio inside is rejected, the first one behind is not."""
    at, size = 16 * GIB, 1 << 15 + up
    for phys, met in ((at + size - (1 << 15), True), (at + size, False)):
        raw = two(3 + up, at >> 27 + up << 27 + up, (at >> 15 + up) & 4095)
        raw.chunks[0].elements = [(phys >> 27 << 27, BITS)]
        raw.bitmaps[BITS] = bitmap(phys >> 15 & 4095)
        if met:
            with pytest.raises(e.FolioOverlap, match=f"{phys:#x}"):
                read_both(*raw.build())
        else:
            assert len(list(read_both(*raw.build()).blocks)) == 2


def test_an_overlap_two_orders_up_is_seen_through_the_order_between() -> None:
    raw = two(9, 16 * GIB, 1)
    raw.chunks[1].next = CHUNK + 12288
    raw.chunks.append(RawChunk(18, [(0, BITS + 1024)], CHUNK + 12288))
    raw.bitmaps[BITS + 1024] = bitmap(8)  # 8..9 GiB, where order 3 has a folio
    with pytest.raises(e.FolioOverlap, match=f"{BLOCK0:#x}"):
        read_both(*raw.build())


def test_what_the_tree_announces_is_checked() -> None:
    memory, address, pages, sha256 = one(0, BLOCK0, 0).build()
    assert list(read_both(memory, address, pages, sha256).blocks) == [Folio(BLOCK0 >> 12, 0)]
    with pytest.raises(e.DigestMismatch, match=sha256.hex()):
        read_both(memory, address, pages, bytes(32))
    with pytest.raises(e.TooManyPages, match="announced are 1"):
        read_both(memory, address, pages - 1, sha256)
    with pytest.raises(e.TooManyPages, match="announced are 0"):
        read_both(memory, address, 0, sha256)
    with pytest.raises(e.PagesWithoutMap, match="2 pages"):
        read_both(memory, 0, pages, hashlib.sha256().digest())
    for wrong, rejection in ((address + 1, e.ChunkUnaligned), (3 * GIB, e.ChunkNotRam), (64 << 20, e.ChunkInScratch)):
        with pytest.raises(rejection, match=f"chunk at 0x0: .*{wrong:#x}"):
            read_both(memory, wrong, pages, sha256)
    with pytest.raises(e.Unreadable, match=f"{address + 40960:#x} .*no memory"):
        read_both(memory, address + 40960, pages, sha256)
    memory.pages[address] = memory.pages[address][:100]
    with pytest.raises(e.Unreadable, match="100 bytes of 4096"):
        read_both(memory, address, pages, sha256)


@pytest.mark.parametrize(("order", "bit"), [(40, 1), (40, 4095), (41, 0), (41, 2048), (51, 0), (51, 4095)])
def test_a_bit_whose_folio_would_wrap_is_rejected(order: int, bit: int) -> None:
    """(bit << 12 + order) is 0 modulo 2^64 for several of these: a sum would have said 'folio at 0'."""
    with pytest.raises(e.FolioBeyondTop, match=f"element 0: .*: {bit:#x}$"):
        read_both(*one(order, 0, bit).build(), ram=[Range(0, TOP)], scratch=(), max_order=51)


def test_the_one_folio_of_order_40_is_read() -> None:
    found = read_both(*one(40, 0, 0).build(), ram=[Range(0, TOP)], scratch=(), max_order=51)
    assert list(found.blocks) == [Folio(0, 40)]
    with pytest.raises(e.StartUnaligned):
        read_both(*one(51, 1 << 63, 0).build(), ram=[Range(0, TOP)], scratch=(), max_order=51)


class TestErrorsOfTheProposal:
    """The six that folio-map.md lists, each made visible in the bytes."""

    def test_1_blocks_are_found_by_index_not_by_size(self) -> None:
        t = Tracker(ram=RAM)
        for pfn in (1 << 20, (1 << 20) + 4096, (1 << 20) + 1):
            t.preserve(pfn, 0)
        assert t.blocks() == 2
        assert [t.bitmaps()[0][1].block(256 + i) for i in (0, 1)] == [3, 1]

    def test_2_phys_start_counts_pages_and_bits(self) -> None:
        t = Tracker(ram=RAM)
        t.preserve((8 * GIB >> 12) + 512, 9)
        chunk = serialize(t, FRAMES).pages
        assert struct.unpack_from("<IIQQQ", chunk) == (9, 1, 0, 8 * GIB, (FRAMES[1] << 12))
        assert chunk[4096] == 2

    def test_3_every_chunk_of_an_order_says_its_order(self) -> None:
        t = Tracker(ram=[Range(0, 1024 * GIB)], max_order=1)
        t.preserve_range(8 << 20, (8 << 20) + (256 << 13))
        t.preserve(1, 0)
        done = serialize(t, FRAMES)
        headers = [struct.unpack_from("<IIQ", done.pages, i * 4096) for i in range(3)]
        assert headers == [(0, 1, FRAMES[1] << 12), (1, 255, FRAMES[2] << 12), (1, 1, 0)]

    def test_4_high_bits_are_not_lost(self) -> None:
        t = Tracker(ram=[Range(0, TOP)])
        folio = Folio((1 << 40) - (1 << 18), 18)
        t.preserve(*folio)
        memory, done = written(t)
        found = read_both(memory, done.address, done.page_count, done.sha256, ram=[Range(0, TOP)], scratch=())
        assert list(found.blocks) == [folio]

    def test_5_nothing_is_an_empty_map(self) -> None:
        done = serialize(Tracker(ram=RAM), [])
        assert (done.address, done.page_count, bytes(done.pages)) == (0, 0, b"")
        assert not read_both(Memory(), 0, 0, done.sha256).folio_count

    def test_6_a_damaged_map_is_told_from_another(self) -> None:
        memory, address, pages, sha256 = one(0, BLOCK0, 0).build()
        page = bytearray(memory.pages[BITS])
        page[0] = 3  # a good map, of one folio more
        memory.pages[BITS] = bytes(page)
        with pytest.raises(e.DigestMismatch):
            read_both(memory, address, pages, sha256)


@pytest.mark.parametrize(("bitmaps", "chunks"), [(255, 1), (256, 2)])
def test_a_second_chunk_begins_beyond_255_bitmaps(bitmaps: int, chunks: int) -> None:
    t = Tracker(ram=RAM, max_order=0)
    blocks = np.arange(4 * GIB >> 24, (4 * GIB >> 24) + bitmaps, dtype=np.uint64)
    t.preserve_array(blocks << np.uint64(12), 0)
    assert bitmaps << 24 <= 4080 << 20 or chunks == 2
    memory, done = written(t)
    assert done.page_count == chunks + -(-bitmaps // 8)
    found = read_both(memory, done.address, done.page_count, done.sha256, scratch=())
    assert found.folio_count == bitmaps


def test_pages_needed_is_the_fixed_point_of_the_specification() -> None:
    assert pages_needed(1024, 19) == 174
    assert pages_needed(65_536, 19) == 9_723
    assert pages_needed(0, 0) == 0
    for bitmaps in (1, 7, 8, 254, 255, 256, 5000):
        for orders in (1, 2, 19):
            p = pages_needed(bitmaps, orders)
            assert p == -(-(bitmaps + p) // 8) + -(-(bitmaps + p) // 255) + orders


def test_a_map_that_lists_its_own_pages_fits_in_them() -> None:
    t = seeded()
    pages = pages_needed(t.blocks(), 19)
    for frame in SHUFFLED[:pages]:
        t.preserve(frame, 0)
    assert serialize(t, SHUFFLED[:pages]).page_count <= pages


def test_after_serialize_nothing_changes_until_reopened() -> None:
    t = seeded()
    t.preserve(1 << 20, 0)
    done = serialize(t, SHUFFLED)
    with pytest.raises(e.AlreadySerialized):
        serialize(t, SHUFFLED)
    frame = np.array([1 << 20], np.uint64)
    calls: list[Callable[[], None]] = [
        lambda: t.preserve(2 << 20, 0),
        lambda: t.unpreserve(1 << 20, 0),
        lambda: t.preserve_range(2 << 20, 3 << 20),
        lambda: t.unpreserve_range(1 << 20, (1 << 20) + 1),
        lambda: t.preserve_array(frame + np.uint64(1), 0),
        lambda: t.unpreserve_array(frame, 0),
        lambda: t.preserve_folios(frame + np.uint64(1), b"\0"),
        lambda: t.unpreserve_folios(frame, b"\0"),
    ]
    for call in calls:
        with pytest.raises(e.Finalized, match="finalized"):
            call()
    t.reopen()
    assert serialize(t, SHUFFLED).sha256 == done.sha256
    t.reopen()
    t.unpreserve(1 << 20, 0)
    assert serialize(t, SHUFFLED).sha256 != done.sha256


@pytest.mark.parametrize(
    ("frames", "refusal", "words"),
    [
        (FRAMES[:3], e.TooFewFrames, "needs 42 pages and was given 3"),
        ([*FRAMES[:40], FRAMES[0], *FRAMES[40:42]], e.UnusableFrame, f"{FRAMES[0]:#x}.*twice"),
        ([3 << 18, *FRAMES], e.UnusableFrame, f"{3 << 18:#x}.*not RAM"),
        ([64 << 8, *FRAMES], e.UnusableFrame, f"{64 << 8:#x}.*scratch"),
        ([0, *FRAMES], e.UnusableFrame, "0x0"),
    ],
)
def test_frames_that_cannot_hold_a_map_are_refused(frames: Sequence[int], refusal: type[Refused], words: str) -> None:
    t = seeded()
    with pytest.raises(refusal, match=words):
        serialize(t, frames)
    assert not t.finalized
    assert serialize(t, SHUFFLED).page_count == 42
