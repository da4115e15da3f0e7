# SPDX-License-Identifier: LGPL-2.1-or-later
"""Keeping by two processes that anybody may kill. Nothing here needs /dev/liveupdate."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from khod.custodian import protocol
from khod.custodian.luo import same
from khod.errors import CustodianGone, CustodyFull, DeviceMissing, InvalidRequest, MachineError, Refused
from khod.kernel.custody import PROGRAM, KernelCustody
from khod.kernel.liveupdate import KernelLiveUpdate
from tests.unit.custodian.conftest import Memfd, contents
from tests.unit.custodian.pid1 import kill, kill_both, links, twins, wait


def test_keep_take_drop(custody: KernelCustody, memfd: Memfd) -> None:
    fd = memfd(b"one")
    custody.keep("one", fd)
    custody.keep("2", memfd(b"two"))
    assert list(custody.kept()) == ["2", "one"]
    taken = custody.take("one")
    assert same(fd, taken)
    assert not os.get_inheritable(taken)
    assert contents(taken) == b"one"
    custody.drop(["one", "absent"])
    assert list(custody.kept()) == ["2"]
    with pytest.raises(InvalidRequest, match="'one'"):
        custody.take("one")


def test_another_file_takes_the_place_of_what_had_the_name(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.keep("book", memfd(b"old"))
    before = len(links(socket_path))
    new = memfd(b"new")
    for _ in range(3):  # the same again has no effect
        custody.keep("book", new)
        assert contents(custody.take("book")) == b"new"
        assert len(links(socket_path)) == before


@pytest.mark.parametrize("name", ["", "elevenchars", "Upper", "with-dash", "ä", "a\0b", "a" * 40000])
def test_names_that_are_none(custody: KernelCustody, memfd: Memfd, name: str) -> None:
    with pytest.raises(InvalidRequest):
        custody.keep(name, memfd(b""))
    custody.drop([name])
    assert list(custody.kept()) == []


def test_a_closed_descriptor(custody: KernelCustody) -> None:
    with pytest.raises(MachineError) as refused:
        custody.keep("a", 1 << 20)
    assert refused.value.errno == errno.EBADF


def test_names_in_pages(custody: KernelCustody, memfd: Memfd) -> None:
    names = [f"instance{i:02}" for i in range(100)] + [f"n{i}" for i in range(1900)]
    fd = memfd(b"")
    for name in names:
        custody.keep(name, fd)
    assert list(custody.kept()) == sorted(names)
    custody.drop(names[1:])
    assert list(custody.kept()) == names[:1]


def test_either_twin_may_be_killed_and_has_a_successor(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    kept = memfd(b"guest")
    custody.keep("ram", kept)
    inventory = links(socket_path)
    for victim in (0, 1, 0, 0, 1, 1, 0):
        before = twins(socket_path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(socket_path))
            connection.send(protocol.request(protocol.ROOM))
            connection.recv(64)
            kill(before[victim])
            if victim == 0:
                assert connection.recv(64) == b"", "the connections of the dead are closed"
        assert list(custody.kept()) == ["ram"]
        after = twins(socket_path)
        assert before[victim] not in after
        if victim == 0:
            assert after[0] == before[1], "the twin serves"
        taken = custody.take("ram")
        assert same(kept, taken)
        os.close(taken)
        # Nothing else of the dead stays open: pipes and pidfds are as many as before.
        assert links(socket_path) == inventory


def test_a_call_whose_custodian_dies_is_made_again(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.keep("a", memfd(b"a"))
    serving, sleeping = twins(socket_path)
    os.kill(serving, signal.SIGSTOP)
    raised: list[BaseException] = []

    def call(function: Callable[..., None], *arguments: object) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            raised.append(error)

    calls = [(custody.keep, "b", memfd(b"b")), (custody.drop, ["a"]), (custody.keep, "c", memfd(b"c"))]
    threads = [threading.Thread(target=call, args=arguments) for arguments in calls]
    for thread in threads:
        thread.start()
    kill(serving)
    for thread in threads:
        thread.join(20)
    assert not raised
    assert list(custody.kept()) == ["b", "c"]
    assert contents(custody.take("c")) == b"c"
    assert twins(socket_path)[0] == sleeping


def test_threads_and_deaths_at_any_moment(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    """Whatever a keep returned from is kept, whichever instruction the custodian died at."""
    fds = [memfd(str(i).encode()) for i in range(4)]
    custody.keep("first", fds[0])
    done: list[list[str]] = [[], [], [], []]
    raised: list[BaseException] = []

    def keep(who: int) -> None:
        try:
            for i in range(120):
                name = f"n{who}x{i}"
                custody.keep(name, fds[who])
                if i % 3 == 0:
                    custody.drop([name])
                else:
                    done[who].append(name)
                custody.keep(f"same{who}", fds[i % 4])
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=keep, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    deaths = 0
    while any(thread.is_alive() for thread in threads):
        kill(twins(socket_path)[deaths % 2])
        deaths += 1
        custody.room()  # answers when there are two again
    assert not raised
    assert deaths > 3
    assert set(custody.kept()) == {"first", *(f"same{who}" for who in range(4)), *(name for names in done for name in names)}
    for who in range(4):
        assert contents(custody.take(done[who][-1])) == str(who).encode()


def test_both_dead_is_said_and_not_replaced_by_an_empty_one(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.keep("a", memfd(b"a"))
    kill_both(socket_path)
    with pytest.raises(CustodianGone, match="nobody answers"):
        custody.kept()
    # A khod that is started anew starts another: the socket of the dead is no obstacle.
    fresh = KernelCustody(str(socket_path), start=True)
    assert list(fresh.kept()) == []
    os.waitpid(custody._child, 0)
    custody._child = fresh._child


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(CustodianGone, match="nobody answers") as gone:
        KernelCustody(str(tmp_path / "none.sock")).kept()
    assert "khod-custodian.service" in gone.value.hint


def test_one_custodian_at_a_socket(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.keep("a", memfd(b"a"))
    done = subprocess.run(
        [sys.executable, "-I", "-S", PROGRAM, "--socket", str(socket_path)], capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "a custodian serves there already" in done.stderr
    kill(twins(socket_path)[0])
    assert list(custody.kept()) == ["a"], "the lock is the twin's too"


def test_several_threads_start_one(custody: KernelCustody, socket_path: Path) -> None:
    rooms: list[int] = []
    threads = [threading.Thread(target=lambda: rooms.append(custody.room())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(rooms) == 8
    assert len(twins(socket_path)) == 2


def test_one_that_was_begun_is_the_one_that_is_used(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.begin()
    child = custody._child
    assert child > 0
    custody.begin()
    custody.keep("a", memfd(b"a"))
    custody.begin()
    assert custody._child == child == twins(socket_path)[0]
    other = KernelCustody(str(socket_path), start=True)
    other.begin()
    assert other._child == -1
    assert list(other.kept()) == ["a"]


def test_sigterm_is_refused_while_something_is_held_and_nobody_else_has_it(
    custody: KernelCustody, socket_path: Path, memfd: Memfd
) -> None:
    custody.keep("a", memfd(b"a"))
    serving, sleeping = twins(socket_path)
    for pid in (serving, sleeping):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    assert list(custody.kept()) == ["a"]
    assert twins(socket_path) == (serving, sleeping)
    custody.drop(["a"])
    ends = [os.pidfd_open(pid) for pid in (serving, sleeping)]
    os.kill(serving, signal.SIGTERM)
    for fd in ends:
        wait(fd)
        os.close(fd)
    assert not socket_path.exists()


def test_leave(custody: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    custody.keep("a", memfd(b"a"))
    assert not custody.leave()
    custody.drop(["a"])
    ends = [os.pidfd_open(pid) for pid in twins(socket_path)]
    assert custody.leave()
    for fd in ends:
        wait(fd)
        os.close(fd)


def test_room_is_what_the_limit_leaves(socket_path: Path, memfd: Memfd) -> None:
    program = [sys.executable, "-I", "-S", PROGRAM, "--socket", str(socket_path), "--say-ready"]
    process = subprocess.Popen(["sh", "-c", 'ulimit -n 80; exec "$@"', "sh", *program], stdout=subprocess.PIPE)
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    try:
        custody = KernelCustody(str(socket_path))
        fd = memfd(b"")
        for i in range(16):
            assert custody.room() == 16 - i
            custody.keep(f"n{i}", fd)
        with pytest.raises(CustodyFull, match="80 descriptors"):
            custody.keep("more", fd)
        assert "room for 0 more descriptors" in custody.doubt(4096, 1)
        custody.drop(["n3"])
        custody.keep("more", fd)
        kill(twins(socket_path)[0])
        with pytest.raises(CustodyFull):
            custody.keep("again", fd)
        assert len(custody.kept()) == 16
    finally:
        kill_both(socket_path)
        process.wait(20)


def test_without_a_store_nothing_can_be_offered(custody: KernelCustody) -> None:
    with pytest.raises(Refused, match="systemd 254"):
        custody.offer([])
    custody.withdraw()
    custody.release("khod")
    assert list(custody.sessions()) == []


def test_what_the_device_refuses_is_told_as_everywhere(tmp_path: Path, socket_path: Path, memfd: Memfd) -> None:
    custody = KernelCustody(str(socket_path), start=True, device=str(tmp_path / "liveupdate"))
    try:
        liveupdate = KernelLiveUpdate(str(tmp_path / "liveupdate"), custody=custody)
        with pytest.raises(DeviceMissing):
            liveupdate.retrieve_session("khod")
        (tmp_path / "liveupdate").touch()  # a file, of which RETRIEVE_SESSION is ENOTTY
        with pytest.raises(MachineError, match=r"retrieve_session.*ENOTTY"):
            liveupdate.retrieve_session("khod")
        assert custody.retrieve_fd(memfd(b""), 1) is None
        assert list(custody.sessions()) == []
    finally:
        kill_both(socket_path)
        os.waitpid(custody._child, 0)


def test_it_starts_with_little() -> None:
    """What it imports is part of every blackout."""
    code = "import sys; sys.path.append(sys.argv[1]); import khod.custodian.__main__; print(*sys.modules)"
    command = [sys.executable, "-I", "-S", "-c", code, str(Path(__file__).parents[3])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    dear = {"collections", "contextlib", "ctypes", "dataclasses", "enum", "pathlib", "re", "signal", "socket", "typing"}
    assert not dear & set(done.stdout.split())
