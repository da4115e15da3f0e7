# SPDX-License-Identifier: LGPL-2.1-or-later
"""Drivers that carry what the kernel does not preserve: bulk copies, descriptors made anew, what is promised and demanded."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.core.driver import Continuity, Strategy
from khod.core.state import State
from khod.errors import DeviceBusy, KhodError, Refused, UpdateFailed
from khod.plugin import Declaration, Instance, Preserve, Request, StateBound, hookimpl
from khod.simulated import ProcessDied
from tests.orchestration.world import ME, MIB, QUICK, World

SIZE = MIB


class Carrier:
    """Copies a file that the kernel does not preserve, and makes another of it."""

    name = "carrier"

    def __init__(self) -> None:
        self.log: list[str] = []
        self.made: int = 0
        self.keepsake = {"command": b"\x07"}

    @hookimpl
    def khod_compatible(self) -> str:
        return "test,carrier-v1"

    @hookimpl
    def khod_declare(self, request: Request) -> Declaration:
        return Declaration(
            "test,carrier-v1",
            (),
            states=(StateBound("copy", SIZE, bulk=True),),
            size=SIZE,
            made=tuple(request.fds),
            strategy=Strategy.CARRIED,
            continuity=Continuity.REBUILT,
        )

    @hookimpl
    def khod_prepare(self, instance: Instance) -> Mapping[str, bytes]:
        self.log.append("prepare")
        return self.keepsake

    @hookimpl
    def khod_freeze(self, instance: Instance) -> Mapping[str, bytes]:
        self.log.append("freeze")
        files = instance.machine.files
        files.write(instance.states["copy"].fd, 0, files.read(instance.fds["memory"], 0, SIZE))
        return {}

    @hookimpl
    def khod_thaw(self, instance: Instance) -> None:
        self.log.append(f"thaw {dict(instance.keepsake)}")

    @hookimpl
    def khod_restore(self, instance: Instance) -> Mapping[str, int]:
        files = instance.machine.files
        fd = files.memfd("anew", SIZE)
        files.write(fd, 0, files.read(instance.states["copy"].fd, 0, SIZE))
        self.made += 1
        return {"memory": fd}


class Settling(Carrier):
    """Learns in preparing whether the kernel takes its file."""

    def __init__(self, takes: bool) -> None:
        super().__init__()
        self.takes = takes
        self.fails: KhodError | None = None
        self.seen: list[int] = []

    @hookimpl
    def khod_declare(self, request: Request) -> Declaration:
        return replace(super().khod_declare(request), unsettled=True)

    @hookimpl
    def khod_settle(self, instance: Instance, declared: Declaration) -> Declaration | None:
        self.log.append("settle")
        if self.fails:
            raise self.fails
        if not self.takes:
            return None
        (fd,) = instance.fds.values()
        kept = (Preserve("memory", fd),)
        return replace(declared, fds=kept, states=(), made=(), strategy=Strategy.NATIVE, continuity=Continuity.PRESERVED)

    @hookimpl
    def khod_freeze(self, instance: Instance) -> Mapping[str, bytes]:
        return super().khod_freeze(instance) if instance.states else {}

    @hookimpl
    def khod_restore(self, instance: Instance) -> Mapping[str, int]:
        return {} if instance.fds else super().khod_restore(instance)


@pytest.mark.parametrize("takes", [True, False])
def test_a_strategy_can_be_settled_when_the_update_begins_and_anew_in_each(world: World, takes: bool) -> None:
    async def scenario() -> None:
        driver = Settling(takes)
        await carried(world, driver)
        (view,) = await world.host.instances()
        assert (view.strategy, view.continuity) == ("carried", "rebuilt"), "the least, before anybody has tried"
        host = await world.jump()
        (view,) = await host.instances()
        assert view.state == "restored", view.problem
        assert (view.strategy, view.continuity) == (("native", "preserved") if takes else ("carried", "rebuilt"))
        assert driver.made == (0 if takes else 1)
        world.kill(world.process)
        host = await world.khod()
        (view,) = await host.instances()
        assert view.continuity == ("preserved" if takes else "rebuilt"), "a restart of khod forgets nothing of it"
        driver.takes = not takes
        await host.finish()
        await world.jump()
        assert driver.made == 1
        process, mine = await world.claimed("vm-1")
        assert world.intact(mine, process=process)

    asyncio.run(scenario())


def test_what_an_update_settled_is_undone_with_it(world: World) -> None:
    async def scenario() -> None:
        driver = Settling(True)
        await carried(world, driver)
        declared = world.entry("vm-1").declaration
        task = await world.held(State.FROZEN)
        assert world.entry("vm-1").declaration.strategy is Strategy.NATIVE
        await world.host.abort()
        await asyncio.wait([task])
        assert world.entry("vm-1").declaration is declared
        driver.takes = False
        await world.jump()
        assert driver.made == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("takes", [True, False])
def test_a_continuity_that_only_preparing_can_tell_is_demanded_before_anything_is_preserved(
    tmp_path: Path, takes: bool
) -> None:
    async def scenario() -> None:
        driver = Settling(takes)
        world = World(tmp_path, settings=replace(QUICK, require=Continuity.PRESERVED))
        await carried(world, driver)
        view = await world.host.preflight(str(world.image))
        (check,) = [c for c in view.checks if c.name == "continuity:vm-1"]
        assert (check.verdict, check.evidence) == ("warning", "vm-1 will at least be rebuilt, and `require` is preserved")
        if takes:
            assert (await world.jump()).state is State.RESTORED
            return
        with (
            world.kernel.faults.recorded(world.process.pid) as calls,
            pytest.raises(UpdateFailed, match=r"instance vm-1: it will be rebuilt, and `require` is preserved"),
        ):
            await world.update()
        assert driver.log == ["settle"]
        assert not {"create_session", "preserve_fd"} & set(calls)
        assert world.host.state is State.ABORTED

    asyncio.run(scenario())


def test_who_cannot_tell_now_fails_an_update_that_has_touched_nothing(world: World) -> None:
    async def scenario() -> None:
        driver = Settling(True)
        await carried(world, driver)
        driver.fails = DeviceBusy("somebody has /dev/liveupdate open", hint="try again")
        with pytest.raises(UpdateFailed, match="instance vm-1: somebody has /dev/liveupdate open"):
            await world.update()
        assert driver.log == ["settle"]
        driver.fails = None
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_an_optional_instance_that_cannot_be_given_what_is_required_stays_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, require=Continuity.PRESERVED))
        world.plugins = [Settling(False)]
        await world.khod()
        await world.register("cache", world.memory(SIZE), "carrier", required=False)
        await world.register("vm-1", world.memory())
        host = await world.jump()
        assert [view.name for view in await host.instances()] == ["vm-1"]
        (left,) = (await host.history())[0].left_behind
        assert "it will be rebuilt" in left

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"states": (StateBound("copy", 2 * SIZE, bulk=True),)}, "settles states"),
        ({"continuity": Continuity.RESET}, "settles less than it had declared: reset"),
        ({"requires": ("other",)}, "other dependencies"),
        ({"made": ()}, "neither preserved nor made anew"),
    ],
    ids=["more memory", "less continuity", "other needs", "less than all"],
)
def test_a_driver_settles_for_nothing_that_it_had_not_declared(world: World, changed: dict[str, Any], says: str) -> None:
    class Greedy(Settling):
        @hookimpl
        def khod_settle(self, instance: Instance, declared: Declaration) -> Declaration | None:
            return replace(declared, **changed)

    async def scenario() -> None:
        driver = Greedy(True)
        await carried(world, driver)
        with pytest.raises(UpdateFailed, match=says):
            await world.update()
        assert driver.log == []

    asyncio.run(scenario())


async def carried(world: World, carrier: Carrier) -> int:
    """khod, and an instance whose file cannot be preserved; the workload's descriptor."""
    world.plugins = [carrier]
    await world.khod()
    fd = world.memory(SIZE)
    await world.register("vm-1", fd, "carrier")
    return fd


