# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one door to system calls that the standard library does not have.

Whoever is on the restore path imports this inside the function that needs it: ctypes is one of the dearest modules to
import, and most of the restore path does without.

Each function raises OSError with the kernel's errno and the name of the call. Prototypes are private to this module:
``libc["name"]`` makes an object of its own, where ``libc.name`` would share one with every other user of ctypes.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int, c_long, c_size_t, c_ubyte, c_ulong, c_void_p
from typing import Any

from khod.abi import kexec

NR_REBOOT = 169
NR_KEXEC_FILE_LOAD = 320
"""arch/x86/entry/syscalls/syscall_64.tbl."""

PROT_READ = 1
PROT_WRITE = 2
MAP_SHARED = 1
MADV_POPULATE_READ = 22
MADV_POPULATE_WRITE = 23
"""include/uapi/asm-generic/mman-common.h; Linux 5.14."""

_MAP_FAILED = c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)


def _failed(name: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{name}: {os.strerror(number)}")


def _prototype(name: str, restype: Any, *argtypes: Any) -> Any:
    def check(result: Any, _function: Any, _arguments: Any) -> Any:
        if result in (-1, _MAP_FAILED):
            raise _failed(name)
        return result

    function = _libc[name]
    function.restype, function.errcheck = restype, check
    if argtypes:
        function.argtypes = argtypes
    return function


_syscall = _prototype("syscall", c_long)
_syncfs = _prototype("syncfs", c_int, c_int)
_mmap = _prototype("mmap", c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_long)
_munmap = _prototype("munmap", c_int, c_void_p, c_size_t)
_madvise = _prototype("madvise", c_int, c_void_p, c_size_t, c_int)
_mincore = _prototype("mincore", c_int, c_void_p, c_size_t, c_void_p)


def kexec_file_load(kernel: int, initrd: int, cmdline: bytes, flags: int) -> None:
    """kexec_file_load(2); `cmdline` without its NUL. `initrd` -1 goes with KEXEC_FILE_NO_INITRAMFS."""
    line = cmdline + b"\0"
    # syscall() is variadic: every argument is wrapped, or ctypes would pass 32 bits of each.
    _syscall(c_long(NR_KEXEC_FILE_LOAD), c_int(kernel), c_int(initrd), c_ulong(len(line)), c_char_p(line), c_ulong(flags))


def reboot_kexec() -> None:
    """reboot(LINUX_REBOOT_CMD_KEXEC). Comes back only by raising OSError."""
    _syscall(
        c_long(NR_REBOOT),
        c_ulong(kexec.LINUX_REBOOT_MAGIC1),
        c_ulong(kexec.LINUX_REBOOT_MAGIC2),
        c_ulong(kexec.LINUX_REBOOT_CMD_KEXEC),
        c_void_p(None),
    )


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    _syncfs(fd)


class Mapping:
    """A shared mapping of `length` bytes of a file, read-only unless `writable`; a context manager. Unlike the mmap module's it
    knows its address, which /proc/self/pagemap is indexed by."""

    def __init__(self, fd: int, offset: int, length: int, *, writable: bool = False) -> None:
        self.length, self.writable = length, writable
        self.address = int(_mmap(None, length, PROT_READ | (PROT_WRITE if writable else 0), MAP_SHARED, fd, offset))

    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """MADV_POPULATE_READ or _WRITE: every page of the range gets its page table entry, or OSError."""
        advice = MADV_POPULATE_WRITE if self.writable else MADV_POPULATE_READ
        _madvise(self.address + offset, self.length if length is None else length, advice)

    def fill(self, source: Mapping) -> None:
        """Copy all of `source`, which is as long. Other threads run meanwhile. Both are populated: a page that is not there
        would be SIGBUS."""
        ctypes.memmove(self.address, source.address, source.length)

    def resident(self) -> bytes:
        """mincore(2): a byte for every page, with bit 0 set where the page is in memory."""
        pages = -(-self.length // os.sysconf("SC_PAGESIZE"))
        vector = (c_ubyte * pages)()
        _mincore(self.address, self.length, vector)
        return bytes(vector)

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, *_: object) -> None:
        _munmap(self.address, self.length)
