# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is to be preserved: one sparse bitmap per order, filled folio by folio, range by range, or array by array.

Every call does all that it was asked or, raising a `FolioRefused`, nothing. A batch is first made into bitmaps of its own;
every rule is then checked bitmap against bitmap. Only when one is broken the folio is looked for, and `_refuse` says of that
one folio what is wrong with it: for one folio or for millions, the words are the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from khod.folio.bitmaps import Bitmaps, Ints, Repeated, from_frames, from_run
from khod.folio.errors import (
    AlreadySerialized,
    AlreadyTracked,
    EmptyRange,
    Finalized,
    FolioUnaligned,
    InScratch,
    NotRam,
    NotTracked,
    OrderAboveLimit,
    Overlaps,
)
from khod.folio.ground import Ground
from khod.folio.layout import BLOCK_BITS, BLOCK_SHIFT
from khod.folio.overlap import meeting
from khod.folio.units import DEFAULT_MAX_ORDER, MAX_ORDER, PAGE_SHIFT, PHYS_BITS, Folio, Range

Pfns: TypeAlias = "array[int] | NDArray[np.uint64] | NDArray[np.int64] | memoryview"
"""First frames, 8 bytes each, unsigned or below 2^63."""
Orders: TypeAlias = "array[int] | NDArray[np.uint8] | memoryview | bytes"
Batch: TypeAlias = "tuple[int, Bitmaps]"
"""An order, and folios of it."""

_PFN_END = 1 << PHYS_BITS - PAGE_SHIFT


class Total(NamedTuple):
    """What one order holds."""

    folios: int
    bitmaps: int
    bytes: int
    """Of memory preserved, not of bitmaps."""


