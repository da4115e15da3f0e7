# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether folios of two orders share memory: bitmaps of a finer and a coarser order against each other, in arrays."""

from __future__ import annotations

import numpy as np

from khod.folio.bitmaps import WORDS, Bitmaps, Ints, Words
from khod.folio.layout import BLOCK_BITS, BLOCK_SHIFT

# Blocks a step: the widest step holds 64 words, and as many indices, for each.
_STEP = 1 << 9
_WORD_SHIFT = 6


def meeting(fine: Bitmaps, coarse: Bitmaps, up: int) -> int | None:
    """A frame of `coarse` that holds a frame of `fine`; None if there is none. `up` is how many orders lie between."""
    if not len(fine) or not len(coarse):
        return None
    # Only the fine blocks that lie under a coarse one can meet anything.
    coarse_blocks = fine.blocks >> up
    under = np.flatnonzero(coarse.find(coarse_blocks)[1])
    for start in range(0, len(under), _STEP):
        part = under[start : start + _STEP]
        blocks = fine.blocks[part]
        if up >= BLOCK_SHIFT:
            hit = _whole_blocks(blocks, coarse, up)
        elif up >= _WORD_SHIFT:
            hit = _whole_words(blocks, fine.rows(part), coarse, up)
        else:
            hit = _parts_of_words(blocks, fine.rows(part), coarse, up)
        if hit is not None:
            return hit
    return None


def _test(coarse: Bitmaps, frames: Ints) -> Ints | None:
    """Those of `frames` that are in `coarse`, all of whose blocks exist; None if there is none."""
    at, _ = coarse.find(frames >> BLOCK_SHIFT)
    words = coarse.words(at, frames >> _WORD_SHIFT & WORDS - 1)
    hit = frames[(words >> (frames & 63).view(np.uint64) & np.uint64(1)).astype(np.bool_)]
    return hit if len(hit) else None


def _whole_blocks(blocks: Ints, coarse: Bitmaps, up: int) -> int | None:
    """One coarse folio covers whole fine blocks, none of which is empty."""
    hit = _test(coarse, blocks >> up - BLOCK_SHIFT)
    return None if hit is None else int(hit[0])


def _whole_words(blocks: Ints, rows: Words, coarse: Bitmaps, up: int) -> int | None:
    """One coarse folio covers whole words of a fine block."""
    groups = BLOCK_BITS >> up
    used = rows.reshape(len(blocks), groups, -1).any(axis=2)
    frames = ((blocks << BLOCK_SHIFT - up)[:, None] + np.arange(groups))[used]
    hit = _test(coarse, frames)
    return None if hit is None else int(hit[0])


def _parts_of_words(blocks: Ints, rows: Words, coarse: Bitmaps, up: int) -> int | None:
    """Several coarse folios share a word of a fine block: stretch their bits over the fine ones."""
    # The first coarse frame of each fine word; the coarse bits of one fine word never straddle coarse words.
    frames = (blocks << BLOCK_SHIFT - up)[:, None] + (np.arange(WORDS) << _WORD_SHIFT - up)
    at, _ = coarse.find(blocks >> up)
    words = coarse.words(at[:, None], frames >> _WORD_SHIFT & WORDS - 1)
    part = words >> (frames & 63).view(np.uint64) & np.uint64((1 << (64 >> up)) - 1)
    both = rows & _stretched(part, up)
    hit = np.flatnonzero(both)
    if not len(hit):
        return None
    word = int(both.flat[hit[0]])
    return int(frames.flat[hit[0]]) + ((word & -word).bit_length() - 1 >> up)


def _stretched(words: Words, up: int) -> Words:
    """Each of the lowest ``64 >> up`` bits becomes ``1 << up`` equal bits."""
    # Halve the groups of bits again and again, moving each upper half to its place, until each bit stands alone.
    for stage in reversed(range(_WORD_SHIFT - up)):
        width, pitch = 1 << stage, 1 << stage + up
        mask = sum(((1 << width) - 1) << at for at in range(0, 64, pitch))
        words = (words | words << np.uint64(pitch - width)) & np.uint64(mask)
    return words * np.uint64((1 << (1 << up)) - 1)
