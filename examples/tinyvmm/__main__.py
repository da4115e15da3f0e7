# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tinyvmm [--cpus N] [--device | --guest-memfd] [SOCKET]``: run a guest, before a live update and, started again,
after it.

On standard input it takes orders, one a line, and answers each with a line of JSON: ``status``, ``dma`` (guest page A to the
device and back to page B), ``stray`` (the device writes where nothing is mapped), ``quit``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from khod.client import Claimed, Hold, Notice, Participant, Workload
from khod.client.iommu import Iommu
from khod.client.participant import DEFAULT_SOCKET
from tinyvmm import edu, guest
from tinyvmm.kvm import Vm

STATE_ROOM = 256 << 10
MEMORY, MAPPINGS, DEVICE = "tinyvmm", "tinyvmm-iommu", "tinyvmm-edu"
STRAY = 128 << 20
"""An IOVA that nothing is mapped at."""


class Machine(Workload):
    """The guest with all that belongs to it."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.device: edu.Edu | None = None
        self.iommu: Iommu | None = None
        self.running = False
        self._switch = threading.Lock()

    def run(self, wanted: bool) -> None:
        """Let it run, or have it stand still."""
        with self._switch:
            if wanted != self.running:
                (self.vm.start if wanted else self.vm.stop)()
                self.running = wanted

    def quiesce(self, notice: Notice) -> None:
        """Stop the vCPUs FIRST: one that runs goes on in its memory until the very jump. Then the device, then save."""
        self.run(False)
        if self.device is not None:
            self.device.idle()
        for vcpu in self.vm.vcpus:
            guest.forget_gap(self.vm.memory, vcpu.number)
        notice.states[MEMORY]["vcpus"].write(json.dumps(self.vm.save()).encode())

    def aborted(self, notice: Notice) -> None:
        """Go on."""
        self.run(True)

    # Orders.

    def status(self) -> dict[str, object]:
        """What the vCPUs found."""
        vcpus = [asdict(guest.seen(self.vm.memory, vcpu.number)) for vcpu in self.vm.vcpus]
        failures = [vcpu.failure for vcpu in self.vm.vcpus if vcpu.failure]
        return {"vcpus": vcpus, "khz": self.vm.vcpus[0].tsc_khz, "failures": failures}

    def dma(self) -> dict[str, object]:
        """From page A to the device, and back to page B."""
        assert self.device is not None
        words, memory = os.urandom(edu.MOST), self.vm.memory
        memory[guest.PAGE_A : guest.PAGE_A + edu.MOST] = words
        self.device.read_memory(guest.PAGE_A, edu.MOST)
        self.device.write_memory(guest.PAGE_B, edu.MOST)
        return {"equal": memory[guest.PAGE_B : guest.PAGE_B + edu.MOST] == words}

    def stray(self) -> dict[str, object]:
        """Beyond everything that is mapped: the IOMMU does not let it."""
        assert self.device is not None
        self.device.write_memory(STRAY, edu.MOST)
        return {}


def memfd() -> int:
    """Memory for the guest."""
    ram = os.memfd_create("tinyvmm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x10)  # MFD_EXEC
    os.ftruncate(ram, guest.SIZE)
    fcntl.fcntl(ram, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return ram


def cold(khod: Participant, cpus: int, device: bool, private: bool) -> Machine:
    """A new guest, registered."""
    machine = Machine(Vm(None if private else memfd(), cpus))
    machine.vm.reset()
    ram = machine.vm.ram
    options = {"carry": "yes"} if private else {}
    khod.register(MEMORY, {"ram": ram}, states={"vcpus": STATE_ROOM}, options=options, lifetime="process")
    if device:
        iommu = machine.iommu = Iommu.create()
        iommu.map(0, guest.SIZE, MEMORY, "ram", ram)  # the device knows the guest's own addresses
        fd = edu.attach(iommu.fd, iommu.ioas)
        khod.register(MAPPINGS, iommu.fds, driver="iommu", lifetime="process")
        khod.register(DEVICE, {"device": fd}, driver="vfio", requires=(MAPPINGS,), lifetime="process")
        machine.device = edu.Edu(fd)
    return machine


def warm(khod: Participant, claimed: Claimed, device: bool) -> Machine:
    """The guest that came through a jump."""
    state = json.loads(claimed.states["vcpus"])
    machine = Machine(Vm(claimed.take("ram"), len(state["vcpus"])))
    machine.vm.restore(state)
    if device:
        mappings, came = khod.claim(MAPPINGS), khod.claim(DEVICE)
        if not isinstance(mappings, Claimed) or not isinstance(came, Claimed):
            sys.exit(f"the guest came through without its device: {mappings}, {came}")
        machine.iommu = Iommu.claimed(mappings)
        machine.device = edu.Edu(came.take("device"))
    return machine


class Late(Workload):
    """Stands in until there is a machine: nothing is asked before `Participant.start`."""

    machine: Machine

    def quiesce(self, notice: Notice) -> None:
        """The machine's."""
        self.machine.quiesce(notice)

    def aborted(self, notice: Notice) -> None:
        """The machine's."""
        self.machine.aborted(notice)


def main() -> None:
    """Run until standard input ends, or for ever."""
    words = argparse.ArgumentParser(prog="tinyvmm", description=__doc__)
    words.add_argument("socket", nargs="?", type=Path, default=DEFAULT_SOCKET)
    words.add_argument("--cpus", type=int, default=1)
    words.add_argument("--guest-memfd", action="store_true", help="with memory in a guest_memfd, which Linux 7.3 copies")
    words.add_argument("--device", action="store_true", help="with QEMU's edu device")
    given = words.parse_args()
    workload = Late()
    with Participant(workload, path=given.socket) as khod:
        answer = khod.claim(MEMORY)
        if isinstance(answer, Hold):
            sys.exit(f"the guest must not be started: {answer.reason}")
        came = isinstance(answer, Claimed)
        if isinstance(answer, Claimed):
            machine = warm(khod, answer, given.device)
        else:
            machine = cold(khod, given.cpus, given.device, given.guest_memfd)
        workload.machine = machine
        before = machine.status()
        khod.start()
        machine.run(True)
        ran = time.monotonic()
        for name in (MEMORY, *((MAPPINGS, DEVICE) if given.device else ())) if came else ():
            khod.finished(name, since=ran)
        print(json.dumps({"started": "warm" if came else "cold", "ran": ran, **before}), flush=True)
        orders = {"status": machine.status, "dma": machine.dma, "stray": machine.stray}
        for line in sys.stdin:
            order = line.strip()
            if order == "quit":
                break
            print(json.dumps(orders[order]() if order in orders else {"no such order": order}), flush=True)
        machine.run(False)


if __name__ == "__main__":
    main()