class Tracker:
    """The folios that are to be preserved on one machine."""

    def __init__(self, *, ram: Sequence[Range], scratch: Sequence[Range] = (), max_order: int = DEFAULT_MAX_ORDER) -> None:
        if not 0 <= max_order <= MAX_ORDER:
            raise ValueError(f"max_order {max_order} is not in 0..{MAX_ORDER}")
        self.max_order = max_order
        self.ground = Ground(ram, scratch)
        self._orders: dict[int, Bitmaps] = {}
        self._finalized = False

    # -- one folio ----------------------------------------------------------------------------------------------------

    def preserve(self, pfn: int, order: int) -> None:
        """Preserve one folio.

        Raises OrderAboveLimit, FolioUnaligned, NotRam, InScratch, AlreadyTracked, Overlaps, Finalized; so does every other
        way to preserve.
        """
        self._changing("preserve")
        folio = Folio(pfn, order)
        self._check(folio)
        self._orders.setdefault(order, Bitmaps()).add(pfn >> order)

    def unpreserve(self, pfn: int, order: int) -> None:
        """Preserve it no longer. Raises OrderAboveLimit, FolioUnaligned, NotTracked, Finalized; so do the others."""
        self._changing("unpreserve")
        folio = Folio(pfn, order)
        self._check_shape(folio)
        if folio not in self:
            raise NotTracked(folio)
        self._orders[order].remove(pfn >> order)
        self._forget_empty(order)

    # -- a range ------------------------------------------------------------------------------------------------------

    def preserve_range(self, start_pfn: int, end_pfn: int) -> None:
        """Preserve the frames from `start_pfn` up to `end_pfn` as the fewest naturally aligned folios. Raises EmptyRange."""
        self._preserve(self._range(start_pfn, end_pfn), disjoint=True)

    def unpreserve_range(self, start_pfn: int, end_pfn: int) -> None:
        """The opposite of `preserve_range` with the same arguments. Raises EmptyRange."""
        self._unpreserve(self._range(start_pfn, end_pfn))

    # -- arrays -------------------------------------------------------------------------------------------------------

    def preserve_array(self, pfns: Pfns, order: int) -> None:
        """Preserve folios of one order, in any order, each named once."""
        self._preserve(self._uniform(pfns, order, AlreadyTracked))

    def unpreserve_array(self, pfns: Pfns, order: int) -> None:
        """The opposite of `preserve_array`."""
        self._unpreserve(self._uniform(pfns, order, NotTracked))

    def preserve_folios(self, pfns: Pfns, orders: Orders) -> None:
        """Preserve folios, `pfns[i]` being of `orders[i]`."""
        self._preserve(self._mixed(pfns, orders, AlreadyTracked))

    def unpreserve_folios(self, pfns: Pfns, orders: Orders) -> None:
        """The opposite of `preserve_folios`."""
        self._unpreserve(self._mixed(pfns, orders, NotTracked))

    # -- looking ------------------------------------------------------------------------------------------------------

    def __contains__(self, folio: tuple[int, int]) -> bool:
        """Whether exactly this folio, a pair of pfn and order, is preserved."""
        pfn, order = folio
        held = self._orders.get(order)
        return held is not None and pfn >= 0 and not pfn & (1 << order) - 1 and pfn >> order in held

    def __len__(self) -> int:
        return sum(held.count for held in self._orders.values())

    def __iter__(self) -> Iterator[Folio]:
        """Folios by order, then by frame: the order of the map."""
        for order, pfns in self.arrays():
            for pfn in pfns.tolist():
                yield Folio(pfn, order)

    def arrays(self) -> Iterator[tuple[int, Ints]]:
        """All folios as arrays of first frames, ascending; an order comes in as many pieces as it takes."""
        for order, held in self.bitmaps():
            for frames in held.pieces():
                yield order, frames << order

    def bitmaps(self) -> list[tuple[int, Bitmaps]]:
        """Orders, ascending, with their bitmaps. To look at: they are the tracker's own."""
        return sorted(self._orders.items())

    def totals(self) -> dict[int, Total]:
        """What each order holds, ascending."""
        return {o: Total(held.count, len(held), held.count << o + PAGE_SHIFT) for o, held in self.bitmaps()}

    def blocks(self) -> int:
        """How many bitmaps there are: B of the specification."""
        return sum(len(held) for held in self._orders.values())

    @property
    def bitmap_bytes(self) -> int:
        """The memory that bitmaps occupy here, as allocated."""
        return sum(held.nbytes for held in self._orders.values())

    # -- the end of preparing -----------------------------------------------------------------------------------------

    @property
    def finalized(self) -> bool:
        """Whether a serialized map of this tracker is in force."""
        return self._finalized

    def finalize(self) -> None:
        """Take no change from now on. Raises AlreadySerialized."""
        if self._finalized:
            raise AlreadySerialized
        self._finalized = True

    def reopen(self) -> None:
        """Take changes again; what was serialized is no longer in force. Harmless when nothing was."""
        self._finalized = False

    # -- batches ------------------------------------------------------------------------------------------------------

    def _preserve(self, batches: Iterable[Batch], *, disjoint: bool = False) -> None:
        self._changing("preserve")
        whole = list(batches)
        for n, (order, batch) in enumerate(whole):
            self._check_batch(order, batch)
            met = None if disjoint else _overlap(order, batch, whole[:n])
            if met is not None:
                raise Overlaps(*met)
        for order, batch in whole:
            self._orders.setdefault(order, Bitmaps()).merge(batch)

    def _unpreserve(self, batches: Iterable[Batch]) -> None:
        self._changing("unpreserve")
        whole = list(batches)
        for order, batch in whole:
            held = self._orders.get(order)
            missing = batch.first(0, 1 << 63) if held is None else held.absent(batch)
            if missing is not None:
                raise NotTracked(Folio(missing << order, order))
        for order, batch in whole:
            self._orders[order].subtract(batch)
            self._forget_empty(order)

    def _range(self, start: int, end: int) -> Iterator[Batch]:
        # The fewest aligned folios: at most one of each order on the way up, a run of the highest order that fits, at most
        # one of each order on the way down. So the loop is over orders, however long the range.
        if end <= start:
            raise EmptyRange(start, end)
        if start < 0:
            raise NotRam(Folio(start, 0), start)
        if end > _PFN_END:
            raise NotRam(Folio(max(start, _PFN_END), 0), max(start, _PFN_END))
        for order in range(self.max_order + 1):
            size = 1 << order
            last = order == self.max_order
            if not last and start & size and start + size <= end:
                yield order, from_run(start >> order, (start >> order) + 1)
                start += size
            if not last and end & size and start + size <= end:
                yield order, from_run((end >> order) - 1, end >> order)
                end -= size
            if last and start < end:
                yield order, from_run(start >> order, end >> order)

    def _uniform(self, pfns: Pfns, order: int, repeated: type[AlreadyTracked | NotTracked]) -> Iterator[Batch]:
        frames = _frames(pfns)
        if len(frames):
            yield order, self._batch(frames, order, repeated)

    def _mixed(self, pfns: Pfns, orders: Orders, repeated: type[AlreadyTracked | NotTracked]) -> Iterator[Batch]:
        frames, tags = _frames(pfns), np.frombuffer(orders, np.uint8)
        if len(frames) != len(tags):
            raise ValueError(f"{len(frames)} frames with {len(tags)} orders")
        counts = np.bincount(tags, minlength=1)
        for order in np.flatnonzero(counts).tolist():
            chosen = frames if counts[order] == len(frames) else frames[tags == order]
            yield order, self._batch(chosen, order, repeated)

    def _batch(self, pfns: Ints, order: int, repeated: type[AlreadyTracked | NotTracked]) -> Bitmaps:
        # Only the shape is checked here: what can be put into bitmaps at all.
        low, high = int(pfns.min()), int(pfns.max())
        if not 0 <= order <= self.max_order:
            raise OrderAboveLimit(Folio(low, order), self.max_order)
        if low < 0:  # 2^63 and above, as it was given
            self._refuse(Folio(int(pfns.view(np.uint64).max()), order))
        if high >= _PFN_END:
            self._refuse(Folio(high, order))
        if not order:
            frames = pfns
        else:
            frames = pfns >> order
            odd = pfns & (1 << order) - 1
            if odd.any():
                raise FolioUnaligned(Folio(int(pfns[np.argmax(odd != 0)]), order))
        try:
            return from_frames(frames)
        except Repeated as twice:
            raise repeated(Folio(twice.frame << order, order), twice=True) from None

    # -- the rules ----------------------------------------------------------------------------------------------------

    def _changing(self, what: str) -> None:
        if self._finalized:
            raise Finalized(what)

    def _check_batch(self, order: int, batch: Bitmaps) -> None:
        frame = off_ground(self.ground, order, batch)
        if frame is None and (held := self._orders.get(order)) is not None:
            frame = held.shared(batch)
        if frame is not None:
            self._refuse(Folio(frame << order, order))
        met = _overlap(order, batch, self._orders.items())
        if met is not None:
            raise Overlaps(*met)

    def _refuse(self, folio: Folio) -> NoReturn:
        """Raise what is wrong with `folio`, which a check of its whole batch has found to be refused."""
        self._check(folio)
        raise AssertionError(f"{folio} was refused in a batch and is accepted alone")

    def _check_shape(self, folio: Folio) -> None:
        if not 0 <= folio.order <= self.max_order:
            raise OrderAboveLimit(folio, self.max_order)
        if folio.pfn & (1 << folio.order) - 1:
            raise FolioUnaligned(folio)

    def _check(self, folio: Folio) -> None:
        self._check_shape(folio)
        pfn, order = folio
        end = pfn + (1 << order)
        if not self.ground.allows(pfn, end):
            hole = self.ground.hole(pfn, end)
            if hole is not None:
                raise NotRam(folio, hole)
            region = self.ground.scratch_at(pfn, end)
            assert region is not None
            raise InScratch(folio, region)
        if folio in self:
            raise AlreadyTracked(folio)
        for other, held in self._orders.items():
            if other == order:
                continue
            # Of a higher order: the one folio around this one. Of a lower one: the first inside it.
            frame = held.first(pfn >> other, max(end >> other, (pfn >> other) + 1))
            if frame is not None:
                raise Overlaps(folio, Folio(frame << other, other))

    def _forget_empty(self, order: int) -> None:
        if not self._orders[order].count:
            del self._orders[order]


