# SPDX-License-Identifier: LGPL-2.1-or-later
"""Devices that do DMA, and the mappings that it goes through, in updates of the simulated machine."""

from __future__ import annotations

import asyncio
from collections import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import khod_iommu
import khod_vfio
import pytest

from khod.abi import ioas_table
from khod.abi.ioas_table import Mapping, Table
from khod.abi.vfio import PCI_COMMAND, PCI_COMMAND_MASTER
from khod.core.devices import IovaRange
from khod.core.state import State
from khod.errors import InvalidRequest, KhodError, Refused, UpdateFailed
from khod.plugin import Instance, hookimpl
from khod.simulated import ProcessDied, Release, machine, ports
from khod.simulated.cards import REGISTERS_FILE, Card, plug
from khod.simulated.kernel import Kernel
from tests.orchestration.world import ME, MIB, World

EDU = "0000:00:04.0"
NIC = "0000:00:05.0"
IOVA = 0x100_0000
MASTER = (0x100 | 0x3 | PCI_COMMAND_MASTER).to_bytes(2, "little")


class Named:
    """A plugin module under its name."""

    def __init__(self, module: Any, name: str) -> None:
        self.name = name
        for hook in dir(module):
            if hook.startswith("khod_"):
                setattr(self, hook, getattr(module, hook))


def mappings(*parts: tuple[int, int, int]) -> list[Mapping]:
    """From (iova, pages, first page of the memory)."""
    return ioas_table.merged(Mapping(iova, 4096 * pages, 4096 * first, 0, 6) for iova, pages, first in parts)


@dataclass
class Rig:
    """A workload that has memory, an IOAS with mappings, and devices attached to it."""

    world: World
    cards: Sequence[Card]
    mapped: list[Mapping] = field(default_factory=lambda: mappings((IOVA, 256, 0)))
    fds: dict[str, int] = field(default_factory=dict)
    release: Release = field(default_factory=Release)
    huge_pages: bool = True
    words: list[bool] = field(default_factory=list)
    """Which of the device's last words got to memory."""

    async def start(self) -> None:
        world = self.world
        vfio = Named(khod_vfio, "vfio")
        if self.cards[0].address == EDU:
            vfio.khod_freeze = self.busy_freeze  # type: ignore[attr-defined]
        world.plugins = [Named(khod_iommu, "iommu"), vfio]
        plug(world.directory, *self.cards)
        world.kernel.power_off()
        world.kernel = Kernel.boot(world.directory, release=self.release)
        world.workload = world.kernel.spawn("workload")
        await world.khod()
        process = world.workload
        devices = machine(process).devices
        ram, iommufd = world.memory(), devices.open_iommu()
        ioas = devices.ioas_alloc(iommufd)
        devices.huge_pages(iommufd, ioas, self.huge_pages)
        self.fds |= {"ram": ram, "iommufd": iommufd, "table": self.table(ioas)}
        for mapping in self.mapped:
            devices.map_file(iommufd, ioas, ram, mapping)
        await world.register("ram", ram)
        await self.register("mappings", "iommu", ("iommufd", "table"))
        for card in self.cards:
            if card.driven_by:
                continue
            devices.override(card.address)
            fd = self.fds[card.address] = devices.open_device(card.address)
            devices.bind(fd, iommufd)
            devices.attach(fd, ioas)
            devices.write_config(fd, PCI_COMMAND, MASTER)
            await self.register(card.address, "vfio", (card.address,), requires=("mappings",))

    def table(self, ioas: int) -> int:
        process = self.world.workload
        fd = process.memfd(ioas_table.file_size(len(self.mapped)))
        process.write(fd, 0, ioas_table.head(Table(ioas, [("ram", "memory")], (), self.huge_pages), len(self.mapped)))
        process.write(fd, ioas_table.FIRST, ioas_table.records(self.mapped))
        return fd

    async def register(self, name: str, driver: str, fds: Sequence[str], **kwargs: Any) -> None:
        world = self.world
        given = [("device" if fd == name else fd, world.workload.give(self.fds[fd], world.process)) for fd in fds]
        await world.host.register(ME, world.asked(name.replace(":", "."), driver, **kwargs), given)

    @hookimpl
    def busy_freeze(self, instance: Instance) -> abc.Mapping[str, bytes]:
        """The first device writes to memory right before it is frozen, and right after."""
        busy = instance.name == EDU.replace(":", ".")
        if busy:
            self.words.append(self.card().dma(IOVA + 4096, b"word 0"))
        changed: abc.Mapping[str, bytes] = khod_vfio.khod_freeze(instance)
        if busy:
            self.words.append(self.card().dma(IOVA + 4096, b"word 1"))
        return changed

    def card(self, address: str = EDU) -> Card:
        return self.world.kernel.devices.cards[address]

    async def states(self) -> dict[str, str]:
        return {view.name: view.state for view in await self.world.host.instances()}

    async def problem(self, name: str) -> str:
        return next(view.problem for view in await self.world.host.instances() if view.name == name.replace(":", "."))


