# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process on the simulated machine, seen from outside the kernel: what a workload, or khod's ports, make their calls with.

Descriptors are numbers in the process's own table. Every method raises OSError where a system call would fail, and
`khod.simulated.faults.ProcessDied` when the process is no more. Nothing here needs numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class RealFd:
    """A descriptor of the host as an argument (borrowed: the kernel gets a duplicate) or as a result (owned)."""

    fd: int


class Transport(Protocol):
    """The way from a process to its kernel. Safe to use from several threads."""

    pid: int

    def call(self, name: str, *args: Any) -> Any:
        """Make a call; arguments and results are JSON's types, bytes, and `RealFd`."""
        ...

    def end(self) -> None:
        """The process exits."""
        ...


class Process:
    """A process. `transport` is its own: two processes never share one."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.transport = transport
        self.name = name

    @property
    def pid(self) -> int:
        """Its number."""
        return self.transport.pid

    def call(self, name: str, *args: Any) -> Any:
        """Make any system call by name."""
        return self.transport.call(name, *args)

    def exit(self) -> None:
        """End; what is open closes."""
        self.transport.end()

    def kill(self, *pids: int) -> None:
        """End other processes, all at once."""
        self.call("kill", *pids)

    def memfd(self, size: int, *, order: int = 0, noexec: bool = False, scatter: int | None = None) -> int:
        """A new memfd of holes. `order` is what shmem's huge page policy gives it, up to 18; `noexec`: MFD_NOEXEC_SEAL;
        `scatter` seeds a random choice of frames, as memory that was long in use has them."""
        return int(self.call("memfd", size, order, not noexec, scatter))

    def special(self, kind: str, size: int = 0, *, private: bool = False) -> int:
        """A file that Linux 7.3 does not preserve: 'hugetlb', 'guest_memfd' (`private`: no mapping shows what is in it),
        'iommufd', 'vfio', 'other'."""
        return int(self.call("special", kind, size, private))

    def write(self, fd: int, offset: int, contents: bytes | memoryview) -> None:
        """pwrite(2) of everything."""
        self.call("write", fd, offset, contents)

    def read(self, fd: int, offset: int, length: int) -> bytes:
        """pread(2)."""
        return bytes(self.call("read", fd, offset, length))

    def peek(self, fd: int, offset: int, length: int) -> bytes:
        """Look at memory through a mapping."""
        return bytes(self.call("peek", fd, offset, length))

    def poke(self, fd: int, offset: int, contents: bytes) -> None:
        """Change memory through a mapping, or as a device does by DMA."""
        self.call("poke", fd, offset, contents)

    def populate(self, fd: int) -> None:
        """Give every hole a page."""
        self.call("populate", fd)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a hole."""
        self.call("punch", fd, offset, length)

    def truncate(self, fd: int, size: int) -> None:
        """Set the size."""
        self.call("truncate", fd, size)

    def seek(self, fd: int, position: int | None = None) -> int:
        """Set the position of the open file, or ask for it (None)."""
        return int(self.call("seek", fd, position))

    def reopen(self, fd: int, mode: str = "rw") -> int:
        """Open the same file anew: 'r', 'rw', 'path'."""
        return int(self.call("reopen", fd, mode))

    def duplicate(self, fd: int) -> int:
        """dup(2)."""
        return int(self.call("duplicate", fd))

    def close(self, fd: int) -> None:
        """close(2)."""
        self.call("close", fd)

    def give(self, fd: int, other: Process) -> int:
        """Send a descriptor, as SCM_RIGHTS does; its number there."""
        return int(self.call("pass_fd", fd, other.pid))

    def open_device(self) -> int:
        """Open /dev/liveupdate and keep it open: everybody else gets EBUSY."""
        return int(self.call("open_device"))

    def load_old(self, cmdline: str) -> None:
        """Load an image by the old kexec_load(2), which carries nothing."""
        self.call("load_old", cmdline)

    def lock_down(self, level: str) -> None:
        """Set the kernel's lockdown: 'integrity', 'confidentiality'."""
        self.call("lock_down", level)

    def limit_custody(self, *, memory: int | None = None, descriptors: int = 1 << 19) -> None:
        """memory.max and LimitNOFILE= of the custodian's unit."""
        self.call("limit_custody", memory, descriptors)

    def inject(self, call: str, **fields: Any) -> None:
        """Plan a fault: `errno`, or none to die; `nth`, `after`, `forever`, `torn`, `pid`, `victims` as
        `faults.Fault` has them."""
        self.call("inject", call, fields)
