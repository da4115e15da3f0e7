# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMM with a device, restored in the initrd: what khod finds when it starts beside it, or after it has failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import khod_guestmemfd
import pytest

from khod import driven
from khod.core.book import Book
from khod.core.incoming import open_incoming, read_tree
from khod.core.registry import Entry, InstanceState
from khod.core.restore import Restorer
from khod.early.plan import Start
from khod.errors import FormatError
from khod.plugin.manager import PluginManager
from khod.simulated import machine
from khod.simulated.cards import Card
from tests.orchestration.test_devices import EDU, IOVA, Rig
from tests.orchestration.test_resumed import PID, SINCE, Vmm
from tests.orchestration.world import ME, World

DEVICE = EDU.replace(":", ".")
Restore = Callable[[World, Start], Awaitable[list[Entry]]]


async def restored(world: World, start: Start) -> list[Entry]:
    """What the initrd does, in a process that ends then."""
    process = world.kernel.spawn("driven")
    ports, manager = machine(process), PluginManager()
    manager.register(khod_guestmemfd, "guestmemfd")
    for plugin in world.plugins:
        manager.register(plugin, plugin.name)
    book = Book(ports)
    book.open()
    incoming = open_incoming(ports)
    read_tree(ports, incoming)
    assert not incoming.verdict
    try:
        entries = await driven.restore(ports, world.settings, manager, book, incoming, start)
        names, fds, states = driven.passed(entries)
        assert names == ["memory", *(f"mappings/{name}" for name in ("table", "iommufd")), f"{DEVICE}/device"], names
        assert len(set(fds)) == 4
        assert not states
    finally:
        world.kill(process)
    return entries


def started(world: World, entries: list[Entry], *, writes: bool) -> None:
    """What it notes of a VMM that runs, and what that does."""
    ports = machine(world.kernel.spawn("stage"))
    lines = ["khod-early 1"]
    for entry in entries:
        whom = f"user:root\t{entry.name}\t{entry.incoming}"
        lines += [f"start\t{whom}\t16\t3", f"runs\t{whom}\t{PID}\t{SINCE}"]
    record = ports.files.memfd("khod-early", 0)
    ports.files.write(record, 0, "".join(f"{line}\n" for line in lines).encode())
    ports.custody.keep("early", record)
    if writes:
        fd = ports.liveupdate.retrieve_fd(ports.liveupdate.retrieve_session(entries[0].incoming), 0)
        for offset in range(0, ports.files.stat(fd).size, 4096):
            ports.files.write(fd, offset, b"written in the new kernel")
    world.watch = lambda pid: Vmm() if pid == PID else None


ALL = Start("user:root", "ram", ["/bin/vmm"], ["mappings", DEVICE])


def test_khod_goes_on_with_what_was_restored_and_runs(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.jump_away()
        entries = await restored(world, ALL)
        assert rig.card().dma(IOVA, b"its device works"), "held by custody alone"
        started(world, entries, writes=True)
        bound = rig.card().file
        host = await world.khod()
        assert not host.problems
        assert set((await rig.states()).values()) == {"claimed"}
        assert rig.card().file is bound, "what was made anew is not made twice"
        assert rig.card().dma(IOVA, b"still")
        answer = await host.claim(ME, DEVICE)
        assert (answer.answer, answer.process) == ("hold", PID)

    asyncio.run(scenario())


def test_khod_hands_out_what_was_restored_and_not_started(world: World) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.jump_away()
        await restored(world, ALL)
        await world.khod()
        assert set((await rig.states()).values()) == {"restored"}
        process, ram = await world.claimed("ram")
        assert process.read(ram, 4096, 6) == b"word 0"
        assert rig.card().dma(IOVA, b"its device works")

    asyncio.run(scenario())


def test_khod_begins_anew_with_a_group_that_is_not_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver fails where a module is missing; on the root file system it is there."""

    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.jump_away()
        original = Restorer._one

        async def unsound(self: Restorer, entry: Entry, *rest: object) -> None:
            await original(self, entry, *rest)  # type: ignore[arg-type]
            if entry.name == DEVICE:
                entry.state, entry.problem = InstanceState.DAMAGED, "no vfio-pci here"

        monkeypatch.setattr(Restorer, "_one", unsound)
        with pytest.raises(FormatError, match="no vfio-pci here"):
            await restored(world, ALL)
        monkeypatch.undo()
        host = await world.khod()
        assert not host.problems
        assert set((await rig.states()).values()) == {"restored"}
        assert rig.card().dma(IOVA, b"its device works")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("also", "why"),
    [
        ([DEVICE], "0000.00.04.0 needs mappings, which is not started with it"),
        (["mappings", DEVICE, "disk"], "disk did not come through"),
    ],
)
def test_a_group_that_is_incomplete_is_khods(world: World, also: list[str], why: str) -> None:
    async def scenario() -> None:
        rig = Rig(world, [Card(EDU)])
        await rig.start()
        await world.jump_away()
        with pytest.raises(FormatError, match=why):
            await restored(world, Start("user:root", "ram", ["/bin/vmm"], also))
        await world.khod()
        assert set((await rig.states()).values()) == {"restored"}

    asyncio.run(scenario())
