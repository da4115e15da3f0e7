# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the simulated machine is made of: its memory map, its directory, and what one kernel leaves to the next."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from khod.errors import InvalidRequest
from khod.folio.units import PAGE_SIZE, Range

MIB = 1 << 20
GIB = 1 << 30
LOW_MEMORY = 1 * MIB
"""RAM begins here: frame 0 and the BIOS's megabyte are nobody's, so that frame 0 can mean "no frame"."""
HOLE = Range(3 * GIB, 4 * GIB)
"""Below 4 GiB are device registers, as on every PC; memory beyond 3 GiB lies above it."""
SCRATCH_ALIGN = 4 * MIB
KERNEL_SIZE = 2 * MIB
"""What a running kernel occupies of the memory that it was started in."""

MEMORY_FILE = "memory"
MACHINE_FILE = "machine.json"
BOOT_FILE = "boot-params.json"
SOCKET = "kernel.sock"
DISK = "disk"
ENVIRONMENT = "KHOD_SIMULATED"
"""Set for what runs on the machine: the machine's directory."""
JUMPED = 85
"""Exit status of a kernel's process: start the next kernel."""
PANICKED = 86
"""Exit status of a kernel's process: the machine stands still."""

DEFAULT_CMDLINE = "root=/dev/vda kho=on liveupdate=on"


def ram_ranges(memory: int) -> tuple[Range, ...]:
    """System RAM of a machine with `memory` bytes up to 3 GiB, the rest above the hole."""
    if memory <= HOLE.start:
        return (Range(LOW_MEMORY, memory),)
    return (Range(LOW_MEMORY, HOLE.start), Range(HOLE.end, HOLE.end + memory - HOLE.start))


def default_scratch(memory: int) -> tuple[Range, ...]:
    """A low area and one of the node, as ``kho_scratch=`` would place them: an eighth of memory, 1 GiB at most."""
    low = _aligned(min(memory // 32, 64 * MIB))
    node = _aligned(min(memory // 8, GIB))
    base = ram_ranges(memory)[-1].start
    start = (max(base, 2 * low + SCRATCH_ALIGN) + SCRATCH_ALIGN - 1) // SCRATCH_ALIGN * SCRATCH_ALIGN
    return (Range(SCRATCH_ALIGN, SCRATCH_ALIGN + low), Range(start, start + node))


def _aligned(size: int) -> int:
    return max(SCRATCH_ALIGN, size // SCRATCH_ALIGN * SCRATCH_ALIGN)


@dataclass(frozen=True, slots=True)
class Release:
    """The kernel in an image: its version, and the formats that it writes and reads (kernel-facts, version map)."""

    release: str = "7.3.4"
    kho: str = "kho-v4"
    luo: str = "luo-v5"
    memfd: str = "memfd-v2"
    kernel_size: int = KERNEL_SIZE
    preserves: tuple[str, ...] = ()
    """Kinds of files that it preserves besides memfds, of 'guest_memfd', 'hugetlb', 'iommufd', 'vfio': Linux 7.3 none. A kernel
    that is jumped to takes the same."""


@dataclass(frozen=True, slots=True)
class BootParams:
    """All that a kernel is given besides the contents of memory."""

    kernel: Release
    cmdline: str
    scratch: tuple[tuple[int, int], ...]
    """Start and end of each region, as the first kernel reserved them."""
    record: int = 0
    """Physical address of the record that the previous kernel left, 0 when it left none."""
    reset: int = 0
    """Host CLOCK_MONOTONIC of the last cold boot: the moment in which the TSC started at 0."""

    def write(self, directory: Path) -> None:
        """Leave it in the machine's directory for the kernel that starts next."""
        _replace(directory / BOOT_FILE, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> BootParams | None:
        """What the previous kernel left; None before a cold boot."""
        try:
            raw = json.loads((directory / BOOT_FILE).read_text())
        except FileNotFoundError:
            return None
        raw["kernel"] = Release(**{**raw["kernel"], "preserves": tuple(raw["kernel"]["preserves"])})
        raw["scratch"] = tuple((start, end) for start, end in raw["scratch"])
        return cls(**raw)


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine that outlives its kernels, and what it boots from disk."""

    memory: int
    scratch: tuple[tuple[int, int], ...]
    cmdline: str = DEFAULT_CMDLINE
    systemd: bool = False
    """Whether PID 1 is a systemd."""

    @classmethod
    def read(cls, directory: Path) -> Hardware:
        """Raises InvalidRequest when there is no machine in `directory`."""
        try:
            raw = json.loads((directory / MACHINE_FILE).read_text())
        except FileNotFoundError:
            raise InvalidRequest(f"no simulated machine in {directory}", hint="khod.simulated.create makes one")
        return cls(raw["memory"], tuple((start, end) for start, end in raw["scratch"]), raw["cmdline"], raw["systemd"])


def create(
    directory: Path | str,
    *,
    memory: int,
    scratch: Sequence[Range] | None = None,
    cmdline: str = DEFAULT_CMDLINE,
    systemd: bool = False,
) -> Path:
    """Build a machine with `memory` bytes of RAM in `directory`, which must not hold one; returns the directory.

    Nothing is written but metadata: a TiB costs a sparse file. `scratch` are the regions that its kernels reserve for their
    successors, multiples of 4 MiB inside RAM; by default an eighth of memory. `systemd`: whether it has one as PID 1.
    """
    path = Path(directory)
    regions = tuple(scratch) if scratch is not None else default_scratch(memory)
    _check(memory, regions)
    path.mkdir(parents=True, exist_ok=True)
    (path / DISK).mkdir()
    with open(path / MEMORY_FILE, "xb") as file:
        file.truncate(ram_ranges(memory)[-1].end)
    hardware = Hardware(memory, tuple((r.start, r.end) for r in regions), cmdline, systemd)
    _replace(path / MACHINE_FILE, asdict(hardware))
    return path


def _check(memory: int, scratch: tuple[Range, ...]) -> None:
    if memory % PAGE_SIZE or memory < 32 * MIB:
        raise InvalidRequest(f"memory of {memory} bytes: must be whole pages, and 32 MiB at least")
    previous = 0
    for region in scratch:
        inside = any(ram.start <= region.start < region.end <= ram.end for ram in ram_ranges(memory))
        if not inside or region.start < previous or region.start % SCRATCH_ALIGN or region.end % SCRATCH_ALIGN:
            raise InvalidRequest(f"scratch region {region}: must be ascending, in multiples of 4 MiB, inside RAM")
        previous = region.end


def _replace(path: Path, value: object) -> None:
    """Write JSON so that a reader finds the old or the new, never a half."""
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
