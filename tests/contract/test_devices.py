# SPDX-License-Identifier: LGPL-2.1-or-later
"""IOMMUs and PCI devices, which only drivers ask for."""

from __future__ import annotations

from collections.abc import Callable
from errno import EADDRINUSE, EEXIST, EINVAL, ENOENT, ENOTTY

import pytest

from khod import errors
from khod.abi.ioas_table import Mapping
from khod.abi.iommufd import IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE
from khod.abi.vfio import PCI_COMMAND, PCI_COMMAND_MASTER, MigrationState
from khod.core.devices import Devices, IovaRange
from khod.core.ports import Machine
from tests.contract.rig import EDU, PAGE, Rig

BOTH = IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE
MSI = 0xFEE00000
"""Where interrupts are messages, memory cannot be."""
NOWHERE = "0000:00:1e.7"


@pytest.fixture
def devices(host: Machine) -> Devices:
    return host.devices


def mapping(iova: int, pages: int = 1, offset: int = 0) -> Mapping:
    return Mapping(iova, pages * PAGE, offset, 0, BOTH)


def refused(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(errors.DeviceUnusable) as caught:
        call()
    assert caught.value.errno == number, caught.value


class Attached:
    """A device that is bound and attached to an IOAS of its own."""

    def __init__(self, rig: Rig) -> None:
        devices, self.address = rig.machine.devices, rig.card()
        self.iommufd = devices.open_iommu()
        self.ioas = devices.ioas_alloc(self.iommufd)
        devices.override(self.address)
        self.device = devices.open_device(self.address)
        devices.bind(self.device, self.iommufd)
        devices.attach(self.device, self.ioas)


def test_an_ioas_without_devices_takes_every_iova_once(rig: Rig, devices: Devices) -> None:
    ram, iommufd = rig.memfd(8 * PAGE), devices.open_iommu()
    one, other = devices.ioas_alloc(iommufd), devices.ioas_alloc(iommufd)
    assert one != other
    assert list(devices.iova_ranges(iommufd, one)) == [IovaRange(0, (1 << 64) - 1)]
    devices.huge_pages(iommufd, one, False)
    devices.map_file(iommufd, one, ram, mapping(16 * PAGE, 4))
    refused(EEXIST, lambda: devices.map_file(iommufd, one, ram, mapping(19 * PAGE)))
    devices.map_file(iommufd, other, ram, mapping(19 * PAGE))
    refused(ENOENT, lambda: devices.unmap(iommufd, one, 16 * PAGE, PAGE))
    assert devices.unmap(iommufd, one, 16 * PAGE, 4 * PAGE) == 4 * PAGE
    refused(ENOENT, lambda: devices.unmap(iommufd, one, 16 * PAGE, 4 * PAGE))
    devices.map_file(iommufd, one, ram, mapping(19 * PAGE))


def test_an_ioas_that_there_is_not_and_what_is_no_iommufd(rig: Rig, devices: Devices) -> None:
    ram, iommufd = rig.memfd(PAGE), devices.open_iommu()
    nowhere = devices.ioas_alloc(iommufd) + 7
    refused(ENOENT, lambda: devices.iova_ranges(iommufd, nowhere))
    refused(ENOENT, lambda: devices.map_file(iommufd, nowhere, ram, mapping(0)))
    refused(ENOENT, lambda: devices.unmap(iommufd, nowhere, 0, PAGE))
    refused(ENOTTY, lambda: devices.ioas_alloc(ram))


def test_a_device_is_looked_at_where_it_is(rig: Rig, devices: Devices) -> None:
    found = devices.look(rig.card())
    assert found is not None
    assert (found.address, found.identity[:2]) == (rig.card(), EDU)
    assert found.driver in ("", "vfio-pci")
    assert found.group
    assert rig.card() not in {other.address for other in found.neighbours}
    assert any(taken.start <= MSI <= taken.last for taken in found.reserved)
    assert not found.resets
    assert devices.look(NOWHERE) is None


def test_a_device_is_bound_to_vfio_again_and_again(rig: Rig, devices: Devices) -> None:
    for _ in range(2):
        devices.override(rig.card())
        found = devices.look(rig.card())
        assert found is not None
        assert found.driver == "vfio-pci"
    with pytest.raises(errors.DeviceUnusable):
        devices.override(NOWHERE)
    with pytest.raises(errors.DeviceUnusable):
        devices.open_device(NOWHERE)


def test_a_descriptor_says_which_device_it_leads_to(rig: Rig, devices: Devices) -> None:
    devices.override(rig.card())
    assert devices.address(devices.open_device(rig.card())) == rig.card()
    for other in (rig.memfd(PAGE), devices.open_iommu()):
        with pytest.raises(errors.InvalidRequest):
            devices.address(other)


def test_nothing_can_be_done_before_it_is_bound_which_it_is_once(rig: Rig, devices: Devices) -> None:
    devices.override(rig.card())
    device, iommufd = devices.open_device(rig.card()), devices.open_iommu()
    ioas = devices.ioas_alloc(iommufd)
    refused(EINVAL, lambda: devices.read_config(device, 0, 4))
    refused(EINVAL, lambda: devices.attach(device, ioas))
    refused(EINVAL, lambda: devices.shape(device))
    devices.bind(device, iommufd)
    refused(EINVAL, lambda: devices.bind(device, iommufd))
    refused(ENOENT, lambda: devices.attach(device, ioas + 7))
    devices.attach(device, ioas)


def test_what_a_device_has_reserved_cannot_be_mapped(rig: Rig, devices: Devices) -> None:
    ram, it = rig.memfd(4 * PAGE), Attached(rig)
    allowed = devices.iova_ranges(it.iommufd, it.ioas)
    assert [r.start for r in allowed] == sorted(r.start for r in allowed)
    assert not any(r.start <= MSI <= r.last for r in allowed)
    refused(EINVAL, lambda: devices.map_file(it.iommufd, it.ioas, ram, mapping(MSI)))
    devices.map_file(it.iommufd, it.ioas, ram, mapping(0, 4))
    refused(EINVAL, lambda: devices.map_file(it.iommufd, it.ioas, ram, mapping(8 * PAGE, 2, 3 * PAGE)))


def test_only_memory_is_mapped_for_a_device(rig: Rig, devices: Devices) -> None:
    it = Attached(rig)
    refused(EINVAL, lambda: devices.map_file(it.iommufd, it.ioas, devices.open_iommu(), mapping(0)))


def test_a_device_does_not_go_where_something_is_mapped_that_it_reserves(rig: Rig, devices: Devices) -> None:
    ram, iommufd = rig.memfd(PAGE), devices.open_iommu()
    ioas = devices.ioas_alloc(iommufd)
    devices.map_file(iommufd, ioas, ram, mapping(MSI))
    devices.override(rig.card())
    device = devices.open_device(rig.card())
    devices.bind(device, iommufd)
    refused(EADDRINUSE, lambda: devices.attach(device, ioas))
    assert devices.unmap(iommufd, ioas, MSI, PAGE) == PAGE
    devices.attach(device, ioas)


def test_configuration_space_is_read_and_written_and_a_closed_device_does_no_dma(rig: Rig, devices: Devices) -> None:
    it = Attached(rig)
    assert len(devices.read_config(it.device, 0, 4096)) in (256, 4096)
    assert len(devices.read_config(it.device, 16, 8)) == 8

    def command(device: int) -> int:
        return int.from_bytes(devices.read_config(device, PCI_COMMAND, 2), "little")

    for value in (command(it.device) | PCI_COMMAND_MASTER, command(it.device) & ~PCI_COMMAND_MASTER):
        devices.write_config(it.device, PCI_COMMAND, value.to_bytes(2, "little"))
        assert command(it.device) == value
    devices.write_config(it.device, PCI_COMMAND, (command(it.device) | PCI_COMMAND_MASTER).to_bytes(2, "little"))
    rig.machine.files.close(it.device)
    again = Attached(rig)
    assert not command(again.device) & PCI_COMMAND_MASTER


def test_a_device_has_regions_and_interrupts(rig: Rig, devices: Devices) -> None:
    assert list(devices.shape(Attached(rig).device)) == [1 << 20, 0, 0, 0, 0, 0, 1, 1, 0], "as QEMU's edu is documented"


def test_one_that_does_not_migrate_says_so(rig: Rig, devices: Devices) -> None:
    it = Attached(rig)
    assert devices.migration(it.device) is None
    refused(ENOTTY, lambda: devices.set_state(it.device, MigrationState.STOP_COPY))
