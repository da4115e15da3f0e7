# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files, frames and memory, and the bridge between the machine and this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EBADF

import pytest

from khod import errors
from khod.core.ports import F_SEAL_EXEC, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_WRITE, WINDOW, Machine
from khod.folio.units import PAGE_SHIFT
from tests.contract.rig import PAGE, Rig, seals_of

CONTENTS = bytes(range(256)) * 16


def test_a_memfd_of_ours_is_executable_and_sealable(host: Machine) -> None:
    fd = host.files.memfd("khod", 3 * PAGE)
    stat = host.files.stat(fd)
    assert (stat.kind, stat.size, stat.allocated, stat.seals) == ("memfd", 3 * PAGE, 0, 0)
    host.files.add_seals(fd, F_SEAL_GROW)
    assert host.files.stat(fd).seals == F_SEAL_GROW


def test_read_and_write(host: Machine) -> None:
    fd = host.files.memfd("khod", 2 * PAGE)
    host.files.write(fd, PAGE - 3, CONTENTS)
    assert host.files.read(fd, PAGE - 3, len(CONTENTS)) == CONTENTS
    assert host.files.read(fd, 0, 4) == bytes(4)
    assert host.files.read(fd, 2 * PAGE - 4, 100) == CONTENTS[-1:] + bytes(3)
    assert host.files.read(fd, 9 * PAGE, 1) == b""


def test_shrinking_forgets(host: Machine) -> None:
    fd = host.files.memfd("khod", 2 * PAGE)
    host.files.write(fd, 0, CONTENTS + CONTENTS)
    host.files.truncate(fd, 10)
    host.files.truncate(fd, 2 * PAGE)
    assert host.files.read(fd, 0, 2 * PAGE) == CONTENTS[:10] + bytes(2 * PAGE - 10)


def test_seals_hold(rig: Rig, host: Machine) -> None:
    cases: dict[int, Callable[[int], None]] = {
        F_SEAL_SHRINK: lambda fd: host.files.truncate(fd, 0),
        F_SEAL_GROW: lambda fd: host.files.write(fd, PAGE, b"more"),
        F_SEAL_WRITE: lambda fd: host.files.write(fd, 0, b"new"),
        F_SEAL_SEAL: lambda fd: host.files.add_seals(fd, F_SEAL_GROW),
    }
    for seal, forbidden in cases.items():
        fd = rig.memfd(PAGE)
        host.files.add_seals(fd, seal)
        with pytest.raises(errors.FileFrozen):
            forbidden(fd)


def test_sealing_the_mode_of_an_executable_seals_everything(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE)
    host.files.add_seals(fd, F_SEAL_EXEC)
    assert host.files.stat(fd).seals == 0x3E
    assert host.files.stat(rig.memfd(PAGE, noexec=True)).seals == F_SEAL_EXEC


def test_descriptors(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE)
    other = host.files.duplicate(fd)
    assert host.files.stat(other).inode == host.files.stat(fd).inode != host.files.stat(rig.memfd(PAGE)).inode
    rig.seek(fd, 77)
    assert rig.seek(other) == 77
    host.files.close(fd)
    for call in (host.files.close, host.files.stat, host.files.duplicate):
        with pytest.raises(errors.BadDescriptor) as refused:
            call(fd)
        assert refused.value.errno == EBADF
    assert host.files.stat(other).size == PAGE
    assert host.files.stat(rig.read_only(other)).writable is False


def test_kinds(rig: Rig, host: Machine) -> None:
    found = rig.unsupported()
    assert host.files.stat(found.pop("hugetlb")).kind == "hugetlb"
    assert {host.files.stat(fd).kind for fd in found.values()} == {"other"}
    assert host.files.stat(host.liveupdate.create_session("khod-contract")).kind == "session"


def test_a_real_memfd_is_adopted_with_what_its_owner_writes_later(host: Machine) -> None:
    real = os.memfd_create("guest", 0x10 | os.MFD_ALLOW_SEALING)
    os.ftruncate(real, 64 * PAGE)
    fd = host.files.adopt(os.dup(real))
    os.pwrite(real, b"later", 5 * PAGE)
    assert host.files.read(fd, 5 * PAGE, 5) == b"later"
    assert host.files.stat(fd).kind == "memfd"
    session = host.liveupdate.create_session("khod-contract")
    host.liveupdate.preserve_fd(session, fd, 0)
    assert sum(len(window.pfns) for window in host.frames.windows(fd)) == 64
    os.close(real)


def test_adopting_consumes_and_names_what_cannot_be_preserved(host: Machine) -> None:
    reader, writer = os.pipe()
    fd = host.files.adopt(reader)
    assert host.files.stat(fd).kind == "other"
    host.files.close(fd)
    with pytest.raises(BrokenPipeError):  # nobody holds the other end any more
        os.write(writer, b"x")
    os.close(writer)


