# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verification beside the running workload: it finds what differs, and is in nobody's way (decision 22)."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from khod.core.alerts import Alert
from khod.core.ports import FolioWindow
from khod.core.state import State
from khod.simulated import ports
from tests.orchestration.world import ME, Recorder, World, settled


class Gate(ports.Frames):
    """Frames that are looked at when the test lets them be."""

    def __init__(self, world: World) -> None:
        super().__init__(world.process)
        self.reached, self.open = threading.Event(), threading.Event()

    def windows(self, fd: int) -> Iterator[FolioWindow]:
        self.reached.set()
        assert self.open.wait(20)
        return super().windows(fd)


class Moved(ports.Frames):
    """Frames of a kernel that gave back others than it was given."""

    def windows(self, fd: int) -> Iterator[FolioWindow]:
        for window in super().windows(fd):
            window.pfns[-1] += 1 << window.orders[-1]
            yield window


async def jumped(world: World) -> None:
    await world.khod()
    await world.register("vm-1", world.memory())
    await world.register("vm-2", world.memory())
    await world.jump_away()


async def gated(world: World) -> Gate:
    """khod, with the verification under way and not getting on."""
    world.fit = lambda machine: replace(machine, frames=Gate(world))
    host = await world.khod()
    host.verify()
    gate = host.machine.frames
    assert isinstance(gate, Gate)
    assert await asyncio.to_thread(gate.reached.wait, 20)
    return gate


def test_every_folio_is_compared(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        host = await world.khod()
        await host.verified()
        assert not host.problems
        assert host.incoming is not None
        assert host.incoming.map is not None
        assert host.incoming.map.folio_count == int((await host.history())[0].checked.split("all ")[1].split()[0])

    asyncio.run(scenario())


def test_pages_that_moved_are_told_of(world: World, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        await jumped(world)
        world.fit = lambda machine: replace(machine, frames=Moved(world.process))
        host = await world.khod()
        assert host.state is State.RESTORED, "the samples were found where they were"
        with caplog.at_level(logging.CRITICAL):
            await host.verified()
        assert host.problems[:2] == [f"vm-{n}: some of its pages are in other frames than before the jump" for n in (1, 2)]
        assert any("the folio map lists" in problem for problem in host.problems)
        (record,) = [r for r in caplog.records if r.levelno == logging.CRITICAL]
        assert vars(record)["MESSAGE_ID"] == Alert.MEMORY_DIFFERS.ident

    asyncio.run(scenario())


def test_nobody_waits_for_it_to_get_his_memory(world: World) -> None:
    """Finishing does; the claims of others do not wait for that."""

    async def scenario() -> None:
        await jumped(world)
        gate = await gated(world)
        first = await world.host.claim(ME, "vm-1")
        finished = asyncio.create_task(world.host.finished(ME, first.handle))
        whole = asyncio.create_task(world.host.finish())
        await settled()
        async with asyncio.timeout(10):
            assert (await world.host.claim(ME, "vm-2")).answer == "fds"
        assert not finished.done()
        assert not whole.done()
        gate.open.set()
        await finished
        await whole
        assert str(world.host.state) == "idle"
        assert not world.host.problems

    asyncio.run(scenario())


def test_what_is_let_go_of_meanwhile_is_not_looked_at_beneath_another_file(world: World) -> None:
    async def scenario() -> None:
        await jumped(world)
        gate = await gated(world)
        for name in ("vm-1", "vm-2"):
            await world.host.discard(ME, name)
        for name in ("vm-3", "vm-4"):
            await world.register(name, world.memory())
        gate.open.set()
        await world.host.verified()
        assert not world.host.problems

    asyncio.run(scenario())


def test_what_was_handed_out_though_not_all_of_it_came_keeps_nobody_from_finishing(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        await world.jump_away()
        world.kernel.faults.fail("retrieve_fd", errno.EIO, nth=4)  # tree, map, memory, and this: its state
        host = await world.khod()
        assert world.entry("vm-1").state == "damaged"
        answer = await host.claim(ME, "vm-1", unverified=True)
        await host.verified()
        await host.finished(ME, answer.handle)
        assert str(host.state) == "idle"

    asyncio.run(scenario())
