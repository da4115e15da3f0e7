# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sessions that came through a jump, in the hands of a custodian with PID 1's store behind it, and everybody killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from khod.custodian import luo
from khod.custodian.keeper import Keeper
from khod.custodian.store import Store
from khod.custodian.table import Table
from khod.errors import SessionDirection, SessionUnknown
from khod.kernel.custody import KernelCustody
from khod.kernel.liveupdate import KernelLiveUpdate
from khod.kernel.machine import machine
from tests.unit.custodian.pid1 import Pid1, kill, twins
from tests.vm.guest import Guest

LARGE = 64 << 20
FILES = 80
SESSIONS = 12


def before(vm: Guest) -> None:
    ports = machine(vm.state)

    def preserve(session: int, token: int, size: int = 4096) -> None:
        fd = ports.files.memfd("ram", size)
        ports.files.write(fd, 0, content(token))
        ports.liveupdate.preserve_fd(session, fd, token)
        ports.files.close(fd)

    for name in ("large", "orphan", "adopted"):
        preserve(ports.liveupdate.create_session(name), 7, LARGE if name == "large" else 4096)
    many = ports.liveupdate.create_session("many")
    for token in range(FILES):
        preserve(many, token)
    for i in range(SESSIONS):
        preserve(ports.liveupdate.create_session(f"s{i}"), i)
    ports.kexec.load(ports.kexec.open(str(vm.kernel)))
    ports.filesystems.sync()
    ports.kexec.execute()


def content(token: int) -> bytes:
    return b"token %d" % token


def shmem() -> int:
    return next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))


class Restarted:
    """A khod that has just been started, and knows nothing."""

    def __init__(self, path: Path) -> None:
        self.custody = KernelCustody(str(path))
        self.liveupdate = KernelLiveUpdate(custody=self.custody)

    def read(self, name: str, token: int) -> int:
        """Retrieve and compare; the descriptor of the file."""
        session = self.liveupdate.retrieve_session(name)
        fd = self.liveupdate.retrieve_fd(session, token)
        os.close(session)
        assert os.pread(fd, 100, 0).rstrip(b"\0") == content(token), (name, token)
        return fd


def during(path: Path, work: Callable[[], None]) -> int:
    """Run `work` while the process that serves is killed again and again; how often."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deaths = 0
    ask = KernelCustody(str(path))
    while thread.is_alive():
        kill(twins(path)[0])
        deaths += 1
        ask.room()  # answers when there are two again
        for _ in range(deaths % 7):  # and some work is done between two deaths
            ask.room()
    thread.join()
    if raised:
        raise raised[0]
    return deaths


def after(vm: Guest) -> None:
    pid1 = Pid1(Path("/run/tmp"))
    path = pid1.socket_path
    pid1.start()
    khod = Restarted(path)
    one_survives(pid1, path)
    vm.record("one", store=pid1.names(), sessions=list(khod.custody.sessions()))
    many_deaths(vm, path)
    client_dies_too(path)
    vm.record("client")
    both_dead(pid1, path)
    vm.record("both", sessions=len(khod.custody.sessions()))
    adoption()
    vm.record("adoption")
    release(vm, khod)
    offers(pid1, khod)
    pid1.end()


def one_survives(pid1: Pid1, path: Path) -> None:
    kept = Restarted(path).read("large", 7)
    assert len(pid1.store) == 1
    assert luo.is_session(pid1.store[0][1])
    for victim in (0, 1, 0):
        kill(twins(path)[victim])
        again = Restarted(path).read("large", 7)
        assert luo.same(kept, again), "two retrieves of one token are one file"
        os.close(again)
    os.close(kept)


def many_deaths(vm: Guest, path: Path) -> None:
    def files() -> None:
        khod = Restarted(path)
        for token in range(FILES):
            os.close(khod.read("many", token))

    def sessions() -> None:
        khod = Restarted(path)
        for i in range(SESSIONS):
            os.close(khod.read(f"s{i}", i))

    vm.record("deaths", files=during(path, files), sessions=during(path, sessions))


def client_dies_too(path: Path) -> None:
    """The first client retrieves, and is killed together with the process that served it, before it could say anything."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        Restarted(path).read("orphan", 7)
        os.write(theirs, b"x")
        signal.pause()
    os.read(ours, 1)
    kill(child, twins(path)[0])
    os.waitpid(child, 0)
    os.close(Restarted(path).read("orphan", 7))


