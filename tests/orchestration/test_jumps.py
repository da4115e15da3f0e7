# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two ways to jump (decision 17), and what either does about shutdowns by others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from errno import EIO
from pathlib import Path
from typing import cast

import pytest

from khod import config
from khod.core import jump
from khod.core.ports import Machine, ServiceManager
from khod.core.state import State
from khod.errors import KexecFailed, NotPermitted, Refused, UpdateFailed
from khod.supervision import undo_at_shutdown, until_it_may_end
from tests.orchestration.world import QUICK, World
from tests.unit.kernel.buses import Logind, bus

BY_SYSTEMD = replace(QUICK, jump=jump.SYSTEMD)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, systemd=True)


def inhibitors(world: World) -> list[str]:
    """Reasons why a shutdown waits now."""
    assert world.kernel.systemd is not None
    return world.kernel.systemd.inhibitors


@dataclass
class Manager:
    """A PID 1 that takes the request and does what a test wants with it."""

    world: World
    on_kexec: Callable[[], None] = lambda: None
    doubts: str = ""
    refuses: Exception | None = None
    asked: int = 0
    offered_when_asked: int = -1
    stops: bool = False
    was_asked: threading.Event = field(default_factory=threading.Event)

    def present(self) -> bool:
        return True

    def doubt(self) -> str:
        return self.doubts

    def inhibit(self, why: str) -> int:
        if self.refuses is not None:
            raise self.refuses
        return int(self.world.process.call("manager_inhibit", why))

    def kexec(self) -> None:
        self.asked += 1
        assert self.world.kernel.systemd is not None
        self.offered_when_asked = len([label for label in self.world.kernel.systemd.store if label[0] == "outgoing"])
        self.on_kexec()

    def stopping(self) -> bool:
        return self.stops

    def coming(self) -> bool:
        stops = self.stops
        self.was_asked.set()
        return stops


async def under(world: World, manager: Manager) -> None:
    """khod on the world's machine, with that PID 1, and a registered guest."""
    await world.khod()
    machine: Machine = world.host.machine
    world.host.machine = replace(machine, manager=cast(ServiceManager, manager))
    await world.register("vm", world.memory())


def test_the_names_are_the_configurations() -> None:
    assert jump.JUMPS == config.JUMPS
    assert QUICK.jump == config.Config().jump == jump.DIRECT


@pytest.mark.parametrize("how", jump.JUMPS)
def test_memory_comes_through_either_way(tmp_path: Path, how: str) -> None:
    world = World(tmp_path, settings=replace(QUICK, jump=how), systemd=True)

    async def play() -> None:
        await world.khod()
        fd = world.memory(fill=b"through")
        await world.register("vm", fd)
        host = await world.jump()
        assert host.state is State.RESTORED, host.problems
        process, there = world.received(world.process_fd("vm"))
        assert world.intact(there, fill=b"through", process=process)
        assert world.told == ["Reading what came through", "Restoring 1 instances", "Restored 1 of 1 instances"]

    asyncio.run(play())


@pytest.mark.parametrize("how", jump.JUMPS)
def test_shutdowns_are_held_off_from_the_first_step_until_the_last_is_undone(tmp_path: Path, how: str) -> None:
    world = World(tmp_path, settings=replace(QUICK, jump=how), systemd=True)

    async def play() -> None:
        await world.khod()
        await world.register("vm", world.memory())
        held = await world.held(State.FROZEN)
        update = world.host.last_update
        assert update is not None
        assert inhibitors(world) == [f"live update {update.id} is under way"]
        await world.host.abort()
        assert inhibitors(world) == []
        await asyncio.wait([held])

    asyncio.run(play())


def test_the_plan_says_which_way() -> None:
    described = [step.name for step in jump.steps_for(jump.SYSTEMD)]
    assert described[0] == "hold off"
    assert described[-4:] == ["sync", "offer", "commit", "execute"]
    assert [step.name for step in jump.steps_for(jump.DIRECT)][-3:] == ["sync", "commit", "execute"]


def test_a_refused_kexec_is_undone_whole(tmp_path: Path) -> None:
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    def refuse() -> None:
        assert inhibitors(world) == [], "our own inhibitor would hold our own jump up"
        raise KexecFailed("systemctl kexec: inhibited by apt", errno=EIO)

    async def play() -> None:
        manager = Manager(world, refuse)
        await under(world, manager)
        with pytest.raises(UpdateFailed, match="inhibited by apt"):
            await world.update()
        assert manager.offered_when_asked == 2, "the guest's session and khod's own"
        assert world.kernel.systemd is not None
        assert [label for label in world.kernel.systemd.store if label[0] == "outgoing"] == []
        assert world.host.state is State.ABORTED
        assert world.host.keeps_from_exit() == ""

    asyncio.run(play())


def test_a_systemd_that_would_lose_it_all_is_found_out_before_anything_is_touched(tmp_path: Path) -> None:
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    async def play() -> None:
        manager = Manager(world, doubts="systemd 255 does not carry its descriptor store")
        await under(world, manager)
        with pytest.raises(UpdateFailed, match="systemd 255 does not carry"):
            await world.update()
        update = world.host.last_update
        assert update is not None
        assert not update.outgoing.tree
        assert [step.name for step in update._begun] == ["hold off"]
        assert manager.asked == 0

    asyncio.run(play())


