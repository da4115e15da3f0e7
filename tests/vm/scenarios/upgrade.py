# SPDX-License-Identifier: LGPL-2.1-or-later
"""Updates from one kernel version to another, along the path that the test gives; the memory is written to in each of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from khod.errors import Lost
from tests.vm.content import PAGE, fill, filled
from tests.vm.driving import Khod, pagemap
from tests.vm.guest import Guest

KINDS = {"ram": 32 << 20, "page": PAGE, "odd": (3 << 20) + PAGE}


def before(vm: Guest) -> None:
    khod = Khod(vm)
    fds = {}
    with khod.client() as client:
        for name, size in KINDS.items():
            fds[name] = os.memfd_create(name, 0x2 | 0x10)  # MFD_ALLOW_SEALING | MFD_EXEC
            os.ftruncate(fds[name], size)
            fill(fds[name], size)
            client.register(name, "guestmemfd", [("ram", fds[name])], lifetime="persistent")
    jump(vm, khod, fds)


def jump(vm: Guest, khod: Khod, fds: dict[str, int]) -> None:
    """To the next kernel of the path; what the frames are is kept on the disk."""
    with khod.client() as client:
        client.load(vm.parameters["path"][vm.stage])
        checks = client.preflight().checks
        vm.record(f"preflight {vm.stage}", verdicts={check.name: [check.verdict, check.evidence] for check in checks})
        events = client.update("frozen")
        while next(events).kind != "held":
            pass
        frames = {name: pagemap(fd) for name, fd in fds.items()}
        (vm.state / "frames").write_text(repr(frames))
        with khod.client() as other:
            other.proceed()
        wait_for_the_end(events)


def wait_for_the_end(events: Iterator[object]) -> None:
    try:
        for _ in events:
            pass
    except Lost:
        threading.Event().wait()


def landed(vm: Guest) -> None:
    """What came, as its owner and khod see it; then on to the next kernel, if there is another."""
    khod = Khod(vm)
    with khod.client() as client:
        status, update = client.status(), client.history()[0]
        fds = {name: client.claim(name, lifetime="persistent").fds[0] for name in KINDS}
        vm.record(
            f"landed {vm.stage}",
            release=os.uname().release,
            state=status.state,
            problems=[*status.problems, *update.problems],
            whole={name: filled(fd, KINDS[name]) for name, fd in fds.items()},
            same_frames=repr({name: pagemap(fd) for name, fd in fds.items()}) == (vm.state / "frames").read_text(),
            report=[update.outcome, update.from_release, update.to_release],
            history=khod.ctl("history"),
        )
        client.finish()
    if vm.stage < len(vm.parameters["path"]):
        jump(vm, khod, fds)
    vm.over()


after = after2 = landed
