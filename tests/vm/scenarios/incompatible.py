# SPDX-License-Identifier: LGPL-2.1-or-later
"""A target that reads another format than is written: what khod says before, and what becomes of the memory all the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

from khod.errors import Refused
from tests.vm.content import fill
from tests.vm.driving import Khod
from tests.vm.guest import Guest
from tests.vm.scenarios.upgrade import wait_for_the_end

SIZE = 128 << 20


def before(vm: Guest) -> None:
    target, check = vm.parameters["target"], f"format:{vm.parameters['format']}"
    khod = Khod(vm)
    fd = os.memfd_create("ram", 0x2 | 0x10)
    os.ftruncate(fd, SIZE)
    fill(fd, SIZE)
    with khod.client() as client:
        client.register("ram", "guestmemfd", [("ram", fd)], lifetime="persistent")
        client.load(target)
    said = json.loads(khod.ctl("preflight", "--json", status=3))
    blockers = {c["name"]: [c["evidence"], c["overridable"]] for c in said["checks"] if c["verdict"] == "blocker"}
    vm.record("blocked", blockers=blockers, update=khod.ctl("update", status=3))
    with khod.client() as client:
        vm.record("before", memory=memory(), state=client.status().state)
        events = client.update(overrides=[check])
        try:
            wait_for_the_end(events)
        except Refused as error:
            vm.record("not overridden", said=str(error))
    jump_all_the_same(vm, Path(target))


def jump_all_the_same(vm: Guest, target: Path) -> None:
    """Past khod, which does not: what it is right about."""
    from khod.kernel.kexec import KernelKexec

    kexec = KernelKexec()
    kexec.load(kexec.open(str(target)))
    vm.record("jump")
    kexec.execute()


def after(vm: Guest) -> None:
    khod = Khod(vm)
    with khod.client() as client:
        status, update = client.status(), client.history()[0]
        claim = client.claim("ram")
        overridden = list(update.overridden)
    vm.record(
        "landed",
        memory=memory(),
        state=status.state,
        outcome=update.outcome,
        reason=update.reason,
        problems=list(status.problems),
        device=status.device,
        claim=[claim.answer, claim.reason],
        overridden=overridden,
    )


def memory() -> dict[str, int]:
    """MemTotal and MemAvailable, bytes."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) << 10 for words in lines if words[0] in ("MemTotal:", "MemAvailable:")}
