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


def test_a_second_khoctl_starts_nothing_until_the_first_command_has_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        host = await world.khod()
        mine = world.workload.give(world.memory(), world.process)
        await host.register(caller(), world.asked("vm-1", lifetime=Lifetime.PERSISTENT), [("ram", mine)])
        host = await world.jump()
        path = tmp_path / "khod.sock"

        async def claim(*asked: str) -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                KHOCTL, "--socket", path, "claim", *asked, "vm-1", "--", "sh", "-c", "echo $LISTEN_FDNAMES; read line",
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

        async with serve(host, machine(world.process).files, path):
            first = await claim()
            assert first.stdout is not None
            assert (await asyncio.wait_for(first.stdout.readline(), 60)).strip() == b"ram"
            second = await claim()
            out, err = await asyncio.wait_for(second.communicate(), 60)
            assert (second.returncode, out) == (8, b""), err
            assert f"process {first.pid} has vm-1".encode() in err
            third = await claim("--shared")
            out, err = await asyncio.wait_for(third.communicate(b"\n"), 60)
            assert (third.returncode, out) == (0, b"ram\n"), err
            await first.communicate(b"\n")
            again = await claim()
            out, err = await asyncio.wait_for(again.communicate(b"\n"), 60)
            assert (again.returncode, out) == (0, b"ram\n"), err

    asyncio.run(scenario())
