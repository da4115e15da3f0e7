# SPDX-License-Identifier: LGPL-2.1-or-later
"""Physical memory: one sparse file, whose offsets are physical addresses.

A page that was never written is a hole of the file and reads as zeros. What costs, here and in the kernel above, is written
data and never the size of the machine: `data` walks the file's extents (lseek(2), SEEK_DATA).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from khod.folio.units import PAGE_SIZE

POISON = b"\xaa\x55dead" * 682 + b"\xaa\x55de"
"""What is left of a page that was destroyed: never zeros, which could pass for what was there before."""
_POISONED_PER_EXTENT = 256
"""Pages; the rest of a longer extent is punched, which destroys as well and costs nothing."""
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_fallocate = ctypes.CDLL(None, use_errno=True)["fallocate64"]
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

assert len(POISON) == PAGE_SIZE


def punch(fd: int, start: int, length: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE: these bytes read as zeros and occupy nothing."""
    if _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "fallocate")


def data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The written extents of a file between `start` and `end`, ascending; their bounds lie between `start` and `end`."""
    while start < end:
        try:
            begin = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if begin >= end:
            return
        start = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        yield begin, start


class Ram:
    """The memory file, open. Addresses and lengths are bytes; nothing here knows what a page is used for."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.end = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Give the file back; nothing works afterwards."""
        os.close(self._fd)

    def read(self, phys: int, length: int) -> bytes:
        """`length` bytes at `phys`. Raises ValueError beyond the end."""
        if not (phys >= 0 and length >= 0 and phys + length <= self.end):
            raise ValueError(f"{length} bytes at {phys:#x}: memory ends at {self.end:#x}")
        out = bytearray(length)
        view, done = memoryview(out), 0
        while done < length:
            done += os.preadv(self._fd, [view[done:]], phys + done)
        return bytes(out)

    def write(self, phys: int, contents: bytes | memoryview) -> None:
        """Store `contents` at `phys`."""
        view, done = memoryview(contents), 0
        if phys < 0 or phys + len(view) > self.end:
            raise ValueError(f"{len(view)} bytes at {phys:#x}: memory ends at {self.end:#x}")
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], phys + done)

    def zero(self, phys: int, length: int) -> None:
        """Make a range read as zeros."""
        punch(self._fd, phys, length)

    def data(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Written extents between two addresses, in whole pages."""
        for begin, stop in data(self._fd, start, end):
            yield begin // PAGE_SIZE * PAGE_SIZE, min(end, (stop + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the written parts of a range to another, whose old contents must be zeros."""
        for begin, stop in self.data(source, source + length):
            self.write(target + begin - source, self.read(begin, stop - begin))

    def destroy(self, start: int, end: int) -> None:
        """Ruin the written parts of a range: whoever reads them through a stale address finds out."""
        for begin, stop in self.data(start, end):
            pages = min(_POISONED_PER_EXTENT, (stop - begin) // PAGE_SIZE)
            self.write(begin, POISON * pages)
            if (rest := begin + pages * PAGE_SIZE) < stop:
                punch(self._fd, rest, stop - rest)
