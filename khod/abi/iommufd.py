# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/uapi/linux/iommufd.h: the requests of /dev/iommu that khod and its clients make, and their structs.

As with liveupdate, numbers carry no size; every struct begins with its own as u32. What a call answers is written into the
buffer that it was given: the ``…_of`` functions read it.
"""

from __future__ import annotations

from struct import Struct

IOMMUFD_TYPE = ord(";")


def _io(nr: int) -> int:
    return IOMMUFD_TYPE << 8 | nr


IOMMU_DESTROY = _io(0x80)
IOMMU_IOAS_ALLOC = _io(0x81)
IOMMU_IOAS_IOVA_RANGES = _io(0x84)
IOMMU_IOAS_UNMAP = _io(0x86)
IOMMU_OPTION = _io(0x87)
IOMMU_IOAS_MAP_FILE = _io(0x8F)
IOMMU_IOAS_CHANGE_PROCESS = _io(0x92)
"""Linux 6.14: pinned pages of files are accounted to the calling process from now on."""

IOMMU_IOAS_MAP_FIXED_IOVA = 1
IOMMU_IOAS_MAP_WRITEABLE = 2
IOMMU_IOAS_MAP_READABLE = 4

IOMMU_OPTION_HUGE_PAGES = 1
IOMMU_OPTION_OP_SET, IOMMU_OPTION_OP_GET = 0, 1

_DESTROY = Struct("=II")  # size, id
_ALLOC = Struct("=III")  # size, flags, out id
_RANGES = Struct("=IIIIQQ")  # size, ioas, number, reserved, address of an array of (u64 start, u64 last), out alignment
_UNMAP = Struct("=IIQQ")  # size, ioas, iova, length (out: bytes unmapped)
_OPTION = Struct("=IIHHIQ")  # size, option, op, reserved, object, value
_MAP_FILE = Struct("=IIIiQQQ")  # size, flags, ioas, descriptor, start, length, iova
_CHANGE = Struct("=II")  # size, reserved


def destroy(number: int) -> bytearray:
    """``struct iommu_destroy``."""
    return bytearray(_DESTROY.pack(_DESTROY.size, number))


def ioas_alloc() -> bytearray:
    """``struct iommu_ioas_alloc``."""
    return bytearray(_ALLOC.pack(_ALLOC.size, 0, 0))


def ioas_of(answer: bytearray) -> int:
    """The number of the IOAS that was allocated."""
    return int(_ALLOC.unpack(answer)[2])


def iova_ranges(ioas: int, address: int, room: int) -> bytearray:
    """``struct iommu_ioas_iova_ranges`` with an array for `room` ranges at `address`."""
    return bytearray(_RANGES.pack(_RANGES.size, ioas, room, 0, address, 0))


def range_count_of(answer: bytearray) -> int:
    """How many ranges there are, whatever the room: with more than that the call fails with EMSGSIZE."""
    return int(_RANGES.unpack(answer)[2])


def unmap(ioas: int, iova: int, length: int) -> bytearray:
    """``struct iommu_ioas_unmap``."""
    return bytearray(_UNMAP.pack(_UNMAP.size, ioas, iova, length))


def unmapped_of(answer: bytearray) -> int:
    """Bytes that were unmapped."""
    return int(_UNMAP.unpack(answer)[3])


def option(ioas: int, number: int, op: int, value: int = 0) -> bytearray:
    """``struct iommu_option``."""
    return bytearray(_OPTION.pack(_OPTION.size, number, op, 0, ioas, value))


def value_of(answer: bytearray) -> int:
    """What an option is set to."""
    return int(_OPTION.unpack(answer)[5])


def map_file(ioas: int, fd: int, start: int, length: int, iova: int, protection: int) -> bytearray:
    """``struct iommu_ioas_map_file`` for just this IOVA; `protection` is of IOMMU_IOAS_MAP_READABLE and _WRITEABLE."""
    return bytearray(_MAP_FILE.pack(_MAP_FILE.size, IOMMU_IOAS_MAP_FIXED_IOVA | protection, ioas, fd, start, length, iova))


def change_process() -> bytearray:
    """``struct iommu_ioas_change_process``."""
    return bytearray(_CHANGE.pack(_CHANGE.size, 0))
