# SPDX-License-Identifier: LGPL-2.1-or-later
"""SIGKILL of khod, of either process of the custodian, and of khod with one of them, before and after every call that khod
makes of its machine: nothing is lost, and nobody runs on while his frozen state travels (decisions 14, 18 and 21).

Each place is a whole machine; what is tried in the quick run is a sample of places, and all of them in the full one.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.state import State
from khod.simulated import ProcessDied
from tests.orchestration.world import ME, MIB, QUICK, Recorder, World

VICTIMS = [("caller",), ("first",), ("second",), ("caller", "first"), ("caller", "second")]
SIZE = 8 * 4096
SETTINGS = replace(QUICK, sample_pages=4)
Play = Callable[[World], Awaitable[object]]


class Scene:
    """A host with two instances, one of them a driver's with a state, and what must be true of it whatever died."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = 0

    def world(self) -> World:
        """A new machine."""
        self.runs += 1
        world = World(self.directory / str(self.runs), memory=64 * MIB, settings=SETTINGS)
        world.plugins = [Recorder()]
        return world

    def discard(self, world: World) -> None:
        """Its files, which are many."""
        world.kernel.power_off()
        shutil.rmtree(self.directory / str(self.runs))


async def registered(world: World) -> dict[str, int]:
    """khod, with two instances of the workload's."""
    await world.khod()
    memory = {"ram": world.memory(SIZE, b"ram"), "device": world.memory(SIZE, b"device")}
    await world.register("ram", memory["ram"])
    await world.register("device", memory["device"], "recorder", requires=["ram"])
    return memory


async def whole(world: World) -> None:
    """Both instances came through, and can be claimed with every byte."""
    assert world.host.state is State.RESTORED, (world.host.state, world.host.problems)
    for name in ("ram", "device"):
        process, fd = await world.claimed(name)
        assert world.intact(fd, SIZE, name.encode(), process)


def places(calls: int, full: bool) -> list[tuple[int, bool]]:
    """Numbers of calls to die at, before or after: all of them, or a sample that moves through all phases."""
    every = [(nth, after) for nth in range(1, calls + 1) for after in (False, True)]
    return every if full else every[:: max(1, len(every) // 12)]


async def calls_of(world: World, play: Play) -> list[str]:
    """What khod calls while it plays."""
    with world.kernel.faults.recorded(world.process.pid) as calls:
        await play(world)
    return calls


async def updated(world: World) -> None:
    with pytest.raises(ProcessDied):
        await world.update()


async def killed_in_an_update(scene: Scene, nth: int, after: bool, victims: tuple[str, ...]) -> None:
    world = scene.world()
    memory = await registered(world)
    world.kernel.faults.die("*", nth=nth, after=after, pid=world.process.pid, victims=victims)
    await updated(world)
    if not world.kernel.jumped:
        assert "caller" in victims, "the death of one of the custodian's ends nothing"
        host = await world.khod()
        assert host.state in (State.ABORTED, State.IDLE), host.problems
        assert not world.kernel.luo.outgoing, "sessions are left"
        assert not host.machine.kexec.loaded(), "the image is left"
        for name, fd in memory.items():
            assert world.intact(fd, SIZE, name.encode())
            world.workload.truncate(fd, 2 * SIZE)  # nothing is preserved any more
            world.workload.truncate(fd, SIZE)
            assert world.entry(name).state == "registered"
        (recorder,) = world.plugins
        prepared = recorder.log.count("prepare device")
        assert recorder.log.count("thaw device") >= prepared, "it stays frozen"
        await world.jump()
    else:
        world.boot()
        await world.khod()
    await whole(world)
    scene.discard(world)


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "every"])
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_update_is_undone_or_goes_through(tmp_path: Path, victims: tuple[str, ...], full: bool) -> None:
    async def scenario() -> None:
        scene = Scene(tmp_path)
        world = scene.world()
        await registered(world)
        calls = await calls_of(world, updated)
        assert calls[-1] == "execute"
        assert {"create_session", "preserve_fd", "memfd", "window", "sync", "load", "store_append"} <= set(calls)
        scene.discard(world)
        for nth, after in places(len(calls), full):
            await killed_in_an_update(scene, nth, after and nth < len(calls), victims)

    asyncio.run(scenario())


