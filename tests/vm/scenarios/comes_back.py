# SPDX-License-Identifier: LGPL-2.1-or-later
"""reboot(KEXEC) that returns, before the kernel serializes anything or in the middle of it: khod undoes everything, the memory
can be used, and a second update goes through."""

from __future__ import annotations

import os

from khod.errors import Lost, UpdateFailed
from tests.vm.content import fill, filled
from tests.vm.driving import Khod
from tests.vm.guest import Guest

SIZE = 4 << 20


def before(vm: Guest) -> None:
    khod = Khod(vm)
    fds = []
    with khod.client() as client:
        for name in ("vm-1", "vm-2"):
            fd = os.memfd_create(name, 0x2 | 0x10)
            os.ftruncate(fd, SIZE)
            fill(fd, SIZE)
            client.register(name, "guestmemfd", [("ram", fd)], lifetime="persistent")
            fds.append(fd)
        client.load(str(vm.kernel))
        events = client.update("frozen")
        while next(events).kind != "held":
            pass
        vm.ask("arm")
        with khod.client() as other:
            other.proceed()
        try:
            for _ in events:
                pass
            said = ""
        except UpdateFailed as error:
            said = str(error)
    with khod.client() as client:
        ended = client.status().state
        os.ftruncate(fds[0], 2 * SIZE)
        os.ftruncate(fds[0], SIZE)
        (update,) = client.history()
        vm.record("came back", ended=ended, said=said, reason=update.reason, problems=list(update.problems),
                  intact=all(filled(fd, SIZE) for fd in fds))  # fmt: skip
        try:
            for _ in client.update():
                pass
        except Lost:
            pass


def after(vm: Guest) -> None:
    khod = Khod(vm)
    with khod.client() as client:
        intact = {name: filled(client.claim(name).fds[0], SIZE) for name in ("vm-1", "vm-2")}
        vm.record("second", intact=intact, outcomes=[u.outcome for u in client.history()])
