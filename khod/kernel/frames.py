# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which frames back a file, by /proc/PID/pagemap and /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst).

A window of the file is mapped read-only, populated, looked up and unmapped again. `windows` is the way before the jump:
gigabytes, by numpy. `pages` is the way after it: a sample, before numpy would even be imported.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from khod.core.ports import WINDOW, FolioWindow
from khod.core.refusals import refused
from khod.early import folios
from khod.early.folios import KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, PM_PFN, PM_PRESENT, NoFolio
from khod.early.folios import entries as _entries
from khod.errors import MachineError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, Folio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_GAP = 64
"""Frames nobody asked for that are read along rather than starting another read: about what one more call costs."""


class KernelFrames:
    """The port `Frames` of the running kernel. Needs CAP_SYS_ADMIN, or the kernel shows every frame as 0."""

    def windows(self, fd: int) -> Iterator[FolioWindow]:
        """See the port."""
        size = _size(fd)
        for offset in range(0, size, WINDOW):
            with refused("window", f"descriptor {fd} at {offset:#x}"):
                yield _window(fd, offset, min(WINDOW, size - offset))

    def pages(self, fd: int, indices: Sequence[int]) -> list[tuple[int, Folio]]:
        """See the port."""
        from khod.kernel.libc import Mapping  # ctypes

        size = _size(fd)
        found = []
        with refused("frames", f"{len(indices)} pages of descriptor {fd}"), _opened("kpageflags") as flags:
            for index in indices:
                offset = index << PAGE_SHIFT
                if not 0 <= offset < size:
                    raise MachineError(f"page {index} is outside descriptor {fd} of {size} bytes")
                with Mapping(fd, offset, PAGE_SIZE) as page, _opened("self/pagemap") as pagemap:
                    page.populate()
                    (entry,) = _entries(pagemap, page.address >> PAGE_SHIFT, 1)
                found.append((pfn := _frame(entry, index), _folio(flags, pfn)))
        return found


def _size(fd: int) -> int:
    """Of a file without holes. Looking a hole up would fill it: with memory that nobody has reckoned with."""
    with refused("stat", f"descriptor {fd}"):
        status = os.fstat(fd)
    if status.st_blocks * 512 < -(-status.st_size // PAGE_SIZE) * PAGE_SIZE:
        raise MachineError(f"descriptor {fd} has holes", hint="only a preserved file has a frame for each page")
    return status.st_size


def _window(fd: int, offset: int, length: int) -> FolioWindow:
    import numpy as np

    from khod.kernel.libc import Mapping

    pages = -(-length >> PAGE_SHIFT)
    with Mapping(fd, offset, length) as window, _opened("self/pagemap") as pagemap:
        window.populate()
        entries = np.frombuffer(folios.raw(pagemap, window.address >> PAGE_SHIFT, pages), np.uint64)
        with _opened("kpageflags") as flags:
            pfns = _frames(entries, offset >> PAGE_SHIFT)
            return _folios(flags, offset, pfns, _flags(flags, pfns))


def _frames(entries: NDArray[np.uint64], first: int) -> NDArray[np.uint64]:
    import numpy as np

    pfns = entries & np.uint64(PM_PFN)
    bad = np.flatnonzero((pfns == 0) | (entries & np.uint64(PM_PRESENT) == 0))
    if bad.size:
        _frame(int(entries[bad[0]]), first + int(bad[0]))
    return pfns


def _flags(kpageflags: int, pfns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The flags of each frame, read in as few calls as reading at most `_GAP` frames too many between two allows."""
    import numpy as np

    order = np.argsort(pfns, kind="stable")
    ascending = pfns[order].astype(np.int64)
    cuts = np.flatnonzero(np.diff(ascending) > _GAP) + 1
    starts, ends = np.concatenate(([0], cuts)), np.concatenate((cuts, [ascending.size]))
    out = np.empty(pfns.size, np.uint64)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        run = ascending[start:end]
        first = int(run[0])
        read = np.frombuffer(folios.raw(kpageflags, first, int(run[-1]) - first + 1), np.uint64)
        out[order[start:end]] = read[run - first]
    return out


def _folios(kpageflags: int, offset: int, pfns: NDArray[np.uint64], flags: NDArray[np.uint64]) -> FolioWindow:
    import numpy as np

    tail = (flags & np.uint64(KPF_COMPOUND_TAIL)) != 0
    head = (flags & np.uint64(KPF_COMPOUND_HEAD)) != 0
    starts = np.flatnonzero(~tail)
    if not starts.size or starts[0] != 0:  # the window begins inside a folio
        starts = np.concatenate(([0], starts))
    lengths = np.diff(np.append(starts, pfns.size))
    firsts = pfns[starts]
    orders = np.zeros(starts.size, np.uint8)
    # A folio is whole in its file but for the ends of a window: those two are looked at one by one, and so is whatever
    # does not look like a folio (its pages went elsewhere between the two reads, or the file is not preserved).
    compound = head[starts]
    whole = compound & (lengths & (lengths - 1) == 0)
    orders[whole] = np.log2(lengths[whole]).astype(np.uint8)
    single = ~compound & ~tail[starts] & (lengths == 1)
    odd = np.flatnonzero(~(whole | single)).tolist()
    for i in sorted({*odd, 0, starts.size - 1}):
        firsts[i], orders[i] = _folio(kpageflags, int(firsts[i]))
    return FolioWindow(offset, array("Q", firsts.tobytes()), array("B", orders.tobytes()))


def _frame(entry: int, index: int) -> int:
    """The frame in one entry of pagemap."""
    try:
        return folios.frame(entry, index)
    except NoFolio as error:
        raise MachineError(str(error), hint=error.hint)


def _folio(kpageflags: int, pfn: int) -> Folio:
    """The folio that holds a frame."""
    try:
        return Folio(*folios.folio(kpageflags, pfn))
    except NoFolio as error:
        raise MachineError(str(error), hint=error.hint)


@contextmanager
def _opened(name: str) -> Iterator[int]:
    fd = os.open(f"/proc/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
