# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/uapi/linux/vfio.h, as far as a device by its own character device needs it, and the PCI registers that khod touches.

Structs begin with ``argsz``, their own size. What a call answers is in the buffer that it was given.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

VFIO_TYPE, VFIO_BASE = ord(";"), 100


def _io(nr: int) -> int:
    return VFIO_TYPE << 8 | VFIO_BASE + nr


VFIO_DEVICE_GET_INFO = _io(7)
VFIO_DEVICE_GET_REGION_INFO = _io(8)
VFIO_DEVICE_GET_IRQ_INFO = _io(9)
VFIO_DEVICE_SET_IRQS = _io(10)
VFIO_DEVICE_RESET = _io(11)
VFIO_DEVICE_FEATURE = _io(17)
VFIO_DEVICE_BIND_IOMMUFD = _io(18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _io(19)
VFIO_DEVICE_DETACH_IOMMUFD_PT = _io(20)

VFIO_DEVICE_FLAGS_RESET = 1
VFIO_PCI_CONFIG_REGION_INDEX = 7
VFIO_PCI_BARS, VFIO_PCI_INTERRUPTS = range(6), range(3)
"""Indices: BAR 0 to 5; INTx, MSI, MSI-X."""
VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER = 4, 0x20

FEATURE_GET, FEATURE_SET = 0x10000, 0x20000
FEATURE_MIGRATION, FEATURE_MIG_DEVICE_STATE, FEATURE_MIG_DATA_SIZE = 1, 2, 9
MIGRATION_STOP_COPY = 1


class MigrationState(IntEnum):
    """enum vfio_device_mig_state."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4


PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_INTX_DISABLE = 0x04, 0x004, 0x400
"""include/uapi/linux/pci_regs.h."""
PCI_STATUS, PCI_STATUS_CAP_LIST, PCI_CAPABILITY_LIST = 0x06, 0x10, 0x34
PCI_CAP_ID_EXP, PCI_EXP_DEVCTL, PCI_EXP_LNKCTL, PCI_EXP_DEVCTL2 = 0x10, 0x08, 0x10, 0x28
PCI_CACHE_LINE_SIZE, PCI_BASE_ADDRESS_0, PCI_CARDBUS_CIS, PCI_ROM_ADDRESS, PCI_INTERRUPT_LINE = 0x0C, 0x10, 0x28, 0x30, 0x3C

_INFO = Struct("=IIIII4x")  # argsz, flags, regions, irqs, offset of capabilities
_REGION = Struct("=IIIIQQ")  # argsz, flags, index, offset of capabilities, size, offset
_IRQ = Struct("=IIII")  # argsz, flags, index, count
_IRQS = Struct("=IIIII")  # argsz, flags, index, start, count; then the data
_BIND = Struct("=IIiIQ")  # argsz, flags, iommufd, out device number, address of a token
_ATTACH = Struct("=IIII")  # argsz, flags, IOAS (out: page table), pasid
_DETACH = Struct("=III")  # argsz, flags, pasid
_FEATURE = Struct("=II")  # argsz, flags; then the data
_U64 = Struct("=Q")
_STATE = Struct("=Ii")  # state, descriptor of the data


def get_info() -> bytearray:
    """``struct vfio_device_info``."""
    return bytearray(_INFO.pack(_INFO.size, 0, 0, 0, 0))


def flags_of(answer: bytearray) -> int:
    """VFIO_DEVICE_FLAGS_*."""
    return int(_INFO.unpack(answer)[1])


def get_region_info(index: int) -> bytearray:
    """``struct vfio_region_info``."""
    return bytearray(_REGION.pack(_REGION.size, 0, index, 0, 0, 0))


def region_of(answer: bytearray) -> tuple[int, int]:
    """Size of a region, and where in the device's file it begins."""
    *_, size, offset = _REGION.unpack(answer)
    return size, offset


def get_irq_info(index: int) -> bytearray:
    """``struct vfio_irq_info``."""
    return bytearray(_IRQ.pack(_IRQ.size, 0, index, 0))


def irq_count_of(answer: bytearray) -> int:
    """How many vectors there are."""
    return int(_IRQ.unpack(answer)[3])


def set_irq(index: int, eventfd: int) -> bytearray:
    """``struct vfio_irq_set``: the first vector of `index` triggers an eventfd."""
    flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER
    return bytearray(_IRQS.pack(_IRQS.size + 4, flags, index, 0, 1) + eventfd.to_bytes(4, "little", signed=True))


def bind_iommufd(iommufd: int) -> bytearray:
    """``struct vfio_device_bind_iommufd``."""
    return bytearray(_BIND.pack(_BIND.size, 0, iommufd, 0, 0))


def attach(ioas: int) -> bytearray:
    """``struct vfio_device_attach_iommufd_pt``."""
    return bytearray(_ATTACH.pack(_ATTACH.size, 0, ioas, 0))


def detach() -> bytearray:
    """``struct vfio_device_detach_iommufd_pt``."""
    return bytearray(_DETACH.pack(_DETACH.size, 0, 0))


def get_u64(feature: int) -> bytearray:
    """``struct vfio_device_feature`` that asks for one u64: MIGRATION's flags, MIG_DATA_SIZE's length."""
    return bytearray(_FEATURE.pack(_FEATURE.size + 8, FEATURE_GET | feature) + bytes(8))


def u64_of(answer: bytearray) -> int:
    """The u64."""
    return int(_U64.unpack_from(answer, _FEATURE.size)[0])


def set_state(state: MigrationState) -> bytearray:
    """``struct vfio_device_feature`` with ``struct vfio_device_feature_mig_state``."""
    return bytearray(
        _FEATURE.pack(_FEATURE.size + _STATE.size, FEATURE_SET | FEATURE_MIG_DEVICE_STATE) + _STATE.pack(state, -1)
    )


def data_fd_of(answer: bytearray) -> int:
    """The descriptor that the device's state is read from, or written to; -1 for none."""
    return int(_STATE.unpack_from(answer, _FEATURE.size)[1])
