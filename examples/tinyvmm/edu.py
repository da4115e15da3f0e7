# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's `edu` device (its docs/specs/edu.rst), driven through VFIO: it copies between guest memory and a buffer of its own."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time
from pathlib import Path

from khod.abi import vfio

IDENTITY = ("0x1234", "0x11e8")
BUFFER = 0x40000
MOST = 4080
"""Bytes at once: QEMU 7.2 ends with a whole buffer of 4096 (an off-by-one of its check)."""
SOURCE, TARGET, LENGTH, COMMAND = 0x80, 0x88, 0x90, 0x98
START, TO_RAM = 1, 2
_PCI = Path("/sys/bus/pci")
_COMMAND_MEMORY = 2


def find() -> str:
    """The address of the device. Raises FileNotFoundError."""
    for device in sorted((_PCI / "devices").iterdir()):
        if tuple((device / name).read_text().strip() for name in ("vendor", "device")) == IDENTITY:
            return device.name
    raise FileNotFoundError("no edu device: QEMU needs -device edu")


def attach(iommufd: int, ioas: int) -> int:
    """Its descriptor, once it is bound to vfio-pci and to the iommufd, attached to the IOAS, and may do DMA."""
    address = find()
    device = _PCI / "devices" / address
    (device / "driver_override").write_text("vfio-pci")
    (_PCI / "drivers_probe").write_text(address)
    (name,) = (entry.name for entry in (device / "vfio-dev").iterdir())
    fd = os.open(f"/dev/vfio/devices/{name}", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, vfio.VFIO_DEVICE_BIND_IOMMUFD, vfio.bind_iommufd(iommufd))
    fcntl.ioctl(fd, vfio.VFIO_DEVICE_ATTACH_IOMMUFD_PT, vfio.attach(ioas))
    _, at = _region(fd, vfio.VFIO_PCI_CONFIG_REGION_INDEX)
    (command,) = struct.unpack("<H", os.pread(fd, 2, at + vfio.PCI_COMMAND))
    os.pwrite(fd, struct.pack("<H", command | _COMMAND_MEMORY | vfio.PCI_COMMAND_MASTER), at + vfio.PCI_COMMAND)
    return fd


def _region(fd: int, index: int) -> tuple[int, int]:
    answer = vfio.get_region_info(index)
    fcntl.ioctl(fd, vfio.VFIO_DEVICE_GET_REGION_INFO, answer)
    return vfio.region_of(answer)


class Edu:
    """The device, by its registers."""

    def __init__(self, fd: int) -> None:
        """`fd` is attached; borrowed."""
        size, offset = _region(fd, 0)
        self._bar = mmap.mmap(fd, size, offset=offset)

    def _word(self, offset: int) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_buffer(self._bar, offset)

    def idle(self, seconds: float = 5.0) -> None:
        """Wait until no DMA is under way: one that a jump cuts off is lost, and the device says that it is done."""
        deadline = time.monotonic() + seconds
        while self._word(COMMAND).value & START:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the device's DMA took more than {seconds:g} s")
            time.sleep(0.002)  # the device would interrupt; a witness that asks has no handler to go wrong

    def read_memory(self, iova: int, length: int) -> None:
        """Copy from memory into its buffer."""
        self._dma(iova, BUFFER, length, START)

    def write_memory(self, iova: int, length: int) -> None:
        """Copy from its buffer to memory."""
        self._dma(BUFFER, iova, length, START | TO_RAM)

    def _dma(self, source: int, target: int, length: int, command: int) -> None:
        self.idle()
        for offset, value in ((SOURCE, source), (TARGET, target), (LENGTH, length)):
            self._word(offset).value, self._word(offset + 4).value = value & 0xFFFFFFFF, value >> 32
        self._word(COMMAND).value = command
        self.idle()
