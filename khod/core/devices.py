# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port `Devices`: IOMMUs and PCI devices that user space drives, in the words of linux/iommufd.h and linux/vfio.h.

The conventions are those of `khod.core.ports`. A kernel that has neither raises DeviceUnusable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from khod.abi.ioas_table import Mapping
from khod.abi.vfio import MigrationState


@dataclass(frozen=True, slots=True)
class IovaRange:
    """IOVAs from `start` to `last`, which is one of them."""

    start: int
    last: int

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.last:#x}"


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another device of a group."""

    address: str
    driver: str
    """'' for none."""
    bridge: bool = False
    """A bridge does no DMA of its own."""


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A PCI function as the running kernel knows it."""

    address: str
    """Domain, bus, device and function: '0000:00:04.0'."""
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    revision: int
    driver: str
    """'' for none."""
    group: str
    """Number of its IOMMU group; '' where no IOMMU stands before it."""
    neighbours: tuple[Neighbour, ...]
    """The others of that group."""
    reserved: tuple[IovaRange, ...]
    """IOVAs of that group that nothing may be mapped at."""
    resets: bool
    """Whether the kernel can reset it alone."""

    @property
    def identity(self) -> tuple[int, ...]:
        """What it is, wherever it is plugged in."""
        return (self.vendor, self.device, self.subsystem_vendor, self.subsystem_device, self.revision)


class Devices(Protocol):
    """IOMMUs and devices."""

    # iommufd.

    def open_iommu(self) -> int:
        """A new iommufd. Raises DeviceUnusable where there is no /dev/iommu."""
        ...

    def ioas_alloc(self, iommufd: int) -> int:
        """The number of a new IOAS."""
        ...

    def iova_ranges(self, iommufd: int, ioas: int) -> Sequence[IovaRange]:
        """IOVAs that may be mapped, ascending: fewer when devices are attached. Raises DeviceUnusable for no such IOAS."""
        ...

    def huge_pages(self, iommufd: int, ioas: int, allowed: bool) -> None:
        """Set IOMMU_OPTION_HUGE_PAGES."""
        ...

    def map_file(self, iommufd: int, ioas: int, fd: int, mapping: Mapping) -> None:
        """Map a part of the file behind `fd` at just this IOVA, and pin it. Raises DeviceUnusable where something is mapped
        already, the IOVA is reserved, the range reaches over the end of the file, or that kind of file cannot be mapped."""
        ...

    def unmap(self, iommufd: int, ioas: int, iova: int, length: int) -> int:
        """Unmap whole mappings; how many bytes that were. Raises DeviceUnusable for a part of one."""
        ...

    # PCI.

    def look(self, address: str) -> PciDevice | None:
        """The device at an address; None where there is none."""
        ...

    def override(self, address: str) -> None:
        """Bind the device to vfio-pci, whose it is already: no effect. Raises DeviceUnusable."""
        ...

    # VFIO.

    def open_device(self, address: str) -> int:
        """Open the character device that vfio-pci made of it. Raises DeviceUnusable."""
        ...

    def address(self, device: int) -> str:
        """Which device a descriptor of VFIO's leads to. Raises InvalidRequest for another kind of file."""
        ...

    def bind(self, device: int, iommufd: int) -> None:
        """VFIO_DEVICE_BIND_IOMMUFD: before it, nothing can be done with the device. It is reset now, if it can be. Raises
        DeviceUnusable, as all that follow do."""
        ...

    def attach(self, device: int, ioas: int) -> None:
        """Have its DMA go through that IOAS of its iommufd."""
        ...

    def shape(self, device: int) -> Sequence[int]:
        """What a client has to do with: the sizes of its six BARs, and how many interrupts of each kind there are (INTx, MSI,
        MSI-X)."""
        ...

    def read_config(self, device: int, offset: int, length: int) -> bytes:
        """Of its configuration space: up to `length` bytes, as many as there are."""
        ...

    def write_config(self, device: int, offset: int, data: bytes) -> None:
        """To its configuration space, in one access."""
        ...

    def migration(self, device: int) -> int | None:
        """The most bytes of state that it would have to migrate now, as its driver estimates; None when it offers no
        migration (STOP_COPY)."""
        ...

    def set_state(self, device: int, state: MigrationState) -> int:
        """Bring it into a state of migration. STOP_COPY and RESUMING answer with an owned descriptor for `read_state` and
        `write_state`, others with -1."""
        ...

    def read_state(self, fd: int, length: int) -> bytes:
        """Up to `length` bytes more of its state; b'' at the end."""
        ...

    def write_state(self, fd: int, data: bytes) -> None:
        """More of its state."""
        ...
