# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults strike where they were put, once, and the dead do nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import EIO, ENOMEM
from pathlib import Path

import pytest

from khod import errors
from khod.simulated import Process, ProcessDied, connect, machine
from khod.simulated.kernel import Kernel
from khod.simulated.serve import Server

Jump = Callable[..., Kernel]


def test_the_nth_call_fails_and_only_that(kernel: Kernel, process: Process) -> None:
    host = machine(process)
    session = host.liveupdate.create_session("a")
    kernel.faults.fail("preserve_fd", ENOMEM, nth=2)
    host.liveupdate.preserve_fd(session, process.memfd(4096), 0)
    with pytest.raises(errors.OutOfMemory):
        host.liveupdate.preserve_fd(session, process.memfd(4096), 1)
    host.liveupdate.preserve_fd(session, process.memfd(4096), 1)


def test_a_call_that_does_not_exist_is_an_error(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match="preserve_fb"):
        kernel.faults.die("preserve_fb")


@pytest.mark.parametrize("after", [False, True])
def test_dying_before_or_after_the_effect(kernel: Kernel, process: Process, after: bool) -> None:
    kernel.faults.die("store_append", after=after)
    cleaned = []
    with pytest.raises(ProcessDied):
        try:
            machine(process).store.append(b"entry")
        finally:
            with pytest.raises(ProcessDied):
                machine(process).store.append(b"from finally")
            cleaned.append(True)
    assert cleaned
    assert machine(kernel.spawn("next")).store.read() == (b"entry" if after else b"")


@pytest.mark.parametrize(("how", "left"), [("half", b"12"), ("nuls", bytes(4))])
def test_a_torn_append(kernel: Kernel, process: Process, how: str, left: bytes) -> None:
    kernel.faults.die("store_append", torn=how)
    with pytest.raises(ProcessDied):
        machine(process).store.append(b"1234")
    assert machine(kernel.spawn("next")).store.read() == left


def test_the_kernel_closes_what_the_dead_had_open(kernel: Kernel, process: Process) -> None:
    free = kernel.pages.buddy.free
    host = machine(process)
    fd = process.memfd(1 << 20)
    host.liveupdate.preserve_fd(host.liveupdate.create_session("a"), fd, 0)
    assert kernel.pages.buddy.free < free
    kernel.spawn("killer").kill(process.pid)
    assert kernel.pages.buddy.free == free
    machine(kernel.spawn("next")).liveupdate.create_session("a")


def test_what_another_process_holds_stays(kernel: Kernel, process: Process) -> None:
    other = kernel.spawn("other")
    fd = process.memfd(4096)
    process.write(fd, 0, b"shared")
    theirs = process.give(fd, other)
    process.exit()
    assert other.read(theirs, 0, 6) == b"shared"


def test_an_injected_failure_of_retrieve_is_for_ever(kernel: Kernel, process: Process, jump: Jump) -> None:
    host = machine(process)
    host.liveupdate.preserve_fd(host.liveupdate.create_session("a"), process.memfd(1 << 20), 0)
    booted = jump(kernel)
    live = machine(booted.spawn("khod")).liveupdate
    session, free = live.retrieve_session("a"), booted.pages.buddy.free
    booted.faults.fail("retrieve_fd", EIO)
    for _ in range(2):
        with pytest.raises(errors.RetrieveFailed) as refused:
            live.retrieve_fd(session, 0)
        assert refused.value.errno == EIO
    assert booted.pages.buddy.free >= free + 256


_VICTIM = """
import sys
from khod.simulated import connect, machine
process = connect(sys.argv[1], "victim")
process.inject("boot", pid=process.pid)
try:
    machine(process).boot.boot()
finally:
    print("lived on")
"""


def test_a_process_of_its_own_dies_as_by_sigkill(kernel: Kernel, directory: Path) -> None:
    server = Server(kernel, lambda: None)
    server.start()
    done = subprocess.run([sys.executable, "-c", _VICTIM, str(directory)], capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"")
    assert not [name for _, name in kernel.spawn("after").call("listing") if name == "victim"]
    server.close()


def test_the_socket_carries_what_the_direct_way_does(kernel: Kernel, directory: Path) -> None:
    server = Server(kernel, lambda: None)
    server.start()
    process = connect(directory, "far", mortal=False)
    host = machine(process)
    fd = host.files.memfd("x", 1 << 20)
    contents = os.urandom(1 << 20)
    host.files.write(fd, 0, contents)
    assert host.files.read(fd, 0, 1 << 20) == contents
    session = host.liveupdate.create_session("a")
    host.liveupdate.preserve_fd(session, fd, 0)
    (window,) = host.frames.windows(fd)
    assert b"".join(host.memory.read(pfn << 12, 4096) for pfn in window.pfns) == contents
    real = host.files.export(fd)
    assert os.pread(real, 1 << 20, 0) == contents
    adopted = host.files.adopt(real)
    assert host.files.stat(adopted).size == 1 << 20
    with pytest.raises(errors.AlreadyPreserved):
        host.liveupdate.preserve_fd(session, fd, 1)
    process.exit()
    server.close()
