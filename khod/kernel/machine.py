# SPDX-License-Identifier: LGPL-2.1-or-later
"""All ports of the running Linux together."""

from __future__ import annotations

import os
from pathlib import Path

from khod.core.ports import Machine
from khod.kernel import tsc
from khod.kernel.boot import KernelBootInfo
from khod.kernel.clock import KernelClock
from khod.kernel.custody import KernelCustody
from khod.kernel.devices import KernelDevices
from khod.kernel.facts import KernelFactsReader
from khod.kernel.files import KernelFiles
from khod.kernel.filesystems import KernelFileSystems
from khod.kernel.frames import KernelFrames
from khod.kernel.kexec import KernelKexec
from khod.kernel.liveupdate import BUSY_PATIENCE, KernelLiveUpdate
from khod.kernel.memory import KernelMemory
from khod.kernel.processes import KernelProcesses
from khod.kernel.store import FileStore
from khod.kernel.systemd import Systemd


def machine(
    state_directory: Path, *, device_timeout: float = BUSY_PATIENCE, begin: bool = False, custodian: str = ""
) -> Machine:
    """The running machine, with its journal in `state_directory`, which is made when it is first written to.

    A device that somebody else has open is tried again for `device_timeout` seconds. Where systemd does not watch over us, it
    does not over a custodian either: the first call that needs one starts it, if there is none, or, with `begin`, this one.
    `custodian` is the address of another than the host's, which is there.
    """
    # sd_booted(3) as well: others than systemd listen for READY=1.
    supervised = "NOTIFY_SOCKET" in os.environ and Path("/run/systemd/system").is_dir()
    custody = KernelCustody(custodian) if custodian else KernelCustody(start=not supervised)
    if begin:
        custody.begin()
    memory = KernelMemory()
    return Machine(
        liveupdate=KernelLiveUpdate(patience=device_timeout, custody=custody),
        files=KernelFiles(),
        frames=KernelFrames(),
        memory=memory,
        kexec=KernelKexec(),
        clock=KernelClock(tsc.reader()),
        store=FileStore(state_directory),
        filesystems=KernelFileSystems(),
        boot=KernelBootInfo(),
        processes=KernelProcesses(),
        custody=custody,
        manager=Systemd(),
        kernel=KernelFactsReader(memory),
        devices=KernelDevices(),
    )
