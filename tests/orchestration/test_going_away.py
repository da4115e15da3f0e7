# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that go away in the middle of an update."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.callers import Lifetime
from khod.core.question import ANSWERED, Phase
from khod.core.service import Registration
from khod.core.state import State
from khod.core.views import LifecycleView
from khod.errors import Lost, UpdateFailed
from tests.orchestration.world import QUICK, Guest, Link, Scripted, World, caller, refused, settled, vanish


def test_an_instance_that_had_a_client_does_not_go_without_one(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Guest("vm-1")
        await guest.attend(host)
        await guest.leave()
        await refused(world, "vm-1: nobody is there to answer for it", "client:vm-1")
        await guest.attend(host)
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", ANSWERED)
def test_a_client_that_vanishes_when_it_is_asked_costs_no_time(tmp_path: Path, phase: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, preparing=3600, freezing=3600))
        host = await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("vm-2", world.memory())
        good = Guest("vm-1")
        await good.attend(host)
        bad = Scripted("vm-2", **{phase: vanish})
        await bad.attend(host)
        await asyncio.wait_for(refused(world, "vm-2: its client is gone"), 60)
        assert good.log[-1] == "aborted"

    asyncio.run(scenario())


def test_a_client_that_vanishes_between_its_ready_and_commit_stops_the_jump(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Guest("vm-1")
        await guest.attend(host)
        task = await world.held(State.FROZEN)
        guest.link.end()
        await host.proceed()
        with pytest.raises(UpdateFailed, match="vm-1: the connection on which its client said READY is gone"):
            await task
        assert not world.kernel.jumped

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.QUIESCE])
@pytest.mark.parametrize("first", ["subscription", "keeper", "both at once", "keeper alone"])
def test_a_client_that_exits_takes_its_instances_with_it_and_nothing_else(tmp_path: Path, phase: str, first: str) -> None:
    """Decision 5: however required they were, and whichever of its ends is noticed first."""

    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, preparing=60, freezing=60))
        host = await world.khod()
        await world.register("vm-1", world.memory())
        stays = Guest("vm-1")
        await stays.attend(host)
        loop = asyncio.get_running_loop()
        keeper = caller()

        async def exits(client: Scripted, view: LifecycleView) -> None:
            ends = {"subscription": client.link.end, "keeper": keeper.connection.end}  # type: ignore[attr-defined]
            if first in ends:
                ends.pop(first)()
                loop.call_later(0.01, *ends.values())
            elif first == "keeper alone":
                ends["keeper"]()
            else:
                for end in ends.values():
                    end()

        fd = world.workload.give(world.memory(), world.process)
        await host.register(keeper, Registration(name="vm-2"), [("memory", fd)])
        await Scripted("vm-2", **{phase: exits}).attend(host)
        host = await asyncio.wait_for(world.jump(), 50)
        assert [v.name for v in await host.instances()] == ["vm-1"]

    asyncio.run(scenario())


def test_a_claim_whose_connection_ends_before_its_turn_takes_nothing(world: World) -> None:
    """It would be claimed by nobody, and be let go of at once."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        link = Link()
        async with host.holdings.lock:
            claim = asyncio.create_task(host.claim(caller(connection=link), "vm-1", lifetime=Lifetime.CONNECTION))
            await settled()
            link.end()
        with pytest.raises(Lost, match="the connection that claimed it is gone"):
            await claim
        process, fd = await world.claimed("vm-1")
        assert world.intact(fd, process=process)

    asyncio.run(scenario())


def test_a_claim_by_a_process_that_is_gone_takes_nothing(world: World) -> None:
    """Its connection may be another's by now."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        gone = caller()
        gone.process.end()  # type: ignore[attr-defined]
        with pytest.raises(Lost, match="vm-1: the process that claims it is gone"):
            await host.claim(gone, "vm-1", lifetime=Lifetime.PROCESS)
        assert world.entry("vm-1").state == "restored"
        assert (await host.claim(gone, "vm-1", lifetime=Lifetime.CONNECTION)).answer == "fds"

    asyncio.run(scenario())


def test_a_client_that_hangs_up_and_lives_fails_its_instances(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        keeper = caller()
        fd = world.workload.give(world.memory(), world.process)
        await host.register(keeper, Registration(name="vm-1"), [("memory", fd)])
        await Scripted("vm-1", preparing=vanish).attend(host)
        await refused(world, "vm-1: its client is gone")
        assert world.entry("vm-1").state == "registered"

    asyncio.run(scenario())
