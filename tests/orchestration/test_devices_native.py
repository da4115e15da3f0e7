# SPDX-License-Identifier: LGPL-2.1-or-later
"""iommufds and devices on kernels that preserve them, and what is found out about that when an update begins."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace

import pytest

from khod.core.driver import Continuity
from khod.core.state import State
from khod.errors import UpdateFailed
from khod.simulated import ProcessDied, Release
from khod.simulated.cards import Card
from tests.orchestration.test_devices import EDU, IOVA, MASTER, NIC, Rig, change
from tests.orchestration.world import QUICK, World

ALL = Release(preserves=("iommufd", "vfio"))
REBUILDING = ("map_file", "open_vfio", "bind", "attach")
"""What is done only where something is made anew."""
NAME = EDU.replace(":", ".")


def test_a_device_that_the_kernel_preserves_goes_on_as_it_is(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU, resets=True), Card(NIC, migrates=True, group="2")], release=ALL)
        await rig.start()
        rig.card().registers, rig.card(NIC).registers = "rings at 7", "rings at 8"
        await world.jump_away()
        assert rig.words == [True, False], "its DMA stops in freeze all the same: memory is looked at next"
        for call in REBUILDING:
            world.kernel.faults.fail(call, errno.EIO)
        host = await world.khod()
        views = {view.name: view for view in await host.instances()}
        assert {(v.state, v.strategy, v.continuity) for v in views.values()} == {("restored", "native", "preserved")}, views
        assert (rig.card().registers, rig.card(NIC).registers) == ("rings at 7", "rings at 8"), "nothing has reset it"
        assert rig.card().command.to_bytes(2, "little") == MASTER
        process, ram = await world.claimed("ram")
        assert rig.card().dma(IOVA + 4100, b"after")
        assert process.read(ram, 4096, 9) == b"word" + b"after"
        await host.finish()
        await world.jump()
        assert set((await rig.states()).values()) == {"restored"}
        assert rig.card().registers == "rings at 7"

    asyncio.run(scenario())


def test_an_update_with_one_that_is_undone_lets_it_go_on(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)], release=ALL)
        await rig.start()
        task = await world.held(State.FROZEN)
        assert not rig.card().dma(IOVA, b"late")
        await world.host.abort()
        await asyncio.wait([task])
        assert rig.card().dma(IOVA, b"runs")
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        await world.khod()
        assert rig.card().dma(IOVA, b"runs"), "a khod that follows a killed one lets it go on as well"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ([Card(NIC)], "retrieve_fd"),
        ([Card(EDU, device=0x1234)], r"is 1234:1234 .*, it was 1234:11e8"),
        ([Card(EDU, driven_by="edu")], "retrieve_fd"),
        ([Card(EDU, shape=(0,) * 9)], "has no BARs, "),
        ([Card(EDU), Card(NIC, driven_by="nic")], r"shares IOMMU group 1 with 0000:00:05.0 \(driven by nic\)"),
    ],
    ids=["missing", "another", "claimed by another driver", "another shape", "group shared"],
)
def test_one_that_is_not_as_it_was_is_not_handed_out(world: World, cards: list[Card], says: str) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)], release=ALL)
        await rig.start()
        with pytest.raises(ProcessDied):
            await world.update()
        change(world, *cards)
        world.boot()
        await world.khod()
        assert await rig.states() == {"ram": "restored", "mappings": "restored", NAME: "damaged"}
        with pytest.raises(AssertionError, match=says):
            raise AssertionError(await rig.problem(EDU))
        assert not any(card.dma(IOVA, b"x") for card in world.kernel.devices.cards.values())

    asyncio.run(scenario())


@pytest.mark.parametrize("taken", [True, False])
def test_a_continuity_that_this_kernel_gives_is_found_out_on_the_device_itself(world: World, taken: bool) -> None:
    """`require: preserved`: nothing of it is known before the update begins, and nothing is preserved when it is refused."""

    async def scenario() -> None:
        world.settings = replace(QUICK, require=Continuity.PRESERVED)
        rig = Rig(world, [Card(EDU)], release=ALL if taken else Release(preserves=("iommufd",)))
        await rig.start()
        if taken:
            assert (await world.jump()).state is State.RESTORED
            return
        with pytest.raises(UpdateFailed, match=rf"instance {NAME}: it will be reset, and `require` is preserved"):
            await world.update()
        assert not world.kernel.luo.outgoing
        assert rig.card().dma(IOVA, b"runs")

    asyncio.run(scenario())


@pytest.mark.parametrize(("nth", "instance"), [(1, "mappings"), (2, NAME)])
def test_a_kernel_that_cannot_be_asked_now_refuses_the_update_and_damages_nothing(
    world: World, nth: int, instance: str
) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)], release=ALL)
        await rig.start()
        world.kernel.faults.fail("create_session", errno.EBUSY, nth=nth, pid=world.process.pid)
        with pytest.raises(UpdateFailed, match=rf"instance {instance}: .*\[EBUSY\]"):
            await world.update()
        assert world.host.state is State.ABORTED
        await world.jump_away()
        process = world.kernel.spawn("khod")
        world.kernel.faults.fail("create_session", errno.EBUSY, forever=True, pid=process.pid)
        await world.khod_in(process)
        assert set((await rig.states()).values()) == {"restored"}, "it is not asked where something came through"

    asyncio.run(scenario())
