# SPDX-License-Identifier: LGPL-2.1-or-later
"""For how long a workload did not run, as its client tells it and khod's ledger has it."""

from __future__ import annotations

import asyncio

import pytest

from khod.core.views import LifecycleView
from khod.errors import InvalidRequest
from tests.orchestration.world import ME, Scripted, World


def blackouts(spans: list[tuple[str, str, float]]) -> dict[str, float]:
    return {instance: seconds for phase, instance, seconds in spans if phase == "blackout"}


async def told(world: World) -> dict[str, float]:
    """The last update's, by instance; '' for its own."""
    update = (await world.host.history())[0]
    return blackouts([(s.phase, s.instance, s.seconds) for s in update.spans])


def test_it_is_from_where_the_client_stood_still_to_where_it_runs(world: World) -> None:
    async def stands_for(client: Scripted, view: LifecycleView) -> None:
        """Stands still for 2 of the 7 seconds that its answer takes."""
        world.kernel.host.elapse(7)
        await client.host.ready(client.me, view.update, view.phase, view.handles, stood=2)

    async def scenario() -> None:
        await world.khod()
        for name in ("vm-1", "vm-2"):
            await world.register(name, world.memory())
        guest = Scripted("vm-1", quiesce=stands_for)
        await guest.attend(world.host)
        host = await world.jump()
        update = (await told(world))[""]
        assert update > 7
        for name in ("vm-1", "vm-2"):
            claim = await host.claim(ME, name)
            world.kernel.host.elapse(20)
            await host.finished(ME, claim.handle, ran=3)
            await host.finished(ME, claim.handle)
        found = await told(world)
        assert found.keys() == {"", "vm-1"}, "nobody answers for vm-2"
        assert found["vm-1"] == pytest.approx(update - 5 + 20 - 3, abs=1.5)
        (row,) = [s for s in (await host.history())[0].spans if s.instance == "vm-1" and s.phase == "blackout"]
        assert row.uncertainty == 0.01

    asyncio.run(scenario())


def test_a_khod_that_was_started_anew_knows_since_when_they_stood_still(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        guest = Scripted("vm-1")
        await guest.attend(world.host)
        await world.jump()
        world.kill(world.process)
        host = await world.khod()
        claim = await host.claim(ME, "vm-1")
        world.kernel.host.elapse(60)
        await host.finished(ME, claim.handle)
        assert (await told(world))["vm-1"] > 60

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_figures_that_are_none_are_refused(world: World, seconds: float) -> None:
    async def says(client: Scripted, view: LifecycleView) -> None:
        with pytest.raises(InvalidRequest, match="stood"):
            await client.host.ready(client.me, view.update, view.phase, view.handles, stood=seconds)
        await client.host.ready(client.me, view.update, view.phase, view.handles)

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        guest = Scripted("vm-1", quiesce=says)
        await guest.attend(world.host)
        host = await world.jump()
        claim = await host.claim(ME, "vm-1")
        with pytest.raises(InvalidRequest, match="ran"):
            await host.finished(ME, claim.handle, ran=seconds)

    asyncio.run(scenario())
