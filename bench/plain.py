# SPDX-License-Identifier: LGPL-2.1-or-later
"""bench/folio_map.c, compiled and callable. Both sides of a row then find their input in the same memory."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from khod.folio.units import PAGE_SHIFT, Range

HERE = Path(__file__).parent
COMMAND = ("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
LIBRARIES = ("-lcrypto",)
MAP_REJECTED = 2**64 - 1

U64 = NDArray[np.uint64]


def build() -> ctypes.CDLL:
    """Compile, and declare what is called."""
    out = HERE / "out" / "folio_map.so"
    out.parent.mkdir(exist_ok=True)
    subprocess.run([*COMMAND, "-o", str(out), str(HERE / "folio_map.c"), *LIBRARIES], check=True, timeout=120)
    lib = ctypes.CDLL(str(out))
    pointer, u64, uint = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint
    lib.tracker_new.argtypes, lib.tracker_new.restype = (pointer, uint, uint, uint), pointer
    lib.tracker_free.argtypes, lib.tracker_free.restype = (pointer,), None
    lib.tracker_preserve_array.argtypes = (pointer, pointer, u64, uint)
    lib.tracker_preserve_range.argtypes = (pointer, u64, u64)
    lib.tracker_bitmaps.argtypes, lib.tracker_bitmaps.restype = (pointer,), u64
    lib.tracker_serialize.argtypes, lib.tracker_serialize.restype = (pointer, pointer, u64), u64
    lib.map_read.argtypes, lib.map_read.restype = (pointer, pointer, u64, u64, u64, ctypes.c_char_p, pointer), u64
    return lib


class Plain:
    """A tracker of the C program; the methods are those of `khod.folio.tracker.Tracker`."""

    def __init__(self, lib: ctypes.CDLL, ram: Sequence[Range], scratch: Sequence[Range], max_order: int) -> None:
        ranges = [edge >> PAGE_SHIFT for r in (*ram, *scratch) for edge in (r.start, r.end)]
        self._lib = lib
        self._tracker = lib.tracker_new(np.array(ranges, np.uint64).ctypes.data, len(ram), len(scratch), max_order)

    def close(self) -> None:
        self._lib.tracker_free(self._tracker)

    def preserve_array(self, pfns: U64, order: int) -> None:
        self._check(self._lib.tracker_preserve_array(self._tracker, pfns.ctypes.data, len(pfns), order))

    def preserve_range(self, start: int, end: int) -> None:
        self._check(self._lib.tracker_preserve_range(self._tracker, start, end))

    def blocks(self) -> int:
        return int(self._lib.tracker_bitmaps(self._tracker))

    def serialize(self, base: int) -> U64:
        """The map as for memory that lies at physical `base` in one run."""
        pages = np.zeros((2 + self.blocks() // 255 + 52 + self.blocks() // 8) * 512, np.uint64)
        used = self._lib.tracker_serialize(self._tracker, pages.ctypes.data, base)
        return pages[: used * 512]

    def read(self, pages: U64, base: int, address: int, sha256: bytes, out: U64) -> int:
        """The folios of a map, into `out`; their number, or MAP_REJECTED. Of this tracker only the ground is looked at."""
        count = len(pages) // 512
        found = self._lib.map_read(self._tracker, pages.ctypes.data, base, count, address, sha256, out.ctypes.data)
        return int(found)

    @staticmethod
    def _check(refusal: int) -> None:
        if refusal:
            raise RuntimeError(f"the C program refused: {refusal}")
