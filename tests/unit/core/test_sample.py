# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from khod.core import ledger, sample
from khod.core.ports import Stamp
from khod.folio.units import Folio

SIZES = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5)


@given(SIZES, st.integers(0, 64))
def test_chosen_pages_are_different_and_inside(sizes: list[int], count: int) -> None:
    chosen = sample.choose("u1", "vm", sizes, count)
    pages = [-(-s // 4096) for s in sizes]
    assert len(set(chosen)) == len(chosen) == min(count, sum(pages))
    assert all(0 <= page < pages[index] for index, page in chosen)


def test_the_choice_follows_from_update_and_instance_alone() -> None:
    size = [1 << 30]
    assert sample.choose("u1", "vm", size, 16) == sample.choose("u1", "vm", size, 16)
    assert sample.choose("u1", "vm", size, 16) != sample.choose("u2", "vm", size, 16)
    assert sample.choose("u1", "vm", size, 16) != sample.choose("u1", "vm2", size, 16)


@given(st.integers(0, 40), st.integers(0, 18))
def test_frames_are_packed_with_their_folio(head: int, order: int) -> None:
    folio = Folio(head << order, order)
    pfn = folio.pfn + (1 << order) - 1
    assert sample.unpacked(sample.packed(pfn, folio)) == (pfn, folio)


@given(st.binary(min_size=1, max_size=1), st.integers(0, ledger.STAMP_SIZE - 1))
def test_a_torn_stamp_is_none(byte: bytes, at: int) -> None:
    whole = ledger.encode_stamp(Stamp(10**18, 5, 10**12, 2_600_000))
    assert ledger.decode_stamp(whole) == Stamp(10**18, 5, 10**12, 2_600_000)
    torn = whole[:at] + byte + whole[at + 1 :]
    assert torn == whole or ledger.decode_stamp(torn) is None
    assert ledger.decode_stamp(whole[:at]) is None


def test_across_the_jump_the_tsc_counts_at_the_old_kernels_rate() -> None:
    before, after = Stamp(10**18, 0, 1_000_000, 2_000_000), Stamp(10**18 + 9 * 10**8, 0, 3_001_000_000, 2_100_000)
    assert ledger.across(before, after) == (1.5, ledger.TSC_UNCERTAINTY)
    assert ledger.across(Stamp(10**18, 0), Stamp(10**18 + 2 * 10**9, 0)) == (2.0, ledger.RTC_UNCERTAINTY)
