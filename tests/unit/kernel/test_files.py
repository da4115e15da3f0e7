# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.files against this host's own memfds, pipes and tmpfs."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.core import ports
from khod.errors import BadDescriptor, FileFrozen, MachineError
from khod.kernel.files import KernelFiles

SHM = Path("/dev/shm")


@pytest.fixture
def files() -> KernelFiles:
    return KernelFiles()


@pytest.fixture
def memfd(files: KernelFiles) -> Iterator[int]:
    fd = files.memfd("unit", 3 * 4096 + 5)
    yield fd
    os.close(fd)


def test_a_memfd_is_all_holes_sealable_executable_and_close_on_exec(files: KernelFiles, memfd: int) -> None:
    found = files.stat(memfd)
    assert (found.kind, found.size, found.allocated, found.seals) == ("memfd", 3 * 4096 + 5, 0, 0)
    assert files.resident(memfd) == 0
    assert (found.readable, found.writable) == (True, True)
    assert os.fstat(memfd).st_mode & 0o111  # executable: a memfd with F_SEAL_EXEC would come back read-only
    assert fcntl.fcntl(memfd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_an_impossible_size_leaks_nothing(files: KernelFiles) -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(MachineError) as refused:
        files.memfd("unit", -1)
    assert refused.value.errno == errno.EINVAL
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_allocated_counts_pages_and_not_holes(files: KernelFiles, memfd: int) -> None:
    files.write(memfd, 4096, b"x")
    assert (files.stat(memfd).allocated, files.resident(memfd)) == (4096, 4096)


def test_seals_are_told_truly(files: KernelFiles, memfd: int) -> None:
    files.add_seals(memfd, ports.F_SEAL_GROW)
    files.add_seals(memfd, ports.F_SEAL_EXEC)
    # F_SEAL_EXEC on an executable file implies the rest of the W^X set (mm/memfd.c).
    assert files.stat(memfd).seals & (ports.F_SEAL_GROW | ports.F_SEAL_EXEC) == ports.F_SEAL_GROW | ports.F_SEAL_EXEC
    files.add_seals(memfd, ports.F_SEAL_SEAL)
    with pytest.raises(FileFrozen):
        files.add_seals(memfd, ports.F_SEAL_WRITE)


def test_a_sealed_size_does_not_change(files: KernelFiles, memfd: int) -> None:
    files.add_seals(memfd, ports.F_SEAL_GROW | ports.F_SEAL_SHRINK)
    for size in (1, 1 << 20):
        with pytest.raises(FileFrozen):
            files.truncate(memfd, size)
    with pytest.raises(FileFrozen):
        files.write(memfd, 3 * 4096 + 4096, b"beyond")
    files.write(memfd, 0, b"inside")
    assert files.read(memfd, 0, 6) == b"inside"


def test_read_ends_with_the_file(files: KernelFiles, memfd: int) -> None:
    files.write(memfd, 3 * 4096, memoryview(b"abcde"))
    assert files.read(memfd, 3 * 4096 + 2, 100) == b"cde"
    assert files.read(memfd, 1 << 30, 10) == b""


def test_kinds(files: KernelFiles, memfd: int, tmp_path: Path) -> None:
    def kind_of(fd: int) -> str:
        try:
            return files.stat(fd).kind
        finally:
            os.close(fd)

    assert kind_of(os.open(SHM, os.O_TMPFILE | os.O_RDWR)) == "memfd"
    named = SHM / f"khod-unit-{os.getpid()}"
    fd = os.open(named, os.O_CREAT | os.O_RDWR)
    assert files.stat(fd).kind == "other"  # it has a link: the kernel does not preserve it
    named.unlink()
    assert kind_of(fd) == "memfd"
    assert kind_of(os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)) == "other"
    assert kind_of(os.open("/dev/null", os.O_RDWR)) == "other"
    assert kind_of(os.open(tmp_path, os.O_RDONLY)) == "other"
    assert kind_of(os.eventfd(0)) == "other"
    # Names prove nothing: these are memfds.
    assert kind_of(files.memfd("[kvm-gmem]", 0)) == "memfd"
    assert kind_of(files.memfd("[luo_session] x", 0)) == "memfd"
    reader, writer = os.pipe()
    os.close(writer)
    assert kind_of(reader) == "other"


def test_hugetlb_is_told_from_shmem(files: KernelFiles) -> None:
    try:
        fd = os.memfd_create("huge", os.MFD_HUGETLB)
    except OSError as e:
        pytest.skip(f"this host has no hugetlbfs: {e}")
    try:
        assert files.stat(fd).kind == "hugetlb"
    finally:
        os.close(fd)


def test_the_inode_is_the_identity(files: KernelFiles, memfd: int) -> None:
    other, copy = files.memfd("unit", 0), files.duplicate(memfd)
    reopened = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        same = files.stat(memfd).inode
        assert files.stat(copy).inode == same
        assert files.stat(reopened).inode == same
        assert (files.stat(reopened).readable, files.stat(reopened).writable) == (True, False)
        assert files.stat(other).inode != same
    finally:
        for fd in (other, copy, reopened):
            files.close(fd)


def test_a_path_only_descriptor_neither_reads_nor_writes(files: KernelFiles, memfd: int) -> None:
    fd = os.open(f"/proc/self/fd/{memfd}", os.O_PATH)
    try:
        assert (files.stat(fd).readable, files.stat(fd).writable) == (False, False)
        with pytest.raises(BadDescriptor):
            files.read(fd, 0, 1)
    finally:
        os.close(fd)


def test_closed_descriptors(files: KernelFiles) -> None:
    fd = files.memfd("unit", 0)
    files.close(fd)
    for use in (files.close, files.stat, files.duplicate, files.adopt, files.export):
        with pytest.raises(BadDescriptor):
            use(fd)


def test_adopt_consumes_and_export_copies(files: KernelFiles) -> None:
    real = os.dup(0)
    os.set_inheritable(real, True)
    fd = files.adopt(real)
    assert not os.get_inheritable(fd)
    out = files.export(fd)
    assert out != fd
    assert os.fstat(out).st_ino == os.fstat(fd).st_ino
    files.close(fd)
    os.close(out)


def test_resident_leaves_out_what_is_swapped(files: KernelFiles, memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The way that hosts with swap in use take: by mincore. Nothing is swapped here, so both ways say the same.
    monkeypatch.setattr("khod.kernel.files._swap_in_use", lambda: True)
    with mmap.mmap(memfd, 0) as m:
        m[0] = m[2 * 4096] = 1
    os.lseek(memfd, 77, os.SEEK_SET)
    assert (files.stat(memfd).allocated, files.resident(memfd)) == (8192, 8192)
    assert os.lseek(memfd, 0, os.SEEK_CUR) == 77, "its position is its owner's"


@pytest.mark.timeout(20)
def test_holes_of_a_stranger_cost_nothing(files: KernelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may register can make a file that is a million times what memory is."""
    monkeypatch.setattr("khod.kernel.files._swap_in_use", lambda: True)
    fd = files.memfd("sparse", 1 << 60)
    for offset in (0, 1 << 50, (1 << 60) - 4096):
        files.write(fd, offset, b"x")
    assert (files.stat(fd).allocated, files.resident(fd)) == (3 * 4096, 3 * 4096)
    os.close(fd)
