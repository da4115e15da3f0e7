# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.errors import Refused
from khod.folio import errors as e
from khod.folio.tracker import Tracker
from khod.folio.units import Folio, Range, aligned_folios
from tests.unit.folio.maps import GIB, RAM, SCRATCH, sorted_as_map, window

BASE = 4 * GIB >> 12


def tracker(max_order: int = 18) -> Tracker:
    return Tracker(ram=RAM, scratch=SCRATCH, max_order=max_order)


class Model:
    """The rules of the specification, one folio at a time, frame by frame."""

    def __init__(self, span: range, ram: range, scratch: range) -> None:
        self.owner: dict[int, Folio] = {}
        self.folios: set[Folio] = set()
        self.good = {pfn for pfn in span if pfn in ram and pfn not in scratch}

    def accepts(self, folio: Folio) -> bool:
        frames = range(folio.pfn, folio.pfn + (1 << folio.order))
        return folio.pfn % len(frames) == 0 and all(f in self.good and f not in self.owner for f in frames)

    def add(self, folio: Folio) -> None:
        self.folios.add(folio)
        self.owner.update(dict.fromkeys(range(folio.pfn, folio.pfn + (1 << folio.order)), folio))

    def drop(self, folio: Folio) -> None:
        self.folios.remove(folio)
        for frame in range(folio.pfn, folio.pfn + (1 << folio.order)):
            del self.owner[frame]


SPAN = range(4096 * 3 - 64, 4096 * 4 + 512)
SMALL_RAM = range(4096 * 3 - 40, 4096 * 4 + 500)
SMALL_SCRATCH = range(4096 * 3 + 96, 4096 * 3 + 128)
FOLIO = st.builds(
    lambda pfn, order, aligned: Folio(pfn >> order << order if aligned else pfn, order),
    st.one_of(st.integers(SPAN.start, SPAN.start + 256), st.sampled_from(SPAN)),
    st.integers(0, 9),
    st.sampled_from([True] * 9 + [False]),
)


def bytes_of(frames: range) -> Range:
    return Range(frames.start << 12, frames.stop << 12)


def apply(t: Tracker, adding: bool, group: Sequence[Folio]) -> None:
    if len(group) == 1:
        (t.preserve if adding else t.unpreserve)(*group[0])
    else:
        (t.preserve_folios if adding else t.unpreserve_folios)(*window(group))


@settings(max_examples=70, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.lists(FOLIO, min_size=1, max_size=12)), max_size=12))
def test_every_call_does_what_the_rules_say_or_nothing(steps: list[tuple[bool, bool, list[Folio]]]) -> None:
    model = Model(SPAN, SMALL_RAM, SMALL_SCRATCH)
    t = Tracker(ram=[bytes_of(SMALL_RAM)], scratch=[bytes_of(SMALL_SCRATCH)], max_order=9)
    for adding, together, folios in steps:
        for group in [folios] if together else [[folio] for folio in folios]:
            before = set(model.folios)
            good = True
            for folio in group:
                fits = model.accepts(folio) if adding else folio in model.folios
                good = good and fits
                if good:
                    (model.add if adding else model.drop)(folio)
            if not good:
                model = Model(SPAN, SMALL_RAM, SMALL_SCRATCH)
                for folio in before:
                    model.add(folio)
            if good:
                apply(t, adding, group)
            else:
                with pytest.raises(e.FolioRefused):
                    apply(t, adding, group)
            assert list(t) == sorted_as_map(model.folios)
            assert len(t) == len(model.folios)
            assert all(folio in t for folio in model.folios)
            blocks = {(f.order, f.pfn >> f.order >> 12) for f in model.folios}
            assert t.blocks() == len(blocks)
            assert t.bitmap_bytes == 512 * len(blocks)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1 << 14), st.integers(1, 1 << 14), st.integers(0, 12))
def test_a_range_becomes_the_fewest_aligned_folios(start: int, length: int, max_order: int) -> None:
    t = Tracker(ram=[Range(0, GIB)], max_order=max_order)
    t.preserve_range(start, start + length)
    assert list(t) == sorted_as_map(aligned_folios(start, start + length, max_order))
    t.unpreserve_range(start, start + length)
    assert not len(t)
    assert not t.bitmap_bytes


