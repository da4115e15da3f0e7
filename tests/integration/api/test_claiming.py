# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl claim against khod itself: on what an instance hangs once COMMAND has taken khoctl's place."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from khod.api.server import serve
from khod.core.callers import Lifetime
from khod.simulated import machine
from tests.orchestration.world import World, caller

KHOCTL = Path(sys.executable).with_name("khoctl")


@pytest.mark.parametrize(
    ("had", "asked", "has"),
    [
        (Lifetime.CONNECTION, (), Lifetime.PROCESS),
        (Lifetime.PROCESS, (), Lifetime.PROCESS),
        (Lifetime.PERSISTENT, (), Lifetime.PERSISTENT),
        (Lifetime.CONNECTION, ("--lifetime", "persistent"), Lifetime.PERSISTENT),
    ],
)
def test_it_hangs_on_the_command(tmp_path: Path, had: Lifetime, asked: tuple[str, ...], has: Lifetime) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        host = await world.khod()
        mine = world.workload.give(world.memory(), world.process)
        await host.register(caller(), world.asked("vm-1", lifetime=had), [("ram", mine)])
        host = await world.jump()
        path = tmp_path / "khod.sock"
        async with serve(host, machine(world.process).files, path):
            command = await asyncio.create_subprocess_exec(
                KHOCTL, "--socket", path, "claim", *asked, "vm-1", "--", "sh", "-c", "echo $LISTEN_FDNAMES; read line",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            assert command.stdout is not None
            assert (await asyncio.wait_for(command.stdout.readline(), 60)).strip() == b"ram"
            await host.holdings.settled()
            (view,) = await host.instances()
            assert (view.state, view.lifetime) == ("claimed", has)
            await command.communicate(b"\n")
            async with asyncio.timeout(20):
                while has is Lifetime.PROCESS and len(host.registry):  # noqa: ASYNC110 - the pidfd's word comes in the loop
                    await asyncio.sleep(0.01)
            assert len(host.registry) == (has is Lifetime.PERSISTENT)

    asyncio.run(scenario())
