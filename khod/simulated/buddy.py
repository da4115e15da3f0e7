# SPDX-License-Identifier: LGPL-2.1-or-later
"""The page allocator: naturally aligned folios of 2**order frames, orders 0 to 18.

Memory is divided into blocks of 1 GiB, the largest folio. A block is free, or one folio, or *split*: then it has one byte
per frame. A free buddy of order n is an aligned run of 2**n free frames of a split block, found by looking; lists of them,
as Linux keeps, would be the same facts a second time. So buddies merge by being free, and thousands of folios are taken by
one scan. A machine of 1 TiB whose guests live in 1 GiB folios splits the few blocks that hold everything else.

A kernel that was started by another one may use scratch alone until it knows what it must spare: the allocator is made
shut, `reserve` marks what is spared, `open` releases the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from khod.folio.units import PAGE_SHIFT, Range

BLOCK_ORDER = 18
BLOCK_FRAMES = 1 << BLOCK_ORDER

Pfns = npt.NDArray[np.int64]
_Flags = npt.NDArray[np.bool_]

_ABSENT, _FREE, _FOLIO, _SPLIT = range(4)


class NoMemory(Exception):
    """There is no such folio, or not so many."""


def runs(flags: _Flags) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


class Buddy:
    """Who owns which frame. Not safe for several threads at once: the kernel has one lock."""

    def __init__(self, ram: Sequence[Range], scratch: Sequence[Range]) -> None:
        frames = ram[-1].end >> PAGE_SHIFT
        self._state = np.full((frames + BLOCK_FRAMES - 1) // BLOCK_FRAMES, _ABSENT, dtype=np.uint8)
        self._used: dict[int, _Flags] = {}
        self._scratch: dict[int, _Flags] = {}
        self._shut = True
        self._ram = tuple(ram)
        self._populate(ram)
        self.total = sum((r.end - r.start) >> PAGE_SHIFT for r in ram)
        """Frames of RAM."""
        self.scratch_total = 0
        for region in scratch:
            for block, first, last in _by_block(region):
                self._split(block)
                self._scratch.setdefault(block, np.zeros(BLOCK_FRAMES, dtype=np.bool_))[first:last] = True
                self.scratch_total += last - first
        self.free = self.total - self.scratch_total
        """Free frames outside scratch, usable or not."""
        self.scratch_free = self.scratch_total

    def _populate(self, ram: Sequence[Range]) -> None:
        for region in ram:
            for block, first, last in _by_block(region):
                if last - first == BLOCK_FRAMES:
                    self._state[block] = _FREE
                    continue
                used = self._used.setdefault(block, np.ones(BLOCK_FRAMES, dtype=np.bool_))
                used[first:last] = False
                self._state[block] = _SPLIT

    def _split(self, block: int) -> _Flags:
        if self._state[block] == _FREE:
            self._used[block] = np.zeros(BLOCK_FRAMES, dtype=np.bool_)
            self._state[block] = _SPLIT
        return self._used[block]

    def open(self) -> None:
        """Everything that is not reserved may be used from now on."""
        self._shut = False

    def reserve(self, pfns: Pfns, order: int) -> None:
        """Mark folios as used that a previous kernel allocated, outside scratch."""
        for block, taken in self._grouped(pfns):
            if order == BLOCK_ORDER:
                self._state[block] = _FOLIO
            else:
                self._split(block)[_members(taken, order)] = True
        self.free -= len(pfns) << order

    def allocate(self, order: int, count: int = 1, *, scratch: bool = False, scatter: int | None = None) -> Pfns:
        """First frames of `count` folios, all of scratch or all from outside; `scatter` seeds a random choice of them.

        Raises NoMemory, and then takes nothing.
        """
        if not scratch and self._shut:
            raise NoMemory("only scratch may be used until the record of the previous kernel is read")
        if (count << order) > (self.scratch_free if scratch else self.free):
            raise NoMemory(f"{count} folios of order {order}")
        if order == BLOCK_ORDER:
            found = np.flatnonzero(self._state == _FREE)[:count].astype(np.int64) << BLOCK_ORDER
        else:
            found = self._search(order, count, scratch, None if scatter is None else np.random.default_rng(scatter))
        if len(found) < count:
            raise NoMemory(f"{count} folios of order {order}: {len(found)} are left")
        self._take(found, order, scratch)
        return found

    def _search(self, order: int, count: int, scratch: bool, rng: np.random.Generator | None) -> Pfns:
        parts: list[Pfns] = []
        missing = count * 2 if rng else count
        for block in self._candidates(scratch):
            found = np.flatnonzero(self._available(block, scratch, order)) << order
            if not rng:
                found = found[:missing]
            parts.append(found.astype(np.int64) + (block << BLOCK_ORDER))
            missing -= len(found)
            if missing <= 0:
                break
        pool = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return rng.permutation(pool)[:count] if rng else pool

    def _candidates(self, scratch: bool) -> Iterable[int]:
        """Blocks to look into: the split ones first, so that whole ones stay whole."""
        if scratch:
            return sorted(self._scratch)
        split, whole = np.flatnonzero(self._state == _SPLIT), np.flatnonzero(self._state == _FREE)
        return [int(block) for part in (split, whole) for block in part]

    def _available(self, block: int, scratch: bool, order: int) -> _Flags:
        """Which aligned folios of a block are free and on the right side of scratch's border."""
        if self._state[block] == _FREE:
            return np.ones(BLOCK_FRAMES >> order, dtype=np.bool_)
        used, inside = self._used[block], self._scratch.get(block)
        if inside is not None:
            used = used | (~inside if scratch else inside)
        if order == 0:
            return ~used
        available: _Flags = ~np.asarray(used.reshape(-1, 1 << order).any(axis=1))
        return available

    def _take(self, pfns: Pfns, order: int, scratch: bool) -> None:
        for block, taken in self._grouped(pfns):
            if order == BLOCK_ORDER:
                self._state[block] = _FOLIO
            else:
                self._split(block)[_members(taken, order)] = True
        if scratch:
            self.scratch_free -= len(pfns) << order
        else:
            self.free -= len(pfns) << order

    def release(self, pfns: Pfns, order: int) -> None:
        """Free folios. One of them may have been freed in parts before, but none twice."""
        for block, freed in self._grouped(pfns):
            if order == BLOCK_ORDER:
                self._state[block] = _FREE
                self.free += BLOCK_FRAMES
                continue
            members = _members(freed, order)
            assert self._used[block][members].all(), "double free"
            self._used[block][members] = False
            inside = self._scratch.get(block)
            within = int(inside[members].sum()) if inside is not None else 0
            self.scratch_free += within
            self.free += (len(freed) << order) - within
            if not self._used[block].any() and inside is None:
                del self._used[block]
                self._state[block] = _FREE

    def in_scratch(self, pfns: Pfns) -> _Flags:
        """Which of these frames lie in scratch."""
        out = np.zeros(len(pfns), dtype=np.bool_)
        for block, inside in self._scratch.items():
            here = np.flatnonzero((pfns >> BLOCK_ORDER) == block)
            out[here] = inside[pfns[here] & (BLOCK_FRAMES - 1)]
        return out

    def unused(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a range of frames that belong to nobody, or that are not RAM, as ranges of frames."""
        for block in range(start >> BLOCK_ORDER, ((end - 1) >> BLOCK_ORDER) + 1):
            base = block << BLOCK_ORDER
            first, last = max(start - base, 0), min(end - base, BLOCK_FRAMES)
            if self._state[block] == _FOLIO:
                continue
            if self._state[block] == _SPLIT:
                for begin, stop in runs(~self._used[block][first:last]):
                    yield base + first + begin, base + first + stop
            else:
                yield base + first, base + last

    @staticmethod
    def _grouped(pfns: Pfns) -> Iterator[tuple[int, Pfns]]:
        """Frames by block, as offsets into the block."""
        if len(pfns) == 0:
            return
        blocks = pfns >> BLOCK_ORDER
        if blocks[0] == blocks[-1] and (blocks == blocks[0]).all():
            yield int(blocks[0]), pfns & (BLOCK_FRAMES - 1)
            return
        order = np.argsort(blocks, kind="stable")
        unique, begins = np.unique(blocks[order], return_index=True)
        for block, part in zip(unique.tolist(), np.split(order, begins[1:]), strict=True):
            yield block, pfns[part] & (BLOCK_FRAMES - 1)


def _members(heads: Pfns, order: int) -> Pfns:
    """All frames of folios, given the first of each."""
    return (heads[:, None] + np.arange(1 << order)).reshape(-1) if order else heads


def _by_block(region: Range) -> Iterator[tuple[int, int, int]]:
    """A range as (block, first frame in it, end frame in it)."""
    start, end = region.start >> PAGE_SHIFT, region.end >> PAGE_SHIFT
    while start < end:
        block = start >> BLOCK_ORDER
        stop = min(end, (block + 1) << BLOCK_ORDER)
        yield block, start - (block << BLOCK_ORDER), stop - (block << BLOCK_ORDER)
        start = stop
