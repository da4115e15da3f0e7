# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a device is the one that was registered, and may be handed to the same guest."""

from __future__ import annotations

from collections.abc import Sequence

from khod.abi import cells
from khod.core.devices import Neighbour, PciDevice
from khod.errors import DeviceUnusable
from khod.plugin import Instance

DRIVER = "vfio-pci"


def find(instance: Instance) -> PciDevice:
    """The device that was registered, if it is there and nobody else's. Raises DeviceUnusable with the reason."""
    address = cells.as_string(instance, "address")
    device = instance.machine.devices.look(address)
    if device is None:
        hint = "was it unplugged, or has its slot another number now?"
        raise DeviceUnusable(f"{instance.name}: there is no device at {address}", hint=hint)
    identity = cells.as_u32s(instance, "identity")
    if device.identity != identity:
        raise DeviceUnusable(
            f"{instance.name}: the device at {address} is {named(device.identity)}, it was {named(identity)}",
            hint="another device is in its place: it is not given to this guest",
        )
    if device.driver not in ("", DRIVER):
        raise DeviceUnusable(
            f"{instance.name}: {address} is driven by {device.driver}",
            hint=f"keep that driver from it: vfio-pci.ids=, or driver_override before {device.driver} is loaded",
        )
    if not device.group:
        raise DeviceUnusable(f"{instance.name}: no IOMMU stands before {address}", hint="is the IOMMU switched on?")
    if strangers := [other for other in device.neighbours if not _ours(other)]:
        raise DeviceUnusable(
            f"{instance.name}: {address} shares IOMMU group {device.group} with"
            f" {', '.join(f'{other.address} (driven by {other.driver})' for other in strangers)}",
            hint=f"devices of one group can reach each other: bind all of them to {DRIVER}, or to no driver",
        )
    return device


def _ours(other: Neighbour) -> bool:
    return other.bridge or other.driver in ("", DRIVER)


def named(identity: Sequence[int]) -> str:
    """An identity, for people."""
    vendor, device, subsystem_vendor, subsystem, revision = identity
    return f"{vendor:04x}:{device:04x} ({subsystem_vendor:04x}:{subsystem:04x}) revision {revision:#x}"


def same_shape(instance: Instance, device: PciDevice, fd: int) -> None:
    """Whether a client finds what it had. Raises DeviceUnusable: the same chip with other firmware may have other BARs."""
    now, then = tuple(instance.machine.devices.shape(fd)), cells.as_u64s(instance, "shape")
    if now != then:
        raise DeviceUnusable(
            f"{instance.name}: the device at {device.address} has {_shape(now)}; it had {_shape(then)}",
            hint="its firmware, or what the new kernel lets through of it, is another",
        )


def _shape(numbers: Sequence[int]) -> str:
    bars = ", ".join(f"BAR {index} of {size:#x}" for index, size in enumerate(numbers[:6]) if size) or "no BARs"
    kinds = zip(numbers[6:], ("INTx", "MSI", "MSI-X"), strict=False)
    return f"{bars}, interrupts: {', '.join(f'{count} {kind}' for count, kind in kinds)}"