async def started(world: World) -> None:
    await world.khod()


async def finished(world: World) -> None:
    for name in ("ram", "device"):
        answer = await world.host.claim(ME, name)
        await world.host.finished(ME, answer.handle)
    assert world.host.state is State.IDLE


class Landed:
    """A machine that has jumped, its next kernel not yet booted: copied for each place."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    async def prepare(self) -> None:
        self.origin = self.scene.world()
        await registered(self.origin)
        await updated(self.origin)

    def world(self) -> World:
        """A copy, booted."""
        self.scene.runs += 1
        world = copy(self.origin)
        world.directory = self.scene.directory / str(self.scene.runs) / "machine"
        world.plugins = [Recorder()]
        shutil.copytree(self.origin.directory, world.directory, copy_function=_sparse)
        world.boot()
        return world


def _sparse(source: str, target: str) -> None:
    """A file with its holes: a machine's memory is mostly that."""
    import subprocess

    subprocess.run(["cp", "--sparse=always", source, target], check=True, timeout=30)


async def khod_after(world: World, victims: tuple[str, ...], play: Play, nth: int, after: bool) -> None:
    """Play in a process whose `nth` call is fatal."""
    world.process = world.kernel.spawn("khod")
    world.kernel.faults.die("*", nth=nth, after=after, pid=world.process.pid, victims=victims)
    try:
        await play(world)
    except ProcessDied:
        assert "caller" in victims, "the death of one of the custodian's ends nothing"


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "every"])
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_came_through_is_restored_by_the_next_khod(tmp_path: Path, victims: tuple[str, ...], full: bool) -> None:
    async def scenario() -> None:
        landed = Landed(Scene(tmp_path))
        await landed.prepare()
        world = landed.world()
        world.process = world.kernel.spawn("khod")
        calls = await calls_of(world, lambda w: w.khod_in(w.process))
        assert {"retrieve_session", "retrieve_fd", "doubt", "store_append", "keep"} <= set(calls)
        landed.scene.discard(world)
        for nth, after in places(len(calls), full):
            world = landed.world()
            await khod_after(world, victims, lambda w: w.khod_in(w.process), nth, after)
            if "caller" in victims:
                await world.khod()
            await whole(world)
            await world.host.finish()
            assert (await world.jump()).state is State.RESTORED, "the next update needs nothing more"
            landed.scene.discard(world)

    asyncio.run(scenario())


@pytest.mark.parametrize("victims", VICTIMS, ids="+".join)
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.full)], ids=["sample", "every"])
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_being_claimed_and_finished_stays(tmp_path: Path, victims: tuple[str, ...], full: bool) -> None:
    async def scenario() -> None:
        landed = Landed(Scene(tmp_path))
        await landed.prepare()
        world = landed.world()
        await world.khod()
        calls = await calls_of(world, finished)
        assert {"keep", "finish", "release"} <= set(calls)
        landed.scene.discard(world)
        for nth, after in places(len(calls), full):
            world = landed.world()
            await world.khod()
            world.kernel.faults.die("*", nth=nth, after=after, pid=world.process.pid, victims=victims)
            try:
                await finished(world)
            except ProcessDied:
                assert "caller" in victims
                await world.khod()
            assert world.host.state in (State.RESTORED, State.IDLE), world.host.problems
            for name in ("ram", "device"):
                process, fd = await world.claimed(name)
                assert world.intact(fd, SIZE, name.encode(), process), (nth, after)
            if world.host.state is State.RESTORED:
                await world.host.finish()
            assert (await world.jump()).state is State.RESTORED
            landed.scene.discard(world)

    asyncio.run(scenario())
