# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel makes of what its predecessor left: the outcomes that no update may ever mistake for each other."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from khod import errors
from khod.folio.units import PAGE_SHIFT
from khod.simulated import KernelPanic, Process, ProcessDied, Release, machine
from khod.simulated.kernel import Kernel

Jump = Callable[..., Kernel]
SIZE = 8 << 20


@pytest.fixture
def phys(process: Process) -> int:
    """Address of a preserved page that begins with b'guest'."""
    host = machine(process)
    fd = process.memfd(SIZE)
    process.write(fd, 0, b"guest")
    host.liveupdate.preserve_fd(host.liveupdate.create_session("a"), fd, 0)
    return host.frames.pages(fd, [0])[0][0] << PAGE_SHIFT


def seen(kernel: Kernel, phys: int) -> bytes:
    return machine(kernel.spawn("reader")).memory.read(phys, 5)


@pytest.mark.parametrize(
    ("switches", "missing"),
    [("kho=off liveupdate=on", "kho=off"), ("kho=on", "liveupdate=on"), ("kho=on liveupdate=off", "liveupdate=on")],
)
def test_switched_off_the_memory_is_there_and_out_of_reach(
    kernel: Kernel, phys: int, jump: Jump, switches: str, missing: str
) -> None:
    booted = jump(kernel, cmdline=switches)
    host = machine(booted.spawn("khod"))
    with pytest.raises(errors.DeviceMissing, match=missing):
        host.liveupdate.probe()
    assert seen(booted, phys) == b"guest"
    assert booted.pages.buddy.free <= booted.pages.buddy.total - booted.pages.buddy.scratch_total - (SIZE >> PAGE_SHIFT)


def test_another_kho_is_a_cold_boot(kernel: Kernel, phys: int, jump: Jump) -> None:
    booted = jump(kernel, Release(kho="kho-v9"))
    host = machine(booted.spawn("khod"))
    assert not host.boot.boot().handover and host.boot.boot().kexec_count == 0
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("a")
    assert seen(booted, phys) not in (b"guest", bytes(5))


def test_another_luo_panics(kernel: Kernel, phys: int, jump: Jump) -> None:
    with pytest.raises(KernelPanic, match="luo-v5"):
        jump(kernel, Release(luo="luo-v9"))


def test_another_memfd_handler_breaks_the_device(kernel: Kernel, phys: int, jump: Jump) -> None:
    booted = jump(kernel, Release(memfd="memfd-v9"))
    live = machine(booted.spawn("khod")).liveupdate
    for _ in range(2):
        with pytest.raises(errors.DeviceBroken):
            live.retrieve_session("a")
    assert seen(booted, phys) == b"guest"


def test_the_old_kexec_load_carries_nothing(kernel: Kernel, process: Process, phys: int) -> None:
    process.load_old("kho=on liveupdate=on")
    assert machine(process).kexec.loaded()
    with pytest.raises(ProcessDied):
        machine(process).kexec.execute()
    booted = Kernel.boot(kernel.directory)
    assert seen(booted, phys) != b"guest"
    assert not machine(booted.spawn("khod")).boot.boot().handover
    booted.power_off()


def test_what_was_not_retrieved_is_lost_at_the_next_jump(kernel: Kernel, phys: int, jump: Jump) -> None:
    second = jump(kernel)
    assert seen(second, phys) == b"guest"
    third = jump(second)
    assert seen(third, phys) != b"guest"
    host = machine(third.spawn("khod"))
    with pytest.raises(errors.SessionUnknown):
        host.liveupdate.retrieve_session("a")
    assert host.boot.boot().kexec_count == 2


def test_a_new_kernel_lives_in_scratch(kernel: Kernel, phys: int, jump: Jump) -> None:
    booted = jump(kernel)
    scratch = machine(booted.spawn("khod")).memory.scratch()
    assert any(r.start <= booted.text << PAGE_SHIFT < r.end for r in scratch)


def test_preserving_moves_pages_out_of_scratch(kernel: Kernel, process: Process) -> None:
    fd = process.memfd(SIZE)
    contents = os.urandom(SIZE)
    process.write(fd, 0, contents)
    host = machine(process)
    before = {pfn for pfn, _ in host.frames.pages(fd, range(SIZE >> PAGE_SHIFT))}
    inside = {pfn for r in host.memory.scratch() for pfn in range(r.start >> PAGE_SHIFT, r.end >> PAGE_SHIFT)}
    assert before & inside, "movable pages were allocated from scratch"
    host.liveupdate.preserve_fd(host.liveupdate.create_session("a"), fd, 0)
    after = {pfn for pfn, _ in host.frames.pages(fd, range(SIZE >> PAGE_SHIFT))}
    assert not after & inside and before - inside <= after
    assert process.read(fd, 0, SIZE) == contents


def test_the_kernel_kills_who_preserves_too_much(kernel: Kernel, process: Process) -> None:
    session = machine(process).liveupdate.create_session("a")
    with pytest.raises(ProcessDied):
        process.call("preserve_fd", session, process.memfd(1 << 30), 0)
    assert not [name for _, name in kernel.spawn("after").call("listing") if name == "khod"]


def test_a_memory_limit_ruins_what_is_retrieved(kernel: Kernel, phys: int, jump: Jump) -> None:
    booted = jump(kernel)
    process = booted.spawn("khod")
    live = machine(process).liveupdate
    session = live.retrieve_session("a")
    process.limit_custody(memory=SIZE - 1)
    with pytest.raises(errors.RetrieveFailed):
        live.retrieve_fd(session, 0)
    process.limit_custody()
    with pytest.raises(errors.RetrieveFailed):
        live.retrieve_fd(session, 0)


_HOST = """
import sys, time
from pathlib import Path
from khod.simulated import ProcessDied, create, image, machine
from khod.simulated.kernel import Kernel
directory = Path(sys.argv[1])
kernel = Kernel.boot(create(directory / "machine", memory=1 << 40))
process = kernel.spawn("khod")
host = machine(process)
guests = [process.memfd(100 << 30, order=18) for _ in range(10)]
for fd in guests:
    process.populate(fd)
    process.write(fd, 7 << 30, b"guest")
guests.append(process.memfd(16 << 30, scatter=1))
session = host.liveupdate.create_session("a")
for token, fd in enumerate(guests):
    host.liveupdate.preserve_fd(session, fd, token)
orders = [order for fd in guests for window in host.frames.windows(fd) for order in set(window.orders)]
assert orders == [18] * 1000 + [0] * 16
(directory / "bzImage").write_bytes(image.build())
host.kexec.load(host.kexec.open(str(directory / "bzImage")))
try:
    host.kexec.execute()
except ProcessDied:
    pass
del kernel, process, host
process = Kernel.boot(directory / "machine").spawn("khod")
live = machine(process).liveupdate
session = live.retrieve_session("a")
for token in range(10):
    assert process.read(live.retrieve_fd(session, token), 7 << 30, 5) == b"guest"
live.retrieve_fd(session, 10)
live.finish(session)
# Not ru_maxrss: execve(2) hands down what the process was before, a copy of whoever runs the tests.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_a_host_of_one_tebibyte(tmp_path: Path) -> None:
    """A thousand guests' GiB and 16 GiB of scattered pages: seconds, and less than 700 MiB for both kernels together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, "-c", _HOST, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 700 << 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20
    assert (tmp_path / "machine" / "memory").stat().st_blocks * 512 < 256 << 20
