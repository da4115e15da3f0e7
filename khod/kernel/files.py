# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files in memory, and descriptors: the port `Files` of the running kernel. A machine's descriptors are real ones here."""

from __future__ import annotations

import errno
import fcntl
import os
import stat as st
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from khod.abi.liveupdate import SESSION_LINK_PREFIX
from khod.core.ports import WINDOW, FileStat
from khod.core.refusals import refused
from khod.folio.units import PAGE_SIZE

F_ADD_SEALS = 1033
F_GET_SEALS = 1034
MFD_EXEC = 0x10
"""linux/fcntl.h and linux/memfd.h: Python 3.11 does not name MFD_EXEC."""

_GUEST_MEMFD_LINKS = ("/[kvm-gmem] (deleted)", "anon_inode:[kvm-gmem]")
_VFIO_LINK = "anon_inode:[vfio-device]"
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_BLOCK = 512
"""The unit of st_blocks, whatever the file system."""


class KernelFiles:
    """The port `Files` of the running kernel."""

    def memfd(self, name: str, size: int) -> int:
        """See the port."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        with refused("memfd", f"{name!r} of {size} bytes"):
            try:
                fd = os.memfd_create(name, flags | MFD_EXEC)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                # Since Linux 6.3 (105ff5339f49, "mm/memfd: add MFD_NOEXEC_SEAL and MFD_EXEC"). Before, all are executable.
                fd = os.memfd_create(name, flags)
            try:
                os.ftruncate(fd, size)
            except OSError:
                os.close(fd)
                raise
        return fd

    def hugetlb(self, name: str, size: int, page_size: int) -> int:
        """See the port."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | (page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
        with refused("hugetlb", f"{name!r} of {size} bytes in pages of {page_size}"):
            fd = os.memfd_create(name, flags)
            try:
                os.ftruncate(fd, size)
            except OSError:
                os.close(fd)
                raise
        return fd

    def specimen(self, kind: str) -> int:
        """See the port."""
        from khod.kernel.specimen import specimen  # once for each kind, and for most hosts never

        return specimen(kind)

    def stat(self, fd: int) -> FileStat:
        """See the port."""
        with refused("stat", f"descriptor {fd}"):
            status = os.fstat(fd)
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            seals = _seals(fd)
            kind = _kind(fd, status, sealable=seals is not None)
            return FileStat(
                kind=kind,
                size=status.st_size,
                allocated=status.st_blocks * _BLOCK,
                inode=(status.st_dev, status.st_ino),
                seals=seals or 0,
                readable=not flags & os.O_PATH and flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR),
                writable=not flags & os.O_PATH and flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR),
                mappable=kind != "guest_memfd" or _mappable(fd),
                page_size=os.fstatvfs(fd).f_bsize if kind == "hugetlb" else PAGE_SIZE,
            )

    def resident(self, fd: int) -> int:
        """See the port."""
        with refused("stat", f"descriptor {fd}"):
            status = os.fstat(fd)
            kind = _kind(fd, status, sealable=_seals(fd) is not None)
            allocated = status.st_blocks * _BLOCK
            if kind == "guest_memfd":
                return _in_memory(fd, [(0, status.st_size)]) if _mappable(fd) else 0
            if kind != "memfd" or not allocated or not _swap_in_use():
                return allocated
            return min(_in_memory(fd, _extents(fd, status.st_size)), allocated)

    def read(self, fd: int, offset: int, length: int) -> bytes:
        """See the port."""
        parts = []
        with refused("read", f"descriptor {fd}, {length} bytes at {offset}"):
            while length and (part := os.pread(fd, length, offset)):
                parts.append(part)
                offset += len(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, fd: int, offset: int, data: bytes | memoryview) -> None:
        """See the port."""
        view = memoryview(data).cast("B")
        with refused("write", f"descriptor {fd}, {len(view)} bytes at {offset}"):
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """See the port."""
        from khod.kernel.libc import Mapping  # ctypes: only hosts that copy pay for it

        if not length:
            return
        with (
            refused("copy", f"descriptor {source} to {target}, {length} bytes at {offset}"),
            Mapping(source, offset, length) as theirs,
            Mapping(target, offset, length, writable=True) as ours,
        ):
            theirs.populate()
            ours.populate()
            ours.fill(theirs)

    def add_seals(self, fd: int, seals: int) -> None:
        """See the port."""
        with refused("add_seals", f"descriptor {fd}, seals {seals:#x}"):
            fcntl.fcntl(fd, F_ADD_SEALS, seals)

    def truncate(self, fd: int, size: int) -> None:
        """See the port."""
        with refused("truncate", f"descriptor {fd} to {size} bytes"):
            os.ftruncate(fd, size)

    def duplicate(self, fd: int) -> int:
        """See the port."""
        with refused("duplicate", f"descriptor {fd}"):
            return os.dup(fd)

    def close(self, fd: int) -> None:
        """See the port."""
        with refused("close", f"descriptor {fd}"):
            os.close(fd)

    def adopt(self, real: int) -> int:
        """See the port."""
        with refused("adopt", f"descriptor {real}"):
            os.set_inheritable(real, False)
        return real

    def export(self, fd: int) -> int:
        """See the port."""
        with refused("export", f"descriptor {fd}"):
            return os.dup(fd)


