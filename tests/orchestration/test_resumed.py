# SPDX-License-Identifier: LGPL-2.1-or-later
"""A khod that starts beside guests which the restore stage has started: they have written to their memory since."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from khod.core.callers import Caller, Lifetime
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.simulated import machine
from tests.orchestration.world import ME, Link, World, settled

PID, SINCE = 700, 123


class Vmm(Link):
    """The process that the stage started."""

    since = SINCE


def me(pid: int) -> Caller:
    return replace(ME, pid=pid, connection=Link(), process=Link())


async def started(world: World, name: str, *, says: str = "runs", writes: bool = True) -> None:
    """What the stage does, and what it notes of it; the guest writes to every page of its memory."""
    session = f"khod.{world.host.update_id}.2"  # sessions are made against the order
    ports = machine(world.kernel.spawn("stage"))
    fd = ports.liveupdate.retrieve_fd(ports.liveupdate.retrieve_session(session), 0)
    if writes:
        for offset in range(0, ports.files.stat(fd).size, 4096):
            ports.files.write(fd, offset, b"written in the new kernel")
    whom = f"user:root\t{name}\t{session}"
    lines = ["khod-early 1", "mark\tlaunched\t1000", "mark\tinterpreter\t2000", f"start\t{whom}\t16\t3"]
    lines += [f"runs\t{whom}\t{PID}\t{SINCE}"] if says == "runs" else [f"failed\t{whom}\tno such file"] if says else []
    record = ports.files.memfd("khod-early", 0)
    ports.files.write(record, 0, "".join(f"{line}\n" for line in lines).encode())
    ports.custody.keep("early", record)


async def jumped(world: World, lifetime: Lifetime = Lifetime.PERSISTENT) -> None:
    await world.khod()
    await world.register("early", world.memory(), lifetime=lifetime)
    await world.register("later", world.memory())
    await world.jump_away()


def test_who_runs_is_claimed_by_its_process_and_by_nobody_else(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        vmm = Vmm()
        world.watch = lambda pid: vmm if pid == PID else None
        host = await world.khod()
        assert host.state is State.RESTORED
        assert not host.problems, "what the guest has written since is no damage"
        assert world.entry("early").state is InstanceState.CLAIMED
        answer = await host.claim(me(1), "early")
        assert answer.answer == "hold"
        assert answer.process == PID
        assert f"runs already: the initrd started it as process {PID}" in answer.reason
        process, fd = await world.claimed("later")
        assert world.intact(fd, process=process)
        mine = await host.claim(me(PID), "early")
        assert mine.answer == "fds"
        assert mine.handle
        await host.finish()
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize("says", ["failed", ""])
def test_who_was_not_started_is_restored_as_always(world: World, says: str) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early", says=says, writes=False)
        await world.khod()
        assert world.entry("early").state is InstanceState.RESTORED
        process, fd = await world.claimed("early")
        assert world.intact(fd, process=process)

    asyncio.run(scenario())


def test_who_was_not_started_and_is_not_as_it_was_is_damaged(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early", says="failed", writes=True)
        await world.khod()
        assert world.entry("early").state is InstanceState.DAMAGED

    asyncio.run(scenario())


def test_a_vmm_that_has_died_meanwhile_is_one_whose_claimant_died(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        host = await world.khod()  # nobody is watched: there is no such process any more
        assert (await host.claim(ME, "early")).answer == "fds", "what only an operator ends can be claimed again"

    asyncio.run(scenario())


def test_its_end_is_not_the_end_of_what_only_an_operator_ends(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        vmm = Vmm()
        world.watch = lambda pid: vmm if pid == PID else None
        host = await world.khod()
        vmm.end()
        await settled()
        await host.holdings.settled()
        assert (await host.claim(ME, "early")).answer == "fds"

    asyncio.run(scenario())


def test_its_end_is_the_end_of_what_hung_on_a_process(world: World) -> None:
    async def scenario() -> None:
        await jumped(world, Lifetime.CONNECTION)
        await started(world, "early")
        vmm = Vmm()
        world.watch = lambda pid: vmm if pid == PID else None
        host = await world.khod()
        await settled()
        assert world.entry("early").state is InstanceState.CLAIMED
        vmm.end()
        await settled()
        await host.finish()
        assert [entry.name for entry in host.registry] == ["later"]

    asyncio.run(scenario())


def test_a_khod_that_starts_anew_keeps_it_from_others(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        vmm = Vmm()
        world.watch = lambda pid: vmm if pid == PID else None
        await world.khod()
        world.kill(world.process)
        host = await world.khod()
        assert world.entry("early").state is InstanceState.CLAIMED
        assert (await host.claim(me(1), "early")).answer == "hold"
        assert (await host.claim(me(PID), "early")).answer == "fds"

    asyncio.run(scenario())


def test_a_record_that_nobody_can_read_is_none(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        ports = machine(world.kernel.spawn("stage"))
        record = ports.files.memfd("khod-early", 0)
        ports.files.write(record, 0, b"\x00\xff not a record")
        ports.custody.keep("early", record)
        host = await world.khod()
        assert host.state is State.RESTORED
        assert (await host.claim(ME, "early")).answer == "fds"

    asyncio.run(scenario())


def test_the_ledger_has_the_stages_rows(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        host = await world.khod()
        (update,) = await host.history()
        assert {"initrd: kernel", "initrd: interpreter"} <= {span.phase for span in update.spans}
        # "later" has 16 pages of its own in the sample; what the stage has compared is in the report as well.
        assert "the frames of 32 sampled pages" in update.checked

    asyncio.run(scenario())
