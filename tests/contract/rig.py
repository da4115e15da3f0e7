# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a contract test needs besides the ports: the other side of them, on either machine.

A rig makes the files that workloads bring, in the process that the ports belong to, and does to them what workloads do.
Descriptors are the machine's. What it raises is OSError, as a workload would see it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from khod.core.ports import LiveUpdate, Machine
from khod.simulated import Process, image, machine
from khod.simulated.ports import KernelLiveUpdate as SimulatedLiveUpdate

PAGE = 4096
CARD = "0000:00:04.0"
"""Of the simulated machine."""
EDU = (0x1234, 0x11E8)
"""Vendor and device of QEMU's edu, which stands for devices on either machine."""


class Rig(Protocol):
    """The other side of the ports of `machine`."""

    machine: Machine
    raw: LiveUpdate
    """The kernel's own calls, past the custodian: what is retrieved by them, only the calling process holds."""

    def memfd(self, size: int, contents: Mapping[int, bytes] | None = None, *, noexec: bool = False) -> int:
        """A memfd (MFD_EXEC, or MFD_NOEXEC_SEAL) of holes, but for `contents`, bytes by offset."""
        ...

    def unsupported(self) -> dict[str, int]:
        """Descriptors of files that the kernel does not preserve, by what they are."""
        ...

    def path_only(self, fd: int) -> int:
        """The same file opened with O_PATH."""
        ...

    def read_only(self, fd: int) -> int:
        """The same file opened anew with O_RDONLY."""
        ...

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a hole."""
        ...

    def seek(self, fd: int, position: int | None = None) -> int:
        """Set the position of the open file, or ask for it."""
        ...

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Somebody else keeps /dev/liveupdate open."""
        ...

    @contextmanager
    def client(self, contents: bytes) -> Iterator[tuple[int, int]]:
        """Another process with a memfd: its pid, and the number of the descriptor there. At the end it exits."""
        ...

    def keep_and_die(self, name: str, contents: bytes) -> None:
        """Another process gives a memfd into custody, and is killed."""
        ...

    def retrieve_and_die(self, session: str, token: int) -> None:
        """Another process retrieves a session and a file of it by way of custody, and is killed."""
        ...

    def kernel_image(self) -> str:
        """Path of a kernel that can be loaded."""
        ...

    def card(self) -> str:
        """Address of a PCI device that nobody drives, behind an IOMMU, that neither migrates nor resets."""
        ...


class SimulatedRig:
    """On a simulated machine, whichever way its kernel is reached."""

    def __init__(self, process: Process, spawn: Callable[[str], Process], images: Path) -> None:
        """`spawn` makes a process of that name; what `images` become are files there."""
        self.machine = machine(process)
        self.raw: LiveUpdate = SimulatedLiveUpdate(process)
        self._process = process
        self._spawn = spawn
        self._other = spawn("other")
        self._images = images

    def memfd(self, size: int, contents: Mapping[int, bytes] | None = None, *, noexec: bool = False) -> int:
        fd = self._process.memfd(size, noexec=noexec)
        for offset, data in (contents or {}).items():
            self._process.write(fd, offset, data)
        return fd

    def unsupported(self) -> dict[str, int]:
        return {kind: self._process.special(kind) for kind in ("hugetlb", "other")}

    def path_only(self, fd: int) -> int:
        return self._process.reopen(fd, "path")

    def read_only(self, fd: int) -> int:
        return self._process.reopen(fd, "r")

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._process.punch(fd, offset, length)

    def seek(self, fd: int, position: int | None = None) -> int:
        return self._process.seek(fd, position)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        fd = self._other.open_device()
        yield
        self._other.close(fd)

    @contextmanager
    def client(self, contents: bytes) -> Iterator[tuple[int, int]]:
        fd = self._other.memfd(len(contents))
        self._other.write(fd, 0, contents)
        yield self._other.pid, fd
        self._other.exit()

    def keep_and_die(self, name: str, contents: bytes) -> None:
        with self._victim() as process:
            fd = process.memfd(len(contents))
            process.write(fd, 0, contents)
            machine(process).custody.keep(name, fd)

    def retrieve_and_die(self, session: str, token: int) -> None:
        with self._victim() as process:
            live = machine(process).liveupdate
            live.retrieve_fd(live.retrieve_session(session), token)

    @contextmanager
    def _victim(self) -> Iterator[Process]:
        process = self._spawn("victim")
        yield process
        self._process.kill(process.pid)
        process.exit()

    def card(self) -> str:
        return CARD

    def kernel_image(self) -> str:
        path = self._images / "bzImage"
        path.write_bytes(image.build())
        return str(path)


