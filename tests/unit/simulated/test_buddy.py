# SPDX-License-Identifier: LGPL-2.1-or-later
"""The allocator against a plain set of frames."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.folio.units import PAGE_SHIFT, Range
from khod.simulated.buddy import Buddy, NoMemory, Pfns

MIB = 1 << 20
RAM = (Range(1 * MIB, 24 * MIB), Range(1 << 30, (1 << 30) + 8 * MIB))
SCRATCH = (Range(4 * MIB, 8 * MIB),)


def frames(ranges: tuple[Range, ...]) -> set[int]:
    return {pfn for r in ranges for pfn in range(r.start >> PAGE_SHIFT, r.end >> PAGE_SHIFT)}


def members(pfns: Pfns, order: int) -> list[int]:
    return [head + i for head in pfns.tolist() for i in range(1 << order)]


Step = tuple[int, int, bool, bool]
STEPS = st.lists(st.tuples(st.integers(0, 10), st.integers(1, 40), st.booleans(), st.booleans()), max_size=25)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_no_frame_has_two_owners_and_none_is_lost(steps: list[Step]) -> None:
    buddy = Buddy(RAM, SCRATCH)
    buddy.open()
    inside, outside = frames(SCRATCH), frames(RAM) - frames(SCRATCH)
    held: list[tuple[Pfns, int]] = []
    for order, count, scratch, give_back in steps:
        if give_back and held:
            pfns, freed = held.pop(0)
            buddy.release(pfns, freed)
            mine = members(pfns, freed)
            (inside if set(mine) & frames(SCRATCH) else outside).update(mine)
            continue
        free = inside if scratch else outside
        possible = sum(1 for head in range(0, max(free, default=0) + 1, 1 << order) if _free(free, head, order))
        try:
            pfns = buddy.allocate(order, count, scratch=scratch)
        except NoMemory:
            assert possible < count
            continue
        taken = members(pfns, order)
        assert not (pfns % (1 << order)).any()
        assert len(set(taken)) == len(taken) == count << order and free.issuperset(taken)
        free.difference_update(taken)
        held.append((pfns, order))
    assert (buddy.scratch_free, buddy.free) == (len(inside), len(outside))


def _free(free: set[int], head: int, order: int) -> bool:
    return head in free and all(head + i in free for i in range(1 << order))


def test_shut_until_opened() -> None:
    buddy = Buddy(RAM, SCRATCH)
    with pytest.raises(NoMemory):
        buddy.allocate(0)
    assert buddy.in_scratch(buddy.allocate(3, 4, scratch=True)).all()
    spared = np.array([0x800, 0x900], dtype=np.int64)
    buddy.reserve(spared, 8)
    buddy.open()
    taken = members(buddy.allocate(0, buddy.free), 0)
    assert not set(taken) & set(members(spared, 8))


def test_scattered_frames_are_distinct_and_not_in_order() -> None:
    buddy = Buddy(RAM, SCRATCH)
    buddy.open()
    taken = buddy.allocate(0, 2000, scatter=1)
    assert len(set(taken.tolist())) == 2000
    assert (np.diff(taken) == 1).sum() < 100