def test_what_is_carried_is_made_anew_once_with_every_byte(world: World) -> None:
    async def scenario() -> None:
        carrier = Carrier()
        fd = await carried(world, carrier)
        task = await world.held(State.PREPARED)
        world.workload.write(fd, SIZE - 4, b"last")  # the copy is taken when everything stands still
        await world.host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        (view,) = await host.instances()
        assert (view.state, view.strategy, view.continuity) == ("restored", "carried", "rebuilt"), view.problem
        process, mine = await world.claimed("vm-1")
        assert process.read(mine, SIZE - 4, 4) == b"last"
        process.write(mine, 0, b"runs on")
        world.kill(world.process)
        host = await world.khod()
        assert carrier.made == 1, "a restart of khod makes nothing twice"
        process, mine = await world.claimed("vm-1")
        assert process.read(mine, 0, 7) == b"runs on"
        await host.finish()
        assert (await world.jump()).state is State.RESTORED
        process, mine = await world.claimed("vm-1")
        assert process.read(mine, 0, 7) == b"runs on"

    asyncio.run(scenario())


def test_what_has_no_room_when_it_is_made_anew_waits_and_keeps_nobody_else(world: World) -> None:
    """Custody has to take what is made: nothing else would have it."""

    async def scenario() -> None:
        await carried(world, Carrier())
        await world.jump_away()
        world.workload.limit_custody(descriptors=6)  # khod's session, tree and map, the book; its session and its copy
        host = await world.khod()
        assert host.state is State.RESTORED
        assert "LimitNOFILE=" in world.entry("vm-1").problem
        assert (await host.claim(ME, "vm-1")).answer == "hold"
        world.workload.limit_custody(descriptors=7)
        world.kill(world.process)
        await world.khod()
        assert (await world.host.claim(ME, "vm-1")).answer == "fds"

    asyncio.run(scenario())