def both_dead(pid1: Pid1, path: Path) -> None:
    """The sessions come back from the store, retrieved already; one by a mark of another boot, as after PID 1's own jump."""
    pid1.kill_both()
    names = [luo.name(fd) for _, fd in pid1.store]
    at = names.index(b"many")
    pid1.store[at] = ("Offffff1", pid1.store[at][1])
    pid1.start()
    khod = Restarted(path)
    assert sorted(khod.custody.sessions()) == sorted(name.decode() for name in names)
    for token in (0, FILES - 1):
        os.close(khod.read("many", token))
    os.close(khod.read("large", 7))


def adoption() -> None:
    """The moment that no other process can be killed at for certain: after the kernel made the session, before its label."""
    table = Table(1024)
    ours = set(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    device = os.open(luo.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    table.retrieving = True
    session = luo.retrieve_session(device, b"adopted")
    ours -= {device, session}  # numbers that the listing itself had
    survivor = Keeper(table, Store("", 0), luo.DEVICE, "")
    survivor.recover(ours)
    assert survivor.sessions == {b"adopted": session}
    assert luo.name(session) == b"adopted"
    assert not os.path.exists(f"/proc/self/fd/{device}"), "nobody else could open it"  # noqa: PTH110
    assert not table.retrieving
    # One that a client sent, in the middle of any other request, is not ours to keep: it would outlive its owner's undo.
    outgoing = KernelLiveUpdate().create_session("sent")
    ours.discard(outgoing)
    survivor.recover(ours)
    assert not os.path.exists(f"/proc/self/fd/{outgoing}")  # noqa: PTH110
    assert survivor.sessions == {b"adopted": session}
    survivor.release(b"adopted")


def offers(pid1: Pid1, khod: Restarted) -> None:
    session = khod.liveupdate.create_session("out")
    with suppress(SessionDirection):  # the kernel's own word, for a session that is not in custody
        khod.liveupdate.retrieve_fd(session, 1)
        raise AssertionError("it is an outgoing one")
    khod.custody.offer([session])
    assert [luo.name(fd) for _, fd in pid1.store] == [b"out"]
    khod.custody.offer([session])
    os.close(session)
    kill(pid1.twins()[0])
    khod.custody.room()
    assert "many" in khod.custody.sessions()
    pid1.kill_both()
    assert [name[:1] for name in pid1.names()] == ["O"]
    # The incoming ones, unfinished, were the custodian's alone by then: this is what decision 7 forbids.
    pid1.start()
    assert list(khod.custody.sessions()) == []
    khod.custody.withdraw()
    assert pid1.names() == []
    os.close(khod.liveupdate.create_session("out"))  # nobody has it any longer


def release(vm: Guest, khod: Restarted) -> None:
    """Finished or not, what is let go of is free when nobody else has it."""
    session = khod.liveupdate.retrieve_session("large")
    khod.liveupdate.finish(session)
    os.close(session)
    fd = khod.read("large", 7)  # what was retrieved before is kept, and given, after the end of the session too
    held = shmem()
    os.close(fd)
    assert abs(shmem() - held) < 1024
    khod.custody.release("large")
    freed = held - shmem()
    khod.custody.release("orphan")  # not finished
    for name in ("large", "orphan"):
        try:
            khod.liveupdate.retrieve_session(name)
        except SessionUnknown:
            continue
        raise AssertionError(f"{name} is still there")
    vm.record("released", freed=freed)