def _seals(fd: int) -> int | None:
    # Only shmem and hugetlbfs know seals (mm/memfd.c, memfd_file_seals_ptr): everybody else says EINVAL, O_PATH EBADF.
    try:
        return fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EBADF):
            raise
        return None


def _kind(fd: int, status: os.stat_result, *, sealable: bool) -> str:
    link = str(Path(f"/proc/self/fd/{fd}").readlink())
    if st.S_ISREG(status.st_mode):
        if sealable and status.st_nlink == 0:
            # Both answer to seals; hugetlbfs_statfs() gives the size of its huge pages as block size, shmem a page.
            return "hugetlb" if os.fstatvfs(fd).f_bsize > os.sysconf("SC_PAGESIZE") else "memfd"
        return "guest_memfd" if link in _GUEST_MEMFD_LINKS and status.st_nlink <= 1 else "other"
    if st.S_ISCHR(status.st_mode):
        return _character_device(status.st_rdev)
    if link.startswith(SESSION_LINK_PREFIX.rstrip()):
        return "session"
    return "vfio" if link == _VFIO_LINK else "other"


def _character_device(device: int) -> str:
    # By the kernel's own name of the device: the path it was opened by may be anything.
    with suppress(OSError):
        target = Path(f"/sys/dev/char/{os.major(device)}:{os.minor(device)}").readlink()
        if target.match("misc/iommu"):
            return "iommufd"
        if target.parent.name == "vfio-dev":
            return "vfio"
    return "other"


def _mappable(fd: int) -> bool:
    """Whether a guest_memfd is shared with the host: one that is private has no mapping, or only a touch of SIGBUS."""
    from khod.kernel.libc import Mapping

    try:
        with Mapping(fd, 0, PAGE_SIZE) as page:
            page.populate()
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.EFAULT):
            raise
        return False
    return True


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a memfd has pages, in memory or swapped out: the holes of a sparse file can be many times what memory is."""
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # the position of `fd` is its owner's, and comes through
    try:
        end = 0
        while end < size:
            try:
                start = os.lseek(own, end, os.SEEK_DATA)
            except OSError as e:
                if e.errno == errno.ENXIO:  # none from there on
                    return
                raise
            end = os.lseek(own, start, os.SEEK_HOLE)
            yield start // PAGE_SIZE * PAGE_SIZE, end
    finally:
        os.close(own)


def _in_memory(fd: int, extents: Iterable[tuple[int, int]]) -> int:
    from khod.kernel.libc import Mapping  # ctypes: only hosts that swap, or have guest_memfds, pay for it

    pages = 0
    for start, end in extents:
        for offset in range(start, end, WINDOW):
            with Mapping(fd, offset, min(WINDOW, end - offset)) as window:
                pages += window.resident().translate(_LOWEST_BIT).count(1)
    return pages * PAGE_SIZE


def _swap_in_use() -> bool:
    # Filename Type Size Used Priority, below one line of headings
    return any(int(line.split()[3]) for line in Path("/proc/swaps").read_text().splitlines()[1:])