_VICTIM = """
import os, signal, sys
from pathlib import Path
from khod.kernel.machine import machine
host = machine(Path(sys.argv[1]))
if sys.argv[2] == "keep":
    fd = host.files.memfd("deposit", 0)
    host.files.write(fd, 0, sys.stdin.buffer.read())
    host.custody.keep(sys.argv[3], fd)
else:
    host.liveupdate.retrieve_fd(host.liveupdate.retrieve_session(sys.argv[3]), int(sys.argv[4]))
os.kill(os.getpid(), signal.SIGKILL)
"""
_CLIENT = """
import os, sys
fd = os.memfd_create("client", 0x10)
os.write(fd, sys.stdin.buffer.read(int(sys.argv[1])))
print(fd, flush=True)
sys.stdin.read()
"""


class KernelRig:
    """On the running Linux, as root, with ``kho=on liveupdate=on``. `raw` makes the calls of /dev/liveupdate by itself,
    `bzimage` is what may be loaded, `state` the directory of the machine's journal."""

    def __init__(self, machine: Machine, raw: LiveUpdate, bzimage: str, state: Path) -> None:
        self.machine = machine
        self._state = state
        self.raw = raw
        self._bzimage = bzimage

    def memfd(self, size: int, contents: Mapping[int, bytes] | None = None, *, noexec: bool = False) -> int:
        mfd_noexec_seal, mfd_exec = 0x8, 0x10
        flags = mfd_noexec_seal if noexec else mfd_exec | os.MFD_ALLOW_SEALING
        fd = os.memfd_create("contract", os.MFD_CLOEXEC | flags)
        os.ftruncate(fd, size)
        for offset, data in (contents or {}).items():
            os.pwrite(fd, data, offset)
        return fd

    def unsupported(self) -> dict[str, int]:
        made = {"pipe": os.pipe()[0], "eventfd": os.eventfd(0), "directory": os.open("/", os.O_RDONLY)}
        made["linked file"] = os.open("/proc/self/exe", os.O_RDONLY)
        made["hugetlb"] = os.memfd_create("huge", os.MFD_HUGETLB)
        return made

    def path_only(self, fd: int) -> int:
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)

    def read_only(self, fd: int) -> int:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def punch(self, fd: int, offset: int, length: int) -> None:
        fallocate = ctypes.CDLL(None, use_errno=True)["fallocate64"]
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 3, offset, length):
            raise OSError(ctypes.get_errno(), "fallocate")

    def seek(self, fd: int, position: int | None = None) -> int:
        return os.lseek(fd, 0, os.SEEK_CUR) if position is None else os.lseek(fd, position, os.SEEK_SET)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        fd = os.open("/dev/liveupdate", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(fd)

    @contextmanager
    def client(self, contents: bytes) -> Iterator[tuple[int, int]]:
        argv = [sys.executable, "-c", _CLIENT, str(len(contents))]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(contents)
            child.stdin.flush()
            yield child.pid, int(child.stdout.readline())
            child.stdin.close()

    def keep_and_die(self, name: str, contents: bytes) -> None:
        self._victim("keep", name, given=contents)

    def retrieve_and_die(self, session: str, token: int) -> None:
        self._victim("retrieve", session, str(token))

    def _victim(self, *words: str, given: bytes = b"") -> None:
        argv = [sys.executable, "-c", _VICTIM, str(self._state), *words]
        done = subprocess.run(argv, input=given, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    def kernel_image(self) -> str:
        return self._bzimage

    def card(self) -> str:
        devices = sorted(Path("/sys/bus/pci/devices").iterdir())
        found = [d.name for d in devices if [int((d / n).read_text(), 16) for n in ("vendor", "device")] == list(EDU)]
        assert found, "QEMU has no -device edu"
        return found[0]


def seals_of(fd: int) -> int:
    """F_GET_SEALS of a descriptor of the host."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
