# SPDX-License-Identifier: LGPL-2.1-or-later
"""Custody within one boot. What it is for, sessions that came through a jump, is in `scenarios`."""

from __future__ import annotations

import pytest

from khod import errors
from khod.core.ports import Machine
from tests.contract.rig import PAGE, Rig


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


def held(host: Machine, session: str) -> bool:
    """Whether anybody has an outgoing session of that name open: what a descriptor is let go of by shows at once."""
    try:
        host.files.close(host.liveupdate.create_session(session))
    except errors.SessionExists:
        return True
    return False


def keep_session(host: Machine, name: str) -> str:
    """An outgoing session that custody alone holds; its name."""
    fd = host.liveupdate.create_session(session := f"khod-contract-{name}")
    host.custody.keep(name, fd)
    host.files.close(fd)
    return session


def test_dropping_lets_go(host: Machine) -> None:
    sessions = {name: keep_session(host, name) for name in ("a", "b", "c")}
    assert all(held(host, session) for session in sessions.values())
    host.custody.drop(["a", "never", "c", "a"])
    assert [name for name, session in sessions.items() if held(host, session)] == ["b"]
    assert set(host.custody.kept()) & {"a", "b", "c"} == {"b"}
    for name in ("a", "never"):
        with pytest.raises(errors.InvalidRequest):
            host.custody.take(name)
    host.custody.drop(["b"])
    assert not held(host, sessions["b"])


def test_the_new_takes_the_place_of_the_old(rig: Rig, host: Machine) -> None:
    session = keep_session(host, "book")
    new = rig.memfd(PAGE, {0: b"new"})
    host.custody.keep("book", new)
    assert not held(host, session)
    host.custody.keep("book", new)
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


def test_a_session_comes_back_as_one(host: Machine) -> None:
    session = keep_session(host, "s")
    taken = host.custody.take("s")
    assert host.liveupdate.session_name(taken) == session
    host.files.close(taken)
    host.custody.drop(["s"])
    assert not held(host, session)


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
    assert not held(host, "khod-contract")


def test_what_can_be_retrieved_for_certain(host: Machine) -> None:
    assert host.custody.doubt(PAGE, 1) == ""
    assert host.custody.doubt(PAGE, host.custody.room() + (1 << 20)) != ""