def test_what_thaw_has_to_know_outlives_the_khod_that_froze(world: World) -> None:
    async def scenario() -> None:
        carrier = Carrier()
        await carried(world, carrier)
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        host = await world.khod()
        assert not host.problems
        assert carrier.log == ["prepare", "freeze", "thaw {'command': b'\\x07'}"]

    asyncio.run(scenario())


@pytest.mark.parametrize("killed", [False, True])
def test_what_thaw_has_to_know_is_of_its_own_update(world: World, killed: bool) -> None:
    async def scenario() -> None:
        carrier = Carrier()
        await carried(world, carrier)
        if killed:
            world.kernel.faults.die("execute")
            with pytest.raises(ProcessDied):
                await world.update()
            await world.khod()
        else:
            world.kernel.faults.fail("execute", errno.EBUSY)
            with pytest.raises(UpdateFailed):
                await world.update()
        carrier.keepsake = {}
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        await world.khod()
        assert carrier.log[2::3] == ["thaw {'command': b'\\x07'}", "thaw {}"]

    asyncio.run(scenario())


def test_what_is_claimed_is_so_to_a_khod_that_is_restarted_after_an_undone_update(world: World) -> None:
    async def scenario() -> None:
        await carried(world, Carrier())
        await world.jump()
        await world.host.claim(ME, "vm-1")
        world.kernel.faults.fail("execute", errno.EBUSY)
        with pytest.raises(UpdateFailed):
            await world.update()
        world.kill(world.process)
        await world.khod()
        assert world.entry("vm-1").state == "claimed"

    asyncio.run(scenario())


def test_a_copy_that_does_not_fit_is_refused_before_anything_is_frozen(tmp_path: Path) -> None:
    async def scenario() -> None:
        carrier = Carrier()
        world = World(tmp_path, memory=64 * MIB)
        await carried(world, carrier)
        free = world.host.machine.memory.figures()
        world.settings = replace(QUICK, reserve=free.available - free.cma_free - SIZE // 2)
        world.kill(world.process)
        await world.khod()
        with pytest.raises(Refused, match=f"states {SIZE}"):
            await world.update()
        assert carrier.log == []

    asyncio.run(scenario())


def test_a_continuity_that_is_required_and_cannot_be_given_refuses_the_update(tmp_path: Path) -> None:
    async def scenario() -> None:
        carrier = Carrier()
        world = World(tmp_path, settings=replace(QUICK, require=Continuity.PRESERVED))
        await carried(world, carrier)
        with pytest.raises(Refused, match=r"continuity:vm-1: vm-1 will be rebuilt, and `require` is preserved"):
            await world.update()
        assert carrier.log == []
        await world.host.unregister(ME, "vm-1")
        await world.register("vm-2", world.memory())
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_a_driver_that_makes_less_than_it_said_has_damaged_it(world: World) -> None:
    class Careless(Carrier):
        @hookimpl
        def khod_restore(self, instance: Instance) -> Mapping[str, int]:
            return {}

    async def scenario() -> None:
        await carried(world, Careless())
        host = await world.jump()
        (view,) = await host.instances()
        assert view.state == "damaged"
        assert "memory" in view.problem

    asyncio.run(scenario())
