# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port `Devices` of the running kernel: ioctls on /dev/iommu and /dev/vfio/devices, and what sysfs says of PCI devices."""

from __future__ import annotations

import errno
import fcntl
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

from khod.abi import iommufd as abi
from khod.abi import vfio
from khod.abi.ioas_table import Mapping
from khod.core.devices import IovaRange, Neighbour, PciDevice
from khod.core.refusals import refused
from khod.errors import DeviceUnusable, InvalidRequest

DRIVER = "vfio-pci"
_BRIDGE = 0x0604
_RANGES = 8
"""IOVA ranges that there is room for at first."""
_IGNORED = "direct-relaxable"
"""Reserved for a driver of the kernel's own, and not for user space (iommu_get_group_resv_regions)."""


class KernelDevices:
    """The port `Devices` of the running kernel."""

    def __init__(self, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._pci = sysfs / "bus/pci"
        self._groups = sysfs / "kernel/iommu_groups"
        self._chars = sysfs / "dev/char"
        self._dev = dev

    # iommufd.

    def open_iommu(self) -> int:
        """See the port."""
        with refused("open_iommu", "/dev/iommu"):
            return os.open(self._dev / "iommu", os.O_RDWR | os.O_CLOEXEC)

    def ioas_alloc(self, iommufd: int) -> int:
        """See the port."""
        answer = abi.ioas_alloc()
        with refused("ioas_alloc", f"descriptor {iommufd}"):
            fcntl.ioctl(iommufd, abi.IOMMU_IOAS_ALLOC, answer)
        return abi.ioas_of(answer)

    def iova_ranges(self, iommufd: int, ioas: int) -> Sequence[IovaRange]:
        """See the port."""
        room = _RANGES
        with refused("iova_ranges", f"IOAS {ioas} of descriptor {iommufd}"):
            while True:
                found = array("Q", bytes(16 * room))
                answer = abi.iova_ranges(ioas, found.buffer_info()[0], room)
                try:
                    fcntl.ioctl(iommufd, abi.IOMMU_IOAS_IOVA_RANGES, answer)
                    break
                except OSError as error:
                    if error.errno != errno.EMSGSIZE:
                        raise
                    # The kernel says how many there are, and Python 3.14 does not give back what a failed ioctl has written.
                    room *= 2
        count = abi.range_count_of(answer)
        return [IovaRange(found[2 * i], found[2 * i + 1]) for i in range(count)]

    def huge_pages(self, iommufd: int, ioas: int, allowed: bool) -> None:
        """See the port."""
        with refused("huge_pages_option", f"IOAS {ioas} of descriptor {iommufd}"):
            asked = abi.option(ioas, abi.IOMMU_OPTION_HUGE_PAGES, abi.IOMMU_OPTION_OP_SET, allowed)
            fcntl.ioctl(iommufd, abi.IOMMU_OPTION, asked)

    def map_file(self, iommufd: int, ioas: int, fd: int, mapping: Mapping) -> None:
        """See the port."""
        iova, length, offset, _, protection = mapping
        asked = abi.map_file(ioas, fd, offset, length, iova, protection)
        with refused("map_file", f"{mapping} in IOAS {ioas} of descriptor {iommufd}, descriptor {fd} from {offset:#x}"):
            fcntl.ioctl(iommufd, abi.IOMMU_IOAS_MAP_FILE, asked)

    def unmap(self, iommufd: int, ioas: int, iova: int, length: int) -> int:
        """See the port."""
        answer = abi.unmap(ioas, iova, length)
        with refused("unmap", f"{length:#x} bytes at {iova:#x} in IOAS {ioas} of descriptor {iommufd}"):
            fcntl.ioctl(iommufd, abi.IOMMU_IOAS_UNMAP, answer)
        return abi.unmapped_of(answer)

    # PCI.

    def look(self, address: str) -> PciDevice | None:
        """See the port."""
        device = self._pci / "devices" / address
        with refused("look", address):
            if not device.exists():
                return None
            group = device / "iommu_group"
            number = group.resolve().name if group.exists() else ""

            def word(name: str) -> int:
                return int((device / name).read_text(), 16)

            return PciDevice(
                address=address,
                vendor=word("vendor"),
                device=word("device"),
                subsystem_vendor=word("subsystem_vendor"),
                subsystem_device=word("subsystem_device"),
                revision=word("revision"),
                driver=_driver(device),
                group=number,
                neighbours=self._neighbours(number, address) if number else (),
                reserved=self._reserved(number) if number else (),
                resets=bool(_text(device / "reset_method").split()),
            )

    def _neighbours(self, group: str, address: str) -> tuple[Neighbour, ...]:
        found = []
        for device in sorted((self._groups / group / "devices").iterdir()):
            if device.name != address:
                kind = int(_text(device / "class") or "0", 16) >> 8
                found.append(Neighbour(device.name, _driver(device), kind == _BRIDGE))
        return tuple(found)

    def _reserved(self, group: str) -> tuple[IovaRange, ...]:
        lines = (self._groups / group / "reserved_regions").read_text().splitlines()
        fields = [line.split() for line in lines]
        return tuple(IovaRange(int(start, 16), int(last, 16)) for start, last, kind in fields if kind != _IGNORED)

    def override(self, address: str) -> None:
        """See the port."""
        device = self._pci / "devices" / address
        if (found := _driver(device)) == DRIVER:
            return
        if found:
            raise DeviceUnusable(f"{address} is driven by {found}, not by {DRIVER}", hint=f"unbind it from {found}")
        with refused("override", address):
            (device / "driver_override").write_text(DRIVER)
            (self._pci / "drivers_probe").write_text(address)
        if _driver(device) != DRIVER:
            raise DeviceUnusable(f"{address} is driven by nobody, not by {DRIVER}", hint=f"is the module {DRIVER} loaded?")

    # VFIO.

    def open_device(self, address: str) -> int:
        """See the port."""
        with refused("open_vfio", address):
            names = [entry.name for entry in (self._pci / "devices" / address / "vfio-dev").iterdir()]
            return os.open(self._dev / "vfio/devices" / names[0], os.O_RDWR | os.O_CLOEXEC)

    def address(self, device: int) -> str:
        """See the port."""
        with refused("address", f"descriptor {device}"):
            number = os.fstat(device).st_rdev
        node = self._chars / f"{os.major(number)}:{os.minor(number)}"
        if not number or not node.exists() or node.resolve().parent.name != "vfio-dev":
            raise InvalidRequest(f"descriptor {device} is no character device of VFIO's")
        return node.resolve().parent.parent.name

    def bind(self, device: int, iommufd: int) -> None:
        """See the port."""
        with refused("bind", f"descriptor {device} to iommufd {iommufd}"):
            fcntl.ioctl(device, vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.bind_iommufd(iommufd))

    def attach(self, device: int, ioas: int) -> None:
        """See the port."""
        with refused("attach", f"descriptor {device} to IOAS {ioas}"):
            fcntl.ioctl(device, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.attach(ioas))

    def shape(self, device: int) -> Sequence[int]:
        """See the port."""
        found = []
        with refused("shape", f"descriptor {device}"):
            for index in vfio.VFIO_PCI_BARS:
                region = vfio.get_region_info(index)
                fcntl.ioctl(device, vfio.VFIO_DEVICE_GET_REGION_INFO, region)
                found.append(vfio.region_of(region)[0])
            for index in vfio.VFIO_PCI_INTERRUPTS:
                interrupts = vfio.get_irq_info(index)
                fcntl.ioctl(device, vfio.VFIO_DEVICE_GET_IRQ_INFO, interrupts)
                found.append(vfio.irq_count_of(interrupts))
        return found

    def _config(self, device: int) -> tuple[int, int]:
        answer = vfio.get_region_info(vfio.VFIO_PCI_CONFIG_REGION_INDEX)
        fcntl.ioctl(device, vfio.VFIO_DEVICE_GET_REGION_INFO, answer)
        return vfio.region_of(answer)

    def read_config(self, device: int, offset: int, length: int) -> bytes:
        """See the port."""
        with refused("read_config", f"descriptor {device}, {length} bytes at {offset:#x}"):
            size, base = self._config(device)
            return os.pread(device, min(length, max(0, size - offset)), base + offset)

    def write_config(self, device: int, offset: int, data: bytes) -> None:
        """See the port."""
        with refused("write_config", f"descriptor {device}, {len(data)} bytes at {offset:#x}"):
            if os.pwrite(device, data, self._config(device)[1] + offset) != len(data):
                raise OSError(errno.EIO, "the device did not take all of it")

    def migration(self, device: int) -> int | None:
        """See the port."""
        flags, size = vfio.get_u64(vfio.FEATURE_MIGRATION), vfio.get_u64(vfio.FEATURE_MIG_DATA_SIZE)
        with refused("migration", f"descriptor {device}"):
            try:
                fcntl.ioctl(device, vfio.VFIO_DEVICE_FEATURE, flags)
            except OSError as error:
                if error.errno != errno.ENOTTY:
                    raise
                return None
            if not vfio.u64_of(flags) & vfio.MIGRATION_STOP_COPY:
                return None
            fcntl.ioctl(device, vfio.VFIO_DEVICE_FEATURE, size)
        return vfio.u64_of(size)

    def set_state(self, device: int, state: vfio.MigrationState) -> int:
        """See the port."""
        answer = vfio.set_state(state)
        with refused("set_state", f"descriptor {device} to {state.name}"):
            fcntl.ioctl(device, vfio.VFIO_DEVICE_FEATURE, answer)
        return vfio.data_fd_of(answer)

    def read_state(self, fd: int, length: int) -> bytes:
        """See the port."""
        with refused("read_state", f"descriptor {fd}"):
            return os.read(fd, length)

    def write_state(self, fd: int, data: bytes) -> None:
        """See the port."""
        view = memoryview(data)
        with refused("write_state", f"descriptor {fd}, {len(data)} bytes"):
            while view:
                view = view[os.write(fd, view) :]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _driver(device: Path) -> str:
    driver = device / "driver"
    return driver.resolve().name if driver.exists() else ""
