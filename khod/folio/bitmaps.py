# SPDX-License-Identifier: LGPL-2.1-or-later
"""A sparse bitmap of one order: from block index to 4096 bits, in arrays, every operation on all of them at once.

A *frame* is here the number of a folio of this order, ``pfn >> order``. Bits are kept as 64 little-endian words a block,
so that the memory of a row is the bitmap of the wire, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from khod.folio.layout import BITMAP_BYTES, BLOCK_BITS, BLOCK_SHIFT

Ints: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]
Flags: TypeAlias = NDArray[np.bool_]

WORD = np.dtype("<u8")
WORDS = BITMAP_BYTES // 8
_ONE = np.uint64(1)
_ALL = np.uint64(2**64 - 1)
_LOW = np.uint64(63)
# Folios a step: the scratch arrays of a step stay in the second-level cache.
_STEP = 1 << 15
_MARK = np.ones(_STEP, np.uint8)
# Above so many frames from first to last for each that is set, single bits are cheaper than bytes for all.
_SPARSE = 16
# Bitmaps a step when bits become frames again, for the same reason.
_EXPAND = 1 << 7
# A batch gets a bitmap for every block between its first and its last if that is at most so many per folio (128 bytes);
# thinner ones find their blocks by sorting first.
_FOLIOS_PER_BLOCK = 4


class Repeated(Exception):
    """A frame comes twice in one batch: `frame`. Never leaves khod.folio, which knows the folio's order."""

    def __init__(self, frame: int) -> None:
        super().__init__(frame)
        self.frame = frame


