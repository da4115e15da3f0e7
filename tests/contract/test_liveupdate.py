# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions and preserved files before a jump: the errno table of both machines, as exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, ENOTTY, EPERM

import pytest

from khod import errors
from khod.core.ports import F_SEAL_GROW, F_SEAL_SHRINK, Machine
from tests.contract.rig import PAGE, Rig

NAME = "khod-contract"
MAX_TOKEN = (1 << 64) - 1


def preserved(host: Machine, fd: int, token: int = 0, name: str = NAME) -> int:
    session = host.liveupdate.create_session(name)
    host.liveupdate.preserve_fd(session, fd, token)
    return session


def test_a_session_knows_its_name(host: Machine) -> None:
    for name in (NAME, "a/b", "x y", "ü", "n" * 63):
        assert host.liveupdate.session_name(host.liveupdate.create_session(name)) == name


@pytest.mark.parametrize("name", ["", "n" * 64, "a\0b"])
def test_names_that_the_kernel_does_not_take(host: Machine, name: str) -> None:
    for call in (host.liveupdate.create_session, host.liveupdate.retrieve_session):
        with pytest.raises(errors.SessionNameInvalid) as refused:
            call(name)
        assert refused.value.errno == EINVAL


def test_a_name_is_taken_until_its_session_is_closed(host: Machine) -> None:
    session = host.liveupdate.create_session(NAME)
    copy = host.files.duplicate(session)
    host.files.close(session)
    with pytest.raises(errors.SessionExists) as refused:
        host.liveupdate.create_session(NAME)
    assert refused.value.errno == EEXIST
    host.files.close(copy)
    host.liveupdate.create_session(NAME)


def test_nothing_came_through_a_jump(host: Machine) -> None:
    with pytest.raises(errors.SessionUnknown) as refused:
        host.liveupdate.retrieve_session("khod-contract-never")
    assert refused.value.errno == ENOENT


def test_an_outgoing_session_gives_nothing_back(rig: Rig, host: Machine) -> None:
    session = preserved(host, rig.memfd(PAGE))
    for call in (lambda: host.liveupdate.retrieve_fd(session, 0), lambda: host.liveupdate.finish(session)):
        with pytest.raises(errors.SessionDirection) as refused:
            call()
        assert refused.value.errno == EINVAL


def test_what_is_no_session(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE)
    calls = (
        lambda: host.liveupdate.preserve_fd(fd, fd, 0),
        lambda: host.liveupdate.session_name(fd),
        lambda: host.liveupdate.finish(fd),
        lambda: host.liveupdate.retrieve_fd(fd, 0),
    )
    for call in calls:
        with pytest.raises(errors.NotASession) as refused:
            call()
        assert refused.value.errno == ENOTTY


def test_the_device_has_one_opener(rig: Rig, host: Machine) -> None:
    session = host.liveupdate.create_session(NAME)
    with rig.device_held():
        for call in (host.liveupdate.probe, lambda: host.liveupdate.create_session("second")):
            with pytest.raises(errors.DeviceBusy) as refused:
                call()
            assert refused.value.errno == EBUSY
        host.liveupdate.preserve_fd(session, rig.memfd(PAGE), 0)  # a session needs no device
    host.liveupdate.probe()


def test_tokens_are_unique_in_a_session_only(rig: Rig, host: Machine) -> None:
    session = preserved(host, rig.memfd(PAGE), 0)
    host.liveupdate.preserve_fd(session, rig.memfd(PAGE), MAX_TOKEN)
    for token in (0, MAX_TOKEN):
        with pytest.raises(errors.TokenExists) as refused:
            host.liveupdate.preserve_fd(session, rig.memfd(PAGE), token)
        assert refused.value.errno == EEXIST
    preserved(host, rig.memfd(PAGE), 0, "khod-contract-2")


