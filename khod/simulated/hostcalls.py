# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls on the machine itself: memory, disk, clocks, other processes. Each takes the calling process first."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path

from khod.core.ports import Boot
from khod.folio.units import PAGE_SHIFT, Range
from khod.simulated.layout import DISK
from khod.simulated.pages import Pages
from khod.simulated.task import Task

_JOURNAL = "journal"
TSC_KHZ = 1_000_000
"""One tick a nanosecond."""


class HostCalls:
    """Everything that is neither a file in memory nor live update."""

    def __init__(self, directory: Path, pages: Pages, ram: Sequence[Range], scratch: Sequence[Range], reset: int) -> None:
        self._disk = directory / DISK / _JOURNAL
        self._pages = pages
        self._ram = tuple(ram)
        self._scratch = tuple(scratch)
        self.reset = reset
        """When the TSC was at 0, by the host's CLOCK_MONOTONIC."""
        self._booted = time.monotonic_ns()
        # The clock chip tells whole seconds, which is all that a kernel knows of the time when it boots.
        self._realtime = time.time_ns() // 1_000_000_000 * 1_000_000_000
        self.boot_info: Boot | None = None

    # Memory.

    def memory_read(self, task: Task, phys: int, length: int) -> bytes:
        """/proc/kcore, by physical address. EFAULT where there is no RAM."""
        if not any(r.start <= phys and phys + length <= r.end for r in self._ram):
            raise OSError(errno.EFAULT, f"no RAM at {phys:#x}, {length} bytes")
        return self._pages.ram.read(phys, length)

    def ram(self, task: Task) -> list[tuple[int, int]]:
        """/proc/iomem, System RAM."""
        return [(r.start, r.end) for r in self._ram]

    def scratch(self, task: Task) -> list[tuple[int, int]]:
        """Scratch regions, from debugfs."""
        return [(r.start, r.end) for r in self._scratch]

    def figures(self, task: Task) -> dict[str, int]:
        """/proc/meminfo. Like there, what is free of CMA counts as available."""
        buddy = self._pages.buddy
        return {
            "total": buddy.total << PAGE_SHIFT,
            "available": (buddy.free + buddy.scratch_free) << PAGE_SHIFT,
            "cma_free": buddy.scratch_free << PAGE_SHIFT,
            "cma_used": (buddy.scratch_total - buddy.scratch_free) << PAGE_SHIFT,
            "movable_used": 0,
        }

    # The disk.

    def store_read(self, task: Task) -> bytes:
        """The journal."""
        try:
            return self._disk.read_bytes()
        except FileNotFoundError:
            return b""

    def store_append(self, task: Task, contents: bytes) -> None:
        """Write at the end. The host's page cache is this machine's disk: what write(2) took outlives the kernel."""
        with open(self._disk, "ab", buffering=0) as file:
            file.write(contents)

    def store_torn(self, contents: bytes, how: str) -> None:
        """What an append leaves that the machine did not live to finish."""
        left = {"half": contents[: len(contents) // 2], "nuls": bytes(len(contents))}[how]
        with open(self._disk, "ab", buffering=0) as file:
            file.write(left)

    def store_cut(self, task: Task, length: int) -> None:
        """ftruncate(2)."""
        if self._disk.exists():
            os.truncate(self._disk, min(length, self._disk.stat().st_size))

    def sync(self, task: Task) -> None:
        """syncfs(2) of the one disk, which holds what was written to it."""

    # Time, and who is here.

    def stamp(self, task: Task) -> tuple[int, int, int, int]:
        """CLOCK_REALTIME, CLOCK_MONOTONIC, TSC, and its rate in kHz. Only the TSC runs on through a kexec."""
        now = time.monotonic_ns()
        return self._realtime + now - self._booted, now - self._booted, now - self.reset, TSC_KHZ

    def elapse(self, seconds: float) -> None:
        """Let that much time pass at once, by every clock."""
        self._booted -= round(seconds * 1e9)
        self.reset -= round(seconds * 1e9)

    def boot(self, task: Task) -> tuple[str, str, bool, int, str]:
        """The fields of `khod.core.ports.Boot`."""
        info = self.boot_info
        assert info is not None
        return info.boot_id, info.release, info.handover, info.kexec_count, info.previous_release