class Bitmaps:
    """The set of frames of one order. Only blocks with a set bit are kept: memory is exactly 512 bytes for each.

    Rows lie in the order in which their blocks came, behind an index that is sorted: a new block appends a row, and moves
    8 bytes of index for each block above it, not 512.
    """

    __slots__ = ("_flat", "_slots", "blocks", "count")

    def __init__(self, blocks: Ints | None = None, flat: Words | None = None, count: int = 0) -> None:
        """`blocks` ascend; `flat` are their rows, and become this object's own; no row is empty; `count` bits are set."""
        self.blocks = np.empty(0, np.int64) if blocks is None else blocks
        self._flat = np.empty(0, WORD) if flat is None else flat
        self._slots = np.arange(len(self.blocks), dtype=np.int64)
        self.count = count

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes that the bitmaps occupy."""
        return self._flat.nbytes

    @property
    def _rows(self) -> Words:
        return self._flat.reshape(-1, WORDS)

    def rows(self, which: slice | Ints | Flags = slice(None)) -> Words:
        """A copy of the bitmaps of `blocks[which]`, in that order."""
        return self._rows[self._slots[which]]

    def words(self, at: Ints, word: Ints) -> Words:
        """Single words of the bitmaps of `blocks[at]`."""
        return self._rows[self._slots[at], word]

    def find(self, blocks: Ints) -> tuple[Ints, Flags]:
        """For each of `blocks` its position in `self.blocks`, and whether it is there at all."""
        if not len(self):
            return np.zeros(len(blocks), np.int64), np.zeros(len(blocks), np.bool_)
        at = np.searchsorted(self.blocks, blocks).astype(np.int64, copy=False)
        np.minimum(at, len(self) - 1, out=at)
        return at, self.blocks[at] == blocks

    # -- one frame ----------------------------------------------------------------------------------------------------

    def _position(self, block: int) -> int:
        """Where `block` is, or belongs as ``-1 - position``."""
        at = int(np.searchsorted(self.blocks, block))
        return at if at < len(self) and self.blocks[at] == block else -1 - at

    def block(self, block: int) -> int:
        """The bitmap of `block` as an integer, 0 where there is none."""
        at = self._position(block)
        return 0 if at < 0 else int.from_bytes(self._rows[self._slots[at]].tobytes(), "little")

    def __contains__(self, frame: int) -> bool:
        at = self._position(frame >> BLOCK_SHIFT)
        if at < 0:
            return False
        return bool(int(self._rows[self._slots[at], frame >> 6 & WORDS - 1]) >> (frame & 63) & 1)

    def first(self, start: int, end: int) -> int | None:
        """The lowest frame of the set in `start`..`end`, None if there is none."""
        low, high = np.searchsorted(self.blocks, (start >> BLOCK_SHIFT, (end - 1 >> BLOCK_SHIFT) + 1))
        # No row is empty, so this looks at two at most: the first may be hit below `start`, the next one is the answer.
        for block in self.blocks[low:high].tolist():
            base = block << BLOCK_SHIFT
            bits = self.block(block) >> max(start - base, 0)
            if bits:
                frame = max(start, base) + (bits & -bits).bit_length() - 1
                return frame if frame < end else None
        return None

    def add(self, frame: int) -> None:
        """Add one frame that is not in the set."""
        block = frame >> BLOCK_SHIFT
        at = self._position(block)
        if at < 0:
            at = -1 - at
            slot = len(self)
            self._resize(slot + 1)
            self.blocks = np.insert(self.blocks, at, block)
            self._slots = np.insert(self._slots, at, slot)
        self._rows[self._slots[at], frame >> 6 & WORDS - 1] |= _ONE << np.uint64(frame & 63)
        self.count += 1

    def remove(self, frame: int) -> None:
        """Remove one frame that is in the set; its bitmap goes with its last bit."""
        at = self._position(frame >> BLOCK_SHIFT)
        slot = int(self._slots[at])
        self._rows[slot, frame >> 6 & WORDS - 1] ^= _ONE << np.uint64(frame & 63)
        self.count -= 1
        if not self._rows[slot].any():
            last = len(self) - 1
            self._rows[slot] = self._rows[last]
            self._slots[self._slots == last] = slot
            self.blocks, self._slots = np.delete(self.blocks, at), np.delete(self._slots, at)
            self._resize(last)

    def _resize(self, rows: int) -> None:
        # Exactly so many rows, the new ones zero. No view of the rows outlives the call that made it, and growing a large
        # array moves its pages, not its bytes.
        if not self._flat.flags.owndata:
            self._flat = self._flat.copy()
        self._flat.resize(rows * WORDS, refcheck=False)

    # -- a batch ------------------------------------------------------------------------------------------------------

    def shared(self, batch: Bitmaps) -> int | None:
        """A frame that is in both, the lowest; None if there is none."""
        return self._lowest(batch, inverted=False)

    def absent(self, batch: Bitmaps) -> int | None:
        """A frame of `batch` that is not here, the lowest; None if all are."""
        return self._lowest(batch, inverted=True)

    def _lowest(self, batch: Bitmaps, *, inverted: bool) -> int | None:
        at, there = self.find(batch.blocks)
        if inverted and not there.all():
            missing = int(np.argmin(there))
            # A row further down the list of those that are here may still be lower.
            batch_rows, ours = batch.rows(slice(missing)), self.rows(at[:missing])
            hit = _lowest_bit(batch.blocks, batch_rows & ~ours)
            return hit if hit is not None else batch.first(int(batch.blocks[missing]) << BLOCK_SHIFT, 1 << 63)
        if not there.any():
            return None
        ours = self.rows(at[there])
        theirs = batch.rows(there)
        return _lowest_bit(batch.blocks[there], theirs & (~ours if inverted else ours))

    def merge(self, batch: Bitmaps) -> None:
        """Add the frames of `batch`, none of which is here. `batch` is used up."""
        self.count += batch.count
        if not len(self):
            self.blocks, self._slots, self._flat = batch.blocks, batch._slots, batch._flat
            return
        at, there = self.find(batch.blocks)
        self._rows[self._slots[at[there]]] |= batch.rows(there)
        new = ~there
        fresh = batch.blocks[new]
        if not len(fresh):
            return
        room = len(self)
        self._resize(room + len(fresh))
        self._rows[room:] = batch.rows(new)
        if fresh[0] > self.blocks[room - 1]:
            # The way of a sweep through memory, whose every step must cost the same however far it has come.
            self.blocks = _extended(self.blocks, fresh)
            self._slots = _extended(self._slots, np.arange(room, room + len(fresh)))
            return
        where = np.searchsorted(self.blocks, fresh)
        self.blocks = np.insert(self.blocks, where, fresh)
        self._slots = np.insert(self._slots, where, np.arange(room, room + len(fresh)))

    def subtract(self, batch: Bitmaps) -> None:
        """Remove the frames of `batch`, all of which are here, and every bitmap that is left without a bit."""
        self.count -= batch.count
        at, _ = self.find(batch.blocks)
        slots = self._slots[at]
        left = self._rows[slots] & ~batch.rows()
        self._rows[slots] = left
        empty = ~left.any(axis=1)
        if empty.any():
            keep = np.ones(len(self), np.bool_)
            keep[at[empty]] = False
            self._flat = self.rows(keep).reshape(-1)
            self.blocks = self.blocks[keep]
            self._slots = np.arange(len(self.blocks), dtype=np.int64)

    def pieces(self) -> Iterator[Ints]:
        """All frames, ascending, a piece at a time."""
        for start in range(0, len(self), _EXPAND):
            part = slice(start, start + _EXPAND)
            yield frames_of(self.blocks[part], self.rows(part))


def _extended(array: Ints, tail: Ints) -> Ints:
    """`array`, grown in place if it can be, with `tail` behind it."""
    if not array.flags.owndata:
        return np.concatenate((array, tail))
    length = len(array)
    array.resize(length + len(tail), refcheck=False)
    array[length:] = tail
    return array


def _lowest_bit(blocks: Ints, rows: Words) -> int | None:
    hit = rows.any(axis=1)
    if not hit.any():
        return None
    row = int(np.argmax(hit))
    bits = int.from_bytes(rows[row].tobytes(), "little")
    return (int(blocks[row]) << BLOCK_SHIFT) + (bits & -bits).bit_length() - 1


def from_frames(frames: Ints) -> Bitmaps:
    """The set of `frames`, of which there is at least one, in any order. Raises Repeated.

    Each frame *adds* its power of two to its word. A sum of n powers of two has n bits set exactly if no two of them met,
    so one count of bits proves that the additions were unions, and that no frame came twice.
    """
    ascending = _ascends(frames)
    low, high = (frames[0], frames[-1]) if ascending else (frames.min(), frames.max())
    first, last = int(low) >> BLOCK_SHIFT, int(high) >> BLOCK_SHIFT
    if last - first < len(frames) // _FOLIOS_PER_BLOCK + 64:
        blocks = np.arange(first, last + 1, dtype=np.int64)
        base = first << BLOCK_SHIFT
    else:
        blocks, row_of = np.unique(frames >> BLOCK_SHIFT, return_inverse=True)
        frames = (row_of << BLOCK_SHIFT) + (frames & BLOCK_BITS - 1)
        base = 0
    words = np.zeros(len(blocks) * WORDS, WORD)
    (_set_ascending if ascending else _add)(words, frames, base)
    if not ascending and int(np.bitwise_count(words).sum(dtype=np.int64)) != len(frames):
        ordered = np.sort(frames)
        place = int(ordered[np.argmax(ordered[1:] == ordered[:-1])]) - base
        raise Repeated((int(blocks[place >> BLOCK_SHIFT]) << BLOCK_SHIFT) + (place & BLOCK_BITS - 1))
    used = words.reshape(-1, WORDS).any(axis=1)
    if not used.all():
        blocks, words = blocks[used], words.reshape(-1, WORDS)[used].reshape(-1)
    return Bitmaps(blocks, words, len(frames))


def _ascends(frames: Ints) -> bool:
    """Whether each frame is above the one before; says no at the first step that is not."""
    return all(
        bool((part[1:] > part[:-1]).all()) for part in (frames[at : at + _STEP + 1] for at in range(0, len(frames), _STEP))
    )


def _add(words: Words, frames: Ints, base: int) -> None:
    """Add each frame's bit to `words`, whose first bit is the frame `base`."""
    index, bit = np.empty(_STEP, np.int64), np.empty(_STEP, np.uint64)
    for start in range(0, len(frames), _STEP):
        part = frames[start : start + _STEP]
        at, value = index[: len(part)], bit[: len(part)]
        np.right_shift(part, 6, out=at)
        np.subtract(at, base >> 6, out=at)
        np.bitwise_and(part.view(np.uint64), _LOW, out=value)
        np.left_shift(_ONE, value, out=value)
        np.add.at(words, at, value)


