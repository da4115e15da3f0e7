# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every kind of memory, with and without the drivers that build on it, on kernels that preserve it and on ones that do not."""

from __future__ import annotations

import asyncio
from itertools import product
from pathlib import Path

import khod_iommu
import khod_vfio
import pytest

from khod.abi.vfio import PCI_COMMAND
from khod.core.state import State
from khod.simulated import machine
from khod.simulated.cards import Card, plug
from tests.orchestration.test_devices import EDU, IOVA, MASTER, Named, Rig
from tests.orchestration.world import MIB, World

SIZE = 4 * MIB


class Guest(Rig):
    """A workload with memory of one kind, and as much as is asked for of mappings and a device."""

    def __init__(self, world: World, kind: str, drivers: int) -> None:
        super().__init__(world, [Card(EDU)])
        self.kind, self.drivers = kind, drivers

    async def start(self) -> None:
        world, process = self.world, self.world.workload
        world.plugins = [Named(khod_iommu, "iommu"), Named(khod_vfio, "vfio")][: self.drivers]
        plug(world.directory, *self.cards)
        world.power_cut()
        await world.khod()
        process = world.workload
        ram = process.memfd(SIZE) if self.kind == "memfd" else process.special(self.kind, SIZE)
        process.poke(ram, SIZE - 4, b"last")
        await world.register("ram", ram, options={"carry": "yes"})
        if self.drivers < 1:
            return
        devices = machine(process).devices
        iommufd = devices.open_iommu()
        ioas = devices.ioas_alloc(iommufd)
        for mapping in self.mapped if self.kind != "guest_memfd" else ():
            devices.map_file(iommufd, ioas, ram, mapping)
        self.fds |= {"ram": ram, "iommufd": iommufd, "table": self.table(ioas)}
        await self.register("mappings", "iommu", ("iommufd", "table"))
        if self.drivers < 2:
            return
        devices.override(EDU)
        fd = self.fds[EDU] = devices.open_device(EDU)
        devices.bind(fd, iommufd)
        devices.attach(fd, ioas)
        devices.write_config(fd, PCI_COMMAND, MASTER)
        await self.register(EDU, "vfio", (EDU,), requires=("mappings",))


MEMORY = [("memfd", True), *product(("guest_memfd", "hugetlb"), (False, True))]
"""Kinds of memory, and whether the kernel preserves them."""
DRIVERS = [(), *product((False, True)), *product((False, True), (False, True))]
"""The drivers that are there besides memory's, iommu and then vfio: whether the kernel preserves what is theirs."""
CASES = [
    (kind, taken, drivers)
    for (kind, taken), drivers in product(MEMORY, DRIVERS)
    # IOMMU_IOAS_MAP_FILE takes no guest_memfd: what comes back as one has no mappings that khod could make anew.
    if not (kind == "guest_memfd" and taken and drivers)
]


@pytest.mark.parametrize(("kind", "taken", "drivers"), CASES)
def test_they_come_through_together_twice(tmp_path: Path, kind: str, taken: bool, drivers: tuple[bool, ...]) -> None:
    async def scenario() -> None:
        preserves = [kind] if taken and kind != "memfd" else []
        preserves += [name for name, native in zip(("iommufd", "vfio"), drivers, strict=False) if native]
        world = World(tmp_path, preserves=tuple(preserves), huge_pages=4)
        guest = Guest(world, kind, len(drivers))
        await guest.start()
        as_it_is = taken
        for _ in range(2):
            host = await world.jump()
            assert host.state is State.RESTORED, [view.problem for view in await host.instances()]
            views = {view.driver: view for view in await host.instances()}
            assert {view.state for view in views.values()} == {"restored"}, [view.problem for view in views.values()]
            ways = {"guestmemfd": as_it_is}  # what builds on what is made anew is made anew as well
            for name, native in zip(("iommu", "vfio"), drivers, strict=False):
                ways[name] = all(ways.values()) and native
            assert host.incoming is not None
            nodes = {c.driver: (c.strategy == "native", c.continuity == "preserved") for c in host.incoming.carried}
            assert nodes == {name: (native, native) for name, native in ways.items()}
            process, ram = await world.claimed("ram")
            assert process.peek(ram, SIZE - 4, 4) == b"last"
            if len(drivers) == 2:
                assert guest.card().dma(IOVA + 4096, b"by DMA")
                assert process.peek(ram, 4096, 6) == b"by DMA", "the same IOVA leads to the memory that is handed out"
                assert not guest.card().dma(IOVA + MIB, b"x"), "and no other leads anywhere"
            await host.finish()
            as_it_is = taken or kind == "guest_memfd"  # which came back as a memfd

    asyncio.run(scenario())
