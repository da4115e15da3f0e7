# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for VFIO devices: a PCI device that a VMM drives through a descriptor of its own, bound to an iommufd.

An instance is the descriptor of one device; it requires the `iommu` instance that its DMA goes through. Where the kernel
preserves it, which is tried on the device itself, it stays bound and attached, and khod stops its DMA for the time between.
Where it does not, the kernel lets go of the device at the jump. What khod carries is its configuration space and, where its
driver in the kernel offers migration, its state; in the new kernel it is found at the same address, has to be the same device,
and is bound and attached again.

Interrupts need no undoing: with bus mastering off there is no message, and a bit of the same register holds back INTx. What
triggers which eventfd stays as it was for a client that goes on, and is gone with its process for one that jumps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from khod.abi import cells, ioas_table
from khod.abi.vfio import PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER, MigrationState
from khod.core.devices import PciDevice
from khod.core.driver import Continuity, Strategy
from khod.core.ports import Machine
from khod.errors import DeviceUnusable, FormatError, InvalidRequest, Refused, UpdateFailed
from khod.plugin import Declaration, Instance, Preserve, Request, StateBound, hookimpl, probing
from khod_vfio.config import writable
from khod_vfio.identity import find, named, same_shape

COMPATIBLE = "khod,vfio-v1"
DEVICE, IOMMUFD, TABLE = "device", "iommufd", "table"
CONFIG_SIZE = 4096
"""The most that there is of a configuration space."""
SLACK = 1 << 20
"""Bytes by which a device's state may become longer than its driver estimates."""
_CHUNK = 1 << 20


@hookimpl
def khod_compatible() -> str:
    """The string of this version's nodes."""
    return COMPATIBLE


@hookimpl
def khod_declare(machine: Machine, request: Request) -> Declaration:
    """Accept the descriptor of a device that is bound to an iommufd."""
    if list(request.fds) != [DEVICE]:
        raise InvalidRequest(f"{request.name}: one descriptor named '{DEVICE}' is wanted, not {list(request.fds)}")
    if request.options:
        raise InvalidRequest(f"{request.name}: vfio takes no options, {sorted(request.options)} given")
    fd = request.fds[DEVICE]
    address = machine.devices.address(fd)
    device = machine.devices.look(address)
    if device is None:
        raise Refused(f"{request.name}: no device at {address} any more")
    try:
        size, shape = machine.devices.migration(fd), machine.devices.shape(fd)
    except DeviceUnusable as error:
        raise Refused(
            f"{request.name}: {address} cannot be used: {error.message}", hint="bind it to its iommufd before you register it"
        )
    states = [StateBound("config", CONFIG_SIZE)]
    if size is not None:
        states.append(StateBound("migration", 2 * size + SLACK))
    return Declaration(
        compatible=COMPATIBLE,
        fds=(),
        states=tuple(states),
        properties={
            "address": cells.string(address),
            "identity": cells.u32s(device.identity),
            "resets": cells.u32(device.resets),
            "shape": cells.u64s(shape),
            "command": cells.u32(0),
        },
        size=sum(state.size for state in states),
        made=(DEVICE,),
        strategy=Strategy.CARRIED,
        continuity=Continuity.RESET if size is None else Continuity.REBUILT,
        unsettled=True,
    )


@hookimpl
def khod_settle(instance: Instance, declared: Declaration) -> Declaration | None:
    """As it is where the kernel preserves this very device, on the iommufd that it is bound to."""
    name, fd = iommu(instance), instance.fds[DEVICE]
    if name in instance.anew or not probing.takes(instance.machine, [instance.required[name][IOMMUFD], fd]):
        return None
    return replace(
        declared,
        fds=(Preserve(DEVICE, fd, folios=False),),
        states=(),
        made=(),
        size=0,
        strategy=Strategy.NATIVE,
        continuity=Continuity.PRESERVED,
    )


def iommu(instance: Instance) -> str:
    """The name of the iommu instance that it requires. Raises DeviceUnusable."""
    found = [name for name, fds in instance.required.items() if IOMMUFD in fds and TABLE in fds]
    if len(found) != 1:
        raise DeviceUnusable(
            f"{instance.name}: requires {len(found)} iommu instances, and its DMA goes through one",
            hint="name the iommu instance in `requires` when you register the device",
        )
    return found[0]


@hookimpl
def khod_check(instance: Instance) -> Sequence[str]:
    """It is there, it is ours, and what its DMA goes through comes along."""
    problems = []
    for look in (find, iommu):
        try:
            look(instance)
        except DeviceUnusable as error:
            problems.append(str(error))
    return problems


@hookimpl
def khod_prepare(instance: Instance) -> Mapping[str, bytes]:
    """How it is while it runs."""
    return {"command": instance.machine.devices.read_config(instance.fds[DEVICE], PCI_COMMAND, 2)}


