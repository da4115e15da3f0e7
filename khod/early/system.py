# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls that Python has no name for. Errors are OSError."""

from __future__ import annotations

import os

from khod.custodian.native import Long, error, function

CLONE_NEWNS = 0x20000
"""include/uapi/linux/sched.h."""
MS_MOVE, MS_REC, MS_PRIVATE = 8192, 16384, 1 << 18
MNT_DETACH = 2
"""include/uapi/linux/mount.h; include/linux/fs.h."""
NR_FINIT_MODULE = 313
"""arch/x86/entry/syscalls/syscall_64.tbl."""
MODULE_INIT_COMPRESSED_FILE = 4
"""include/uapi/linux/module.h: the kernel decompresses it."""
NR_PIDFD_GETFD = 438
MADV_POPULATE_READ = 22
PAGE = 4096
SOL_SOCKET, SO_PASSRIGHTS = 1, 83
"""include/uapi/asm-generic/socket.h."""
_PROT_READ, _MAP_SHARED = 1, 1
_INT = (1 << 32) - 1
"""What counts of a result that is an int of C: 0, unless it failed."""

_mount, _umount2, _syscall = function("mount"), function("umount2"), function("syscall")
_unshare, _setsockopt = function("unshare"), function("setsockopt")
_mmap, _munmap, _madvise = function("mmap"), function("munmap"), function("madvise")


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    words = [os.fsencode(word) for word in (source, target, kind)]
    if _mount(*words, Long(flags), os.fsencode(options) or None) & _INT:
        raise error(f"mount {source} at {target}")


def detach(target: str) -> None:
    """umount2(2) with MNT_DETACH: whoever has something open there keeps it."""
    if _umount2(os.fsencode(target), Long(MNT_DETACH)) & _INT:
        raise error(f"unmount {target}")


def mounts_apart() -> None:
    """unshare(2) with CLONE_NEWNS, and nothing is passed on to or from where we were: what is mounted for us stays so, whatever
    becomes of the root."""
    if _unshare(Long(CLONE_NEWNS)) & _INT:
        raise error("unshare the mounts")
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def load_module(path: str) -> None:
    """finit_module(2). One that is there already: FileExistsError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = 0 if path.endswith(".ko") else MODULE_INIT_COMPRESSED_FILE
        if _syscall(Long(NR_FINIT_MODULE), Long(fd), b"", Long(flags)):
            raise error(f"load {path}")
    finally:
        os.close(fd)


def taken(pid: int, number: int) -> int:
    """pidfd_getfd(2): a duplicate of a process's descriptor; the caller's."""
    process = os.pidfd_open(pid)
    try:
        fd = _syscall(Long(NR_PIDFD_GETFD), Long(process), Long(number), Long(0))
        if fd < 0:
            raise error(f"take descriptor {number} of process {pid}")
        return fd
    finally:
        os.close(process)


def pass_descriptors(listener: int, on: bool) -> None:
    """Whether those who connect to a socket from now on can send descriptors to it."""
    if _setsockopt(Long(listener), Long(SOL_SOCKET), Long(SO_PASSRIGHTS), int(on).to_bytes(4, "little"), Long(4)) & _INT:
        raise error("say who may send descriptors")


class Page:
    """One page of a file, mapped and populated, at `address`; a context manager."""

    def __init__(self, fd: int, index: int) -> None:
        self.address = _mmap(None, Long(PAGE), Long(_PROT_READ), Long(_MAP_SHARED), Long(fd), Long(index * PAGE))
        if self.address == -1:
            raise error(f"map page {index}")

    def __enter__(self) -> Page:
        if _madvise(Long(self.address), Long(PAGE), Long(MADV_POPULATE_READ)) & _INT:
            raise error("populate a page")
        return self

    def __exit__(self, *_: object) -> None:
        _munmap(Long(self.address), Long(PAGE))


def survive() -> None:
    """Have this process, and those that are cloned from it, spared when all others are killed for another root file system to
    be moved to: the first letter of its command line becomes '@' (systemd, "Root Storage Daemons"). It takes /proc."""
    with open("/proc/self/stat", "rb") as f:
        fields = f.read().rpartition(b")")[2].split()
    # arg_start is field 48 (proc_pid_stat(5)); the first after the name is the third.
    fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, b"@", int(fields[48 - 3]))
    finally:
        os.close(fd)
    with open("/proc/self/comm", "w") as name:
        name.write("khod-early")


def began(pid: int | str = "self") -> int:
    """When a process began, in ticks of this boot."""
    with open(f"/proc/{pid}/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[22 - 3])
