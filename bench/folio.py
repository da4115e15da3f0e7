# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.folio against the plain algorithm in C, on the same input, with the same refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from bench import plain
from bench.plain import MAP_REJECTED, U64, Plain
from bench.rows import ROUNDS, Result, Row, Side, alternating, milliseconds
from khod.folio.bulk import read_map
from khod.folio.tracker import Tracker
from khod.folio.units import PAGE_SIZE, Range
from khod.folio.walk import validate
from khod.folio.writer import SerializedMap, serialize

GIB = 1 << 30
COUNT = 2_000_000
RAM = (Range(1 << 20, 3 * GIB), Range(4 * GIB, 1032 * GIB))
SCRATCH = (Range(256 << 20, 320 << 20), Range(512 << 20, 768 << 20))
FIRST = 6 * GIB >> 12
"""Above all scratch."""
MAP_FRAMES = range(1 << 18, (1 << 18) + (1 << 15))
"""Where maps are written to: RAM that no row preserves."""


@cache
def library() -> ctypes.CDLL:
    return plain.build()


def tracker(max_order: int = 18) -> Tracker:
    return Tracker(ram=RAM, scratch=SCRATCH, max_order=max_order)


def c_tracker(max_order: int = 18) -> Plain:
    return Plain(library(), RAM, SCRATCH, max_order)


# -- inputs ------------------------------------------------------------------------------------------------------------


@cache
def scattered(gib: int) -> U64:
    """Distinct frames, in random order, out of `gib` GiB."""
    frames = np.random.default_rng(gib).choice(gib * GIB >> 12, COUNT, replace=False)
    return frames.astype(np.uint64) + np.uint64(FIRST)


@cache
def ascending() -> U64:
    return np.sort(scattered(16))


@cache
def ranges() -> list[tuple[int, int]]:
    """The same number of frames in 64 runs, none of them aligned to anything."""
    length = COUNT // 64
    return [(FIRST + i * 61_111 + 7, FIRST + i * 61_111 + 7 + length) for i in range(64)]


# -- adding ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adding:
    """Folios into a tracker that is empty; afterwards both maps must be the same bytes."""

    name: str
    target: float
    add: Callable[[Tracker | Plain], None]
    max_order: int = 18

    def __call__(self) -> Iterator[Result]:
        ours = Side(lambda: tracker(self.max_order), lambda t: self.add(cast(Tracker, t)))
        theirs = Side(lambda: c_tracker(self.max_order), lambda t: self.add(cast(Plain, t)), lambda t: cast(Plain, t).close())
        a, b = alternating(ours, theirs)
        yield Result(f"add {COUNT:,} folios of order 0, {self.name}", a / b, self.target, "x", a, b, note=self.check())

    def check(self) -> str:
        mine, other = tracker(self.max_order), c_tracker(self.max_order)
        self.add(mine)
        self.add(other)
        done = serialize(mine, MAP_FRAMES)
        if bytes(done.pages) != other.serialize(done.address).tobytes():
            raise AssertionError(f"{self.name}: the two maps differ")
        other.close()
        return "maps equal"


def add_array(pfns: Callable[[], U64]) -> Callable[[Tracker | Plain], None]:
    return lambda t: t.preserve_array(pfns(), 0)


def add_ranges(t: Tracker | Plain) -> None:
    for start, end in ranges():
        t.preserve_range(start, end)


# -- reading -----------------------------------------------------------------------------------------------------------


