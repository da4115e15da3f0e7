# SPDX-License-Identifier: LGPL-2.1-or-later
"""Codecs of linux/iommufd.h and linux/vfio.h against numbers and sizes that a compiler made of Linux 7.3's headers."""

from __future__ import annotations

import struct

import pytest

from khod.abi import iommufd, vfio
from khod.abi.vfio import MigrationState


@pytest.mark.parametrize(
    ("name", "number", "made", "size"),
    [
        ("IOMMU_DESTROY", 0x3B80, iommufd.destroy(1), 8),
        ("IOMMU_IOAS_ALLOC", 0x3B81, iommufd.ioas_alloc(), 12),
        ("IOMMU_IOAS_IOVA_RANGES", 0x3B84, iommufd.iova_ranges(1, 0, 0), 32),
        ("IOMMU_IOAS_UNMAP", 0x3B86, iommufd.unmap(1, 0, 4096), 24),
        ("IOMMU_OPTION", 0x3B87, iommufd.option(1, 1, 0, 1), 24),
        ("IOMMU_IOAS_MAP_FILE", 0x3B8F, iommufd.map_file(1, 3, 0, 4096, 0, 6), 40),
        ("IOMMU_IOAS_CHANGE_PROCESS", 0x3B92, iommufd.change_process(), 8),
    ],
)
def test_iommufd(name: str, number: int, made: bytearray, size: int) -> None:
    assert getattr(iommufd, name) == number
    assert len(made) == size == struct.unpack_from("=I", made)[0]


@pytest.mark.parametrize(
    ("name", "number", "made", "size"),
    [
        ("VFIO_DEVICE_GET_INFO", 0x3B6B, vfio.get_info(), 24),
        ("VFIO_DEVICE_GET_REGION_INFO", 0x3B6C, vfio.get_region_info(7), 32),
        ("VFIO_DEVICE_GET_IRQ_INFO", 0x3B6D, vfio.get_irq_info(1), 16),
        ("VFIO_DEVICE_SET_IRQS", 0x3B6E, vfio.set_irq(1, 9), 24),
        ("VFIO_DEVICE_RESET", 0x3B6F, None, 0),
        ("VFIO_DEVICE_FEATURE", 0x3B75, vfio.get_u64(vfio.FEATURE_MIGRATION), 16),
        ("VFIO_DEVICE_BIND_IOMMUFD", 0x3B76, vfio.bind_iommufd(5), 24),
        ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", 0x3B77, vfio.attach(2), 16),
        ("VFIO_DEVICE_DETACH_IOMMUFD_PT", 0x3B78, vfio.detach(), 12),
    ],
)
def test_vfio(name: str, number: int, made: bytearray | None, size: int) -> None:
    assert getattr(vfio, name) == number
    if made is not None:
        # The compiler pads vfio_device_info to 24; a kernel takes what argsz says.
        assert len(made) == size
        assert struct.unpack_from("=I", made)[0] == size


def test_fields_are_where_the_kernel_has_them() -> None:
    asked = iommufd.map_file(2, 7, 0x1000, 0x2000, 0x1000000, iommufd.IOMMU_IOAS_MAP_READABLE)
    assert struct.unpack("=IIIiQQQ", asked) == (40, 1 | 4, 2, 7, 0x1000, 0x2000, 0x1000000)
    assert iommufd.ioas_of(bytearray(struct.pack("=III", 12, 0, 5))) == 5
    assert iommufd.unmapped_of(bytearray(struct.pack("=IIQQ", 24, 1, 0, 0x3000))) == 0x3000
    assert iommufd.value_of(bytearray(struct.pack("=IIHHIQ", 24, 1, 1, 0, 1, 9))) == 9
    assert struct.unpack("=IIIIIi", vfio.set_irq(1, 9)) == (24, 0x24, 1, 0, 1, 9)
    assert vfio.region_of(bytearray(struct.pack("=IIIIQQ", 32, 0, 7, 0, 256, 7 << 40))) == (256, 7 << 40)
    assert vfio.irq_count_of(bytearray(struct.pack("=IIII", 16, 1, 2, 33))) == 33
    assert struct.unpack("=IIIi", vfio.set_state(MigrationState.STOP_COPY)) == (16, 0x20002, 3, -1)
    assert vfio.data_fd_of(bytearray(struct.pack("=IIIi", 16, 0, 3, 11))) == 11