def _frames(pfns: Pfns) -> Ints:
    if pfns.itemsize != 8:
        raise TypeError(f"frames of {pfns.itemsize} bytes; pfns are 8 bytes each")
    return np.frombuffer(pfns, np.int64)


def _overlap(order: int, batch: Bitmaps, held: Iterable[Batch]) -> tuple[Folio, Folio] | None:
    """A folio of the batch and one of another order in `held` that share memory; None if there is none."""
    for other, bitmaps in held:
        up = abs(other - order)
        if other > order and (above := meeting(batch, bitmaps, up)) is not None:
            frame = batch.first(above << up, above + 1 << up)
            assert frame is not None
            return Folio(frame << order, order), Folio(above << other, other)
        if other < order and (above := meeting(bitmaps, batch, up)) is not None:
            below = bitmaps.first(above << up, above + 1 << up)
            assert below is not None
            return Folio(above << order, order), Folio(below << other, other)
    return None


def off_ground(ground: Ground, order: int, batch: Bitmaps) -> int | None:
    """The lowest frame of the batch that is not RAM, or in scratch; None if there is none."""
    runs = ground.folios(order)
    if not runs:
        return batch.first(0, 1 << 63)
    starts = np.array([start for start, _ in runs], np.int64)
    ends = np.array([end for _, end in runs], np.int64)
    first = batch.blocks << BLOCK_SHIFT
    around = np.searchsorted(starts, first, "right") - 1
    inside = (around >= 0) & (first + BLOCK_BITS <= ends[around])
    # A block on the border of a run: at most two for each run, until one is refused.
    for at in np.flatnonzero(~inside).tolist():
        block = int(batch.blocks[at])
        bits = batch.block(block) & ground.refused(order, block)
        if bits:
            return (block << BLOCK_SHIFT) + (bits & -bits).bit_length() - 1
    return None
