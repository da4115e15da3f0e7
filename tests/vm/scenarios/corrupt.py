# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's folio map is scribbled over while the update is held at frozen: the next khod restores nothing by itself, says
why, and still hands the memory out to whoever insists (decision 23)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.vm.content import fill, filled
from tests.vm.driving import Khod
from tests.vm.guest import Guest

SIZE = 4 << 20


def before(vm: Guest) -> None:
    khod = Khod(vm)
    fd = os.memfd_create("ram", 0x2 | 0x10)
    os.ftruncate(fd, SIZE)
    fill(fd, SIZE)
    with khod.client() as client:
        client.register("vm-1", "guestmemfd", [("ram", fd)], lifetime="persistent")
        client.load(str(vm.kernel))
    khod.ctl("update", "--hold-at", "frozen")
    for link in Path(f"/proc/{khod.process.pid}/fd").iterdir():
        if "khod-map" in str(link.readlink()):
            victim = os.open(link, os.O_RDWR)
            word = os.pread(victim, 4, 4)
            os.pwrite(victim, bytes([word[0] ^ 0xFF]), 4)
            os.close(victim)
    with khod.client() as client:
        client.proceed()
    signal.pause()


def after(vm: Guest) -> None:
    khod = Khod(vm)
    status = khod.ctl("status")
    with khod.client() as client:
        problems = client.status().problems
        held = client.claim("vm-1")
        refused = khod.ctl("finish", status=3)
        vm.record("verdict", status=status, problems=list(problems), answer=held.answer, reason=held.reason, finish=refused)
    ended = khod.stop()
    khod = Khod(vm)
    with khod.client() as client:
        vm.record("ended", status=ended, state=client.status().state, answer=client.claim("vm-1").answer)
        answer = client.claim("vm-1", unverified=True)
        vm.record("claimed", answer=answer.answer, intact=filled(answer.fds[0], SIZE))
        client.finish()
        vm.record("finished", state=client.status().state)