def test_dma_that_comes_until_the_device_is_frozen_is_there_after_the_jump_and_goes_on(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        assert rig.card().dma(IOVA + 8192, b"before")
        await world.jump_away()
        assert rig.words == [True, False], "it wrote until it was frozen, and not after"
        assert not rig.card().dma(IOVA, b"nobody opened it")
        host = await world.khod()
        assert set((await rig.states()).values()) == {"restored"}, [v.problem for v in await host.instances()]
        process, ram = await world.claimed("ram")
        assert process.read(ram, 4096, 6) == b"word 0"
        assert process.read(ram, 8192, 6) == b"before"
        assert rig.card().dma(IOVA + 4100, b"after"), "the same IOVAs, with no mapping by the client"
        assert process.read(ram, 4096, 9) == b"word" + b"after"
        assert not rig.card().dma(IOVA + MIB, b"x")
        assert rig.card().faults == [IOVA + MIB]
        views = {view.name: view for view in await host.instances()}
        assert (views["mappings"].continuity, views[EDU.replace(":", ".")].continuity) == ("rebuilt", "reset")
        await host.finish()
        await world.jump()
        assert set((await rig.states()).values()) == {"restored"}, "and once more"
        assert rig.card().dma(IOVA, b"again")

    asyncio.run(scenario())


def test_on_a_kernel_that_preserves_iommufds_nothing_is_mapped_anew(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)], release=Release(preserves=("iommufd",)))
        await rig.start()
        await world.jump_away()
        world.kernel.faults.fail("map_file", 5)
        host = await world.khod()
        views = {view.name: view for view in await host.instances()}
        assert (views["mappings"].strategy, views["mappings"].continuity) == ("native", "preserved")
        assert {view.state for view in views.values()} == {"restored"}, [view.problem for view in views.values()]
        process, ram = await world.claimed("ram")
        assert rig.card().dma(IOVA + 4100, b"after")
        assert process.read(ram, 4100, 5) == b"after"
        await host.finish()
        await world.jump()
        assert set((await rig.states()).values()) == {"restored"}

    asyncio.run(scenario())


def test_no_dma_after_freeze_and_again_after_an_abort(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU), Card(NIC, migrates=True, registers="rings", group="2")])
        await rig.start()
        task = await world.held(State.FROZEN)
        for address in (EDU, NIC):
            assert not rig.card(address).dma(IOVA, b"late")
        await world.host.abort()
        await asyncio.wait([task])
        for address in (EDU, NIC):
            assert rig.card(address).command.to_bytes(2, "little") == MASTER
            assert rig.card(address).dma(IOVA, b"runs")

    asyncio.run(scenario())


def test_a_khod_that_follows_a_killed_one_lets_the_device_go_on(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU), Card(NIC, migrates=True, group="2")])
        await rig.start()
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        assert not rig.card().dma(IOVA, b"late")
        host = await world.khod()
        assert not host.problems
        for address in (EDU, NIC):
            assert rig.card(address).dma(IOVA, b"runs")

    asyncio.run(scenario())


