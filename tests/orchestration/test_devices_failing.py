# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mappings and devices whose drivers fail at any call: undone before the jump, and after it nothing lost that is not theirs."""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
from pathlib import Path

import pytest

from khod.core.state import State
from khod.errors import KhodError
from khod.simulated import Release
from khod.simulated.cards import Card
from tests.orchestration.test_devices import EDU, IOVA, MASTER, NIC, Rig
from tests.orchestration.world import World

MAPPING = ("open_iommu", "ioas_alloc", "iova_ranges", "huge_pages_option", "map_file")
"""Calls that only making mappings makes."""
BINDING = ("look", "override", "open_vfio", "bind", "shape", "attach", "write_config")
MIGRATING = ("set_state", "write_state")
RELEASES = {"carried": Release(), "native": Release(preserves=("iommufd", "vfio"))}


def rig(world: World, release: Release = RELEASES["carried"]) -> Rig:
    cards = [Card(EDU), Card(NIC, migrates=True, registers="rings", group="2")]
    return Rig(world, cards, release=release, huge_pages=False)


@pytest.mark.parametrize("way", RELEASES)
def test_a_failure_at_any_call_before_the_jump_undoes_all_of_it(tmp_path: Path, way: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        it = rig(world, RELEASES[way])
        await it.start()
        with world.kernel.faults.recorded(world.process.pid) as calls:
            task = await world.held(State.FROZEN)
            await world.host.abort()
            await asyncio.gather(task, return_exceptions=True)
        undone = set()
        for call in sorted(set(calls) - {"close"}):  # which closes, whatever it says
            for nth in {1, 2, calls.count(call)}:
                world.kernel.faults.fail(call, errno.EIO, nth=nth, pid=world.process.pid)
                try:
                    task = await world.held(State.FROZEN)
                except KhodError:
                    undone.add(call)
                else:  # it came after the jump would have, or nobody minds
                    with suppress(KhodError):
                        await world.host.abort()
                    await asyncio.gather(task, return_exceptions=True)
                world.kernel.faults.clear()
                if world.host.state is State.FAILED:
                    await world.host.abort()
                assert not world.kernel.luo.outgoing, (call, nth)
                for address in (EDU, NIC):
                    assert it.card(address).command.to_bytes(2, "little") == MASTER, (call, nth)
                    assert it.card(address).dma(IOVA, b"runs"), (call, nth)
        expected = {"look", "read_config", "write_config", "preserve_fd", "create_session", "read", "stat"}
        assert expected | ({"set_state", "read_state"} if way == "carried" else set()) <= undone, undone
        await world.jump()
        assert set((await it.states()).values()) == {"restored"}

    asyncio.run(scenario())


@pytest.mark.parametrize("call", [*MAPPING, *BINDING, *MIGRATING])
def test_what_fails_in_the_new_kernel_damages_that_instance_and_loses_no_memory(world: World, call: str) -> None:
    async def scenario() -> None:
        it = rig(world)
        await it.start()
        await world.jump_away()
        # The driver of mappings looks at both devices before, for what they reserve, and leaves it to theirs to complain.
        world.kernel.faults.fail(call, errno.EIO, nth=3 if call == "look" else 1)
        await world.khod()
        states = await it.states()
        assert states.pop("ram") == "restored"
        assert (states.pop("mappings") == "damaged") == (call in MAPPING)
        devices = {EDU: states.pop(EDU.replace(":", ".")), NIC: states.pop(NIC.replace(":", "."))}
        for address, state in devices.items():
            assert it.card(address).dma(IOVA, b"x") == (state == "restored")
            assert state == "restored" or call.removesuffix("_option") in await it.problem(address) or call in MAPPING
        damaged = [state for state in devices.values() if state == "damaged"]
        assert len(damaged) == (2 if call in MAPPING else 1), "one device's failure is not the other's"
        process, ram = await world.claimed("ram")
        assert process.read(ram, 4096, 6) == b"word 0"

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["look", "address", "write_config"])
def test_what_fails_at_a_device_that_the_kernel_preserved_damages_it_alone(world: World, call: str) -> None:
    async def scenario() -> None:
        it = rig(world, RELEASES["native"])
        await it.start()
        await world.jump_away()
        world.kernel.faults.fail(call, errno.EIO)
        await world.khod()
        states = await it.states()
        assert sorted(states.values()) == ["damaged", "restored", "restored", "restored"]
        assert states["ram"] == states["mappings"] == "restored"

    asyncio.run(scenario())
