# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pairs of tests/contract/scenarios.py around a jump of the running kernel: one half in the old kernel, one in the new."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tests.contract.rig import KernelRig
from tests.contract.scenarios import SCENARIOS, after_all, before_all
from tests.vm.guest import Guest


def rig(vm: Guest) -> KernelRig:
    """The running kernel by way of a custodian of its own, and past it."""
    from khod.kernel.custody import KernelCustody
    from khod.kernel.liveupdate import KernelLiveUpdate
    from khod.kernel.machine import machine

    custody = KernelCustody(start=True)
    custodial = KernelLiveUpdate(patience=0.1, custody=custody)
    host = replace(machine(vm.state), custody=custody, liveupdate=custodial)
    return KernelRig(host, KernelLiveUpdate(patience=0.1), str(vm.kernel), vm.state)


def before(vm: Guest) -> None:
    contract = rig(vm)
    remembered = before_all(contract.machine, contract, simulated=False)
    (vm.state / "remembered.json").write_text(json.dumps(remembered))
    contract.machine.kexec.load(contract.machine.kexec.open(str(vm.kernel)))
    contract.machine.filesystems.sync()
    contract.machine.kexec.execute()


def after(vm: Guest) -> None:
    # What is freed in a burst waits on lists of each CPU, tens of MiB that no figure counts as free, unless they are short.
    Path("/proc/sys/vm/percpu_pagelist_high_fraction").write_text("1000000")
    contract = rig(vm)
    remembered = json.loads((vm.state / "remembered.json").read_text())
    vm.record(
        "pairs",
        outcome=after_all(contract.machine, contract, remembered),
        all=[s.name for s in SCENARIOS if not s.simulated_only],
    )
