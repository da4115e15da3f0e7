# SPDX-License-Identifier: LGPL-2.1-or-later
"""Physical memory: to read through /proc/kcore, and how it is laid out.

A PT_LOAD of /proc/kcore that maps RAM carries the physical address in p_paddr, so nothing has to be known about the
kernel's address space (fs/proc/kcore.c). Needs CAP_SYS_RAWIO.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from khod.abi.bootparam import scratch_array
from khod.core.ports import MemoryFigures
from khod.errors import MachineError
from khod.folio.units import PAGE_SIZE, Range, merged
from khod.kernel.boot import DEBUGFS, kho_setup_data

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1
_NO_ADDRESS = (1 << 64) - 1


class Segment(NamedTuple):
    """A piece of memory, and where a file has it."""

    start: int
    end: int
    offset: int


def read_segments(file: int, segments: Sequence[Segment], phys: int, length: int, name: str) -> bytes:
    """Bytes of physical memory out of a file that has it in these segments: of two that overlap the first is asked. Raises
    ValueError with `name` for what is in none, or beyond the file's end."""
    parts = []
    while length > 0:
        segment = next((s for s in segments if s.start <= phys < s.end), None)
        if segment is None:
            raise ValueError(f"{name} has no memory at {phys:#x}")
        part = os.pread(file, min(length, segment.end - phys), segment.offset + phys - segment.start)
        if not part:
            raise ValueError(f"{name}: memory at {phys:#x} cannot be read")
        parts.append(part)
        phys, length = phys + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class KernelMemory:
    """The port `Memory` of the running kernel."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kcore = -1
        self._segments: tuple[Segment, ...] = ()

    def read(self, phys: int, length: int) -> bytes:
        """See the port. Raises MachineError when /proc/kcore may not be opened."""
        self._open()
        return read_segments(self._kcore, self._segments, phys, length, "/proc/kcore")

    def free_huge_pages(self, page_size: int) -> int:
        """See the port."""
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB")
        try:
            free, promised = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
        except FileNotFoundError:
            return 0
        return max(0, free - promised)

    def ram(self) -> tuple[Range, ...]:
        """See the port."""
        ranges = []
        for line in _text(Path("/proc/iomem")).splitlines():
            if found := re.match(r"\s*([0-9a-f]+)-([0-9a-f]+) : System RAM", line):
                start, end = int(found[1], 16), int(found[2], 16) + 1
                ranges.append(Range(-(-start // PAGE_SIZE) * PAGE_SIZE, end // PAGE_SIZE * PAGE_SIZE))
        out = merged(ranges)
        if not out:
            hint = "it shows addresses to CAP_SYS_ADMIN only: run khod as root"
            raise MachineError("/proc/iomem shows no System RAM", errno=errno.EPERM, hint=hint)
        return out

    def scratch(self) -> tuple[Range, ...]:
        """See the port."""
        return merged(area for area in self.areas() if area.start < area.end)

    def areas(self) -> tuple[Range, ...]:
        """The scratch areas in the kernel's order, empty ones among them. From debugfs; without it from what a kernel that was
        kexec'ed was told of its scratch."""
        out = DEBUGFS / "out"
        try:
            starts, lengths = (
                [int(word, 16) for word in (out / f"scratch_{name}").read_text().split()] for name in ("phys", "len")
            )
            areas = list(zip(starts, lengths, strict=True))
        except OSError:
            areas = self._inherited_scratch()
        return tuple(Range(start, start + length) for start, length in areas)

    def figures(self) -> MemoryFigures:
        """See the port."""
        info = {key: int(value) * 1024 for key, value in re.findall(r"^(\w+): +(\d+) kB$", _text(Path("/proc/meminfo")), re.M)}
        zones = _text(Path("/proc/zoneinfo"))
        free = info.get("CmaFree", 0)
        # CmaTotal does not count the scratch areas; the zones do.
        return MemoryFigures(
            total=info["MemTotal"],
            available=info["MemAvailable"],
            cma_free=free,
            cma_used=max(0, sum(map(int, re.findall(r"^ +cma +(\d+)$", zones, re.M))) * PAGE_SIZE - free),
            movable_used=_movable_used(zones),
        )

    def _inherited_scratch(self) -> list[tuple[int, int]]:
        data = kho_setup_data()
        if data is None:
            return []
        try:
            address, size = scratch_array(data)
            array = self.read(address, size)
        except (ValueError, MachineError):  # an old layout, or no right to read memory: unknown, as the port says
            return []
        return [(start, length) for start, length in struct.iter_unpack("=QQ", array)]

    def _open(self) -> None:
        with self._lock:
            if self._kcore < 0:
                try:
                    fd = os.open("/proc/kcore", os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    hint = "reading physical memory takes CAP_SYS_RAWIO, CONFIG_PROC_KCORE=y and no confidentiality lockdown"
                    raise MachineError("open /proc/kcore", errno=e.errno, hint=hint)
                self._segments = _segments(fd)
                self._kcore = fd


def _segments(kcore: int) -> tuple[Segment, ...]:
    header = _EHDR.unpack(os.pread(kcore, _EHDR.size, 0))
    phoff, phentsize, phnum = header[5], header[9], header[10]
    table = os.pread(kcore, phentsize * phnum, phoff)
    found = set()
    for at in range(0, len(table), phentsize):
        kind, _flags, offset, _vaddr, paddr, _filesz, memsz, _align = _PHDR.unpack_from(table, at)
        if kind == _PT_LOAD and paddr != _NO_ADDRESS and memsz:
            found.add(Segment(paddr, paddr + memsz, offset))
    # The kernel's text appears a second time, at its own virtual address: the long segments, RAM's own, are asked first.
    return tuple(sorted(found, key=lambda s: s.start - s.end))


def _movable_used(zoneinfo: str) -> int:
    used = 0
    for zone in re.split(r"^Node \d+, zone +", zoneinfo, flags=re.M)[1:]:
        if zone.startswith("Movable"):
            free = re.search(r"pages free +(\d+)", zone)
            managed = re.search(r"managed +(\d+)", zone)
            if free and managed:
                used += int(managed[1]) - int(free[1])
    return used * PAGE_SIZE


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as e:
        raise MachineError(f"read {path}", errno=e.errno)
