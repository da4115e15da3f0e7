# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who a peer is: credentials, units, processes that are gone or whose number is another's."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from khod.api import peers
from khod.api.peers import Peer, Presence, Processes, unit_in
from khod.api.policy import rights
from khod.config import Rule
from khod.core.callers import Kind, Owner, Right
from khod.errors import NotPermitted

NONE = ""


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/vmm.service", "vmm.service"),
        ("/system.slice/vmm@1.service", "vmm@1.service"),
        ("/system.slice/system-vmm.slice/vmm@1.service", "vmm@1.service"),
        ("/system.slice/system-a.slice/system-a-b.slice/vmm.service", "vmm.service"),
        ("/machine.slice/qemu-1.scope", "qemu-1.scope"),
        ("/machine.slice/vm\\x2d1.service", "vm\\x2d1.service"),
        ("/system.slice/_cpu.service", "cpu.service"),
        ("/system.slice/session.scope", NONE),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/vmm@1.service", NONE),
        ("/user.slice/vmm.service", NONE),
        ("/system.slice/vmm.service/payload", NONE),
        ("/system.slice/vmm.service/system.slice/other.service", NONE),
        ("/machine.slice/c.service/payload/system.slice/vmm.service", NONE),
        ("/system.slice/foo.slice/vmm.service", NONE),
        ("/system.slice/system-.slice/vmm.service", NONE),
        ("/system.slice/system-a-b.slice/vmm.service", NONE),
        ("/system.slice/../system.slice/vmm.service", NONE),
        ("/../system.slice/vmm.service", NONE),
        ("/system.slice//vmm.service", NONE),
        ("/system.slice/vmm.service (deleted)", NONE),
        ("/system.slice/.service", NONE),
        ("/system.slice/vmm\xff.service", NONE),
        ("/system.slice", NONE),
        ("/vmm.service", NONE),
        ("/init.scope", NONE),
        ("/", NONE),
    ],
)
def test_which_control_groups_are_a_unit(path: str, unit: str) -> None:
    assert unit_in(f"1:name=systemd:/system.slice/old.service\n0::{path}\n".encode("latin-1")) == unit


def test_a_control_group_with_a_newline_is_no_unit() -> None:
    assert unit_in(b"0::/user.slice/x\n0::/system.slice/vmm.service\n") == ""
    assert unit_in(b"") == ""


