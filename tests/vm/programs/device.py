# SPDX-License-Identifier: LGPL-2.1-or-later
"""``device``: a service with memory, mappings of it and QEMU's edu device, which come through a jump by khod."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from khod.abi.vfio import PCI_COMMAND, PCI_COMMAND_MASTER
from khod.client import Claimed, Participant, Workload
from khod.client.iommu import Iommu
from khod.kernel.devices import KernelDevices
from tests.vm.programs.inside import notify, tell

SIZE = 4 << 20
IOVA = 0x100_0000
EDU = ("0x1234", "0x11e8")
devices = KernelDevices()


def edu() -> str:
    """Its address."""
    every = sorted(Path("/sys/bus/pci/devices").iterdir())
    return next(d.name for d in every if tuple((d / name).read_text().strip() for name in ("vendor", "device")) == EDU)


def command(device: int) -> int:
    """Its command register."""
    return int.from_bytes(devices.read_config(device, PCI_COMMAND, 2), "little")


def cold(khod: Participant) -> None:
    """Everything is new."""
    ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x10)  # MFD_EXEC
    os.ftruncate(ram, SIZE)
    khod.register("ram", {"ram": ram}, lifetime="process")
    attach(khod, "ram", ram, 0, SIZE)


def attach(khod: Participant, instance: str, ram: int, offset: int, length: int) -> None:
    """Let the device at a part of an instance's memory."""
    iommu = Iommu.create()
    iommu.map(IOVA, length, instance, "ram", ram, offset)
    khod.register("mappings", iommu.fds, driver="iommu", lifetime="process")
    devices.override(edu())
    device = devices.open_device(edu())
    devices.bind(device, iommu.fd)
    devices.attach(device, iommu.ioas)
    devices.write_config(device, PCI_COMMAND, (command(device) | PCI_COMMAND_MASTER).to_bytes(2, "little"))
    khod.register("edu", {"device": device}, driver="vfio", requires=("mappings",), lifetime="process")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with Participant(Workload()) as khod:
        claims = {name: khod.claim(name) for name in ("ram", "mappings", "edu")}
        came = {name: claim for name, claim in claims.items() if isinstance(claim, Claimed)}
        if came:
            assert came.keys() == claims.keys(), claims
            iommu, device = Iommu.claimed(came["mappings"]), came["edu"].take("device")
            mapped = [(m.iova, m.length) for m in iommu.record.mappings]
            tell("came", mapped=mapped, master=bool(command(device) & PCI_COMMAND_MASTER), address=devices.address(device))
        else:
            cold(khod)
        khod.start()
        for name in came:
            khod.finished(name)
        notify("READY=1")
        signal.pause()


if __name__ == "__main__":
    main()
