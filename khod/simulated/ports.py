# SPDX-License-Identifier: LGPL-2.1-or-later
# ruff: noqa: D102 — the contracts stand in khod.core.ports, once for both machines
"""The ports of `khod.core.ports` on a simulated machine: each method is one system call of one process.

Contracts are those of the Protocols. The calls that faults can be injected into bear the names of the methods, except
``window`` (one for each that `Frames.windows` yields), ``frames`` (`Frames.pages`), ``memory_read`` (`Memory.read`),
``store_read``, ``store_append`` and ``store_cut`` (`Store`), ``command_line`` (`Kexec.running_cmdline`), and
``manager_present``, ``manager_doubt``, ``manager_inhibit`` and ``manager_kexec`` (`ServiceManager`). Retrieving
goes through the custodian, as `Custody` says; `KernelLiveUpdate` makes the kernel's own calls.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from khod.abi.ioas_table import Mapping as IoasMapping
from khod.abi.vfio import MigrationState
from khod.core import images, ports
from khod.core.devices import IovaRange, Neighbour, PciDevice
from khod.core.ports import WINDOW, Boot, FileStat, FolioWindow, Image, KernelFacts, Machine, MemoryFigures, Stamp
from khod.core.refusals import REFUSALS, deposit_name, preserve_refusal, refusal, session_name
from khod.folio.units import Folio, Range
from khod.simulated.faults import OpenFailed
from khod.simulated.process import Process, RealFd

_DEVICE_CALLS = ("probe", "create_session", "retrieve_session")
_REFUSED_AS = {
    "kernel_retrieve_session": "retrieve_session",
    "kernel_retrieve_fd": "retrieve_fd",
    "manager_inhibit": "inhibit",
    "manager_kexec": "kexec",
}
"""Calls whose failures `khod.core.refusals` knows by another name."""


@dataclass(frozen=True)
class _Port:
    """What all have in common: a process to make calls, and the translation of its failures."""

    process: Process

    def _call(self, what: str, name: str, *args: Any) -> Any:
        """Call `name`; a failure becomes its exception, about `what`."""
        try:
            return self.process.call(name, *args)
        except OpenFailed as error:
            raise refusal("open_device", error.errno or 0, f"/dev/liveupdate: {error.strerror}")
        except OSError as error:
            number = error.errno or 0
            name = _REFUSED_AS.get(name, name)
            opening = name in _DEVICE_CALLS and number not in REFUSALS.get(name, {})
            raise refusal("open_device" if opening else name, number, f"{what}: {error.strerror}")


class LiveUpdate(_Port):
    """See `khod.core.ports.LiveUpdate`."""

    def probe(self) -> None:
        self._call("device", "probe")

    def create_session(self, name: str) -> int:
        return int(self._call(f"session {name!r}", "create_session", session_name(name)))

    def retrieve_session(self, name: str) -> int:
        return int(self._call(f"session {name!r}", "retrieve_session", session_name(name)))

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        try:
            self.process.call("preserve_fd", session, fd, token, True)
        except OSError as error:
            what = f"descriptor {fd} as token {token} of session {session}: {error.strerror}"
            size = self.process.call("stat", fd)["size"] if error.errno == errno.ENOMEM else 0
            raise preserve_refusal(error.errno or 0, what, size)

    def retrieve_fd(self, session: int, token: int) -> int:
        return int(self._call(f"token {token} of session {session}", "retrieve_fd", session, token))

    def finish(self, session: int) -> None:
        self._call(f"session {session}", "finish", session)

    def session_name(self, session: int) -> str:
        raw = bytes(self._call(f"descriptor {session}", "session_name", session))
        return raw.decode("utf-8", "surrogateescape")


class KernelLiveUpdate(LiveUpdate):
    """The same past the custodian: what is retrieved, only the calling process holds."""

    def retrieve_session(self, name: str) -> int:
        return int(self._call(f"session {name!r}", "kernel_retrieve_session", session_name(name)))

    def retrieve_fd(self, session: int, token: int) -> int:
        return int(self._call(f"token {token} of session {session}", "kernel_retrieve_fd", session, token))


class Files(_Port):
    """See `khod.core.ports.Files`."""

    def memfd(self, name: str, size: int) -> int:
        return int(self._call(f"{name!r} of {size} bytes", "memfd", size))

    def hugetlb(self, name: str, size: int, page_size: int) -> int:
        return int(self._call(f"{name!r} of {size} bytes in pages of {page_size}", "hugetlb", size, page_size))

    def specimen(self, kind: str) -> int:
        return int(self._call(f"a {kind} to try things on", "specimen", kind))

    def stat(self, fd: int) -> FileStat:
        found = self._call(f"descriptor {fd}", "stat", fd)
        return FileStat(**{**found, "inode": tuple(found["inode"])})

    def resident(self, fd: int) -> int:
        return int(self._call(f"descriptor {fd}", "resident", fd))

    def read(self, fd: int, offset: int, length: int) -> bytes:
        return bytes(self._call(f"descriptor {fd}", "read", fd, offset, length))

    def write(self, fd: int, offset: int, data: bytes | memoryview) -> None:
        self._call(f"descriptor {fd}, {len(data)} bytes at {offset}", "write", fd, offset, data)

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        what = f"descriptor {source} to {target}, {length} bytes at {offset}"
        self._call(what, "copy", source, target, offset, length)

    def add_seals(self, fd: int, seals: int) -> None:
        self._call(f"descriptor {fd}, seals {seals:#x}", "add_seals", fd, seals)

    def truncate(self, fd: int, size: int) -> None:
        self._call(f"descriptor {fd} to {size} bytes", "truncate", fd, size)

    def duplicate(self, fd: int) -> int:
        return int(self._call(f"descriptor {fd}", "duplicate", fd))

    def close(self, fd: int) -> None:
        self._call(f"descriptor {fd}", "close", fd)

    def adopt(self, real: int) -> int:
        try:
            return int(self._call(f"host descriptor {real}", "adopt", RealFd(real)))
        finally:
            os.close(real)

    def export(self, fd: int) -> int:
        found = self._call(f"descriptor {fd}", "export", fd)
        return found.fd if isinstance(found, RealFd) else int(found)


class Frames(_Port):
    """See `khod.core.ports.Frames`."""

    def windows(self, fd: int) -> Iterator[FolioWindow]:
        size = int(self._call(f"descriptor {fd}", "stat", fd)["size"])
        for offset in range(0, size, WINDOW):
            raw_pfns, raw_orders = self._call(f"descriptor {fd} at {offset:#x}", "window", fd, offset)
            pfns, orders = array("Q"), array("B")
            pfns.frombytes(raw_pfns)
            orders.frombytes(raw_orders)
            yield FolioWindow(offset, pfns, orders)

    def pages(self, fd: int, indices: Sequence[int]) -> list[tuple[int, Folio]]:
        found = self._call(f"descriptor {fd}", "frames", fd, list(indices))
        return [(pfn, Folio(head, order)) for pfn, head, order in found]


class Memory(_Port):
    """See `khod.core.ports.Memory`."""

    def read(self, phys: int, length: int) -> bytes:
        try:
            return bytes(self.process.call("memory_read", phys, length))
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise ValueError(error.strerror)
            raise refusal("memory_read", error.errno or 0, f"{length} bytes at {phys:#x}")

    def ram(self) -> tuple[Range, ...]:
        return tuple(Range(start, end) for start, end in self._call("layout", "ram"))

    def scratch(self) -> tuple[Range, ...]:
        return tuple(Range(start, end) for start, end in self._call("layout", "scratch"))

    def figures(self) -> MemoryFigures:
        return MemoryFigures(**self._call("figures", "figures"))

    def free_huge_pages(self, page_size: int) -> int:
        return int(self._call(f"pools of {page_size} bytes", "free_huge_pages", page_size))


class Kexec(_Port):
    """See `khod.core.ports.Kexec`. Images are files of the host."""

    def open(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> Image:
        return images.open_image(kernel, initrd, self.running_cmdline() if cmdline is None else cmdline)

    def release(self, image: Image) -> None:
        images.close_image(image)

    def load(self, image: Image) -> None:
        images.check_unchanged(image)
        initrd = RealFd(image.initrd_fd) if image.initrd_fd >= 0 else -1
        self._call(image.kernel, "load", RealFd(image.kernel_fd), initrd, image.cmdline)

    def unload(self) -> None:
        self._call("image", "unload")

    def loaded(self) -> bool:
        return bool(self._call("image", "loaded"))

    def running_cmdline(self) -> str:
        return str(self._call("/proc/cmdline", "command_line"))

    def execute(self) -> NoReturn:
        self._call("reboot(KEXEC)", "execute")
        raise AssertionError("the kernel returned from a jump without an error")


class Clock(_Port):
    """See `khod.core.ports.Clock`."""

    def stamp(self) -> Stamp:
        return Stamp(*self._call("clocks", "stamp"))


class Store(_Port):
    """See `khod.core.ports.Store`."""

    def read(self) -> bytes:
        return bytes(self._call("journal", "store_read"))

    def append(self, data: bytes) -> None:
        self._call("journal", "store_append", data)

    def cut(self, length: int) -> None:
        self._call("journal", "store_cut", length)


class FileSystems(_Port):
    """See `khod.core.ports.FileSystems`."""

    def sync(self) -> None:
        self._call("/", "sync")


class BootInfo(_Port):
    """See `khod.core.ports.BootInfo`."""

    def boot(self) -> Boot:
        return Boot(*self._call("boot", "boot"))


class Processes(_Port):
    """See `khod.core.ports.Processes`."""

    def listing(self) -> tuple[ports.Process, ...]:
        return tuple(ports.Process(pid, name) for pid, name in self._call("processes", "listing"))

    def descriptor(self, pid: int, fd: int) -> int:
        return int(self._call(f"number {fd} of process {pid}", "descriptor", pid, fd))


class Custody(_Port):
    """See `khod.core.ports.Custody`."""

    def keep(self, name: str, fd: int) -> None:
        self._call(f"{name!r}, descriptor {fd}", "keep", deposit_name(name), fd)

    def kept(self) -> Sequence[str]:
        return list(self._call("custody", "kept"))

    def take(self, name: str) -> int:
        return int(self._call(repr(name), "take", name))

    def drop(self, names: Sequence[str]) -> None:
        self._call(", ".join(names), "drop", list(names))

    def sessions(self) -> Sequence[str]:
        return list(self._call("custody", "sessions"))

    def release(self, session: str) -> None:
        self._call(f"session {session!r}", "release", session)

    def offer(self, sessions: Sequence[int]) -> None:
        self._call(f"{len(sessions)} sessions", "offer", list(sessions))

    def withdraw(self) -> None:
        self._call("custody", "withdraw")

    def room(self) -> int:
        return int(self._call("custody", "room"))

    def doubt(self, size: int, files: int) -> str:
        return str(self._call("custody", "doubt", size, files))


class ServiceManager(_Port):
    """See `khod.core.ports.ServiceManager`. `kexec` does not return: whoever calls it is stopped at once."""

    def present(self) -> bool:
        return bool(self._call("PID 1", "manager_present"))

    def doubt(self) -> str:
        return str(self._call("PID 1", "manager_doubt"))

    def stop_commands(self, units: Collection[str], pids: Collection[int]) -> Mapping[str, str]:
        return {}  # a simulated machine's processes belong to no unit

    def inhibit(self, why: str) -> int:
        return int(self._call("logind", "manager_inhibit", why))

    def kexec(self) -> None:
        self._call("PID 1", "manager_kexec")


class Devices(_Port):
    """See `khod.core.devices.Devices`."""

    def open_iommu(self) -> int:
        return int(self._call("/dev/iommu", "open_iommu"))

    def ioas_alloc(self, iommufd: int) -> int:
        return int(self._call(f"descriptor {iommufd}", "ioas_alloc", iommufd))

    def iova_ranges(self, iommufd: int, ioas: int) -> Sequence[IovaRange]:
        return [IovaRange(*found) for found in self._call(f"IOAS {ioas}", "iova_ranges", iommufd, ioas)]

    def huge_pages(self, iommufd: int, ioas: int, allowed: bool) -> None:
        self._call(f"IOAS {ioas}", "huge_pages_option", iommufd, ioas, allowed)

    def map_file(self, iommufd: int, ioas: int, fd: int, mapping: IoasMapping) -> None:
        self._call(f"{mapping} in IOAS {ioas}, descriptor {fd}", "map_file", iommufd, ioas, fd, list(mapping))

    def unmap(self, iommufd: int, ioas: int, iova: int, length: int) -> int:
        return int(self._call(f"{length:#x} bytes at {iova:#x} in IOAS {ioas}", "unmap", iommufd, ioas, iova, length))

    def look(self, address: str) -> PciDevice | None:
        found = self._call(address, "look", address)
        if found is None:
            return None
        neighbours = tuple(Neighbour(*other) for other in found.pop("neighbours"))
        reserved = tuple(IovaRange(*r) for r in found.pop("reserved"))
        return PciDevice(neighbours=neighbours, reserved=reserved, **found)

    def override(self, address: str) -> None:
        self._call(address, "override", address)

    def open_device(self, address: str) -> int:
        return int(self._call(address, "open_vfio", address))

    def address(self, device: int) -> str:
        return str(self._call(f"descriptor {device}", "address", device))

    def bind(self, device: int, iommufd: int) -> None:
        self._call(f"descriptor {device} to iommufd {iommufd}", "bind", device, iommufd)

    def attach(self, device: int, ioas: int) -> None:
        self._call(f"descriptor {device} to IOAS {ioas}", "attach", device, ioas)

    def shape(self, device: int) -> list[int]:
        return [int(n) for n in self._call(f"descriptor {device}", "shape", device)]

    def read_config(self, device: int, offset: int, length: int) -> bytes:
        return bytes(self._call(f"descriptor {device}", "read_config", device, offset, length))

    def write_config(self, device: int, offset: int, data: bytes) -> None:
        self._call(f"descriptor {device}, {len(data)} bytes at {offset:#x}", "write_config", device, offset, data)

    def migration(self, device: int) -> int | None:
        found = self._call(f"descriptor {device}", "migration", device)
        return None if found is None else int(found)

    def set_state(self, device: int, state: MigrationState) -> int:
        return int(self._call(f"descriptor {device} to {state.name}", "set_state", device, int(state)))

    def read_state(self, fd: int, length: int) -> bytes:
        return bytes(self._call(f"descriptor {fd}", "read_state", fd, length))

    def write_state(self, fd: int, data: bytes) -> None:
        self._call(f"descriptor {fd}, {len(data)} bytes", "write_state", fd, data)


class RunningKernel(_Port):
    """See `khod.core.ports.RunningKernel`."""

    def facts(self) -> KernelFacts:
        from khod.abi import formats  # not on the way to restored

        told = self._call("facts", "facts")
        scratch = tuple(Range(start, end) for start, end in told.pop("scratch"))
        written = tuple(sorted(formats.parse(text) for text in told.pop("formats")))
        return KernelFacts(
            machine="x86-64",
            loads_left=None,
            debugfs=True,
            lacking=(),
            headroom=None,
            cgroup="",
            scratch=scratch,
            formats=written,
            formats_source="the machine says so",
            **told,
        )


def machine(process: Process) -> Machine:
    """All ports, as `process` sees them."""
    return Machine(
        liveupdate=LiveUpdate(process),
        files=Files(process),
        frames=Frames(process),
        memory=Memory(process),
        kexec=Kexec(process),
        clock=Clock(process),
        store=Store(process),
        filesystems=FileSystems(process),
        boot=BootInfo(process),
        processes=Processes(process),
        custody=Custody(process),
        manager=ServiceManager(process),
        kernel=RunningKernel(process),
        devices=Devices(process),
    )
