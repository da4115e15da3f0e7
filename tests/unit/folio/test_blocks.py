# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import subprocess
import sys
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.folio.blocks import Blocks, OrderDifference
from khod.folio.errors import FolioUnaligned
from khod.folio.ground import Ground
from khod.folio.units import Folio, Range
from khod.folio.walk import FolioMap
from tests.unit.folio.maps import sorted_as_map, window

FOLIOS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 300), st.integers(0, 1 << 14), st.integers(0, 1 << 40)),
        st.sampled_from([0, 0, 0, 3, 9, 18]),
    ).map(lambda pair: Folio(pair[0] << pair[1], pair[1])),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(FOLIOS, FOLIOS)
def test_blocks_are_sets_of_folios(first: list[Folio], second: list[Folio]) -> None:
    a, b = Blocks(), Blocks()
    a.add(*window(first))
    a.add(*window(first[:3]))  # again, as a folio at the end of a window is
    b.add(*window(second))
    assert list(a) == sorted_as_map(set(first))
    assert a.folio_count == len(set(first))
    assert all(a.contains(*folio) for folio in first)
    assert all(a.contains(*folio) == (folio in set(first)) for folio in second)
    missing, extra = FolioMap(a).difference(b)
    for found, expected in ((missing, set(second) - set(first)), (extra, set(first) - set(second))):
        assert {d.order: d.folios for d in found} == {o: n for o in range(19) if (n := sum(f.order == o for f in expected))}
        for d in found:
            assert list(d.first) == sorted(f for f in expected if f.order == d.order)[:3]
    assert (a == b) == (set(first) == set(second))
    a.update(b)
    assert list(a) == sorted_as_map(set(first) | set(second))


@pytest.mark.parametrize("span", [1 << 17, 1 << 24])
def test_a_whole_window(span: int) -> None:
    """Dense and thin windows are marked in different ways; numpy knows what comes of it."""
    pfns = np.random.default_rng(2).choice(span, 1 << 16, replace=False).astype(np.uint64) + np.uint64(12345)
    blocks = Blocks()
    blocks.add(array("Q", pfns.tobytes()), array("B", bytes(len(pfns))))
    assert [folio.pfn for folio in blocks] == np.sort(pfns).tolist()


def test_a_difference_says_what_and_how_much() -> None:
    blocks = Blocks()
    blocks.add(*window([(512 * i, 9) for i in range(10)]))
    (found,) = blocks.without(Blocks(), examples=2)
    assert found == OrderDifference(9, 10, (Folio(0, 9), Folio(512, 9)))


def test_folios_are_aligned() -> None:
    with pytest.raises(FolioUnaligned, match="0x201"):
        Blocks().add(*window([(512, 9), (513, 9)]))


def test_the_restore_path_imports_no_numpy() -> None:
    code = "import sys, khod.folio.walk, khod.folio.blocks; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_ranges_that_are_not_whole_pages_are_cut_to_what_is_surely_there() -> None:
    ground = Ground([Range(100, 0x9FC00), Range(0x9FC00, 0xA0000), Range(0x100000, 0x200001)], [Range(0x180FFF, 0x181001)])
    assert ground.ram == [(1, 0xA0), (0x100, 0x200)]
    assert ground.scratch == [(0x180, 0x182)]
    assert ground.allowed == [(1, 0xA0), (0x100, 0x180), (0x182, 0x200)]
    assert ground.folios(4) == [(1, 10), (0x10, 0x18), (0x19, 0x20)]
    assert Ground([Range(0, 8 << 12)], [Range(0, 1 << 12), Range(7 << 12, 9 << 12)]).allowed == [(1, 7)]