def test_the_state_of_a_device_that_migrates_is_loaded_again(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(NIC, migrates=True, resets=True)])
        await rig.start()
        rig.card(NIC).registers = "rings at 7"
        rig.card(NIC).config[0x3C] = 11
        await world.jump()
        assert set((await rig.states()).values()) == {"restored"}, await rig.problem(NIC)
        assert rig.card(NIC).registers == "rings at 7"
        assert rig.card(NIC).config[0x3C] == 11
        assert rig.card(NIC).dma(IOVA, b"x")
        (view,) = [v for v in await world.host.instances() if v.driver == "vfio"]
        assert view.continuity == "rebuilt"

    asyncio.run(scenario())


def change(world: World, *cards: Card) -> None:
    """Other hardware in the machine that has just jumped."""
    (world.directory / REGISTERS_FILE).unlink(missing_ok=True)
    plug(world.directory, *cards)


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ([Card(NIC)], "there is no device at 0000:00:04.0"),
        ([Card(EDU, device=0x1234)], r"is 1234:1234 .*, it was 1234:11e8"),
        ([Card(EDU, driven_by="edu")], "is driven by edu"),
        (
            [Card(EDU, shape=(1 << 16, 0, 0, 0, 0, 0, 1, 0, 5))],
            "has BAR 0 of 0x10000, interrupts: 1 INTx, 0 MSI, 5 MSI-X; it had BAR 0 of 0x100000, interrupts: 1 INTx, 1 MSI,",
        ),
        ([Card(EDU), Card(NIC, driven_by="nic")], r"shares IOMMU group 1 with 0000:00:05.0 \(driven by nic\)"),
    ],
    ids=["missing", "another", "claimed by another driver", "another shape", "group shared"],
)
def test_a_device_that_is_not_as_it_was_is_not_handed_out(world: World, cards: list[Card], says: str) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.host.load(str(world.image))
        with pytest.raises(ProcessDied):
            async for _ in await world.host.update():
                pass
        change(world, *cards)
        world.boot()
        await world.khod()
        states = await rig.states()
        assert states == {"ram": "restored", "mappings": "restored", EDU.replace(":", "."): "damaged"}
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(await rig.problem(EDU))
        answer = await world.host.claim(ME, EDU.replace(":", "."))
        assert answer.answer == "hold"

    asyncio.run(scenario())


@pytest.mark.parametrize("preserved", [False, True])
def test_mappings_that_are_not_allowed_any_more_are_named_before_any_is_made(world: World, preserved: bool) -> None:
    """Where the kernel preserves iommufds they are there already: then it is the device that does not go with them."""

    async def scenario() -> None:
        release = Release(preserves=("iommufd",) if preserved else ())
        rig = Rig(world, [Card(EDU)], mappings((0, 1, 0), (IOVA, 200, 0), (2 * IOVA, 1, 3)), release=release)
        await rig.start()
        with pytest.raises(ProcessDied):
            await world.update()
        change(world, Card(EDU, reserved=((IOVA + 8192, IOVA + 8192 + 4095),)))
        world.boot()
        process = world.kernel.spawn("khod")
        with world.kernel.faults.recorded(process.pid) as calls:
            await world.khod_in(process)
        assert "map_file" not in calls
        device = EDU.replace(":", ".")
        assert await rig.states() == {
            "ram": "restored", "mappings": "restored" if preserved else "damaged", device: "damaged",
        }  # fmt: skip
        where = await rig.problem(EDU if preserved else "mappings")
        assert "IOVAs 0x1000000-0x10c7fff" in where
        assert "this kernel reserves 0x1002000-0x1002fff for" in where
        assert preserved or "the one before allowed 0x0-0xfedfffff, 0xfef00000-0x7fffffffff" in where, where
        assert not rig.card().dma(0, b"x")

    asyncio.run(scenario())