@hookimpl
def khod_freeze(instance: Instance) -> Mapping[str, bytes]:
    """Save what the kernel does not preserve of it, and stop its DMA: what it requires is frozen after it."""
    devices, fd = instance.machine.devices, instance.fds[DEVICE]
    config = devices.read_config(fd, 0, CONFIG_SIZE)
    if "config" in instance.states:
        instance.states["config"].write(config)
    if "migration" in instance.states:
        _save(instance, fd)
    command = _command_of(config)
    _command(instance, fd, command & ~PCI_COMMAND_MASTER | PCI_COMMAND_INTX_DISABLE)
    return {"command": cells.u32(command)}


def _command_of(config: bytes) -> int:
    return int.from_bytes(config[PCI_COMMAND : PCI_COMMAND + 2], "little")


def _save(instance: Instance, fd: int) -> None:
    """Stop the device itself, and read its state."""
    devices, area = instance.machine.devices, instance.states["migration"]
    stream = devices.set_state(fd, MigrationState.STOP_COPY)
    data = bytearray()
    try:
        while part := devices.read_state(stream, _CHUNK):
            data += part
            if len(data) > area.bound.size:
                raise UpdateFailed(
                    f"{instance.name}: the device has more than {area.bound.size} bytes of state",
                    hint="that is twice what its driver estimated when it was registered: register it again",
                )
    finally:
        instance.machine.files.close(stream)
    area.write(bytes(data))


def _command(instance: Instance, fd: int, value: int) -> None:
    instance.machine.devices.write_config(fd, PCI_COMMAND, value.to_bytes(2, "little"))


@hookimpl
def khod_thaw(instance: Instance) -> None:
    """Let it go on as it was before prepare."""
    command = instance.keepsake.get("command")
    if command is None:
        return
    devices, fd = instance.machine.devices, instance.fds[DEVICE]
    _command(instance, fd, int.from_bytes(command, "little"))
    if devices.migration(fd) is not None:
        devices.set_state(fd, MigrationState.RUNNING)


@hookimpl
def khod_describe(instance: Instance) -> Mapping[str, str]:
    """Which device, and what becomes of what it has inside."""
    address = cells.as_string(instance, "address")
    if instance.machine.devices.migration(instance.fds[DEVICE]) is not None:
        inside = "saved and loaded again by its driver"
    elif cells.as_u32(instance, "resets"):
        inside = "lost: it is reset when it is opened"
    else:
        inside = "as the hardware has it: nothing resets it, and nobody vouches for it"
    return {"device": f"{named(cells.as_u32s(instance, 'identity'))} at {address}", "its own state": inside}


@hookimpl
def khod_restore(instance: Instance) -> Mapping[str, int]:
    """The same device, bound and attached again, or as it came. That it may do DMA comes last."""
    machine = instance.machine
    device, fds = find(instance), instance.required[iommu(instance)]
    if DEVICE in instance.fds:
        _came(instance, device)
        return {}
    config = instance.states["config"].read()
    if len(config) < 64:
        raise FormatError(f"{instance.name}: {len(config)} bytes of its configuration space were saved")
    ioas = _ioas(instance, device, fds[TABLE])
    machine.devices.override(device.address)
    fd = machine.devices.open_device(device.address)
    try:
        machine.devices.bind(fd, fds[IOMMUFD])
        same_shape(instance, device, fd)
        machine.devices.attach(fd, ioas)
        command = _command_of(config)
        _command(instance, fd, command & ~PCI_COMMAND_MASTER)
        for offset, data in writable(config):
            machine.devices.write_config(fd, offset, data)
        if "migration" in instance.states:
            _load(instance, fd)
        _command(instance, fd, command)
        if "migration" in instance.states:
            machine.devices.set_state(fd, MigrationState.RUNNING)
    except BaseException:
        machine.files.close(fd)
        raise
    return {DEVICE: fd}


def _came(instance: Instance, device: PciDevice) -> None:
    """The kernel preserved it: all that was changed in freeze is set back. Raises FormatError for a descriptor of another."""
    fd = instance.fds[DEVICE]
    if (address := instance.machine.devices.address(fd)) != device.address:
        raise FormatError(f"{instance.name}: what came through is the device at {address}, it was that at {device.address}")
    same_shape(instance, device, fd)
    _command(instance, fd, cells.as_u32(instance, "command"))


def _ioas(instance: Instance, device: PciDevice, table: int) -> int:
    """The IOAS to attach to. Raises DeviceUnusable where something is mapped that the device's group has reserved here: the
    kernel would say that as well, and not where."""
    files = instance.machine.files
    head, count = ioas_table.read_head(files.read(table, 0, ioas_table.FIRST), files.stat(table).size)
    data = files.read(table, ioas_table.FIRST, count * ioas_table.RECORD.size)
    mappings = ioas_table.read_records(data, len(head.files))
    for taken in device.reserved:
        if mapping := ioas_table.hit(mappings, taken.start, taken.last):
            raise DeviceUnusable(
                f"{instance.name}: IOVAs {mapping} are mapped, and this kernel reserves {taken} for {device.address}",
                hint="the reserved ranges of this kernel or its IOMMU differ from those of the one before",
            )
    return head.ioas


def _load(instance: Instance, fd: int) -> None:
    devices = instance.machine.devices
    stream = devices.set_state(fd, MigrationState.RESUMING)
    try:
        devices.write_state(stream, instance.states["migration"].read())
    finally:
        instance.machine.files.close(stream)