@contextmanager
def connected(code: str) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """Our end of a connection that another process has made, and that process; `code` runs in it afterwards."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0khod-test-{os.getpid()}")
        listener.listen()
        script = f"import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect('\\0khod-test-{os.getpid()}')\n{code}"
        command = [sys.executable, "-I", "-S", "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            sock, _ = listener.accept()
            with sock:
                yield sock, process
            process.kill()


def test_the_kernels_word() -> None:
    with connected("sys.stdin.read()") as (sock, process):
        peer = peers.identify(sock)
        assert (peer.pid, peer.uid, peer.user) == (process.pid, os.getuid(), pwd.getpwuid(os.getuid()).pw_name)
        assert peer.groups == {os.getgid(), *os.getgroups()}
        assert not peers.ended(peer.pidfd)
        assert not os.get_inheritable(peer.pidfd)
        process.kill()
        process.wait(10)
        assert peers.ended(peer.pidfd)
        os.close(peer.pidfd)


@pytest.mark.parametrize("count", [3, 1000])
def test_supplementary_groups(count: int) -> None:
    if os.geteuid():
        pytest.skip("only root can join groups")
    many = [*range(70000, 70000 + count)]
    own = os.getgroups()
    os.setgroups(many)
    try:
        one, two = socket.socketpair()
        with one, two:
            peer = peers.identify(one)
            assert peer.groups == {os.getgid(), *many}
            os.close(peer.pidfd)
    finally:
        os.setgroups(own)


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_has_ended_is_a_user_and_no_unit(reaped: bool) -> None:
    # The connection outlives it: a child holds it.
    with connected("print(os.fork() or sys.stdin.read(), flush=True)") as (sock, process):
        assert process.stdout is not None
        process.stdout.readline()
        if reaped:
            process.wait(10)
        else:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        peer = peers.identify(sock)
        assert (peer.user, peer.unit) == (pwd.getpwuid(os.getuid()).pw_name, "")
        if peer.pidfd >= 0:
            assert peers.ended(peer.pidfd)
            os.close(peer.pidfd)


def test_without_pidfds_of_peers_no_unit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SO_PEERPIDFD", 9999)
    monkeypatch.setattr(peers, "_unit_of", lambda *_: "vmm.service")
    with connected("sys.stdin.read()") as (sock, process):
        peer = peers.identify(sock)
        assert peer.unit == ""
        assert peer.pidfd >= 0 and not peers.ended(peer.pidfd)
        os.close(peer.pidfd)
        # Its number is another's by now: of another user, or begun since.
        assert peers._pidfd_by_number(process.pid, os.getuid() + 1) == -1
        monkeypatch.setattr(time, "clock_gettime", lambda _: 0.5)
        assert peers._pidfd_by_number(process.pid, os.getuid()) == -1
        assert peers._pidfd_by_number(0, os.getuid()) == -1


def test_a_name_that_cannot_be_recorded_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str) -> None:
        entry = pwd.struct_passwd((name, "x", 77, 77, "", "/", "/bin/sh"))
        monkeypatch.setattr(pwd, "getpwuid", lambda _: entry)

    named("al\nice")
    assert peers._user(77) == ""
    named("alice")
    assert peers._user(77) == "alice"


# --- the policy


def peer(user: str = "alice", uid: int = 4242, unit: str = "", groups: frozenset[int] = frozenset()) -> Peer:
    return Peer(1, uid, groups, user, unit, -1)


def test_rights_add_up_and_a_unit_owns() -> None:
    rules = [
        Rule("user", "alice", ("instances",)),
        Rule("any", "", ("observe",)),
        Rule("unit", "vmm@*.service", ("opaque",)),
    ]
    alice, both = Owner(Kind.USER, "alice"), frozenset({Right.INSTANCES, Right.OBSERVE})
    assert rights(rules, peer()) == (alice, both)
    assert rights(rules, peer("bob")) == (Owner(Kind.USER, "bob"), frozenset({Right.OBSERVE}))
    assert rights(rules, peer(unit="vmm@1.service")) == (Owner(Kind.UNIT, "vmm@1.service"), both | {Right.OPAQUE})
    assert rights(rules, peer(unit="VMM@1.service")) == (alice, both)
    assert rights(rules, peer("", unit="vmm@1.service"))[0] == Owner(Kind.UNIT, "vmm@1.service")


def test_root_may_everything_whoever_it_is() -> None:
    assert rights([], peer("root", 0)) == (Owner(Kind.USER, "root"), frozenset(Right))
    in_a_unit = rights([Rule("unit", "*.service", ("observe",))], peer("root", 0, "a.service"))
    assert in_a_unit == (Owner(Kind.UNIT, "a.service"), frozenset(Right))


def test_a_user_without_a_name_is_nobody() -> None:
    with pytest.raises(NotPermitted, match="user 4242, who has no name"):
        rights([Rule("any", "", ("observe",))], peer(""))
    assert rights([Rule("group", "no-such-group", ("observe",))], peer())[1] == frozenset()


# --- being there


def test_a_presence_tells_once() -> None:
    async def main() -> list[str]:
        told: list[str] = []
        presence = Presence(asyncio.get_running_loop())
        presence.on_end(lambda: told.append("first"))
        presence.end()
        presence.end()
        presence.on_end(lambda: told.append("late"))
        assert not presence.there
        assert told == []  # not from within
        await asyncio.sleep(0)
        return told

    assert asyncio.run(main()) == ["first", "late"]


def test_a_process_is_watched_once_however_often_it_connects() -> None:
    async def main(child: subprocess.Popen[bytes]) -> None:
        processes = Processes(asyncio.get_running_loop())

        def enter() -> peers.ProcessPresence:
            return processes.enter(Peer(child.pid, 0, frozenset(), "root", "", os.pidfd_open(child.pid)))

        before = open_fds()
        first = enter()
        assert enter() is first
        processes.leave(first)
        assert first.there
        ended = asyncio.Event()
        first.on_end(ended.set)
        processes.leave(first)
        assert len(processes) == 1  # something hangs on it
        assert enter() is first
        child.kill()
        await asyncio.wait_for(ended.wait(), 10)
        assert not first.there
        assert len(processes) == 0
        gone = enter()  # a zombie
        assert not gone.there
        processes.leave(gone)
        assert open_fds() == before

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        asyncio.run(main(child))


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