@pytest.mark.parametrize("ranges", [[IovaRange(0, IOVA - 1), IovaRange(IOVA + 4096, 1 << 39)], [IovaRange(0, IOVA)], []])
def test_iovas_that_the_new_kernels_ioas_does_not_have_are_named(world: World, ranges: list[IovaRange]) -> None:
    class Narrow(ports.Devices):
        def iova_ranges(self, iommufd: int, ioas: int) -> list[IovaRange]:
            return ranges

    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.jump_away()
        world.fit = lambda machine: replace(machine, devices=Narrow(world.process))
        process = world.kernel.spawn("khod")
        with world.kernel.faults.recorded(process.pid) as calls:
            await world.khod_in(process)
        assert "map_file" not in calls
        allows = ", ".join(map(str, ranges)) or "none"
        assert f"IOVAs 0x1000000-0x10fffff were mapped, and this kernel allows {allows}; " in await rig.problem("mappings")

    asyncio.run(scenario())


def test_a_table_of_an_ioas_that_there_is_not_stops_the_update(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        world.workload.write(rig.fds["table"], 12, (9).to_bytes(4, "little"))
        with pytest.raises(Refused, match="IOAS 9"):
            await world.update()

    asyncio.run(scenario())


def test_a_table_that_leads_out_of_what_is_registered_stops_the_update_before_it_starts(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)], mappings((IOVA, 256, 0)))
        await rig.start()
        beyond = ioas_table.records([rig.mapped[0]._replace(offset=MIB)])
        world.workload.write(rig.fds["table"], ioas_table.FIRST, beyond)
        with pytest.raises(Refused, match=r"IOVAs 0x1000000-0x10fffff lead to bytes from 0x100000 of 'memory' of ram"):
            await world.update()
        names = ioas_table.head(Table(1, [("other", "memory")], ()), 1)
        world.workload.write(rig.fds["table"], 0, names)
        with pytest.raises(Refused, match="mappings lead to 'memory' of other, which is not among what it requires"):
            await world.update()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("offset", "written", "says"),
    [(16, b"\xff" * 8, "being changed"), (ioas_table.FIRST + 16, MIB.to_bytes(8, "little"), "lead to bytes from 0x100000")],
    ids=["half written", "leads beyond the memory"],
)
def test_a_table_that_is_no_good_when_all_stand_still_is_undone(world: World, offset: int, written: bytes, says: str) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        task = await world.held(State.PREPARED)
        world.workload.write(rig.fds["table"], offset, written)
        await world.host.proceed()
        with pytest.raises(UpdateFailed, match=says):
            await task
        assert rig.card().dma(IOVA, b"runs")

    asyncio.run(scenario())


def test_what_is_no_device_and_no_iommufd_is_refused(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        rig.fds["x"] = world.memory()
        rig.fds["pipe"] = world.workload.special("other")
        with pytest.raises(InvalidRequest, match="address"):
            await rig.register("x", "vfio", ("x",))
        with pytest.raises(InvalidRequest, match="'iommufd' and 'table' are wanted"):
            await rig.register("y", "iommu", ("iommufd",))
        rig.fds["table"] = rig.fds["x"]
        with pytest.raises(Refused, match="no table of IOMMU mappings"):
            await rig.register("y", "iommu", ("iommufd", "table"))

    asyncio.run(scenario())


def test_config_registers_of_software_are_found_whatever_the_list_of_capabilities_is() -> None:
    from khod_vfio.config import writable

    config = bytearray(256)
    config[0x06], config[0x34] = 0x10, 0x40
    config[0x40:0x42], config[0x50:0x52] = b"\x05\x50", b"\x10\x40"  # MSI, then PCI Express, then MSI again
    offsets = dict(writable(bytes(config)))
    assert {0x10, 0x24, 0x30, 0x3C, 0x58, 0x60, 0x78} <= set(offsets)
    assert PCI_COMMAND not in offsets
    assert not [o for o in offsets if 0x40 <= o < 0x50]
    assert dict(writable(bytes(64))).keys() == {0x0C, 0x0D, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x30, 0x3C}


def test_a_directory_without_cards_has_no_iommu(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(KhodError, match="/dev/iommu"):
        machine(world.workload).devices.open_iommu()
