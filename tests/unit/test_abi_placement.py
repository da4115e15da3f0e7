# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi.placement: cases that Linux 7.3 was seen to take and to refuse (EADDRNOTAVAIL), on a machine of 2 GiB."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.abi import bzimage
from khod.abi.placement import Placed, Segment, place, segments
from khod.folio.units import PAGE_SIZE, Range
from tests import images

MIB = 1 << 20
HEADER = bzimage.parse(images.bzimage(b"", packed=b"\x1f\x8b", init_size=0x12E1000)[: bzimage.HEADER_SIZE])


def areas(*sizes: int) -> list[Range]:
    """Of these MiB: low, global, of the node; each far from the others."""
    starts = (0x2000000, 0x20000000, 0x60000000)
    return [Range(start, start + size * MIB) for start, size in zip(starts, sizes, strict=True)]


def homeless(where: list[Range], cmdline: int = 200, initrd: int = 0) -> list[str]:
    return [p.segment.name for p in place(where, segments(HEADER, len(where), cmdline, initrd)) if p.at is None]


@pytest.mark.parametrize(
    ("sizes", "initrd", "lost"),
    [
        ((16, 64, 32), 0, []),
        ((16, 64, 32), 8 * MIB, []),
        ((16, 64, 32), 64 * MIB, ["the initrd"]),  # as seen
        ((4, 4, 4), 0, ["the kernel"]),  # as seen
        ((108, 0, 324), 0, []),  # the default of 2 GiB
        ((108, 0, 324), 300 * MIB, []),
        ((108, 0, 324), 600 * MIB, ["the initrd"]),  # as seen
        ((0, 0, 0), 0, ["the list of scratch areas", "the purgatory", "parameters and command line", "the kernel"]),
    ],
)
def test_what_the_kernel_places(sizes: tuple[int, int, int], initrd: int, lost: list[str]) -> None:
    assert homeless(areas(*sizes), initrd=initrd) == lost


def test_an_image_goes_into_several_areas_and_each_piece_into_one() -> None:
    """64 MiB in all, and no place for 40: what is free lies in two areas."""
    assert homeless(areas(32, 32, 0), initrd=20 * MIB) == []
    assert homeless(areas(32, 32, 0), initrd=40 * MIB) == ["the initrd"]


def test_alignment_and_lowest_addresses_count() -> None:
    # The kernel has 18.9 MiB, at a multiple of 2 MiB; above it stand the smaller pieces.
    assert homeless([Range(32 * MIB, 52 * MIB)]) == []
    assert homeless([Range(33 * MIB, 53 * MIB)]) == ["the kernel"]
    # Nothing of it lies below the address that the kernel asks for.
    assert homeless([Range(MIB, 24 * MIB)]) == ["the kernel"]


def test_the_first_area_that_has_room_is_taken_from_its_top() -> None:
    first, second = Range(64 * MIB, 72 * MIB), Range(128 * MIB, 256 * MIB)
    found = place([first, second], iter([Segment("a", 5000, 1 << 16), Segment("b", MIB), Segment("c", 16 * MIB, 2 * MIB)]))
    assert [p.at for p in found] == [
        Range(72 * MIB - (1 << 16), 72 * MIB - (1 << 16) + 8192),
        Range(71 * MIB - (1 << 16), 72 * MIB - (1 << 16)),
        Range(240 * MIB, 256 * MIB),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.integers(1, 40 * PAGE_SIZE), st.sampled_from([1, 4096, 65536]), st.integers(0, 40 * PAGE_SIZE)), max_size=6
    ),
)
def test_pieces_never_overlap_and_never_leave_their_area(
    shapes: list[tuple[int, int]], wanted: list[tuple[int, int, int]]
) -> None:
    where, at = [], 0
    for gap, pages in shapes:
        at += gap * PAGE_SIZE
        where.append(Range(at, at + pages * PAGE_SIZE))
        at += pages * PAGE_SIZE
    found = place(where, (Segment(str(n), *w) for n, w in enumerate(wanted)))
    there = [p for p in found if p.at]
    for number, one in enumerate(there):
        assert one.at is not None
        assert any(area.start <= one.at.start and one.at.end <= area.end for area in where)
        assert one.at.start % one.segment.align == 0 and one.at.start >= one.segment.minimum
        assert not any(_overlap(one, other) for other in there[:number])


def _overlap(one: Placed, other: Placed) -> bool:
    assert one.at and other.at
    return one.at.start < other.at.end and other.at.start < one.at.end
