# SPDX-License-Identifier: LGPL-2.1-or-later
"""PCI devices of the simulated machine, and what descriptors of them and of the IOMMU before them lead to.

A `Card` is hardware: it does DMA by itself (`Card.dma`, which a test calls in its stead), through the IOAS that it is attached
to and as long as its bus master bit is set; a kexec leaves its registers as they are. `plug` puts a card into a machine that is
off.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from khod.abi.ioas_table import Mapping
from khod.abi.iommufd import IOMMU_IOAS_MAP_WRITEABLE
from khod.abi.vfio import PCI_COMMAND, PCI_COMMAND_MASTER, MigrationState
from khod.simulated.inode import Inode, OpenFile
from khod.simulated.shmem import Shmem

CARDS_FILE = "cards.json"
REGISTERS_FILE = "registers.json"
"""What cards bring through a jump: they are not part of what kernels hand over."""
CONFIG_SIZE = 256


@dataclass(eq=False)
class Card:
    """A PCI device. `migrates`: it offers migration of what it has in its registers. `resets`: opening it clears them."""

    address: str
    device: int = 0x11E8
    group: str = "1"
    migrates: bool = False
    resets: bool = False
    reserved: tuple[tuple[int, int], ...] = ((0xFEE00000, 0xFEEFFFFF),)
    driven_by: str = ""
    """The driver of the kernel's own that takes it at boot."""
    vendor: int = 0x1234
    subsystem: int = 0x1100
    revision: int = 0x10
    shape: tuple[int, ...] = (1 << 20, 0, 0, 0, 0, 0, 1, 1, 0)
    """Sizes of BARs; interrupts by INTx, MSI, MSI-X."""
    registers: str = ""
    config: bytearray = field(default_factory=lambda: bytearray(CONFIG_SIZE))
    driver: str = ""
    file: VfioDevice | None = None
    """Open and bound."""
    faults: list[int] = field(default_factory=list)
    """IOVAs that the IOMMU did not let it at."""

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self.config[PCI_COMMAND : PCI_COMMAND + 2], "little")

    @command.setter
    def command(self, value: int) -> None:
        self.config[PCI_COMMAND : PCI_COMMAND + 2] = value.to_bytes(2, "little")

    def dma(self, iova: int, data: bytes) -> bool:
        """Write to memory, as it does when it likes; whether that got anywhere."""
        file = self.file
        running = file is not None and file.state is MigrationState.RUNNING
        if not (running and self.command & PCI_COMMAND_MASTER) or file is None:
            return False
        found = file.target(iova, len(data))
        if found is None:
            self.faults.append(iova)
            return False
        shmem, offset = found
        shmem.write(offset, data)
        return True


@dataclass(eq=False)
class Ioas:
    """Mappings, by their IOVA, each with the file that it pins."""

    mapped: dict[int, tuple[Mapping, OpenFile]] = field(default_factory=dict)
    huge_pages: bool = True
    cards: list[Card] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """IOVAs of all mappings, ascending."""

    def add(self, mapping: Mapping, file: OpenFile) -> None:
        """Nothing is mapped there. The file is held from now on."""
        insort(self.starts, mapping.iova)
        self.mapped[mapping.iova] = (mapping, file.get())

    def remove(self, iova: int) -> None:
        """The mapping that begins there."""
        self.starts.remove(iova)
        self.mapped.pop(iova)[1].put()

    def hits(self, iova: int, end: int) -> list[Mapping]:
        """What is mapped of these IOVAs, `end` not among them."""
        first = max(0, bisect_right(self.starts, iova) - 1)
        found = (self.mapped[start][0] for start in self.starts[first : bisect_left(self.starts, end)])
        return [mapping for mapping in found if mapping.end > iova]


class Iommufd(Inode):
    """What a descriptor of /dev/iommu leads to."""

    def __init__(self) -> None:
        super().__init__("iommufd")
        self.number = 1  # that of the node by which all are opened
        self.spaces: dict[int, Ioas] = {}

    def inside(self, place: Callable[[OpenFile], tuple[str, int]]) -> str:
        """All mappings, for a kernel that preserves iommufds."""
        return json.dumps(
            {
                number: [space.huge_pages, [[list(mapping), *place(file)] for mapping, file in space.mapped.values()]]
                for number, space in self.spaces.items()
            }
        )

    def free(self) -> None:
        """Everything is unmapped."""
        for space in self.spaces.values():
            for _, file in space.mapped.values():
                file.put()
        self.spaces.clear()


class VfioDevice(Inode):
    """What a descriptor of a device leads to."""

    def __init__(self, card: Card) -> None:
        super().__init__("vfio")
        self.card = card
        self.iommufd: OpenFile | None = None
        self.ioas: Ioas | None = None
        self.state = MigrationState.RUNNING
        self.data: MigrationData | None = None

    def builds_on(self) -> Inode | None:
        """The iommufd that it is bound to."""
        return self.iommufd.inode if self.iommufd is not None else None

    def inside(self, place: Callable[[OpenFile], tuple[str, int]]) -> str:
        """Which device, and what its DMA goes through, for a kernel that preserves such devices."""
        assert self.iommufd is not None
        assert isinstance(self.iommufd.inode, Iommufd)
        spaces = self.iommufd.inode.spaces.items()
        number = next((number for number, space in spaces if space is self.ioas), 0)
        return json.dumps([self.card.address, *place(self.iommufd), number, self.state])

    def target(self, iova: int, length: int) -> tuple[Shmem, int] | None:
        """The memory behind an IOVA."""
        if self.ioas is None:
            return None
        for mapping in self.ioas.hits(iova, iova + length):
            inode, inside = self.ioas.mapped[mapping.iova][1].inode, mapping.iova <= iova and iova + length <= mapping.end
            if inside and mapping.protection & IOMMU_IOAS_MAP_WRITEABLE and isinstance(inode, Shmem):
                return inode, mapping.offset + iova - mapping.iova
        return None

    def free(self) -> None:
        """The device is disabled."""
        if self.card.file is self:
            self.card.file = None
            self.card.command &= ~PCI_COMMAND_MASTER
        if self.ioas is not None:
            self.ioas.cards.remove(self.card)
        if self.iommufd is not None:
            self.iommufd.put()


class MigrationData(Inode):
    """The stream of a device's state."""

    def __init__(self, data: bytes) -> None:
        super().__init__("other")
        self.data = bytearray(data)
        self.at = 0


def plug(directory: Path, *cards: Card) -> None:
    """Put cards into a machine, in place of those that it has."""
    own = ("config", "file", "faults", "driver")
    (directory / CARDS_FILE).write_text(json.dumps([{k: v for k, v in vars(c).items() if k not in own} for c in cards]))
