# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens to hosts: a reset in the middle, a disk that is full, a state directory that cannot be written to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from khod.core.state import HOLDABLE, State
from khod.errors import MachineError, Refused, UpdateFailed
from khod.simulated import ProcessDied, ports
from tests.orchestration.world import ME, Recorder, World

SIZE = 64 << 10
DISKS = pytest.mark.parametrize(("disk", "said"), [("full_disk", "ENOSPC"), ("read_only_disk", "EROFS")])


def spoil(world: World, disk: str) -> None:
    """From now on the disk is like that."""
    method: Callable[[], None] = getattr(world.kernel.faults, disk)
    method()


async def goes_through(world: World) -> None:
    """The next update does, and the memory with it."""
    await world.register("next", world.memory(SIZE, b"next"))
    host = await world.jump()
    assert host.state is State.RESTORED, host.problems
    process, fd = await world.claimed("next")
    assert world.intact(fd, SIZE, b"next", process)


@pytest.mark.parametrize("state", HOLDABLE)
def test_a_reset_in_the_middle_of_an_update(world: World, state: State) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm", world.memory(SIZE))
        task = await world.held(state)
        world.power_cut()
        task.cancel()
        await asyncio.wait([task])
        host = await world.khod()
        assert host.state is State.IDLE
        assert not len(host.registry)
        assert (await host.claim(ME, "vm")).answer == "cold", "it boots from its disk"
        await goes_through(world)

    asyncio.run(scenario())


def test_a_reset_after_the_jump(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm", world.memory(SIZE))
        assert (await world.jump()).state is State.RESTORED
        world.power_cut()
        host = await world.khod()
        assert host.machine.custody.sessions() == []
        assert (await host.claim(ME, "vm")).answer == "cold"
        await goes_through(world)

    asyncio.run(scenario())


@DISKS
def test_an_update_that_cannot_be_journalled_touches_nothing(world: World, disk: str, said: str) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm", fd := world.memory(SIZE))
        spoil(world, disk)
        with pytest.raises(Refused, match=rf"journal.*{said}"):
            await world.update()
        assert str(world.host.state) == "idle"
        assert not world.kernel.luo.outgoing
        assert world.intact(fd, SIZE)
        world.workload.truncate(fd, 2 * SIZE)
        world.kernel.faults.clear()
        await goes_through(world)

    asyncio.run(scenario())


@DISKS
def test_a_guest_gets_its_memory_whatever_the_disk_says(world: World, disk: str, said: str) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm", world.memory(SIZE))
        await world.host.load(str(world.image))
        with pytest.raises(ProcessDied):
            await world.update()
        world.boot()
        spoil(world, disk)
        host = await world.khod()
        assert host.state is State.RESTORED
        assert any("journal" in problem and said in problem for problem in host.problems)
        process, fd = await world.claimed("vm")
        assert world.intact(fd, SIZE, process=process)

    asyncio.run(scenario())


@DISKS
def test_what_is_not_verified_is_handed_out_on_record_only(world: World, disk: str, said: str) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("odd", world.memory(SIZE), "recorder")
        world.plugins = []
        host = await world.jump()
        assert world.entry("odd").state == "quarantined"
        spoil(world, disk)
        with pytest.raises(MachineError, match=said):
            await host.claim(ME, "odd", unverified=True)
        world.kernel.faults.clear()
        assert (await host.claim(ME, "odd", unverified=True)).answer == "fds"

    asyncio.run(scenario())


def test_a_defect_in_one_preserve_is_undone_when_the_others_have_ended(world: World) -> None:
    """A session that is closed beneath a call may be another file a moment later."""
    at_work, proceed = threading.Event(), threading.Event()
    preserved: list[str] = []

    class Defective(ports.LiveUpdate):
        def preserve_fd(self, session: int, fd: int, token: int) -> None:
            if at_work.is_set():
                raise ZeroDivisionError("a bug")
            at_work.set()
            proceed.wait(20)
            super().preserve_fd(session, fd, token)
            preserved.append(self.session_name(session))

    async def scenario() -> None:
        world.fit = lambda machine: replace(machine, liveupdate=Defective(world.process))
        await world.khod()
        await world.register("vm-1", world.memory(SIZE))
        await world.register("vm-2", world.memory(SIZE))
        update = asyncio.create_task(world.update())
        await asyncio.wait([update], timeout=0.5)  # many times what it takes to undo this
        proceed.set()
        with pytest.raises(UpdateFailed, match=r"khod failed at it: .*a bug"):
            await update
        assert preserved
        assert not world.kernel.luo.outgoing
        assert world.host.state is State.ABORTED

    asyncio.run(scenario())
