# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian of the simulated machine: what outlives whom, and what PID 1's store has behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import EIO
from pathlib import Path

import pytest

from khod import errors
from khod.core.ports import Machine
from khod.simulated import Process, ProcessDied, create, image, machine
from khod.simulated.kernel import Kernel
from khod.simulated.ports import KernelLiveUpdate

Jump = Callable[..., Kernel]
SIZE = 8 << 20
FOLIOS = SIZE >> 12


@pytest.fixture
def host(process: Process) -> Machine:
    return machine(process)


@pytest.fixture
def big(tmp_path: Path) -> Iterator[Kernel]:
    """A kernel under systemd, as a PID 1."""
    kernel = Kernel.boot(create(tmp_path / "systemd", memory=256 << 20, systemd=True))
    yield kernel
    kernel.power_off()


def twins(kernel: Kernel) -> list[int]:
    return [pid for pid, name in kernel.spawn("ps").call("listing") if name == "custodian"]


def deposit(process: Process, name: str, contents: bytes) -> None:
    """Something that only custody holds."""
    fd = process.memfd(SIZE)
    process.populate(fd)
    process.write(fd, 0, contents)
    machine(process).custody.keep(name, fd)
    process.close(fd)


def read(kernel: Kernel, name: str) -> bytes:
    process = kernel.spawn("reader")
    found = process.read(machine(process).custody.take(name), 0, 5)
    process.exit()
    return found


def outgoing(process: Process, name: str, contents: bytes) -> int:
    """A session with one file, which only the session holds."""
    live = machine(process).liveupdate
    session, fd = live.create_session(name), process.memfd(SIZE)
    process.write(fd, 0, contents)
    live.preserve_fd(session, fd, 0)
    process.close(fd)
    return session


def test_either_twin_may_die_and_a_new_one_is_made(kernel: Kernel, process: Process) -> None:
    deposit(process, "a", b"guest")
    process.exit()
    killer, seen = kernel.spawn("killer"), twins(kernel)
    for which in (0, 1, 0, 0):
        before = twins(kernel)
        killer.kill(before[which])
        assert len(twins(kernel)) == 2
        assert before[which] not in twins(kernel)
        assert read(kernel, "a") == b"guest"
    assert not set(seen) & set(twins(kernel))


def test_both_twins_at_once_take_all_that_only_they_held(kernel: Kernel, process: Process, host: Machine) -> None:
    deposit(process, "a", b"guest")
    deposit(process, "b", b"other")
    held, free = host.custody.take("b"), kernel.pages.buddy.free + kernel.pages.buddy.scratch_free
    kernel.spawn("killer").kill(*twins(kernel))
    assert kernel.pages.buddy.free + kernel.pages.buddy.scratch_free == free + FOLIOS
    assert process.read(held, 0, 5) == b"other"
    with pytest.raises(errors.CustodianGone):
        host.custody.kept()
    assert not twins(kernel)
    # A khod that starts anew starts a custodian, and the old one is not fooled by it.
    assert machine(kernel.spawn("khod")).custody.kept() == []
    assert len(twins(kernel)) == 2
    with pytest.raises(errors.CustodianGone):
        host.custody.take("b")


@pytest.mark.parametrize("victims", [("first",), ("second",), ("caller",), ("caller", "first"), ("caller", "second")])
@pytest.mark.parametrize("after", [False, True])
def test_who_dies_at_a_retrieve_loses_nothing(
    kernel: Kernel, process: Process, jump: Jump, victims: tuple[str, ...], after: bool
) -> None:
    outgoing(process, "a", b"guest")
    booted = jump(kernel)
    for call in ("retrieve_session", "retrieve_fd"):
        khod = booted.spawn("khod")
        live = machine(khod).liveupdate
        booted.faults.die(call, pid=khod.pid, after=after, victims=victims)
        before = set(twins(booted))
        if "caller" in victims:
            with pytest.raises(ProcessDied):
                live.retrieve_fd(live.retrieve_session("a"), 0)
        else:
            assert khod.read(live.retrieve_fd(live.retrieve_session("a"), 0), 0, 5) == b"guest"
        assert len(before - set(twins(booted))) == len(set(victims) - {"caller"})
        khod.exit()
    khod = booted.spawn("khod")
    live = machine(khod).liveupdate
    assert khod.read(live.retrieve_fd(live.retrieve_session("a"), 0), 0, 5) == b"guest"


def test_every_call_of_a_process_is_recorded_and_is_a_place_to_die(kernel: Kernel) -> None:
    def life(process: Process) -> None:
        host = machine(process)
        host.custody.keep("a", host.files.memfd("a", 4096))
        host.manager.present()
        host.custody.drop(["a"])

    process = kernel.spawn("khod")
    with kernel.faults.recorded(process.pid) as calls:
        kernel.spawn("other").memfd(4096)
        life(process)
    assert calls == ["memfd", "keep", "manager_present", "drop"]
    for nth in range(1, len(calls) + 1):
        process = kernel.spawn("khod")
        kernel.faults.die("*", nth=nth, pid=process.pid)
        with kernel.faults.recorded(process.pid) as made, pytest.raises(ProcessDied):
            life(process)
        assert made == calls[:nth]


