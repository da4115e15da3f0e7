# SPDX-License-Identifier: LGPL-2.1-or-later
"""A khod that is killed at any call while devices are stopped, or while they are made anew: the next one sees to them."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.simulated import ProcessDied
from tests.orchestration.test_devices import EDU, IOVA, MASTER, NIC, Rig
from tests.orchestration.test_devices_failing import RELEASES, rig
from tests.orchestration.test_killed import places
from tests.orchestration.world import MIB, World

SAMPLED = [False, pytest.param(True, marks=pytest.mark.full)]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def worlds(directory: Path) -> Iterator[World]:
    """One after the other; the one before is discarded."""
    for number in range(1 << 20):
        world = World(directory / str(number), memory=64 * MIB)
        yield world
        world.kernel.power_off()
        shutil.rmtree(directory / str(number))


async def jumped(world: World, way: str) -> tuple[World, Rig]:
    """A machine whose next kernel has no khod yet."""
    it = rig(world, RELEASES[way])
    await it.start()
    await world.jump_away()
    return world, it


def lives(it: Rig) -> bool:
    """Both devices do what they did before."""
    cards = [it.card(address) for address in (EDU, NIC)]
    return all(card.command.to_bytes(2, "little") == MASTER and card.dma(IOVA, b"runs") for card in cards)


@pytest.mark.parametrize("full", SAMPLED, ids=["sample", "every"])
@pytest.mark.parametrize("way", RELEASES)
def test_in_an_update(tmp_path: Path, way: str, full: bool) -> None:
    async def scenario() -> None:
        machines = worlds(tmp_path)
        world = next(machines)
        await rig(world, RELEASES[way]).start()
        with world.kernel.faults.recorded(world.process.pid) as calls, pytest.raises(ProcessDied):
            await world.update()
        assert {"read_config", "write_config", "create_session"} <= set(calls)
        for nth, after in places(len(calls) - 1, full):
            world = next(machines)
            it = rig(world, RELEASES[way])
            await it.start()
            world.kernel.faults.die("*", nth=nth, after=after, pid=world.process.pid)
            with pytest.raises(ProcessDied):
                await world.update()
            if world.kernel.jumped:  # how much is sampled is a matter of time: this one made fewer calls
                world.boot()
            await world.khod()
            assert not world.host.problems, (nth, calls[nth - 1])
            assert not world.kernel.luo.outgoing, (nth, calls[nth - 1])
            assert lives(it), (nth, calls[nth - 1])

    asyncio.run(scenario())


@pytest.mark.parametrize("full", SAMPLED, ids=["sample", "every"])
@pytest.mark.parametrize("way", RELEASES)
def test_in_the_new_kernel(tmp_path: Path, way: str, full: bool) -> None:
    async def scenario() -> None:
        machines = worlds(tmp_path)
        world, it = await jumped(next(machines), way)
        process = world.kernel.spawn("khod")
        with world.kernel.faults.recorded(process.pid) as calls:
            await world.khod_in(process)
        assert way == "native" or {"map_file", "bind", "attach"} <= set(calls)
        for nth, after in places(len(calls), full):
            world, it = await jumped(next(machines), way)
            process = world.kernel.spawn("khod")
            world.kernel.faults.die("*", nth=nth, after=after, pid=process.pid)
            with pytest.raises(ProcessDied):
                await world.khod_in(process)
            await world.khod()
            assert set((await it.states()).values()) == {"restored"}, (nth, calls[nth - 1], world.host.problems)
            assert lives(it), (nth, calls[nth - 1])

    asyncio.run(scenario())
