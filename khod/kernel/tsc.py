# SPDX-License-Identifier: LGPL-2.1-or-later
"""The time stamp counter, the one clock that runs on through a kexec.

It is read as MSR 0x10 through /dev/cpu/0/msr, since the instruction itself needs an executable mapping, which hardened
hosts bar. QEMU's emulation answers 0 to that MSR: then the instruction is tried after all.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

IA32_TIME_STAMP_COUNTER = 0x10
_RDTSC = bytes.fromhex("0faee8 0f31 48c1e220 4809d0 c3")
"""lfence; rdtsc; shl rdx, 32; or rax, rdx; ret."""

Reader = Callable[[], int]


def reader(msr: str = "/dev/cpu/0/msr") -> Reader | None:
    """A function that reads the counter; None where there is none that we may read."""
    if platform.machine() != "x86_64":
        return None
    return _by_msr(msr) or _by_instruction()


def _by_msr(path: str) -> Reader | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no CONFIG_X86_MSR, module not loaded, no CAP_SYS_RAWIO, lockdown
        return None

    def read() -> int:
        return int.from_bytes(os.pread(fd, 8, IA32_TIME_STAMP_COUNTER), "little")

    try:
        if read():
            return read
    except OSError:  # a hypervisor that hides it
        pass
    os.close(fd)
    return None


def _by_instruction() -> Reader | None:
    import ctypes
    import mmap

    try:
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    code.write(_RDTSC)
    function = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))

    def read() -> int:
        assert code  # the mapping lives as long as the function that runs in it
        return int(function())

    return read