def test_victims_that_do_not_exist_are_an_error(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="third"):
        kernel.faults.die("keep", victims=("third",))


def test_a_full_and_a_read_only_disk(kernel: Kernel, host: Machine) -> None:
    host.store.append(b"12")
    kernel.faults.full_disk()
    for _ in range(2):
        with pytest.raises(errors.MachineError, match="ENOSPC"):
            host.store.append(b"3")
    host.store.cut(1)
    kernel.faults.clear()
    kernel.faults.read_only_disk()
    with pytest.raises(errors.MachineError, match="EROFS"):
        host.store.cut(0)
    with pytest.raises(errors.MachineError, match="EROFS"):
        host.store.append(b"3")
    assert host.store.read() == b"1"


def test_the_limits_of_the_custodians_unit(kernel: Kernel, process: Process, jump: Jump) -> None:
    host = machine(process)
    for name in ("a", "b"):
        outgoing(process, name, b"guest")
    booted = jump(kernel)
    khod = booted.spawn("khod")
    host = machine(khod)
    session = host.liveupdate.retrieve_session("a")
    khod.limit_custody(memory=SIZE + 4096, descriptors=2)
    assert host.custody.doubt(SIZE, 1) == ""
    assert "MemoryMax=" in host.custody.doubt(SIZE + 4097, 1)
    assert "LimitNOFILE=" in host.custody.doubt(SIZE, 2)
    fd = host.liveupdate.retrieve_fd(session, 0)
    assert host.custody.room() == 0
    with pytest.raises(errors.CustodyFull):
        host.liveupdate.retrieve_session("b")
    # What was retrieved stays charged until it is gone.
    assert "MemoryMax=" in host.custody.doubt(SIZE, 0)
    host.custody.release("a")
    assert "MemoryMax=" in host.custody.doubt(SIZE, 0)
    khod.close(session)
    khod.close(fd)
    assert host.custody.doubt(SIZE, 1) == ""
    assert khod.read(host.liveupdate.retrieve_fd(host.liveupdate.retrieve_session("b"), 0), 0, 5) == b"guest"


# With a systemd.


def test_a_machine_without_systemd_says_so(kernel: Kernel, host: Machine) -> None:
    assert not host.manager.present()
    assert host.manager.doubt()
    for call in (host.manager.kexec, lambda: host.manager.inhibit("update"), lambda: host.custody.offer([])):
        with pytest.raises(errors.Refused):
            call()
    host.custody.withdraw()


def test_the_store_gives_a_new_custodian_everything(big: Kernel, jump: Jump) -> None:
    khod = big.spawn("khod")
    outgoing(khod, "a", b"guest")
    booted = jump(big)
    khod = booted.spawn("khod")
    live = machine(khod).liveupdate
    live.retrieve_fd(live.retrieve_session("a"), 0)
    deposit(khod, "book", b"pages")
    booted.spawn("killer").kill(khod.pid, *twins(booted))
    assert len(twins(booted)) == 2
    next_khod = booted.spawn("khod")
    host = machine(next_khod)
    assert (host.custody.sessions(), host.custody.kept()) == (["a"], ["book"])
    session = host.liveupdate.retrieve_session("a")
    assert next_khod.read(host.liveupdate.retrieve_fd(session, 0), 0, 5) == b"guest"
    assert read(booted, "book") == b"pages"


def test_nobody_kills_pid_1(big: Kernel) -> None:
    with pytest.raises(PermissionError):
        big.spawn("killer").kill(1)


def test_an_inhibitor_holds_until_it_is_closed(big: Kernel) -> None:
    khod = big.spawn("khod")
    fd = machine(khod).manager.inhibit("update")
    assert big.systemd is not None
    assert big.systemd.inhibitors == ["update"]
    khod.close(fd)
    assert big.systemd.inhibitors == []


def systemd_jump(kernel: Kernel, khod: Process, tmp_path: Path) -> Kernel:
    """Load an image and have PID 1 jump; the kernel that boots."""
    (tmp_path / "bzImage").write_bytes(image.build())
    host = machine(khod)
    opened = host.kexec.open(str(tmp_path / "bzImage"))
    host.kexec.load(opened)
    host.kexec.release(opened)
    with pytest.raises(ProcessDied):
        host.manager.kexec()
    return Kernel.boot(kernel.directory)


def test_pid_1_carries_what_was_offered_and_nothing_else(big: Kernel, tmp_path: Path) -> None:
    khod = big.spawn("khod")
    offered, kept_back = outgoing(khod, "a", b"guest"), outgoing(khod, "b", b"other")
    deposit(khod, "book", b"pages")
    machine(khod).custody.offer([offered])
    booted = systemd_jump(big, khod, tmp_path)
    host = machine(khod := booted.spawn("khod"))
    assert kept_back >= 0
    assert (host.custody.sessions(), host.custody.kept()) == (["a"], [])
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("b")
    with pytest.raises(errors.SessionTaken):  # PID 1 did, before anybody else
        KernelLiveUpdate(khod).retrieve_session("a")
    session = host.liveupdate.retrieve_session("a")
    assert khod.read(host.liveupdate.retrieve_fd(session, 0), 0, 5) == b"guest"
    booted.power_off()