def test_export_has_the_bytes_and_the_seals(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(1 << 20, {7 * PAGE + 1: CONTENTS})
    host.files.add_seals(fd, F_SEAL_GROW | F_SEAL_SHRINK)
    real = host.files.export(fd)
    try:
        assert os.pread(real, 1 << 20, 0) == host.files.read(fd, 0, 1 << 20)
        assert os.pread(real, len(CONTENTS), 7 * PAGE + 1) == CONTENTS
        assert seals_of(real) == F_SEAL_GROW | F_SEAL_SHRINK
    finally:
        os.close(real)


def test_what_is_exported_is_the_same_file(rig: Rig, host: Machine) -> None:
    """A client writes its state into what khod reads, preserves and carries across."""
    fd = rig.memfd(4 * PAGE, {0: b"before"})
    host.liveupdate.preserve_fd(host.liveupdate.create_session("khod-contract"), fd, 0)
    real, again = host.files.export(fd), host.files.export(fd)
    try:
        os.pwrite(real, b"theirs", PAGE)
        host.files.write(fd, 2 * PAGE, b"ours")
        assert host.files.read(fd, PAGE, 6) == b"theirs"
        assert os.pread(again, 4, 2 * PAGE) == b"ours" and os.pread(again, 6, PAGE) == b"theirs"
    finally:
        os.close(real)
        os.close(again)


def test_frames_hold_the_bytes(rig: Rig, host: Machine) -> None:
    """Two ways to one byte: through the file, and through physical memory at the address that frames give."""
    fd = rig.memfd(40 * PAGE, {PAGE * i: bytes([i]) * PAGE for i in range(40)})
    host.liveupdate.preserve_fd(host.liveupdate.create_session("khod-contract"), fd, 0)
    windows = list(host.frames.windows(fd))
    assert [window.offset for window in windows] == [0] and WINDOW > 40 * PAGE
    assert sum(1 << order for order in windows[0].orders) >= 40
    for index, (pfn, folio) in enumerate(host.frames.pages(fd, range(40))):
        assert folio.pfn <= pfn < folio.pfn + (1 << folio.order)
        assert folio in zip(windows[0].pfns, windows[0].orders, strict=True)
        assert host.memory.read(pfn << PAGE_SHIFT, PAGE) == bytes([index]) * PAGE


def test_preserved_frames_are_ram_and_outside_scratch(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(16 << 20, {0: b"x" * (16 << 20)})
    host.liveupdate.preserve_fd(host.liveupdate.create_session("khod-contract"), fd, 0)
    assert host.files.read(fd, 0, 16 << 20) == b"x" * (16 << 20)
    scratch, ram = host.memory.scratch(), host.memory.ram()
    assert scratch and ram
    for pfn, _ in host.frames.pages(fd, range(0, 4096, 16)):
        phys = pfn << PAGE_SHIFT
        assert any(r.start <= phys < r.end for r in ram)
        assert not any(r.start <= phys < r.end for r in scratch)


def test_a_hole_has_no_frame(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(1 << 40)
    with pytest.raises(errors.MachineError):
        host.frames.pages(fd, [5])


def test_memory_ends_somewhere(host: Machine) -> None:
    with pytest.raises(ValueError):
        host.memory.read(host.memory.ram()[-1].end + (1 << 40), PAGE)


def test_figures_add_up(rig: Rig, host: Machine) -> None:
    data = b"x" * (96 << 20)  # made before: our own heap is memory too
    before = host.memory.figures()
    fd = rig.memfd(96 << 20, {0: data})
    after = host.memory.figures()
    # Linux keeps freed pages on lists of each CPU, tens of MiB that MemAvailable does not count.
    assert before.available - after.available > 24 << 20
    assert after.total == before.total >= after.available > 0
    host.files.close(fd)
    assert host.memory.figures().available >= after.available


def test_copying_needs_no_reading_and_no_writing(rig: Rig, host: Machine) -> None:
    source = rig.memfd(4 * PAGE, {PAGE - 3: CONTENTS, 3 * PAGE: b"not this"})
    target = host.files.memfd("khod", 4 * PAGE)
    host.files.write(target, 3 * PAGE, b"stays")
    host.files.copy(source, target, 0, 3 * PAGE)
    assert host.files.read(target, 0, 3 * PAGE) == host.files.read(source, 0, 3 * PAGE)
    assert host.files.read(target, 3 * PAGE, 5) == b"stays"
    assert host.files.stat(target).allocated == host.files.stat(source).allocated == 4 * PAGE, "holes of both are filled"
    assert host.files.resident(target) == 4 * PAGE
    host.files.copy(source, target, 0, 0)


def test_a_copy_that_cannot_be_made_says_so(rig: Rig, host: Machine) -> None:
    source, target = rig.memfd(PAGE), host.files.memfd("khod", PAGE)
    with pytest.raises(errors.Refused):
        host.files.copy(source, rig.read_only(target), 0, PAGE)
    with pytest.raises(errors.Refused):
        host.files.copy(source, target, 0, 2 * PAGE)
    host.files.close(source)
    with pytest.raises(errors.BadDescriptor):
        host.files.copy(source, target, 0, PAGE)


def test_huge_pages(host: Machine) -> None:
    """Of a size that there is, and of one that there is not."""
    size = 2 << 20
    fd = host.files.hugetlb("huge", 2 * size, size)
    stat = host.files.stat(fd)
    assert (stat.kind, stat.size, stat.page_size, stat.allocated) == ("hugetlb", 2 * size, size, 0)
    assert host.files.stat(host.files.memfd("small", size)).page_size == PAGE
    assert host.memory.free_huge_pages(size) == 0
    with pytest.raises(errors.OutOfMemory):
        host.files.copy(fd, host.files.memfd("carrier", 2 * size), 0, 2 * size)
    with pytest.raises(errors.Refused):
        host.files.hugetlb("odd", size * 64, size * 64)


def test_a_specimen_is_what_was_asked_for(host: Machine) -> None:
    assert host.files.stat(host.files.specimen("hugetlb")).kind == "hugetlb"
