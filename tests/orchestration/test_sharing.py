# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that several instances share (decision 6)."""

from __future__ import annotations

import asyncio

import pytest

from khod.core.callers import Lifetime
from khod.core.state import State
from khod.errors import Refused
from tests.orchestration.owners import names, registered, settled, vmm
from tests.orchestration.world import ME, Link, World


def test_a_file_that_two_share_is_preserved_once_and_claimed_by_both(world: World) -> None:
    """Decision 6."""

    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        await registered(world, vmm("vmm@1.service"), "ram", fd, shareable=True)
        with pytest.raises(Refused, match=r"same file as 'memory' of ram of unit:vmm@1.service"):
            await registered(world, vmm("vmm@2.service"), "peer", world.workload.duplicate(fd))
        await registered(world, vmm("vmm@2.service"), "peer", world.workload.duplicate(fd), shareable=True)
        host = await world.jump()
        assert host.state is State.RESTORED, host.problems
        await host.verified()
        assert not host.problems
        first = await host.claim(vmm("vmm@1.service"), "ram")
        second = await host.claim(vmm("vmm@2.service"), "peer")
        stat = host.machine.files.stat
        assert stat(first.fds[0]).inode == stat(second.fds[0]).inode
        await host.finished(vmm("vmm@1.service"), first.handle)
        world.kill(world.process)
        host = await world.khod()
        assert not host.problems
        third = await host.claim(vmm("vmm@2.service"), "peer")
        process, mine = world.received(third.fds[0])
        assert world.intact(mine, process=process), "it is there, though the session that had it is finished"
        await host.finish()
        host = await world.jump()
        assert names(world) == ["peer of unit:vmm@2.service", "ram of unit:vmm@1.service"][::-1]
        assert not host.problems

    asyncio.run(scenario())


def test_who_shares_inherits_the_file_of_one_that_goes(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.memory()
        link = Link()
        await registered(world, vmm("vmm@1.service", link), "ram", fd, shareable=True)
        for number in (2, 3):
            unit = f"vmm@{number}.service"
            await registered(world, vmm(unit), "peer", world.workload.duplicate(fd), shareable=True)
        link.end()
        await settled(world)
        host = await world.jump()
        assert not host.problems
        for number in (2, 3):
            answer = await host.claim(vmm(f"vmm@{number}.service"), "peer")
            process, mine = world.received(answer.fds[0])
            assert world.intact(mine, process=process)

    asyncio.run(scenario())


def test_heirs_are_heirs_to_a_khod_that_was_restarted_too(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        for name in ("ram", "peer-1", "peer-2"):
            await registered(world, ME, name, world.workload.duplicate(fd), shareable=True, lifetime=Lifetime.PERSISTENT)
        await host.unregister(ME, "ram")
        world.kill(world.process)
        await world.khod()
        assert not world.entry("peer-1").shares
        assert world.entry("peer-2").shares == {"memory": (world.entry("peer-1").key, "memory")}
        host = await world.jump()
        assert not host.problems
        assert names(world) == ["peer-1", "peer-2"]

    asyncio.run(scenario())


def test_who_shares_keeps_the_file_of_one_that_came_through_and_is_discarded(world: World) -> None:
    """Decision 18: it came in the other's session, and would be khod's alone once that is gone."""

    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        for name in ("ram", "peer"):
            await registered(world, ME, name, world.workload.duplicate(fd), shareable=True, lifetime=Lifetime.PERSISTENT)
        host = await world.jump()
        await host.discard(ME, "ram")
        world.kill(world.process)
        host = await world.khod()
        assert not host.problems
        process, mine = await world.claimed("peer")
        assert world.intact(mine, process=process)
        host = await world.jump()  # and is preserved by itself from now on
        assert not host.problems
        process, mine = await world.claimed("peer")
        assert world.intact(mine, process=process)

    asyncio.run(scenario())
