# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.frames: on synthetic flags of any layout, and on this host's own memfds where frames are shown."""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.early import folios as early_folios
from khod.early.folios import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL
from khod.errors import BadDescriptor, MachineError
from khod.folio.units import Folio
from khod.kernel import frames
from khod.kernel.frames import KernelFrames

OTHER_FLAGS = 1 << 3 | 1 << 5
"""Uptodate and lru, which say nothing of orders."""


def flags_of(folios: list[Folio], end: int) -> array[int]:
    """kpageflags of a machine of `end` frames that holds these folios and otherwise single pages."""
    out = array("Q", [OTHER_FLAGS]) * end
    for pfn, order in folios:
        if order:
            out[pfn] |= KPF_COMPOUND_HEAD
            for tail in range(pfn + 1, pfn + (1 << order)):
                out[tail] |= KPF_COMPOUND_TAIL
    return out


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[Folio], int, int]:
    """Folios in file order, somewhere in memory, and the pages of the file before and behind a window on it."""
    orders = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    places = draw(st.permutations(range(len(orders))))
    return (
        [Folio(place << 6, order) for place, order in zip(places, orders, strict=True)],
        draw(st.integers(0, (1 << orders[0]) - 1)),
        draw(st.integers(0, (1 << orders[-1]) - 1)),
    )


@settings(max_examples=60, deadline=None)
@given(machines())
def test_any_layout_through_any_window(machine: tuple[list[Folio], int, int]) -> None:
    folios, before, behind = machine
    pages = [pfn + i for pfn, order in folios for i in range(1 << order)]
    pages = pages[before : len(pages) - behind]
    if not pages:
        return
    with tempfile.TemporaryFile() as f:
        f.write(flags_of(folios, len(folios) << 6).tobytes())
        f.flush()
        pfns = np.array(pages, np.uint64)
        window = frames._folios(f.fileno(), 0, pfns, frames._flags(f.fileno(), pfns))
        assert list(map(Folio, window.pfns, window.orders)) == folios
        for page in pages:
            folio = frames._folio(f.fileno(), page)
            assert folio in folios
            assert folio.pfn <= page < folio.pfn + (1 << folio.order)


@pytest.mark.parametrize("order", [9, 10, 18])
def test_large_folios_are_found_from_any_of_their_frames(order: int) -> None:
    folio = Folio(1 << order, order)
    with tempfile.TemporaryFile() as f:
        # A single page follows; the file of flags may also end with the folio, as memory does.
        for end in (3 << order, 2 << order):
            f.seek(0)
            f.truncate()
            f.write(flags_of([folio], end).tobytes())
            f.flush()
            for frame in (0, 1, 511, 512, (1 << order) - 1):
                assert frames._folio(f.fileno(), folio.pfn + min(frame, (1 << order) - 1)) == folio


def test_a_compound_page_without_a_head_is_an_error() -> None:
    with tempfile.TemporaryFile() as f:
        f.write(array("Q", [KPF_COMPOUND_TAIL] * 16).tobytes())
        f.flush()
        with pytest.raises(MachineError, match="no head"):
            frames._folio(f.fileno(), 5)


def test_hidden_and_missing_frames_are_told_apart() -> None:
    present = np.array([early_folios.PM_PRESENT | 7, early_folios.PM_PRESENT], np.uint64)
    with pytest.raises(MachineError, match="hides") as refused:
        frames._frames(present, 0)
    assert "CAP_SYS_ADMIN" in refused.value.hint
    with pytest.raises(MachineError, match="page 11 of the file has no frame"):
        frames._frames(np.array([early_folios.PM_PRESENT | 7, 0], np.uint64), 10)


@pytest.fixture
def memfd() -> Iterator[int]:
    if not Path("/proc/kpageflags").exists() or os.geteuid():
        pytest.skip("this host does not show frames")
    fd = os.memfd_create("unit")
    os.posix_fallocate(fd, 0, 3 << 20)
    yield fd
    os.close(fd)


def own_pagemap(fd: int) -> list[int]:
    """The frames of a file by numpy's own idea of where its mapping is."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size) as m:
        view: Any = np.frombuffer(m, np.uint8)
        address = view.__array_interface__["data"][0]
        view[::4096].sum()
        with open("/proc/self/pagemap", "rb", buffering=0) as f:
            f.seek(address // 4096 * 8)
            entries = np.frombuffer(f.read(-(-size // 4096) * 8), np.uint64)
        del view
    return [int(entry) & early_folios.PM_PFN for entry in entries]


def test_windows_cover_the_file_and_agree_with_pagemap(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "WINDOW", 1 << 20)
    os.ftruncate(memfd, (3 << 20) - 5000)
    windows = list(KernelFrames().windows(memfd))
    assert [w.offset for w in windows] == [0, 1 << 20, 2 << 20]
    found = [pfn + i for w in windows for pfn, order in zip(w.pfns, w.orders, strict=True) for i in range(1 << order)]
    expected = own_pagemap(memfd)
    assert found[: len(expected)] == expected
    indices = [0, 1, 255, 256, len(expected) - 1]
    pages = KernelFrames().pages(memfd, indices)
    assert [pfn for pfn, _ in pages] == [expected[i] for i in indices]
    named = {Folio(p, o) for w in windows for p, o in zip(w.pfns, w.orders, strict=True)}
    assert {folio for _, folio in pages} <= named


def test_an_empty_file_has_no_windows_and_no_pages(memfd: int) -> None:
    os.ftruncate(memfd, 0)
    assert list(KernelFrames().windows(memfd)) == []
    with pytest.raises(MachineError, match="outside"):
        KernelFrames().pages(memfd, [0])


def test_holes_are_refused_and_not_filled(memfd: int) -> None:
    os.ftruncate(memfd, 4 << 20)
    before = os.fstat(memfd).st_blocks
    with pytest.raises(MachineError, match="has holes"):
        list(KernelFrames().windows(memfd))
    with pytest.raises(MachineError, match="has holes"):
        KernelFrames().pages(memfd, [0])
    assert os.fstat(memfd).st_blocks == before


def test_a_closed_descriptor(memfd: int) -> None:
    closed = os.dup(memfd)
    os.close(closed)
    with pytest.raises(BadDescriptor):
        list(KernelFrames().windows(closed))
    with pytest.raises(BadDescriptor):
        KernelFrames().pages(closed, [0])


def test_nothing_stays_mapped(memfd: int) -> None:
    list(KernelFrames().windows(memfd))
    KernelFrames().pages(memfd, [0, 5])
    assert "memfd:unit" not in Path("/proc/self/maps").read_text()
