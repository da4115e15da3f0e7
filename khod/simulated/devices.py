# SPDX-License-Identifier: LGPL-2.1-or-later
"""The system calls that drive devices and the IOMMU before them, on the simulated machine.

The kernel turns bus mastering off at a jump, as Linux does, but for devices that it preserves.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from khod.abi.ioas_table import Mapping
from khod.abi.iommufd import IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE
from khod.abi.vfio import PCI_COMMAND_MASTER, MigrationState
from khod.simulated.cards import (
    CARDS_FILE,
    CONFIG_SIZE,
    REGISTERS_FILE,
    Card,
    Ioas,
    Iommufd,
    MigrationData,
    VfioDevice,
)
from khod.simulated.inode import Inode, OpenFile
from khod.simulated.luo import LiveUpdate
from khod.simulated.record import FileRecord
from khod.simulated.shmem import Shmem
from khod.simulated.task import Task

APERTURE = (1 << 39) - 1
"""The last IOVA of a domain."""
VFIO = "vfio-pci"


def _bad(number: int, why: str) -> OSError:
    return OSError(number, why)


class DeviceCalls:
    """System calls on devices of one boot. Each takes the calling process first and raises OSError."""

    def __init__(self, directory: Path, luo: LiveUpdate) -> None:
        self._directory = directory
        self._luo = luo
        path = directory / CARDS_FILE
        raw = json.loads(path.read_text()) if path.exists() else []
        self.cards = {c["address"]: Card(**{**c, "reserved": tuple(map(tuple, c["reserved"]))}) for c in raw}
        kept = directory / REGISTERS_FILE
        if kept.exists():
            for address, (config, registers) in json.loads(kept.read_text()).items():
                if address in self.cards:
                    self.cards[address].config[:] = bytes.fromhex(config)
                    self.cards[address].registers = registers
            kept.unlink()
        for card in self.cards.values():
            card.driver = card.driven_by

    def revive(self, record: FileRecord) -> Inode:
        """A file without frames that the previous kernel preserved; what it builds on is retrieved already."""
        if record.kind == "vfio" and record.inside:
            return self._revive_device(*json.loads(record.inside))
        if record.kind != "iommufd" or not record.inside:
            return Inode(record.kind, record.size)
        iommufd = Iommufd()
        for number, (huge_pages, mapped) in json.loads(record.inside).items():
            space = iommufd.spaces[int(number)] = Ioas(huge_pages=huge_pages)
            for fields, session, token in mapped:
                space.add(Mapping(*fields), self._luo.retrieved(session, token))
        return iommufd

    def _revive_device(self, address: str, session: str, token: int, ioas: int, state: int) -> VfioDevice:
        card = self._card(address)
        self._to_vfio(card)
        device = VfioDevice(card)
        device.iommufd, device.state, card.file = self._luo.retrieved(session, token).get(), MigrationState(state), device
        assert isinstance(device.iommufd.inode, Iommufd)
        if ioas:
            device.ioas = device.iommufd.inode.spaces[ioas]
            device.ioas.cards.append(card)
        return device

    def jump(self) -> None:
        """pci_device_shutdown() of each that is not preserved: no bus mastering any more. What they hold, they hold by
        themselves."""
        for card in self.cards.values():
            if card.file is None or not card.file.frozen:
                card.command &= ~PCI_COMMAND_MASTER
        kept = {card.address: (card.config.hex(), card.registers) for card in self.cards.values()}
        if kept:
            (self._directory / REGISTERS_FILE).write_text(json.dumps(kept))

    def calls(self) -> tuple[Callable[..., Any], ...]:
        """All of them."""
        return (
            *(self.open_iommu, self.ioas_alloc, self.iova_ranges, self.huge_pages_option, self.map_file, self.unmap),
            *(self.look, self.override, self.open_vfio, self.address, self.bind, self.attach),
            self.shape,
            *(self.read_config, self.write_config, self.migration, self.set_state, self.read_state, self.write_state),
        )

    # iommufd.

    def open_iommu(self, task: Task) -> int:
        """open("/dev/iommu"). ENOENT in a machine without devices."""
        if not self.cards:
            raise _bad(errno.ENOENT, "no IOMMU here")
        return task.install(OpenFile(Iommufd()))

    def _iommufd(self, task: Task, fd: int) -> Iommufd:
        inode = task.file(fd).inode
        if not isinstance(inode, Iommufd):
            raise _bad(errno.ENOTTY, f"descriptor {fd} is a {inode.kind}")
        return inode

    def _space(self, task: Task, fd: int, ioas: int) -> Ioas:
        space = self._iommufd(task, fd).spaces.get(ioas)
        if space is None:
            raise _bad(errno.ENOENT, f"no IOAS {ioas}")
        return space

    def ioas_alloc(self, task: Task, fd: int) -> int:
        """IOMMU_IOAS_ALLOC."""
        iommufd = self._iommufd(task, fd)
        number = max(iommufd.spaces, default=0) + 1
        iommufd.spaces[number] = Ioas()
        return number

    def iova_ranges(self, task: Task, fd: int, ioas: int) -> list[tuple[int, int]]:
        """IOMMU_IOAS_IOVA_RANGES: everything, but for what attached devices cannot reach."""
        space = self._space(task, fd, ioas)
        if not space.cards:
            return [(0, (1 << 64) - 1)]
        found, start = [], 0
        for first, last in sorted({r for card in space.cards for r in card.reserved}):
            if start < first:
                found.append((start, first - 1))
            start = last + 1
        return [*found, (start, APERTURE)]

    def huge_pages_option(self, task: Task, fd: int, ioas: int, allowed: bool) -> None:
        """IOMMU_OPTION_HUGE_PAGES."""
        self._space(task, fd, ioas).huge_pages = allowed

    def map_file(self, task: Task, fd: int, ioas: int, memory: int, mapping: Sequence[int]) -> None:
        """IOMMU_IOAS_MAP_FILE."""
        space, new, file = self._space(task, fd, ioas), Mapping(*mapping), task.file(memory)
        # memfd_pin_folios() takes shmem and hugetlbfs, and nothing else.
        mappable = isinstance(file.inode, Shmem) and file.inode.kind in ("memfd", "hugetlb")
        if not mappable or new.offset + new.length > file.inode.stat().size:
            raise _bad(errno.EINVAL, f"descriptor {memory} has no such memory")
        if not new.protection & (IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE):
            raise _bad(errno.EINVAL, "neither readable nor writeable")
        if space.hits(new.iova, new.end):
            raise _bad(errno.EEXIST, "mapped already")
        if any(_hits(new, card) for card in space.cards):
            raise _bad(errno.EINVAL, "reserved")
        space.add(new, file)

    def unmap(self, task: Task, fd: int, ioas: int, iova: int, length: int) -> int:
        """IOMMU_IOAS_UNMAP, of whole mappings."""
        space = self._space(task, fd, ioas)
        hit = space.hits(iova, iova + length)
        if not hit or any(m.iova < iova or m.end > iova + length for m in hit):
            raise _bad(errno.ENOENT, "no whole mappings")
        for mapping in hit:
            space.remove(mapping.iova)
        return sum(m.length for m in hit)

    # PCI.

    def look(self, task: Task, address: str) -> dict[str, Any] | None:
        """What sysfs says."""
        card = self.cards.get(address)
        if card is None:
            return None
        others = [c for c in self.cards.values() if c.group == card.group and c is not card]
        return {
            "address": address,
            "vendor": card.vendor,
            "device": card.device,
            "subsystem_vendor": card.subsystem,
            "subsystem_device": card.subsystem,
            "revision": card.revision,
            "driver": card.driver,
            "group": card.group,
            "neighbours": [(c.address, c.driver) for c in others],
            "reserved": list(card.reserved),
            "resets": card.resets,
        }

    def _card(self, address: str) -> Card:
        if address not in self.cards:
            raise _bad(errno.ENOENT, f"no device {address}")
        return self.cards[address]

    def override(self, task: Task, address: str) -> None:
        """driver_override and drivers_probe."""
        self._to_vfio(self._card(address))

    @staticmethod
    def _to_vfio(card: Card) -> None:
        """Bind it to vfio-pci. EBUSY where another has it."""
        if card.driver not in ("", VFIO):
            raise _bad(errno.EBUSY, f"{card.address} is driven by {card.driver}")
        card.driver = VFIO

    # VFIO.

    def open_vfio(self, task: Task, address: str) -> int:
        """open("/dev/vfio/devices/vfioN")."""
        card = self._card(address)
        if card.driver != VFIO:
            raise _bad(errno.ENOENT, f"{address} has no device of VFIO's")
        return task.install(OpenFile(VfioDevice(card)))

    def _device(self, task: Task, fd: int, *, bound: bool = True) -> VfioDevice:
        inode = task.file(fd).inode
        if not isinstance(inode, VfioDevice):
            raise _bad(errno.ENOTTY, f"descriptor {fd} is a {inode.kind}")
        if bound and inode.iommufd is None:
            raise _bad(errno.EINVAL, "not bound to an iommufd")
        return inode

    def address(self, task: Task, fd: int) -> str:
        """Which device it is. ENXIO for what is none."""
        inode = task.file(fd).inode
        if not isinstance(inode, VfioDevice):
            raise _bad(errno.ENXIO, f"descriptor {fd} is a {inode.kind}")
        return inode.card.address

    def bind(self, task: Task, fd: int, iommufd: int) -> None:
        """VFIO_DEVICE_BIND_IOMMUFD: once, and by one at a time."""
        device = self._device(task, fd, bound=False)
        self._iommufd(task, iommufd)
        if device.iommufd is not None or device.card.file is not None:
            raise _bad(errno.EINVAL, "bound already")
        device.iommufd, device.card.file = task.file(iommufd).get(), device
        if device.card.resets:
            device.card.registers = ""
            device.card.config[:] = bytes(CONFIG_SIZE)

    def attach(self, task: Task, fd: int, ioas: int) -> None:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT. EADDRINUSE where something is mapped that the device has reserved."""
        device = self._device(task, fd)
        assert device.iommufd is not None
        assert isinstance(device.iommufd.inode, Iommufd)
        space = device.iommufd.inode.spaces.get(ioas)
        if space is None:
            raise _bad(errno.ENOENT, f"no IOAS {ioas}")
        if any(_hits(mapping, device.card) for mapping, _ in space.mapped.values()):
            raise _bad(errno.EADDRINUSE, "reserved")
        if device.ioas is not None:
            device.ioas.cards.remove(device.card)
        device.ioas = space
        space.cards.append(device.card)

    def shape(self, task: Task, fd: int) -> list[int]:
        """VFIO_DEVICE_GET_REGION_INFO and VFIO_DEVICE_GET_IRQ_INFO."""
        return list(self._device(task, fd).card.shape)

    def read_config(self, task: Task, fd: int, offset: int, length: int) -> bytes:
        """pread(2) of the configuration space."""
        return bytes(self._device(task, fd).card.config[offset : offset + length])

    def write_config(self, task: Task, fd: int, offset: int, data: bytes) -> None:
        """pwrite(2) to it."""
        config = self._device(task, fd).card.config
        config[offset : offset + len(data)] = data

    def migration(self, task: Task, fd: int) -> int | None:
        """VFIO_DEVICE_FEATURE_MIGRATION, and MIG_DATA_SIZE."""
        card = self._device(task, fd).card
        return len(card.registers) if card.migrates else None

    def set_state(self, task: Task, fd: int, state: int) -> int:
        """VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE."""
        device, wanted = self._device(task, fd), MigrationState(state)
        if not device.card.migrates:
            raise _bad(errno.ENOTTY, "no migration")
        if device.state is MigrationState.RESUMING and device.data is not None:
            device.card.registers = device.data.data.decode()
        device.state, device.data = wanted, None
        if wanted not in (MigrationState.STOP_COPY, MigrationState.RESUMING):
            return -1
        saved = device.card.registers.encode() if wanted is MigrationState.STOP_COPY else b""
        device.data = MigrationData(saved)
        return task.install(OpenFile(device.data))

    def _data(self, task: Task, fd: int) -> MigrationData:
        inode = task.file(fd).inode
        if not isinstance(inode, MigrationData):
            raise _bad(errno.EINVAL, f"descriptor {fd} is a {inode.kind}")
        return inode

    def read_state(self, task: Task, fd: int, length: int) -> bytes:
        """read(2)."""
        data = self._data(task, fd)
        part = bytes(data.data[data.at : data.at + length])
        data.at += len(part)
        return part

    def write_state(self, task: Task, fd: int, data: bytes) -> None:
        """write(2)."""
        self._data(task, fd).data += data


def _hits(mapping: Mapping, card: Card) -> bool:
    return mapping.end - 1 > APERTURE or any(mapping.iova <= last and first < mapping.end for first, last in card.reserved)