def _set_ascending(words: Words, frames: Ints, base: int) -> None:
    """The same for frames that ascend, faster where they are dense: a byte for each, then eight bytes become one."""
    index = np.empty(_STEP, np.int64)
    for start in range(0, len(frames), _STEP):
        part = frames[start : start + _STEP]
        low, high = int(part[0]) & ~63, int(part[-1]) | 63
        span = high - low + 1
        if span > _SPARSE * len(part):
            _add(words, part, base)
            continue
        marks = np.zeros(span, np.uint8)
        if part[-1] - part[0] == len(part) - 1:
            marks[int(part[0]) - low : int(part[-1]) - low + 1] = 1
        else:
            marks[np.subtract(part, low, out=index[: len(part)])] = _MARK[: len(part)]
        packed = np.packbits(marks, bitorder="little").view(WORD)
        words[low - base >> 6 : high + 1 - base >> 6] |= packed


def from_run(start: int, end: int) -> Bitmaps:
    """The set of the frames `start`..`end`, of which there is at least one."""
    first, last = start >> BLOCK_SHIFT, end - 1 >> BLOCK_SHIFT
    blocks = np.arange(first, last + 1, dtype=np.int64)
    words = np.full(len(blocks) * WORDS, _ALL, WORD)
    head, tail = start - (first << BLOCK_SHIFT), (last + 1 << BLOCK_SHIFT) - end
    words[: head >> 6] = 0
    words[len(words) - (tail >> 6) :] = 0
    words[head >> 6] &= _ALL << np.uint64(head & 63)
    words[len(words) - 1 - (tail >> 6)] &= _ALL >> np.uint64(tail & 63)
    return Bitmaps(blocks, words, end - start)


def _dense(words: Words) -> bool:
    # One word in 16 stands for all: only the speed depends on the answer.
    sample = words[::16]
    return int(np.bitwise_count(sample).sum(dtype=np.int64)) > len(sample)


def frames_of(blocks: Ints, rows: Words) -> Ints:
    """The frames whose bits are set in `rows`, the bitmaps of `blocks`, in that order."""
    words = np.ascontiguousarray(rows).reshape(-1)
    if _dense(words):
        frames = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))
    else:
        # Mostly zero: look for words, in those for bytes, and only in those for bits.
        word = np.flatnonzero(words != 0)
        octets = words[word].view(np.uint8)
        octet = np.flatnonzero(octets != 0)
        first = (word[octet >> 3] << 6) + ((octet & 7) << 3)
        bit = np.flatnonzero(np.unpackbits(octets[octet], bitorder="little").view(np.bool_))
        frames = first[bit >> 3] + (bit & 7)
    shift = (blocks - np.arange(len(blocks))) << BLOCK_SHIFT
    if len(blocks) and shift[0] == shift[-1]:
        frames += shift[0]
    else:
        frames += shift[frames >> BLOCK_SHIFT]
    return frames