@pytest.mark.parametrize("kind", ["random", "sorted", "run", "thin"])
def test_arrays_of_every_shape_come_back(kind: str) -> None:
    rng = np.random.default_rng(7)
    span = 1 << 23 if kind == "thin" else 1 << 17
    count = 3000 if kind == "thin" else 70_000
    pfns = rng.choice(span, count, replace=False).astype(np.uint64) + np.uint64(BASE + (256 << 12))
    if kind in ("sorted", "thin"):
        pfns = np.sort(pfns)
    if kind == "run":
        pfns = np.arange(BASE + 5, BASE + 5 + count, dtype=np.uint64)
    t = tracker()
    t.preserve_array(pfns, 0)
    assert np.array_equal(np.concatenate([piece for _, piece in t.arrays()]), np.sort(pfns))
    half = pfns[::2].copy()
    t.unpreserve_array(half, 0)
    assert np.array_equal(np.concatenate([piece for _, piece in t.arrays()]), np.sort(pfns[1::2]))
    with pytest.raises(e.NotTracked):
        t.unpreserve_array(pfns, 0)
    assert len(t) == len(pfns) // 2
    t.preserve_array(half, 0)
    assert len(t) == count


REFUSALS: list[tuple[str, Callable[[Tracker], object], type[Refused], str]] = [
    ("order above", lambda t: t.preserve(BASE, 19), e.OrderAboveLimit, "order 19"),
    ("order below", lambda t: t.preserve(BASE, -1), e.OrderAboveLimit, "order -1"),
    ("order above, array", lambda t: t.preserve_array(array("Q", [BASE]), 19), e.OrderAboveLimit, "0..18"),
    ("unaligned", lambda t: t.preserve(BASE + 1, 1), e.FolioUnaligned, f"{BASE + 1:#x}"),
    ("unaligned, array", lambda t: t.preserve_array(array("Q", [BASE, BASE + 3]), 1), e.FolioUnaligned, "1 frames off"),
    ("not RAM", lambda t: t.preserve(3 * GIB >> 12, 0), e.NotRam, f"{3 * GIB:#x} is not RAM"),
    ("not RAM, last frame", lambda t: t.preserve((3 * GIB >> 12) - 2, 2), e.FolioUnaligned, ""),
    ("not RAM in part", lambda t: t.preserve(0, 9), e.NotRam, "0x0 is not RAM"),
    ("not RAM, array", lambda t: t.preserve_array(array("Q", [BASE, 3 << 18]), 0), e.NotRam, f"{3 << 18:#x}"),
    ("no such frame", lambda t: t.preserve_array(array("Q", [2**64 - 1]), 0), e.NotRam, f"{2**64 - 1:#x}"),
    ("beyond the top", lambda t: t.preserve_array(array("Q", [1 << 40]), 0), e.NotRam, f"{1 << 52:#x}"),
    ("range beyond the top", lambda t: t.preserve_range(BASE, 1 << 41), e.NotRam, f"{1 << 52:#x}"),
    ("range below zero", lambda t: t.preserve_range(-1, 5), e.NotRam, ""),
    ("scratch", lambda t: t.preserve(64 << 8, 0), e.InScratch, "0x4000000-0x6000000"),
    ("scratch in part", lambda t: t.preserve(0x8000 >> 1, 14), e.InScratch, "0x4000000-0x6000000"),
    ("scratch, array", lambda t: t.preserve_array(array("Q", [BASE, 70 << 8]), 0), e.InScratch, f"{70 << 8:#x}"),
    ("scratch, range", lambda t: t.preserve_range(32 << 8, 80 << 8), e.InScratch, "0x4000000"),
    ("twice", lambda t: t.preserve(BASE + 512, 9), e.AlreadyTracked, "already preserved"),
    ("twice, array", lambda t: t.preserve_array(array("Q", [BASE, BASE + 512]), 9), e.AlreadyTracked, f"{BASE + 512:#x}"),
    ("in one call", lambda t: t.preserve_array(array("Q", [BASE, 5 + BASE, BASE]), 0), e.AlreadyTracked, "named twice"),
    ("in one range", lambda t: t.preserve_range(BASE, BASE + 1024), e.Overlaps, f"{BASE + 512:#x} order 9"),
    ("below", lambda t: t.preserve(BASE + 513, 0), e.Overlaps, f"{BASE + 512:#x} order 9"),
    ("above", lambda t: t.preserve(BASE, 10), e.Overlaps, f"overlaps preserved folio pfn {BASE + 512:#x}"),
    ("far above", lambda t: t.preserve(BASE, 18), e.Overlaps, f"{BASE + 512:#x} order 9"),
    ("each other", lambda t: t.preserve_folios(*window([(BASE, 0), (BASE, 3)])), e.Overlaps, f"{BASE:#x} order 0"),
    ("empty range", lambda t: t.preserve_range(BASE, BASE), e.EmptyRange, "empty"),
    ("negative range", lambda t: t.preserve_range(BASE, BASE - 1), e.EmptyRange, "negative"),
    ("unpreserve nothing", lambda t: t.unpreserve(BASE, 0), e.NotTracked, "not preserved"),
    ("unpreserve another order", lambda t: t.unpreserve(BASE + 512, 0), e.NotTracked, "order 0"),
    ("unpreserve, array", lambda t: t.unpreserve_array(array("Q", [BASE + 512, BASE]), 9), e.NotTracked, f"{BASE:#x}"),
    ("unpreserve twice", lambda t: t.unpreserve_array(array("Q", [BASE + 512] * 2), 9), e.NotTracked, "named twice"),
    ("unpreserve, range", lambda t: t.unpreserve_range(BASE + 512, BASE + 1025), e.NotTracked, ""),
]


