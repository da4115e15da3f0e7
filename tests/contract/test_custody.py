# SPDX-License-Identifier: LGPL-2.1-or-later
"""Custody within one boot. What it is for, sessions that came through a jump, is in `scenarios`."""

from __future__ import annotations

import pytest

from khod import errors
from khod.core.ports import Machine
from tests.contract.rig import PAGE, Rig

LARGE = 32 << 20


def available(host: Machine) -> int:
    return host.memory.figures().available


def test_what_is_kept_is_the_same_open_file(rig: Rig, host: Machine) -> None:
    fd = rig.memfd(PAGE, {0: b"guest"})
    host.custody.keep("book", fd)
    assert "book" in host.custody.kept()
    taken = host.custody.take("book")
    rig.seek(taken, 77)
    assert taken != fd and rig.seek(fd) == 77
    host.files.close(fd)
    host.files.close(taken)
    again = host.custody.take("book")
    assert rig.seek(again) == 77
    assert host.files.read(again, 0, 5) == b"guest"
    host.custody.drop(["book"])


def test_what_is_kept_outlives_who_gave_it(rig: Rig, host: Machine) -> None:
    rig.keep_and_die("d0", b"guest")
    assert host.files.read(host.custody.take("d0"), 0, 5) == b"guest"
    host.custody.drop(["d0"])


def test_dropping_lets_go(rig: Rig, host: Machine) -> None:
    for name in ("a", "b", "c"):
        fd = rig.memfd(LARGE)
        host.liveupdate.preserve_fd(session := host.liveupdate.create_session("khod-contract"), fd, 0)  # fills it
        host.custody.keep(name, fd)
        host.files.close(session)
        host.files.close(fd)
    before = available(host)
    host.custody.drop(["a", "never", "c", "a"])
    assert available(host) - before > 2 * LARGE - (8 << 20)
    assert set(host.custody.kept()) & {"a", "b", "c"} == {"b"}
    for name in ("a", "never"):
        with pytest.raises(errors.InvalidRequest):
            host.custody.take(name)
    assert host.files.stat(host.custody.take("b")).allocated == LARGE
    host.custody.drop(["b"])


def test_the_new_takes_the_place_of_the_old(rig: Rig, host: Machine) -> None:
    old = rig.memfd(LARGE)
    for offset in range(0, LARGE, 1 << 20):
        host.files.write(old, offset, bytes(1 << 20))
    host.custody.keep("book", old)
    host.files.close(old)
    before = available(host)
    new = rig.memfd(PAGE, {0: b"new"})
    host.custody.keep("book", new)
    host.custody.keep("book", new)
    assert available(host) - before > LARGE - (8 << 20)
    assert list(host.custody.kept()).count("book") == 1
    assert host.files.read(host.custody.take("book"), 0, 3) == b"new"
    host.custody.drop(["book"])


@pytest.mark.parametrize("name", ["", "n" * 11, "Book", "a-b", "a b", "ü", "a\n", "a\0"])
def test_names_that_custody_does_not_take(rig: Rig, host: Machine, name: str) -> None:
    before = list(host.custody.kept())
    with pytest.raises(errors.InvalidRequest):
        host.custody.keep(name, rig.memfd(PAGE))
    assert host.custody.kept() == before


def test_names_of_ten_characters(rig: Rig, host: Machine) -> None:
    names = [f"{i:010d}" for i in range(300)]
    room = host.custody.room()
    for name in names:
        host.custody.keep(name, fd := rig.memfd(PAGE))
        host.files.close(fd)
    assert sorted(set(host.custody.kept()) & set(names)) == names
    assert host.custody.room() == room - len(names)
    host.custody.drop(names)
    assert host.custody.room() == room


def test_sessions_can_be_kept_as_well(host: Machine) -> None:
    session = host.liveupdate.create_session("khod-contract")
    host.custody.keep("s", session)
    host.files.close(session)
    with pytest.raises(errors.SessionExists):
        host.liveupdate.create_session("khod-contract")
    taken = host.custody.take("s")
    assert host.liveupdate.session_name(taken) == "khod-contract"
    host.files.close(taken)
    host.custody.drop(["s"])
    host.files.close(host.liveupdate.create_session("khod-contract"))


def test_outgoing_sessions_are_none_that_are_held(rig: Rig, host: Machine) -> None:
    session = host.liveupdate.create_session("khod-contract")
    host.liveupdate.preserve_fd(session, rig.memfd(PAGE), 0)
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("khod-contract")
    assert "khod-contract" not in host.custody.sessions()
    host.custody.release("khod-contract")
    assert host.liveupdate.session_name(session) == "khod-contract"


def test_without_pid_1_s_store_nothing_is_offered(host: Machine) -> None:
    session = host.liveupdate.create_session("khod-contract")
    with pytest.raises(errors.Refused):
        host.custody.offer([session])
    host.custody.withdraw()
    host.files.close(session)
    host.files.close(host.liveupdate.create_session("khod-contract"))  # nobody else has it


def test_what_can_be_retrieved_for_certain(host: Machine) -> None:
    assert host.custody.doubt(PAGE, 1) == ""
    assert host.custody.doubt(PAGE, host.custody.room() + (1 << 20)) != ""
