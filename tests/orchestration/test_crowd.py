# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hundred clients, some of them hostile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.callers import Lifetime, Right
from khod.core.question import ANSWERED
from khod.core.service import Registration
from khod.core.state import State
from khod.core.views import LifecycleView
from khod.errors import KhodError, UpdateFailed
from tests.orchestration.world import MIB, QUICK, Guest, Hear, Scripted, World, caller, settled


async def vanish(client: Scripted, view: LifecycleView) -> None:
    client.link.end()


async def refused(world: World, match: str) -> None:
    """An update that fails, with everything as before."""
    with pytest.raises(UpdateFailed, match=match):
        await world.update()
    assert world.host.state is State.ABORTED
    assert not world.kernel.luo.outgoing
    assert not world.kernel.jumped
    await settled()


async def twice(client: Scripted, view: LifecycleView) -> None:
    await Guest.hear(client, view)
    for phase in ANSWERED:
        with pytest.raises(KhodError):
            await client.host.ready(client.me, view.update, phase, view.handles)


async def garbage(client: Scripted, view: LifecycleView) -> None:
    everybody = [e.handle for e in client.host.registry]
    for update, phase, handles in [
        (view.update, "\0" * 1000, []),
        ("", view.phase, []),
        (view.update, view.phase, everybody),
        (view.update, view.phase, ["nonsense"] * 5000),
    ]:
        with pytest.raises(KhodError):
            await client.host.ready(client.me, update, phase, handles)
        with pytest.raises(KhodError):
            await client.host.failed(client.me, update, phase, handles, "x" * 100000)


@pytest.mark.slow
@pytest.mark.parametrize("required", [False, True])
def test_two_hundred_clients_of_which_five_are_hostile(tmp_path: Path, required: bool) -> None:
    """195 come through; or, where a hostile one's instance is required, nobody does and all go on."""

    async def scenario() -> None:
        world = World(tmp_path, memory=1024 * MIB, settings=QUICK)
        host = await world.khod()
        scripts: list[dict[str, Hear]] = [
            {"preparing": silence},
            {"quiesce": silence},
            {"preparing": twice, "quiesce": twice, "commit": twice},
            {"preparing": garbage},
            {"quiesce": vanish},
        ]
        guests = []
        for number in range(200):
            name = f"vm-{number}"
            owner = f"user{number % 10}"
            hostile = number % 40 == 7
            guest = Scripted(name, **(scripts[number // 40] if hostile else {}))
            guest.me = caller(owner, [Right.INSTANCES, Right.OPERATE], connection=guest.link)
            fds = []
            for n in range(8):
                fd = world.memory(4096)
                world.workload.call("add_seals", fd, 4)
                fds.append((f"fd{n}", world.workload.give(fd, world.process)))
                world.workload.close(fd)
            asked = Registration(name=name, lifetime=Lifetime.PERSISTENT, required=required or not hostile)
            await host.register(guest.me, asked, fds)
            await guest.attend(host)
            guests.append(guest)
        host.settings = replace(QUICK, preparing=5, freezing=5)
        lost = {"vm-7", "vm-47", "vm-127", "vm-167"}  # the one that answers twice has answered
        if required:
            await refused(world, r"vm-(7|127) of user:user7: its client did not answer preparing")
            assert all(g.log[-1] == "aborted" for g in guests)
            return
        host = await world.jump()
        assert host.state is State.RESTORED
        assert {v.name for v in await host.instances()} == {f"vm-{n}" for n in range(200)} - lost
        assert all(g.log[-1] == ("executing" if g.instances[0] not in lost else "aborted") for g in guests if g.link.there)

    asyncio.run(scenario())


async def silence(client: Scripted, view: LifecycleView) -> None:
    pass
