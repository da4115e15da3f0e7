# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies of memory that nobody can read or write, on the Linux that runs this test."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.abi import kvm
from khod.client import guest_memory
from khod.core.carrying import Crew
from khod.errors import OutOfMemory, Refused
from khod.kernel.files import KernelFiles
from khod.kernel.memory import KernelMemory

SIZE = 4 << 20
HUGE = 2 << 20


@pytest.fixture
def files() -> KernelFiles:
    return KernelFiles()


def guest_memfd(flags: int) -> int:
    try:
        device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        machine = fcntl.ioctl(device, kvm.KVM_CREATE_VM, 0)
        fd: int = fcntl.ioctl(machine, kvm.KVM_CREATE_GUEST_MEMFD, kvm.create_guest_memfd(SIZE, flags))
    except OSError as error:
        pytest.skip(f"no guest_memfd with flags {flags} here: {error}")
    os.close(machine)
    os.close(device)
    return fd


@pytest.fixture
def shared() -> Iterator[int]:
    fd = guest_memfd(kvm.GUEST_MEMFD_FLAG_MMAP | kvm.GUEST_MEMFD_FLAG_INIT_SHARED)
    yield fd
    os.close(fd)


def test_a_guest_memfd_is_copied_out_and_back(files: KernelFiles, shared: int) -> None:
    with pytest.raises(OSError, match="Illegal seek"):
        os.pread(shared, 1, 0)
    contents = os.urandom(SIZE)
    first, second = files.memfd("first", SIZE), files.memfd("second", SIZE)
    files.write(first, 0, contents)
    files.copy(first, shared, 0, SIZE)
    files.copy(shared, second, HUGE, HUGE)
    assert files.read(second, 0, SIZE) == bytes(HUGE) + contents[HUGE:]
    for fd in (first, second):
        os.close(fd)


@pytest.mark.parametrize("flags", [0, kvm.GUEST_MEMFD_FLAG_MMAP])
def test_one_that_only_the_guest_sees_is_known_by_that(files: KernelFiles, flags: int) -> None:
    fd, target = guest_memfd(flags), files.memfd("target", SIZE)
    stat = files.stat(fd)
    assert (stat.kind, stat.size, stat.mappable) == ("guest_memfd", SIZE, False)
    with pytest.raises(Refused):
        files.copy(fd, target, 0, SIZE)
    for one in (fd, target):
        os.close(one)


def test_one_that_is_shared_is_known_too(files: KernelFiles, shared: int) -> None:
    assert files.stat(shared).mappable
    assert files.resident(shared) == 4096, "looking at it takes one page of it"
    files.copy(files.memfd("source", SIZE), shared, HUGE, HUGE)
    assert files.resident(shared) == HUGE + 4096


def test_a_vmm_rebuilds_its_memory_from_the_carrier(files: KernelFiles, shared: int) -> None:
    """What khod does in the old kernel and a VMM in the new one, without the jump between."""
    contents = os.urandom(SIZE)
    first, carrier, seen = files.memfd("first", SIZE), files.memfd("carrier", SIZE), files.memfd("seen", SIZE)
    files.write(first, 0, contents)
    files.copy(first, shared, 0, SIZE)
    Crew().copy("out", files, shared, carrier, SIZE, 4096)
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    machine = fcntl.ioctl(device, kvm.KVM_CREATE_VM, 0)
    rebuilt = guest_memory.rebuild(machine, carrier)
    stat = files.stat(rebuilt)
    assert (stat.kind, stat.size, stat.mappable) == ("guest_memfd", SIZE, True)
    assert stat.inode != files.stat(shared).inode
    assert not os.get_inheritable(rebuilt)
    files.copy(rebuilt, seen, 0, SIZE)
    assert files.read(seen, 0, SIZE) == contents
    with pytest.raises(Refused, match="flags 0x80"):
        guest_memory.rebuild(machine, carrier, flags=0x80)
    with pytest.raises(Refused, match="guest_memfd"):
        guest_memory.rebuild(first, carrier)
    before = len([*Path("/proc/self/fd").iterdir()])
    with pytest.raises(Refused):
        guest_memory.rebuild(machine, carrier, flags=0)  # which nobody can copy into
    assert len([*Path("/proc/self/fd").iterdir()]) == before
    for fd in (first, carrier, seen, rebuilt, machine, device):
        os.close(fd)


def test_huge_pages_that_are_missing_are_an_error_and_no_signal(files: KernelFiles) -> None:
    pages = KernelMemory().free_huge_pages(HUGE) + 1
    fd, target = files.hugetlb("huge", pages * HUGE, HUGE), files.memfd("target", pages * HUGE)
    assert files.stat(fd).page_size == HUGE
    with pytest.raises(OutOfMemory):
        files.copy(fd, target, 0, pages * HUGE)
    for one in (fd, target):
        os.close(one)
