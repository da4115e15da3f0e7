# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python has no name for, by ctypes. Errors are OSError."""

from __future__ import annotations

import ctypes
import os

MS_MOVE = 8192
MNT_DETACH = 2
"""include/uapi/linux/mount.h; include/linux/fs.h."""
NR_FINIT_MODULE = 313
"""arch/x86/entry/syscalls/syscall_64.tbl."""
MODULE_INIT_COMPRESSED_FILE = 4
"""include/uapi/linux/module.h: the kernel decompresses it."""
MADV_POPULATE_READ = 22
PAGE = 4096
_PROT_READ, _MAP_SHARED = 1, 1
_FAILED = (1 << 64) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    _check(_libc.mount(*words, ctypes.c_ulong(flags), os.fsencode(options) or None), f"mount {source} at {target}")


def detach(target: str) -> None:
    """umount2(2) with MNT_DETACH: whoever has something open there keeps it."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"unmount {target}")


def load_module(path: str) -> None:
    """finit_module(2). One that is there already: FileExistsError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = 0 if path.endswith(".ko") else MODULE_INIT_COMPRESSED_FILE
        _check(_libc.syscall(ctypes.c_long(NR_FINIT_MODULE), fd, b"", flags), f"load {path}")
    finally:
        os.close(fd)


class Page:
    """One page of a file, mapped and populated, at `address`; a context manager."""

    def __init__(self, fd: int, index: int) -> None:
        address = _libc.mmap(None, PAGE, _PROT_READ, _MAP_SHARED, fd, index * PAGE)
        if address is None or address == _FAILED:
            _check(-1, f"map page {index}")
        self.address = int(address)

    def __enter__(self) -> Page:
        _check(_libc.madvise(self.address, PAGE, MADV_POPULATE_READ), "populate a page")
        return self

    def __exit__(self, *_: object) -> None:
        _libc.munmap(self.address, PAGE)


def survive() -> None:
    """Have this process, and those that are cloned from it, spared when all others are killed for another root file system to
    be moved to: the first letter of its command line becomes '@' (systemd, "Root Storage Daemons"). It takes /proc."""
    with open("/proc/self/stat", "rb") as f:
        fields = f.read().rpartition(b")")[2].split()
    # arg_start is field 48 (proc_pid_stat(5)); the first after the name is the third.
    ctypes.memset(int(fields[48 - 3]), ord("@"), 1)
    with open("/proc/self/comm", "w") as name:
        name.write("khod-early")


def began(pid: int | str = "self") -> int:
    """When a process began, in ticks of this boot."""
    with open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[22 - 3])
