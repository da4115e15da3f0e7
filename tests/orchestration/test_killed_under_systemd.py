# SPDX-License-Identifier: LGPL-2.1-or-later
"""With PID 1's store behind it even both processes of the custodian may be killed at once (decisions 18 and 20), around every
call by which khod changes anything, on the way to a jump by systemd and behind it.

Not while sessions are offered and khod dies with them: then the store has the sessions alone (decision 17).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.core import jump
from khod.core.state import State
from khod.simulated import ProcessDied
from khod.simulated.faults import ANY, CALLER, FIRST, SECOND
from tests.orchestration.world import MIB, QUICK, Recorder, World

SETTINGS = replace(QUICK, jump=jump.SYSTEMD, sample_pages=4)
SIZE = 64 << 10
NAMES = ("vm-1", "vm-2")
LOOKS = {"stamp", "stat", "read", "window", "frames", "ram", "scratch", "figures", "boot", "store_read", "loaded", "kept"}
"""Calls that change nothing: to die around one of them is to die after the call before it."""
Kill = Callable[[World], None]
Phase = Callable[[Path, Kill], Coroutine[Any, Any, list[str]]]


async def registered(directory: Path) -> tuple[World, dict[str, int]]:
    """khod under a systemd, with two instances, and their memory."""
    world = World(directory, 64 * MIB, SETTINGS, systemd=True)
    world.plugins = [Recorder()]
    await world.khod()
    memory = {name: world.memory(SIZE, name.encode()) for name in NAMES}
    await world.register("vm-1", memory["vm-1"])
    await world.register("vm-2", memory["vm-2"], "recorder", requires=["vm-1"])
    return world, memory


async def departing(directory: Path, kill: Kill) -> list[str]:
    """An update until its jump; what khod called. If it was killed, another undoes it, and updates."""
    world, memory = await registered(directory)
    kill(world)
    with world.kernel.faults.recorded(world.process.pid) as calls, pytest.raises(ProcessDied):
        await world.update()
    assert not world.kernel.faults.pending, "nobody was killed"
    if not world.kernel.jumped:
        await world.khod()
        assert not world.kernel.luo.outgoing
        for name, fd in memory.items():
            assert world.entry(name).state == "registered"
            world.workload.truncate(fd, 2 * SIZE)
            world.workload.truncate(fd, SIZE)
            assert world.intact(fd, SIZE, name.encode())
        await world.jump()
    else:
        world.boot()
        await world.khod()
    await arrived(world)
    return calls


async def arrived(world: World) -> None:
    """Everything can be claimed, with the bytes that it had."""
    assert world.host.state is State.RESTORED, world.host.problems
    for name in NAMES:
        process, fd = await world.claimed(name)
        assert world.intact(fd, SIZE, name.encode(), process)


async def arriving(directory: Path, kill: Kill) -> list[str]:
    """khod restores what came; what it called. If it was killed, another restores it once more."""
    world, _ = await registered(directory)
    with pytest.raises(ProcessDied):
        await world.update()
    world.boot()
    process = world.kernel.spawn("khod")
    world.process = process
    kill(world)
    with world.kernel.faults.recorded(process.pid) as calls:
        try:
            await world.khod_in(process)
        except ProcessDied:
            await world.khod()
    assert not world.kernel.faults.pending, "nobody was killed"
    await arrived(world)
    await world.host.finish()
    await world.jump()
    await arrived(world)
    return calls


def places(calls: list[str]) -> Iterator[tuple[int, bool]]:
    """Number of a call, and whether to die after it."""
    for nth, call in enumerate(calls, 1):
        if call not in LOOKS:
            yield from ((nth, False), (nth, True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "victims"),
    [
        (departing, (CALLER,)),
        (departing, (FIRST, SECOND)),
        (departing, (CALLER, FIRST, SECOND)),
        (arriving, (FIRST, SECOND)),
        (arriving, (CALLER, FIRST, SECOND)),
    ],
)
def test_nothing_is_lost(tmp_path: Path, phase: Phase, victims: tuple[str, ...]) -> None:
    calls = asyncio.run(phase(tmp_path / "0", lambda world: None))
    assert len(calls) > 20
    if phase is departing and len(victims) == 3:
        calls = calls[: calls.index("offer")]
    for nth, after in places(calls):

        def kill(world: World, nth: int = nth, after: bool = after) -> None:
            world.kernel.faults.die(ANY, nth=nth, after=after, pid=world.process.pid, victims=victims)

        directory = tmp_path / f"{nth}{after}"
        try:
            asyncio.run(phase(directory, kill))
        except BaseException as error:
            error.add_note(f"{victims} {'after' if after else 'before'} call {nth}, {calls[nth - 1]}")
            raise
        shutil.rmtree(directory)
