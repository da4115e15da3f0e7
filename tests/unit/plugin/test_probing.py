# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a kernel preserves a kind of file is found by trying, once, and a failure to try is no answer."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from khod.errors import DeviceBusy, DeviceMissing, OutOfMemory, Refused, SessionUnknown
from khod.plugin.probing import native
from khod.simulated import ProcessDied, Release, create, machine
from khod.simulated.image import build
from khod.simulated.kernel import Kernel

MIB = 1 << 20
KINDS = ("hugetlb", "guest_memfd", "iommufd")


def booted(directory: Path, *preserves: str, cmdline: str | None = None) -> Kernel:
    return Kernel.boot(create(directory / "machine", memory=128 * MIB), release=Release(preserves=preserves), cmdline=cmdline)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernel_says_of_a_fresh_file_is_the_answer(tmp_path: Path, kind: str) -> None:
    host = machine(booted(tmp_path / "today").spawn("khod"))
    later = machine(booted(tmp_path / "later", kind).spawn("khod"))
    assert native(host, lambda: host.files.specimen(kind)) is False
    assert native(later, lambda: later.files.specimen(kind)) is True
    assert native(host, lambda: host.files.memfd("fresh", 4096)) is True


def test_nothing_stays_and_the_kernel_is_asked_once(tmp_path: Path) -> None:
    kernel = booted(tmp_path)
    khod = kernel.spawn("khod")
    host = machine(khod)
    before = sorted(kernel.task(khod.pid).table.files)
    with kernel.faults.recorded(khod.pid) as calls:
        for _ in range(3):
            native(host, lambda: host.files.specimen("guest_memfd"))
    assert calls.count("preserve_fd") == 1
    assert sorted(kernel.task(khod.pid).table.files) == before
    assert not kernel.luo.outgoing


def test_a_failure_to_ask_is_no_answer(tmp_path: Path) -> None:
    kernel = booted(tmp_path, "hugetlb")
    host, other = machine(kernel.spawn("khod")), kernel.spawn("other")

    def ask() -> bool:
        return native(host, lambda: host.files.specimen("hugetlb"))

    device = other.open_device()
    with pytest.raises(DeviceBusy):
        ask()
    other.close(device)
    kernel.faults.fail("preserve_fd", errno.ENOMEM)
    with pytest.raises(OutOfMemory):
        ask()
    assert not kernel.luo.outgoing
    assert ask() is True, "no failure is remembered"


def test_a_kernel_without_the_device_does_not_answer(tmp_path: Path) -> None:
    host = machine(booted(tmp_path, cmdline="kho=on").spawn("khod"))
    with pytest.raises(DeviceMissing):
        native(host, lambda: host.files.specimen("hugetlb"))


def test_what_cannot_be_made_is_not_tried(tmp_path: Path) -> None:
    host = machine(booted(tmp_path, "vfio").spawn("khod"))
    with pytest.raises(Refused, match="vfio"):
        native(host, lambda: host.files.specimen("vfio"))


def test_a_kernel_that_preserves_them_gives_them_back(tmp_path: Path) -> None:
    """The simulated machine's own word: kinds with memory keep every byte, the others what they are."""
    kernel = booted(tmp_path, "guest_memfd", "hugetlb", "iommufd", "vfio", cmdline="kho=on liveupdate=on hugepages=3")
    khod = kernel.spawn("khod")
    host = machine(khod)
    (tmp_path / "bzImage").write_bytes(build())
    session = host.liveupdate.create_session("all")
    sizes = {"guest_memfd": MIB, "hugetlb": 4 * MIB, "iommufd": 0, "vfio": 0}
    for token, (kind, size) in enumerate(sizes.items()):
        fd = khod.special(kind, size)
        if size:
            khod.poke(fd, size - 4, b"last")
        host.liveupdate.preserve_fd(session, fd, token)
    host.kexec.load(host.kexec.open(str(tmp_path / "bzImage")))
    with pytest.raises(ProcessDied):
        host.kexec.execute()
    after = Kernel.boot(tmp_path / "machine")
    process = after.spawn("khod")
    host = machine(process)
    session = host.liveupdate.retrieve_session("all")
    for token, (kind, size) in enumerate(sizes.items()):
        fd = host.liveupdate.retrieve_fd(session, token)
        assert (host.files.stat(fd).kind, host.files.stat(fd).size) == (kind, size)
        if size:
            assert process.peek(fd, size - 4, 4) == b"last"
    host.liveupdate.finish(session)
    assert host.memory.free_huge_pages(2 * MIB) == 3, "the new kernel's pool is its own"
    host.files.close(session)
    host.custody.release("all")
    with pytest.raises(SessionUnknown):
        host.liveupdate.retrieve_session("all")