def test_no_update_begins_while_a_shutdown_is_under_way(world: World) -> None:
    async def play() -> None:
        await under(world, Manager(world, refuses=NotPermitted("logind refused: OperationInProgress")))
        with pytest.raises(UpdateFailed, match="OperationInProgress"):
            await world.update()

    asyncio.run(play())


def test_without_logind_an_update_goes_on_and_says_so(world: World) -> None:
    async def play() -> None:
        await under(world, Manager(world, refuses=Refused("there is no logind")))
        await world.host.load(str(world.image))
        said = []
        with pytest.raises(UpdateFailed, match="aborted by an operator"):
            async for event in await world.host.update(State.PREPARED):
                said.append(event.message)
                if event.kind == "held":
                    await world.host.abort()
        assert "shutdowns by others are not held off: there is no logind" in said

    asyncio.run(play())


async def left(world: World, manager: Manager) -> asyncio.Task[None]:
    """An update that has left the jump to PID 1; the task ends with it."""
    taken = asyncio.Event()
    loop = asyncio.get_running_loop()
    manager.on_kexec = lambda: cast(None, loop.call_soon_threadsafe(taken.set))
    await under(world, manager)

    async def update() -> None:
        with pytest.raises(UpdateFailed):
            await world.update()

    task = asyncio.create_task(update())
    await asyncio.wait_for(taken.wait(), 10)
    assert world.host.last_update is not None
    while not world.host.last_update.accepted:  # noqa: ASYNC110 - the thread that asked has yet to say so
        await asyncio.sleep(0)
    assert world.host.last_update.left_to_systemd
    return task


def test_sigterm_on_the_way_to_the_jump_lets_go_of_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    async def play() -> None:
        manager = Manager(world)
        task = await left(world, manager)
        told = asyncio.Event()
        told.set()
        assert await asyncio.wait_for(until_it_may_end(told, world.host, manager, print), 10), "it must go at once"
        assert world.kernel.systemd is not None
        assert len([label for label in world.kernel.systemd.store if label[0] == "outgoing"]) == 2
        # Nor does an event loop that is torn down take anything back.
        assert world.host.last_update is not None
        assert world.host.last_update._task is not None
        world.host.last_update._task.cancel()
        await asyncio.wait([world.host.last_update._task])
        assert world.host.state is State.EXECUTING
        assert len([label for label in world.kernel.systemd.store if label[0] == "outgoing"]) == 2
        task.cancel()

    asyncio.run(play())


def test_sigterm_waits_for_pid_1_to_accept(tmp_path: Path) -> None:
    """A khod that is stopped while it asks for the jump, and is refused, must be there to undo it."""
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)
    asked, answer = threading.Event(), threading.Event()

    def refuse() -> None:
        asked.set()
        assert answer.wait(10)
        raise KexecFailed("systemctl kexec: inhibited by apt", errno=EIO)

    async def play() -> None:
        manager = Manager(world, refuse)
        await under(world, manager)
        updating = asyncio.create_task(world.update())
        assert await asyncio.to_thread(asked.wait, 10)
        told = asyncio.Event()
        told.set()
        waiting = asyncio.create_task(until_it_may_end(told, world.host, manager, print))
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        answer.set()
        assert not await asyncio.wait_for(waiting, 10), "nothing is PID 1's: khod ends as always"
        assert world.host.state is State.ABORTED
        with pytest.raises(UpdateFailed):
            await updating

    asyncio.run(play())


def test_a_shutdown_that_does_not_happen_after_all_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """logind accepted the kexec and could not start it: guests must not stand still for ever."""
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    async def play(login: Logind) -> None:
        manager = Manager(world)
        task = await left(world, manager)
        watching = asyncio.create_task(undo_at_shutdown(world.host, manager))
        await asyncio.to_thread(login.listening.wait, 10)
        manager.stops = True
        login.prepare(False)  # as when the job of kexec.target is done: the jump is under way
        await asyncio.to_thread(manager.was_asked.wait, 10)
        assert world.host.last_update is not None
        assert world.host.last_update.left_to_systemd
        assert not task.done()
        manager.stops = False
        login.prepare(False)
        await asyncio.wait_for(task, 10)
        assert world.host.state is State.ABORTED
        watching.cancel()

    with bus(tmp_path) as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        login = Logind(address)
        try:
            asyncio.run(play(login))
        finally:
            login.close()


def test_a_jump_of_pid_1_that_fails_is_a_cold_boot_and_said_to_be_lost(tmp_path: Path) -> None:
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    async def play() -> None:
        await world.khod()
        await world.register("vm", world.memory())
        world.kernel.faults.fail("execute", EIO)
        host = await world.jump()
        assert host.state is State.LOST

    asyncio.run(play())


def test_the_jump_comes_when_khod_and_its_custodian_are_gone_already(tmp_path: Path) -> None:
    """What PID 1 does with a host: services end first, then it jumps, with what is in its store."""
    world = World(tmp_path, settings=BY_SYSTEMD, systemd=True)

    async def play() -> None:
        await world.khod()
        await world.register("vm", world.memory(fill=b"through"))
        systemd = world.kernel.systemd
        assert systemd is not None
        systemd.at_once = False
        updating = asyncio.create_task(world.update())
        assert await asyncio.to_thread(systemd.asked.wait, 10)
        world.kill(world.process, *world.twins())
        world.kernel.shut_down()
        updating.cancel()
        await asyncio.wait([updating])
        world.boot()
        host = await world.khod()
        assert host.state is State.RESTORED, host.problems
        process, there = await world.claimed("vm")
        assert world.intact(there, fill=b"through", process=process)

    asyncio.run(play())