def test_without_an_offer_what_can_be_preserved_comes_along(big: Kernel, tmp_path: Path) -> None:
    """What a ``systemctl kexec`` of an administrator's does to khod's deposits."""
    khod = big.spawn("khod")
    outgoing(khod, "a", b"guest")
    deposit(khod, "book", b"pages")
    machine(khod).custody.keep("device", khod.special("vfio"))
    booted = systemd_jump(big, khod, tmp_path)
    host = machine(booted.spawn("khod"))
    assert (host.custody.sessions(), host.custody.kept()) == ([], ["book"])
    assert read(booted, "book") == b"pages"
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("a")
    with pytest.raises(errors.SessionUnknown):  # finished and closed by PID 1
        host.liveupdate.retrieve_session("systemd")
    booted.power_off()


def test_an_offer_is_withdrawn(big: Kernel, tmp_path: Path) -> None:
    khod = big.spawn("khod")
    session = outgoing(khod, "a", b"guest")
    deposit(khod, "book", b"pages")
    host = machine(khod)
    host.custody.offer([session])
    khod.close(session)
    with pytest.raises(errors.SessionExists):  # the custodian and PID 1 hold it
        host.liveupdate.create_session("a")
    big.spawn("killer").kill(*twins(big))
    with pytest.raises(errors.SessionExists):
        host.liveupdate.create_session("a")
    host.custody.withdraw()
    host.liveupdate.create_session("a")
    assert big.systemd is not None
    assert not [label for label in big.systemd.store if label[0] == "outgoing"]


def test_a_withdrawn_offer_puts_the_deposits_back(big: Kernel) -> None:
    khod = big.spawn("khod")
    deposit(khod, "book", b"pages")
    custody = machine(khod).custody
    custody.offer([outgoing(khod, "a", b"guest")])
    assert big.systemd is not None
    assert list(big.systemd.store) == [("outgoing", "a")]
    custody.withdraw()
    assert list(big.systemd.store) == [("deposit", "book")]
    big.spawn("killer").kill(*twins(big))
    assert read(big, "book") == b"pages"


def test_a_jump_that_fails_behind_everybody_is_a_cold_boot(big: Kernel, tmp_path: Path) -> None:
    khod = big.spawn("khod")
    machine(khod).custody.offer([outgoing(khod, "a", b"guest")])
    machine(khod).store.append(b"executing")
    big.faults.fail("execute", EIO)
    booted = systemd_jump(big, khod, tmp_path)
    host = machine(booted.spawn("khod"))
    assert not host.boot.boot().handover
    assert host.custody.sessions() == []
    assert host.store.read() == b"executing"
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("a")
    booted.power_off()


@pytest.mark.parametrize("unloaded", [False, True])
def test_the_shutdown_comes_when_khod_is_gone_already(big: Kernel, tmp_path: Path, unloaded: bool) -> None:
    """As on Linux: the request is accepted, services end by SIGTERM, and what PID 1 stores is all that is left."""
    khod = big.spawn("khod")
    host = machine(khod)
    (tmp_path / "bzImage").write_bytes(image.build())
    host.kexec.load(host.kexec.open(str(tmp_path / "bzImage")))
    session = outgoing(khod, "a", b"guest")
    host.custody.offer([session])
    assert big.systemd is not None
    big.systemd.at_once = False
    host.manager.kexec()
    assert host.liveupdate.session_name(session) == "a", "there still is somebody to ask"
    khod.exit()
    killer = big.spawn("killer")
    killer.kill(*twins(big))
    if unloaded:
        machine(killer).kexec.unload()
    big.shut_down()
    with pytest.raises(ProcessDied):
        killer.memfd(0)
    booted = Kernel.boot(big.directory)
    custody = machine(booted.spawn("khod")).custody
    assert custody.sessions() == ([] if unloaded else ["a"])
    booted.power_off()


def test_a_pid_1_that_does_not_carry_its_store_does_not_jump(big: Kernel) -> None:
    khod = big.spawn("khod")
    assert big.systemd is not None
    assert machine(khod).manager.doubt() == ""
    big.systemd.doubt = "systemd 255 does not carry its store"
    assert "255" in machine(khod).manager.doubt()
    with pytest.raises(errors.Refused, match="255"):
        machine(khod).manager.kexec()
    assert machine(khod).custody.kept() == []


def test_pid_1_refuses_to_jump_without_an_image(big: Kernel) -> None:
    khod = big.spawn("khod")
    with pytest.raises(errors.NothingLoaded):
        machine(khod).manager.kexec()
    big.faults.fail("manager_kexec", EIO)
    with pytest.raises(errors.KexecFailed):
        machine(khod).manager.kexec()
    assert machine(khod).custody.kept() == []
