# SPDX-License-Identifier: LGPL-2.1-or-later
"""A KVM guest runs on through two live updates, one right after the other; with `device`, so does a device that does DMA."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from khod.rehearsal.inside import SOCKET
from tests.vm.driving import Khod
from tests.vm.guest import Guest

EXAMPLES = Path(__file__).parents[3] / "examples"


class Vmm:
    """The example, as a process of its own."""

    def __init__(self, vm: Guest) -> None:
        device = ["--device"] if vm.parameters["device"] else []
        device += ["--guest-memfd"] if vm.parameters.get("guest_memfd") else []
        log = open(vm.shared / f"tinyvmm-{vm.stage}.log", "wb")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-m", "tinyvmm", "--cpus", "2", *device, str(SOCKET)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{EXAMPLES}"},
        )
        self.started = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 40)[0], "tinyvmm does not answer"
        line = self.process.stdout.readline()
        assert line, f"tinyvmm ended: {self.process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def order(self, word: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()

    def advanced(self, counters: list[int]) -> dict[str, Any]:
        """The status, once every vCPU has counted on by some thousands of rounds."""
        deadline = time.monotonic() + 30
        while True:
            status = self.order("status")
            assert not status["failures"], status
            if all(vcpu["counter"] > before + 5000 for vcpu, before in zip(status["vcpus"], counters, strict=True)):
                return status
            assert time.monotonic() < deadline, (status, counters)


def counters(status: dict[str, Any]) -> list[int]:
    return [vcpu["counter"] for vcpu in status["vcpus"]]


def faults() -> list[str]:
    """What the kernel says of DMA that the IOMMU did not let through."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [line for line in log.splitlines() if "DMAR" in line and "fault addr" in line]


def run(vm: Guest, vmm: Vmm) -> None:
    """See that everything lives, and tell what was seen."""
    device: dict[str, Any] = {}
    first = vmm.started if vm.stage else vmm.advanced([0, 0])
    if vm.parameters["device"]:
        device["dma"] = vmm.order("dma")
        assert not faults(), faults()
    later = vmm.advanced(counters(first))
    if vm.parameters["device"] and vm.stage:
        vmm.order("stray")
        device["faults"] = faults()
        device["after"] = vmm.order("dma")
    vm.record("lives", started=vmm.started, first=first, later=later, **device)
    (vm.state / "counters").write_text(json.dumps(counters(later)))


def jump(vm: Guest, khod: Khod) -> None:
    with khod.client() as client:
        client.load(str(vm.kernel))
        for _ in client.update():
            pass
    signal.pause()


def before(vm: Guest) -> None:
    khod = Khod(vm)
    run(vm, Vmm(vm))
    jump(vm, khod)


def goes_on(vm: Guest) -> Khod:
    khod = Khod(vm)
    with khod.client() as client:
        found = {view.name: [view.state, view.continuity, view.problem] for view in client.instances()}
        vm.record("instances", **found)
    vmm = Vmm(vm)
    vm.record("came", then=json.loads((vm.state / "counters").read_text()), now=counters(vmm.started))
    run(vm, vmm)
    with khod.client() as client:
        update = client.history()[0]
        blackouts = {span.instance: [span.seconds, span.uncertainty] for span in update.spans if span.phase == "blackout"}
        vm.record("ledger", outcome=update.outcome, blackouts=blackouts, problems=list(update.problems))
        vm.record("end", state=client.status().state)
    return khod


def after(vm: Guest) -> None:
    jump(vm, goes_on(vm))


def after2(vm: Guest) -> None:
    goes_on(vm)
