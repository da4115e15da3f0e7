# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls on files and descriptors. Each takes the calling process first and raises OSError."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from khod.core.ports import F_SEAL_EXEC, WINDOW
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE
from khod.simulated.inode import Inode, OpenFile
from khod.simulated.pages import Pages
from khod.simulated.process import RealFd
from khod.simulated.shmem import Shmem
from khod.simulated.special import HUGE_SIZE, Special
from khod.simulated.task import Task

_MAX_ORDER = 18
_STRIDE = 1 << 22


class FileCalls:
    """Files in memory; `tasks` finds the other process where two are concerned."""

    def __init__(self, pages: Pages, special: Special, tasks: Callable[[int], Task]) -> None:
        self._pages = pages
        self._special = special
        self._task = tasks

    def memfd(self, task: Task, size: int, order: int = 0, executable: bool = True, scatter: int | None = None) -> int:
        """memfd_create(2) with MFD_EXEC (or MFD_NOEXEC_SEAL), and the folio order that shmem's policy gives the file."""
        if not 0 <= order <= _MAX_ORDER or size < 0:
            raise OSError(errno.EINVAL, f"size {size}, order {order}")
        inode = Shmem(self._pages, size, order=order, executable=executable)
        inode.scatter = scatter
        inode.seals = 0 if executable else F_SEAL_EXEC
        return task.install(OpenFile(inode))

    def special(self, task: Task, kind: str, size: int = 0, private: bool = False) -> int:
        """A file that is no ordinary memfd: 'hugetlb', 'guest_memfd', 'iommufd', 'vfio', 'other' (a pipe, say)."""
        return task.install(OpenFile(self._special.make(kind, size, private=private)))

    def specimen(self, task: Task, kind: str) -> int:
        """A new file of that kind, the smallest. ENOENT for what only hardware makes."""
        if kind not in ("hugetlb", "guest_memfd", "iommufd"):
            raise OSError(errno.ENOENT, f"nothing here makes a {kind}")
        return self.special(task, kind, PAGE_SIZE if kind == "guest_memfd" else 0)

    def hugetlb(self, task: Task, size: int, page_size: int) -> int:
        """memfd_create(2) with MFD_HUGETLB, and ftruncate(2)."""
        if page_size != HUGE_SIZE or size % page_size:
            raise OSError(errno.EINVAL, f"{size} bytes in pages of {page_size}")
        return self.special(task, "hugetlb", size)

    def free_huge_pages(self, task: Task, page_size: int) -> int:
        """Free ones in the pool of that size."""
        return len(self._special.pool.pool) if page_size == HUGE_SIZE else 0

    def reopen(self, task: Task, fd: int, mode: str) -> int:
        """Open /proc/self/fd/`fd` again: 'r', 'rw', or 'path' for O_PATH."""
        inode = task.lookup(fd).inode
        return task.install(OpenFile(inode, writable=mode == "rw", path_only=mode == "path"))

    def stat(self, task: Task, fd: int) -> dict[str, Any]:
        """fstat(2), F_GET_SEALS, F_GETFL."""
        file = task.lookup(fd)
        return {**asdict(file.inode.stat()), "readable": file.readable, "writable": file.writable}

    def resident(self, task: Task, fd: int) -> int:
        """mincore(2) of all of it."""
        inode = task.lookup(fd).inode
        return inode.present() if isinstance(inode, Shmem) else 0

    def _shmem(self, task: Task, fd: int, *, write: bool = False) -> Shmem:
        file = task.file(fd)
        if write and not file.writable:
            raise OSError(errno.EBADF, f"descriptor {fd} is open for reading only")
        if not isinstance(file.inode, Shmem):
            raise OSError(errno.EINVAL, f"descriptor {fd} is a {file.inode.kind}")
        return file.inode

    def read(self, task: Task, fd: int, offset: int, length: int) -> bytes:
        """pread(2). A guest_memfd has none."""
        inode = self._shmem(task, fd)
        if inode.kind == "guest_memfd":
            raise OSError(errno.ESPIPE, "it can only be mapped")
        return inode.read(offset, length)

    def write(self, task: Task, fd: int, offset: int, contents: bytes) -> None:
        """pwrite(2), all of it. What is no ordinary memfd has none."""
        inode = self._shmem(task, fd, write=True)
        if inode.kind != "memfd":
            raise OSError(errno.ESPIPE if inode.kind == "guest_memfd" else errno.EINVAL, "it can only be mapped")
        inode.write(offset, contents)

    # What is done through mappings, or by a device.

    def _mapped(self, task: Task, fd: int, offset: int, length: int, *, write: bool = False) -> Shmem:
        if write and not task.file(fd).writable:
            raise OSError(errno.EACCES, f"descriptor {fd} is open for reading only")
        inode = self._shmem(task, fd)
        if inode.private:
            raise OSError(errno.ENODEV, "it cannot be mapped")
        if not 0 <= offset <= offset + length <= inode.stat().size:
            raise OSError(errno.EFAULT, "behind the end of the file")
        inode.fault_in(offset, length)
        return inode

    def peek(self, task: Task, fd: int, offset: int, length: int) -> bytes:
        """Look at memory."""
        return self._mapped(task, fd, offset, length).read(offset, length)

    def poke(self, task: Task, fd: int, offset: int, contents: bytes) -> None:
        """Change memory."""
        self._mapped(task, fd, offset, len(contents), write=True).write(offset, contents)

    def copy(self, task: Task, source: int, target: int, offset: int, length: int) -> None:
        """From one mapping to another."""
        theirs = self._mapped(task, source, offset, length)
        ours = self._mapped(task, target, offset, length, write=True)
        while length:
            part = theirs.read(offset, min(length, _STRIDE))
            ours.write(offset, part)
            offset, length = offset + len(part), length - len(part)

    def populate(self, task: Task, fd: int) -> None:
        """fallocate(2) of the whole file."""
        self._shmem(task, fd, write=True).populate()

    def punch(self, task: Task, fd: int, offset: int, length: int) -> None:
        """fallocate(2), FALLOC_FL_PUNCH_HOLE."""
        self._shmem(task, fd, write=True).punch(offset, length)

    def truncate(self, task: Task, fd: int, size: int) -> None:
        """ftruncate(2)."""
        self._shmem(task, fd, write=True).truncate(size)

    def add_seals(self, task: Task, fd: int, seals: int) -> None:
        """fcntl(2), F_ADD_SEALS."""
        file = task.file(fd)
        if not file.writable:
            raise OSError(errno.EPERM, "sealing needs a descriptor that may write")
        self._shmem(task, fd).add_seals(seals)

    def seek(self, task: Task, fd: int, position: int | None = None) -> int:
        """lseek(2): set the position of the open file, or ask for it."""
        file = task.file(fd)
        if position is not None:
            file.position = position
        return file.position

    def duplicate(self, task: Task, fd: int) -> int:
        """dup(2)."""
        return task.install(task.lookup(fd))

    def close(self, task: Task, fd: int) -> None:
        """close(2)."""
        task.close(fd)

    def pass_fd(self, task: Task, fd: int, pid: int) -> int:
        """Send a descriptor to another process (SCM_RIGHTS); its number there."""
        return self._task(pid).install(task.lookup(fd))

    def descriptor(self, task: Task, pid: int, fd: int) -> int:
        """pidfd_getfd(2)."""
        other = self._task(pid)
        if not other.dumpable:
            raise OSError(errno.EPERM, f"{other.name}[{pid}] may not be traced")
        return task.install(other.lookup(fd))

    # Frames.

    def window(self, task: Task, fd: int, offset: int) -> tuple[bytes, bytes]:
        """The folios behind one window: first frames (u64) and orders (u8). ENODATA where a page has no frame."""
        inode = self._shmem(task, fd)
        shift = inode.order + PAGE_SHIFT
        end = min(offset + WINDOW, inode.stat().size)
        pfns = inode.pfns[offset >> shift : ((end - 1) >> shift) + 1]
        if end <= offset or len(pfns) << shift < end - offset or not pfns.all():
            raise OSError(errno.ENODATA, f"a hole in the window at {offset:#x}")
        return pfns.astype("<u8").tobytes(), bytes([inode.order]) * len(pfns)

    def frames(self, task: Task, fd: int, indices: Sequence[int]) -> list[tuple[int, int, int]]:
        """Frame, first frame of the folio, and its order, for each page index."""
        inode = self._shmem(task, fd)
        found = []
        for index in indices:
            slot, within = index >> inode.order, index & ((1 << inode.order) - 1)
            if not 0 <= slot < len(inode.pfns) or not inode.pfns[slot]:
                raise OSError(errno.ENODATA, f"page {index} has no frame")
            head = int(inode.pfns[slot])
            found.append((head + within, head, inode.order))
        return found

    # The host's files.

    def adopt(self, task: Task, real: int) -> int:
        """A descriptor for one of the host, which is consumed. A memfd keeps its bytes there until the jump."""
        try:
            kind = _kind(real)
        except OSError:
            os.close(real)
            raise
        if kind == "memfd":
            inode: Inode = Shmem(self._pages)
            assert isinstance(inode, Shmem)
            inode.adopt(real)
        else:
            inode = Inode(kind, os.fstat(real).st_size)
            os.close(real)
        return task.install(OpenFile(inode))

    def export(self, task: Task, fd: int) -> RealFd:
        """A descriptor of the host for one of this machine; owned by the caller. From now on the file's bytes are kept in a
        memfd of the host, so that what is stored through either is seen through the other."""
        inode = self._shmem(task, fd)
        if inode.backing < 0:
            size = inode.stat().size
            real = os.memfd_create("khod", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(real, size)
                self._pour(inode, real, size)
                fcntl.fcntl(real, fcntl.F_ADD_SEALS, inode.seals)
            except OSError:
                os.close(real)
                raise
            inode.backing = real
        return RealFd(os.dup(inode.backing))

    def _pour(self, inode: Shmem, real: int, size: int) -> None:
        for offset, phys, length in self._pages.written(inode.pfns, inode.order):
            _write(real, offset, self._pages.ram.read(phys, min(length, max(0, size - offset))))


def _kind(real: int) -> str:
    """What a descriptor of the host is, in the words of `khod.core.ports.FileStat`."""
    try:
        fcntl.fcntl(real, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        return "other"
    if fcntl.fcntl(real, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return "memfd"
    try:
        os.pwrite(real, b"", 0)
    except OSError as error:
        if error.errno == errno.EINVAL:  # hugetlbfs has no write: vfs_write says so before it looks at the length
            return "hugetlb"
    return "memfd"


def _write(fd: int, offset: int, contents: bytes) -> None:
    view = memoryview(contents)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
