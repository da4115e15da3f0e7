# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests' memory while the kernel cannot be asked whether it preserves it: somebody else has /dev/liveupdate open."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from khod.errors import Refused
from tests.orchestration.test_guest_memory import SIZE, filled, only
from tests.orchestration.world import World


def test_what_only_the_kernel_can_bring_across_is_turned_down_for_now(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, preserves=("guest_memfd",))
        await world.khod()
        private = world.workload.special("guest_memfd", SIZE, private=True)
        world.kernel.faults.fail("create_session", errno.EBUSY, pid=world.process.pid)
        with pytest.raises(Refused, match=r"whether this kernel preserves it cannot be told now: .*\[EBUSY\]") as caught:
            await world.register("vm-1", private)
        assert "again" in str(caught.value.hint)
        await world.register("vm-1", private)
        assert (await only(world)).strategy == "native"

    asyncio.run(scenario())


def test_what_can_be_copied_on_every_kernel_is_taken(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, preserves=("guest_memfd",))
        await world.khod()
        world.kernel.faults.fail("create_session", errno.EBUSY, pid=world.process.pid)
        await world.register("vm-1", filled(world, "guest_memfd"))
        assert (await only(world)).strategy == "carried"

    asyncio.run(scenario())


def test_what_came_through_as_it_is_needs_no_kernel_that_can_be_asked(tmp_path: Path) -> None:
    """That it takes such memory has been seen."""

    async def scenario() -> None:
        world = World(tmp_path, preserves=("guest_memfd",))
        await world.khod()
        await world.register("vm-1", world.workload.special("guest_memfd", SIZE, private=True))
        await world.jump_away()
        process = world.kernel.spawn("khod")
        world.kernel.faults.fail("create_session", errno.EBUSY, forever=True, pid=process.pid)
        await world.khod_in(process)
        view = await only(world)
        assert (view.state, view.strategy) == ("restored", "native"), view.problem

    asyncio.run(scenario())