class Pages:
    """Memory that holds one map."""

    def __init__(self, done: SerializedMap, frames: range | list[int]) -> None:
        self._pages = {
            pfn << 12: bytes(done.pages[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) for i, pfn in enumerate(frames[: done.page_count])
        }

    def read(self, phys: int, length: int) -> bytes:
        return self._pages[phys][:length]


@dataclass(frozen=True, slots=True)
class Reading:
    """A whole map back to frames, checked before the first of them is told.

    Both sides compute the digest, look at each header, element and bitmap, and see that every folio lies in RAM and outside
    scratch. Ours alone proves as well that no page of the map is used twice and no folio overlaps another.
    """

    name: str
    target: float
    pfns: Callable[[], U64]

    def __call__(self) -> Iterator[Result]:
        t = tracker()
        t.preserve_array(self.pfns(), 0)
        done = serialize(t, MAP_FRAMES)
        memory = Pages(done, MAP_FRAMES)
        flat = np.frombuffer(done.pages, np.uint64).copy()
        out = np.zeros(COUNT, np.uint64)
        base = MAP_FRAMES[0] << 12
        ground = c_tracker()

        def read() -> None:
            found = read_map(memory, done.address, done.page_count, done.sha256, ram=RAM, scratch=SCRATCH)
            assert sum(len(pfns) for _, pfns in found.arrays()) == COUNT

        def read_plain(sha256: bytes = done.sha256) -> int:
            return ground.read(flat, base, done.address, sha256, out)

        assert read_plain() == COUNT
        assert read_plain(bytes(32)) == MAP_REJECTED, "the C reader does not look at the digest"
        a, b = alternating(Side(lambda: None, lambda _: read()), Side(lambda: None, lambda _: read_plain()))
        yield Result(f"read back with validation, {self.name}", a / b, self.target, "x", a, b)


def restore_path() -> Iterator[Result]:
    """1,024 bitmaps whose pages lie anywhere, by the reader that the blackout waits for.

    The fastest of many: nothing else is there to be slowed down with it, and a busy machine only ever adds.
    """
    t = tracker()
    t.preserve_array(scattered(16), 0)
    frames = np.random.default_rng(9).permutation(np.array(MAP_FRAMES)).tolist()
    done = serialize(t, frames)
    memory = Pages(done, frames)

    def check() -> object:
        return validate(memory, done.address, done.page_count, done.sha256, ram=RAM, scratch=SCRATCH)

    took = min(milliseconds(check) for _ in range(3 * ROUNDS))
    yield Result(f"validate {t.blocks():,} bitmaps without numpy, fastest of {3 * ROUNDS}", took, 5.0, "ms", took)


# -- capacity ----------------------------------------------------------------------------------------------------------


def bitmap_memory() -> Iterator[Result]:
    for gib in (16, 1024):
        t = tracker()
        t.preserve_array(scattered(gib), 0)
        blocks = len(np.unique(scattered(gib) >> np.uint64(12)))
        yield Result(f"bitmap memory, scattered over {gib} GiB", t.bitmap_bytes, 512 * blocks, "bytes", 0, exact=True)


def half_of_a_tebibyte() -> Iterator[Result]:
    """Every second frame of 1 TiB, a window of 1 GiB at a time, against four times what the first quarter of it takes."""
    every_second = np.arange(0, GIB >> 12, 2, dtype=np.uint64) + np.uint64(4 * GIB >> 12)
    windows = 1024

    def fill(count: int) -> Callable[[object], None]:
        def work(subject: object) -> None:
            t = cast(Tracker, subject)
            for window in range(count):
                t.preserve_array(every_second + np.uint64(window * (GIB >> 12)), 0)
            assert len(t) == count << 17
            assert t.bitmap_bytes == count << 15

        return work

    whole, quarter = alternating(Side(tracker, fill(windows)), Side(tracker, fill(windows // 4)), rounds=5)
    name = "1 TiB of order 0 half full: time linear (to four times its first quarter)"
    yield Result(name, whole / (4 * quarter), 1.25, "x", whole, 4 * quarter)


ROWS: tuple[Row, ...] = (
    Adding("random in 16 GiB", 1.7, add_array(lambda: scattered(16))),
    Adding("sorted in 16 GiB", 0.5, add_array(ascending)),
    Adding("in 64 ranges", 0.5, add_ranges, max_order=0),
    Adding("scattered over 1 TiB", 1.0, add_array(lambda: scattered(1024))),
    Reading("random in 16 GiB", 3.0, lambda: scattered(16)),
    Reading("scattered over 1 TiB", 3.0, lambda: scattered(1024)),
    restore_path,
    bitmap_memory,
    half_of_a_tebibyte,
)