@pytest.mark.parametrize(("call", "refusal", "words"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_refusals(call: Callable[[Tracker], object], refusal: type[Refused], words: str) -> None:
    t = tracker()
    t.preserve(BASE + 512, 9)
    with pytest.raises(refusal) as caught:
        call(t)
    assert type(caught.value) is refusal
    assert words in str(caught.value)
    assert list(t) == [Folio(BASE + 512, 9)]


@pytest.mark.parametrize("up", range(1, 19))
@pytest.mark.parametrize("fine_first", [True, False])
def test_orders_do_not_overlap(up: int, fine_first: bool) -> None:
    """Every distance between two orders, by array, which is a different way than by folio."""
    inside, outside = BASE + (3 << 18) + (1 << up) - 1, BASE + (3 << 18) + (1 << up)
    coarse = array("Q", [BASE + (3 << 18)])
    for frame, met in ((inside, True), (outside, False)):
        t = tracker()
        fine = array("Q", [frame])
        first, second = ((fine, 0), (coarse, up)) if fine_first else ((coarse, up), (fine, 0))
        t.preserve_array(*first)
        if not met:
            t.preserve_array(*second)
            assert len(t) == 2
            continue
        with pytest.raises(e.Overlaps, match=f"order {first[1]}"):
            t.preserve_array(*second)
        assert len(t) == 1


def test_one_gibibyte_folios_of_one_tebibyte_fit_in_one_bitmap() -> None:
    t = Tracker(ram=[Range(0, 1024 * GIB)])
    t.preserve_range(0, 1 << 28)
    assert t.totals() == {18: (1024, 1, 1024 * GIB)}
    assert t.bitmap_bytes == 512


def test_sixteen_gibibytes_take_at_most_1024_bitmaps() -> None:
    t = Tracker(ram=[Range(0, 1024 * GIB)], max_order=0)
    t.preserve_range(1 << 22, 2 << 22)
    assert t.totals() == {0: (1 << 22, 1024, 16 * GIB)}
    assert t.bitmap_bytes == 512 << 10


@pytest.mark.slow
def test_sixteen_gibibytes_scattered_over_one_tebibyte_take_at_most_65536_bitmaps() -> None:
    rng = np.random.default_rng(3)
    t = Tracker(ram=[Range(0, 1024 * GIB)])
    # One frame of every 64, at random in its 64: 16 GiB, everywhere.
    t.preserve_array(np.arange(1 << 22, dtype=np.uint64) * 64 + rng.integers(0, 64, 1 << 22, np.uint64), 0)
    assert t.totals() == {0: (1 << 22, 65536, 16 * GIB)}
    assert t.bitmap_bytes == 32 << 20


@pytest.mark.parametrize("order", [40, 41, 51])
def test_the_highest_orders_do_not_wrap(order: int) -> None:
    t = Tracker(ram=[Range(0, 1 << 52)], max_order=51)
    if order == 40:  # the whole of physical address space, as one folio
        t.preserve_array(array("Q", [0]), order)
        assert list(t) == [Folio(0, 40)]
        with pytest.raises(e.Overlaps, match="order 40"):
            t.preserve((1 << 40) - 1, 0)
    else:
        with pytest.raises(e.NotRam, match=f"order {order}"):
            t.preserve(0, order)
        with pytest.raises(e.NotRam, match=f"order {order}"):
            t.preserve_array(array("Q", [0]), order)
        assert not len(t)


def test_a_repeated_folio_is_named_however_far_apart_the_others_are() -> None:
    pfns = [BASE + (i * 7919 << 10) for i in range(2000)]
    with pytest.raises(e.AlreadyTracked, match=f"{pfns[1500]:#x} order 0.*named twice"):
        Tracker(ram=[Range(0, 1 << 50)]).preserve_array(array("Q", [*pfns, pfns[1500]]), 0)


def test_frames_must_be_eight_bytes() -> None:
    with pytest.raises(TypeError, match="4 bytes"):
        tracker().preserve_array(np.arange(4, dtype=np.uint32), 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 frames with 1 orders"):
        tracker().preserve_folios(array("Q", [BASE, BASE + 1]), b"\0")
