# SPDX-License-Identifier: LGPL-2.1-or-later
"""Updates that must not happen: each is refused or undone whole, while a process writes into the memory all the time. Then one
that goes through, leaving an optional instance behind."""

from __future__ import annotations

import os
import signal
import struct
from mmap import mmap
from pathlib import Path

from khod.errors import KhodError, Lost, UpdateFailed
from tests.vm.driving import Khod
from tests.vm.guest import Guest

MIB = 1 << 20
PLUGIN = """
from khod.plugin import Declaration, Preserve, hookimpl

@hookimpl
def khod_compatible():
    return "test,anything-v1"

@hookimpl
def khod_declare(request):
    return Declaration("test,anything-v1", tuple(Preserve(n, fd, folios=False) for n, fd in request.fds.items()))
"""


def install_plugin() -> str:
    """A third party's plugin, which lets anything through: a module and its entry point, as pip leaves them."""
    site = Path("/run/plugins")
    info = site / "anything-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "anything.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: anything\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[khod]\nanything = anything\n")
    return str(site)


class Workload:
    """A process that counts in its memory, as fast as it can, and ends itself if a count is ever not what it wrote."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("workload", 0x2 | 0x10)
        os.ftruncate(self.fd, 4 * MIB)
        # One store a count: struct.pack_into() fills with zeros first, and the stop may come in between.
        self.words = memoryview(mmap(self.fd, 4 * MIB)).cast("Q")
        self.pid = os.fork()
        if self.pid == 0:
            count = 0
            while self.words[0] == count:
                count += 1
                self.words[0] = count
            os._exit(1)

    def count(self) -> int:
        return self.words[0]

    def stand_still(self) -> None:
        """For the jump: a page that is written to behind khod's back is damaged, if it is one of its sample."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def goes_on(self) -> bool:
        """Whether it is alive and has counted since the last look."""
        was = self.count()
        while self.count() == was:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                return False
        # Preserved memory refuses this; memory that was let go does not.
        os.ftruncate(self.fd, 5 * MIB)
        os.ftruncate(self.fd, 4 * MIB)
        return True


def refused(khod: Khod, hold: str | None = None) -> tuple[str, str]:
    """An update that must not go through: the kind of its refusal, and its words."""
    with khod.client() as client:
        try:
            for _ in client.update(hold):
                pass
        except KhodError as error:
            return type(error).__name__, str(error)
    return "none", ""


def before(vm: Guest) -> None:
    khod = Khod(vm, plugins=install_plugin())
    work = Workload()
    with khod.client() as client:
        client.register("vm-1", "guestmemfd", [("ram", work.fd)], lifetime="persistent")
        vm.record("no kernel", said=refused(khod), goes_on=work.goes_on())
        junk = Path("/run/junk")
        junk.write_bytes(bytes(1 * MIB))
        vm.record("junk", said=khod.ctl("load", str(junk), status=4), goes_on=work.goes_on())
        client.load(str(vm.kernel))

        huge = hugetlb()
        vm.record("hugetlb by guestmemfd", said=guestmemfd_refuses(khod, huge))
        client.register("huge", "anything", [("pages", huge)], lifetime="persistent")
        vm.record("hugetlb required", said=refused(khod), goes_on=work.goes_on(), state=client.status().state)
        client.unregister("huge")

        for state in ("preparing", "prepared", "freezing", "frozen"):
            khod.ctl("update", "--hold-at", state)
            held = client.status()
            said = khod.ctl("abort")
            vm.record(f"abort {state}", held=[held.state, held.held], said=said, goes_on=work.goes_on())

        exited(vm, khod)
        client.register("huge", "anything", [("pages", huge)], required=False, lifetime="persistent")
    work.stand_still()
    with khod.client() as client:
        try:
            for _ in client.update():
                pass
        except Lost:
            pass  # the machine is about to be gone


def hugetlb() -> int:
    Path("/proc/sys/vm/nr_hugepages").write_text("4")
    fd = os.memfd_create("huge", 0x4)
    os.ftruncate(fd, 2 * MIB)
    return fd


def guestmemfd_refuses(khod: Khod, fd: int) -> str:
    with khod.client() as client:
        try:
            client.register("huge2", "guestmemfd", [("pages", fd)], lifetime="persistent")
        except KhodError as error:
            return str(error)
    return ""


def exited(vm: Guest, khod: Khod) -> None:
    """A client that is gone before the abort: khod's duplicate keeps its memory (decision 3)."""
    fd = os.memfd_create("orphan", 0x2 | 0x10)
    os.pwrite(fd, b"orphan", 0)
    with khod.client() as client:
        client.register("vm-2", "guestmemfd", [("ram", fd)], lifetime="persistent")
        khod.ctl("update", "--hold-at", "frozen")
        os.close(fd)
        client.abort()
        answer = client.claim("vm-2")
        vm.record("exited client", answer=answer.answer, bytes=os.pread(answer.fds[0], 6, 0).decode())
        client.unregister("vm-2")


def after(vm: Guest) -> None:
    khod = Khod(vm, plugins="/run/plugins")
    with khod.client() as client:
        answer = client.claim("vm-1")
        (update, *others) = client.history()
        vm.record(
            "went through",
            count=struct.unpack("<Q", os.pread(answer.fds[0], 8, 0))[0],
            left_behind=list(update.left_behind),
            outcome=update.outcome,
            others=[u.outcome for u in others],
        )
        status = client.status()
    # It holds nothing that nobody else has: it may end.
    vm.record("end", unclaimed=status.unclaimed, status=khod.stop(), kind=UpdateFailed.__name__)
