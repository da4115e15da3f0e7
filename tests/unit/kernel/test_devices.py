# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the port of devices reads from sysfs, against a tree laid out as the kernel's is; ioctls are for the virtual machine."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from array import array
from pathlib import Path

import pytest

from khod.core.devices import IovaRange, Neighbour
from khod.errors import DeviceUnusable, InvalidRequest
from khod.kernel.devices import KernelDevices

EDU, BRIDGE, NIC = "0000:00:04.0", "0000:00:01.0", "0000:00:05.0"


def device(sysfs: Path, address: str, driver: str = "", **words: str) -> Path:
    path = sysfs / "devices/pci0000:00" / address
    path.mkdir(parents=True)
    facts = {"vendor": "0x1234", "device": "0x11e8", "subsystem_vendor": "0x1af4", "subsystem_device": "0x1100"}
    for name, value in {**facts, "revision": "0x10", "class": "0x00ff00", **words}.items():
        (path / name).write_text(value + "\n")
    for place in (sysfs / "bus/pci/devices", sysfs / "kernel/iommu_groups/7/devices"):
        place.mkdir(parents=True, exist_ok=True)
        (place / address).symlink_to(path)
    (path / "iommu_group").symlink_to(sysfs / "kernel/iommu_groups/7")
    if driver:
        (sysfs / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (path / "driver").symlink_to(sysfs / "bus/pci/drivers" / driver)
    return path


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    device(tmp_path, EDU)
    device(tmp_path, BRIDGE, "pcieport", **{"class": "0x060400"})
    device(tmp_path, NIC, "e1000e", reset_method="flr bus")
    regions = "0x00000000fee00000 0x00000000feefffff msi\n0x000000007f000000 0x000000007fffffff direct-relaxable\n"
    (tmp_path / "kernel/iommu_groups/7/reserved_regions").write_text(regions)
    return tmp_path


def test_a_device_with_its_group(sysfs: Path) -> None:
    found = KernelDevices(sysfs).look(EDU)
    assert found is not None
    assert found.identity == (0x1234, 0x11E8, 0x1AF4, 0x1100, 0x10)
    assert (found.driver, found.group, found.resets) == ("", "7", False)
    assert found.neighbours == (Neighbour(BRIDGE, "pcieport", True), Neighbour(NIC, "e1000e", False))
    assert found.reserved == (IovaRange(0xFEE00000, 0xFEEFFFFF),), "what a driver of the kernel's own needs is free for ours"
    nic = KernelDevices(sysfs).look(NIC)
    assert nic is not None
    assert (nic.driver, nic.resets) == ("e1000e", True)


def test_no_device_and_no_group(sysfs: Path) -> None:
    assert KernelDevices(sysfs).look("0000:00:1f.0") is None
    (sysfs / "devices/pci0000:00" / EDU / "iommu_group").unlink()
    found = KernelDevices(sysfs).look(EDU)
    assert found is not None
    assert (found.group, found.neighbours, found.reserved) == ("", (), ())


def test_a_device_that_another_driver_has_is_not_taken_from_it(sysfs: Path) -> None:
    with pytest.raises(DeviceUnusable, match=r"0000:00:05\.0 is driven by e1000e, not by vfio-pci"):
        KernelDevices(sysfs).override(NIC)
    assert not (sysfs / "bus/pci/drivers_probe").exists()
    assert not (sysfs / "devices/pci0000:00" / NIC / "driver_override").exists()
    with pytest.raises(DeviceUnusable, match="driven by nobody"):
        KernelDevices(sysfs).override(EDU)
    assert (sysfs / "bus/pci/drivers_probe").read_text() == EDU
    assert (sysfs / "devices/pci0000:00" / EDU / "driver_override").read_text() == "vfio-pci"


def test_which_device_a_descriptor_is(sysfs: Path) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    pipe, other = os.pipe()
    try:
        number = os.fstat(null).st_rdev
        chars = sysfs / "dev/char"
        chars.mkdir(parents=True)
        at = sysfs / "devices/pci0000:00" / EDU / "vfio-dev/vfio0"
        at.mkdir(parents=True)
        (chars / f"{os.major(number)}:{os.minor(number)}").symlink_to(at)
        assert KernelDevices(sysfs).address(null) == EDU
        with pytest.raises(InvalidRequest, match="no character device of VFIO's"):
            KernelDevices(sysfs).address(pipe)
        with pytest.raises(InvalidRequest, match="no character device of VFIO's"):
            KernelDevices().address(null)
    finally:
        for fd in (null, pipe, other):
            os.close(fd)


def test_what_is_not_there_is_said_to_be_unusable(sysfs: Path, tmp_path: Path) -> None:
    devices = KernelDevices(sysfs, tmp_path / "dev")
    with pytest.raises(DeviceUnusable, match="/dev/iommu"):
        devices.open_iommu()
    with pytest.raises(DeviceUnusable, match=EDU):
        devices.open_device(EDU)
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(DeviceUnusable, match="ioas_alloc"):
            devices.ioas_alloc(null)
        with pytest.raises(DeviceUnusable, match="read_config"):
            devices.read_config(null, 0, 4)
    finally:
        os.close(null)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [1, 8, 9, 100])
def test_any_number_of_ranges_is_read(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """By an ioctl as Python 3.14 has it: what one that failed has written is not given back."""
    ranges = array("Q", [n * 4096 for n in range(2 * count)])

    def ioctl(fd: int, request: int, argument: bytearray) -> int:
        size, ioas, room, reserved, address, alignment = (fields := struct.Struct("=IIIIQQ")).unpack(argument)
        if room < count:
            raise OSError(errno.EMSGSIZE, "more than that")
        ctypes.memmove(address, ranges.tobytes(), len(ranges) * 8)
        fields.pack_into(argument, 0, size, ioas, count, reserved, address, alignment)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert KernelDevices().iova_ranges(5, 1) == [IovaRange(2 * n * 4096, (2 * n + 1) * 4096) for n in range(count)]