def test_a_file_is_preserved_once_whatever_leads_to_it(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE)
    first = preserved(host, fd)
    second = host.liveupdate.create_session("khod-contract-2")
    for session in (first, second):
        for other in (fd, host.files.duplicate(fd), rig.read_only(fd)):
            with pytest.raises(errors.AlreadyPreserved) as refused:
                host.liveupdate.preserve_fd(session, other, 9)
            assert refused.value.errno == EBUSY
    host.files.close(first)
    host.liveupdate.preserve_fd(second, fd, 9)


def test_types_that_are_not_preserved(rig: Rig, host: Machine) -> None:
    session = host.liveupdate.create_session(NAME)
    kinds = {**rig.unsupported(), "session": session, "other session": host.liveupdate.create_session("khod-contract-2")}
    for kind, fd in kinds.items():
        with pytest.raises(errors.FdNotPreservable) as refused:
            host.liveupdate.preserve_fd(session, fd, 1)
        assert refused.value.errno == ENOENT, kind


def test_descriptors_that_are_none(rig: Rig, host: Machine) -> None:
    session, fd = host.liveupdate.create_session(NAME), rig.memfd(PAGE)
    for bad in (rig.path_only(fd), -1):
        with pytest.raises(errors.BadDescriptor) as refused:
            host.liveupdate.preserve_fd(session, bad, 1)
        assert refused.value.errno == EBADF
    # Closed only now: the calls before may have opened something of their own, under whatever number was free.
    closed = host.files.duplicate(fd)
    host.files.close(closed)
    with pytest.raises(errors.BadDescriptor):
        host.liveupdate.preserve_fd(session, closed, 1)


def test_files_too_large_to_preserve(rig: Rig, host: Machine) -> None:
    session = host.liveupdate.create_session(NAME)
    for size in (1 << 40, ((1 << 32) - 1) * PAGE + PAGE):
        with pytest.raises(errors.FileTooLarge):
            host.liveupdate.preserve_fd(session, rig.memfd(size), 1)


def test_more_than_memory_holds_does_not_end_us(rig: Rig, host: Machine) -> None:
    session = host.liveupdate.create_session(NAME)
    fd = rig.memfd(host.memory.figures().total * 2)
    with pytest.raises(errors.OutOfMemory):
        host.liveupdate.preserve_fd(session, fd, 1)
    host.files.close(fd)
    host.liveupdate.preserve_fd(session, rig.memfd(PAGE), 1)


def test_holes_are_filled_and_stay_filled(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(64 * PAGE, {0: b"x"})
    assert host.files.stat(fd).allocated == PAGE
    session = preserved(host, fd)
    assert host.files.stat(fd).allocated == 64 * PAGE
    host.files.close(session)
    assert host.files.stat(fd).allocated == 64 * PAGE


@contextmanager
def frozen() -> Iterator[None]:
    with pytest.raises(errors.FileFrozen) as refused:
        yield
    assert refused.value.errno == EPERM


def test_a_preserved_file_keeps_its_size_and_takes_writes(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(4 * PAGE, {0: b"before"})
    session = preserved(host, fd)
    for size in (0, PAGE, 5 * PAGE):
        with frozen():
            host.files.truncate(fd, size)
    host.files.truncate(fd, 4 * PAGE)
    with frozen():
        host.files.write(fd, 4 * PAGE, b"past the end")
    with pytest.raises(OSError) as refused:
        rig.punch(fd, 0, PAGE)
    assert refused.value.errno == EPERM
    host.files.write(fd, 0, b"inside")
    assert host.files.read(fd, 0, 6) == b"inside"
    host.files.add_seals(fd, F_SEAL_SHRINK)
    host.files.close(session)
    host.files.truncate(fd, 5 * PAGE)
    assert host.files.stat(fd).size == 5 * PAGE


def test_an_empty_file_is_preserved(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(0)
    session = preserved(host, fd)
    with frozen():
        host.files.truncate(fd, PAGE)
    host.files.close(session)
    host.files.truncate(fd, PAGE)


def test_growing_seals_do_not_stand_in_the_way(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE)
    host.files.add_seals(fd, F_SEAL_GROW | F_SEAL_SHRINK)
    preserved(host, fd)
    with frozen():
        host.files.truncate(fd, 2 * PAGE)
