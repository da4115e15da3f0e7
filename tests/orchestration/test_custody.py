# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a khod that is started anew in the same boot finds: nothing hangs on khod alone (decisions 3, 14, 18, 19, 21)."""

from __future__ import annotations

import asyncio
import errno

import pytest

from khod.core.callers import Lifetime
from khod.core.state import State
from khod.errors import MachineError, Refused
from khod.simulated import ProcessDied
from tests.orchestration.world import ME, MIB, Recorder, World


async def restarted(world: World) -> None:
    """SIGKILL, and the next khod."""
    world.kill(world.process)
    await world.khod()


def states(world: World) -> dict[str, str]:
    return {entry.name: entry.state for entry in world.host.registry}


def test_registrations_outlive_khod_with_everything_that_was_said_of_them(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        memory = world.memory()
        await world.register("ram", memory)
        await world.register("nic", world.memory(), "recorder", requires=["ram"], required=False, options={"queue": "8"})
        before = await world.host.instances()
        handles = {entry.name: entry.handle for entry in world.host.registry}
        world.workload.close(memory)
        await restarted(world)
        assert await world.host.instances() == before
        assert {entry.name: entry.handle for entry in world.host.registry} == handles
        process, fd = await world.claimed("ram")
        assert world.intact(fd, process=process), "the one descriptor left was in custody"

    asyncio.run(scenario())


def test_what_is_unregistered_leaves_custody_and_does_not_come_back(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.memory(fill=b"secret")
        await world.register("vm-1", fd)
        world.workload.close(fd)
        await world.host.unregister(ME, "vm-1")
        assert world.host.machine.custody.kept() == ["book"]
        await restarted(world)
        assert not len(world.host.registry)
        assert len(world.kernel.task(world.twins()[0].pid).fds) == 1, "custody holds the book and nothing else"

    asyncio.run(scenario())


@pytest.mark.parametrize("after", [False, True])
def test_a_registration_that_nobody_was_told_of_leaves_nothing(world: World, after: bool) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.memory()
        world.kernel.faults.die("keep", pid=world.process.pid, after=after)
        with pytest.raises(ProcessDied):
            await world.register("vm-1", fd)
        await world.khod()
        assert not len(world.host.registry)
        assert world.host.machine.custody.kept() == ["book"]
        await world.register("vm-1", fd)

    asyncio.run(scenario())


@pytest.mark.parametrize("grade", ["registered", "opaque"])
def test_a_registration_that_fails_at_the_book_leaves_nothing(world: World, grade: str) -> None:
    async def register() -> None:
        if grade == "opaque":
            await world.host.register_opaque(ME, "vm-1", Lifetime.PERSISTENT)
        else:
            await world.register("vm-1", fd)

    async def scenario() -> None:
        await world.khod()
        before = len(world.kernel.task(world.process.pid).fds)
        world.kernel.faults.fail("write", errno.ENOMEM, pid=world.process.pid)
        with pytest.raises(MachineError):
            await register()
        assert not len(world.host.registry)
        assert world.host.machine.custody.kept() == ["book"]
        assert len(world.kernel.task(world.process.pid).fds) == before
        await register()

    fd = world.memory()
    asyncio.run(scenario())


def test_a_claim_is_remembered_and_so_is_who_may_answer_for_it(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("vm-2", world.memory())
        await world.jump()
        answer = await world.host.claim(ME, "vm-1")
        # The guest runs on, and writes: what was compared once is not compared again.
        world.workload.write(world.workload.call("descriptor", world.process.pid, answer.fds[0]), 0, b"goes on")
        await restarted(world)
        assert world.host.state is State.RESTORED
        assert states(world) == {"vm-1": "claimed", "vm-2": "restored"}
        assert not world.host.problems
        await world.host.finished(ME, answer.handle)
        assert world.host.state is State.RESTORED, "vm-2 is still to be claimed"
        await restarted(world)
        assert states(world) == {"vm-1": "claimed", "vm-2": "restored"}
        other = await world.host.claim(ME, "vm-2")
        await world.host.finished(ME, other.handle)
        assert str(world.host.state) == "idle", "the last one to finish finishes the update"
        await restarted(world)
        assert str(world.host.state) == "idle"
        assert states(world) == {"vm-1": "claimed", "vm-2": "claimed"}
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_what_is_damaged_stays_so_until_it_is_discarded(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.memory(4096)
        await world.register("vm-1", fd)
        task = await world.held(State.FROZEN)
        world.workload.write(fd, 100, b"late DMA")
        await world.host.proceed()
        await asyncio.wait([task])
        world.boot()
        await world.khod()
        await restarted(world)
        assert states(world) == {"vm-1": "damaged"}
        assert "bytes differ" in world.entry("vm-1").problem
        await world.host.discard(ME, "vm-1")
        await restarted(world)
        assert states(world) == {}
        assert world.host.state is State.RESTORED
        await world.host.finish()
        assert not world.kernel.luo.incoming

    asyncio.run(scenario())


def test_what_was_handed_out_as_it_is_stays_so(world: World) -> None:
    """An administrator has decided about it, and its workload may run."""

    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        await world.jump_away()
        world.kernel.faults.fail("retrieve_fd", errno.EIO, nth=4)  # tree, map, memory, and this: its state
        await world.khod()
        assert states(world) == {"vm-1": "damaged"}
        answer = await world.host.claim(ME, "vm-1", unverified=True)
        await restarted(world)
        assert states(world) == {"vm-1": "claimed"}
        assert world.entry("vm-1").problem
        await world.host.finished(ME, answer.handle)
        assert str(world.host.state) == "idle"

    asyncio.run(scenario())


def test_a_retrieve_that_could_fail_is_not_made_until_it_is_proven(world: World) -> None:
    """Decision 19: a RETRIEVE_FD that fails frees the file's folios for ever."""

    async def scenario() -> None:
        await world.khod()
        await world.register("small", world.memory(4096))
        await world.register("large", world.memory(8 * MIB))
        await world.jump_away()
        world.workload.limit_custody(memory=4 * MIB)
        await world.khod()
        assert states(world) == {"small": "restored", "large": "waiting"}
        assert "memory" in world.entry("large").problem
        assert (await world.host.claim(ME, "large")).answer == "hold"
        assert (await world.host.claim(ME, "large", unverified=True)).answer == "hold"
        with pytest.raises(Refused, match="large is waiting"):
            await world.host.finish()
        world.workload.limit_custody(memory=16 * MIB)
        await restarted(world)
        assert states(world) == {"small": "restored", "large": "restored"}
        process, fd = await world.claimed("large")
        assert world.intact(fd, 8 * MIB, process=process)

    asyncio.run(scenario())


def test_what_waits_can_be_discarded(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("large", world.memory(8 * MIB, b"secret"))
        await world.jump_away()
        world.workload.limit_custody(memory=4 * MIB)
        await world.khod()
        assert states(world) == {"large": "waiting"}
        await world.host.discard(ME, "large")
        await world.host.finish()
        assert str(world.host.state) == "idle"
        assert not world.kernel.luo.incoming, "its memory is free"

    asyncio.run(scenario())


def test_a_driver_thaws_what_a_khod_that_was_killed_had_frozen(world: World) -> None:
    """Nobody else knows how: the dead khod's list of whom to thaw died with it."""

    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        await world.khod()
        await world.register("device", world.memory(), "recorder")
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        assert recorder.log[-1] == "freeze device"
        await world.khod()
        assert recorder.log[-1] == "thaw device"
        recorder.fails = {"thaw device": "will not"}
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        await world.khod()
        assert any("device: its driver could not thaw it: will not" in problem for problem in world.host.problems)

    asyncio.run(scenario())


def test_custody_that_is_full_refuses_a_registration_and_keeps_nothing_of_it(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.kernel.faults.fail("keep", errno.EMFILE, nth=2)
        fds = [(name, world.workload.give(world.memory(), world.process)) for name in ("a", "b", "c")]
        with pytest.raises(Exception, match="LimitNOFILE"):
            await world.host.register(ME, world.asked("vm-1"), fds)
        assert not len(world.host.registry)
        assert world.host.machine.custody.kept() == ["book"]
        assert len(world.kernel.task(world.process.pid).fds) == 1

    asyncio.run(scenario())


def test_an_instance_of_a_plugin_that_is_gone_stays_in_custody(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("device", world.memory(fill=b"secret"), "recorder", lifetime=Lifetime.PERSISTENT)
        world.plugins = []
        await restarted(world)
        assert any("device" in problem and "recorder" in problem for problem in world.host.problems)
        assert len(world.host.machine.custody.kept()) == 2
        world.plugins = [Recorder()]
        await restarted(world)
        assert states(world) == {"device": "registered"}
        assert not world.host.problems

    asyncio.run(scenario())
