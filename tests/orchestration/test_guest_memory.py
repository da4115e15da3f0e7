# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bundled driver with every kind of memory, on kernels that preserve it and on kernels that do not."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from khod.core.callers import Lifetime, Right
from khod.core.carrying import PIECE
from khod.core.driver import Continuity
from khod.core.ports import F_SEAL_GROW, F_SEAL_SHRINK, Machine
from khod.core.service import Registration
from khod.core.state import State
from khod.core.views import InstanceView
from khod.errors import InvalidRequest, KhodError, NotPermitted, Refused, UpdateFailed
from khod.plugin import Declaration, Instance, Preserve, Request, hookimpl
from khod.simulated import ProcessDied, ports
from tests.orchestration.world import ME, MIB, QUICK, World, caller

SIZE = 4 * MIB
POOL = 8
HUGE = 2 * MIB


def filled(world: World, kind: str, size: int = SIZE) -> int:
    """A file of the workload's, with something at its beginning, in its middle, and at its end."""
    fd = world.workload.memfd(size) if kind == "memfd" else world.workload.special(kind, size)
    for offset in (0, size // 2 + 5, size - 4):
        world.workload.poke(fd, offset, f"{offset % 1000:04}".encode())
    return fd


async def whole(world: World, name: str, size: int = SIZE) -> str:
    """What kind of file somebody else claims, after a look at its bytes."""
    process, mine = await world.claimed(name)
    for offset in (0, size // 2 + 5, size - 4):
        assert process.peek(mine, offset, 4) == f"{offset % 1000:04}".encode()
    assert process.peek(mine, 8, size // 2 - 8) == bytes(size // 2 - 8)
    return str(process.call("stat", mine)["kind"])


async def only(world: World) -> InstanceView:
    (view,) = await world.host.instances()
    return view


@pytest.mark.parametrize(("kind", "taken"), [*product(("memfd", "guest_memfd", "hugetlb"), (False, True))])
def test_every_kind_comes_through_by_either_strategy_twice_in_a_row(tmp_path: Path, kind: str, taken: bool) -> None:
    async def scenario() -> None:
        world = World(tmp_path, preserves=(kind,) if taken and kind != "memfd" else (), huge_pages=POOL)
        await world.khod()
        carried = kind != "memfd" and not taken
        options = {"carry": "yes"} | ({} if kind == "guest_memfd" else {"hash": "yes"})
        await world.register("vm-1", filled(world, kind), options=options)
        view = await only(world)
        assert (view.strategy, view.continuity) == (("carried", "rebuilt") if carried else ("native", "preserved"))
        for _ in range(2):
            host = await world.jump()
            assert host.state is State.RESTORED
            assert (await only(world)).state == "restored", (await only(world)).problem
            # Nobody but a VMM makes a guest_memfd: its memory comes back as an ordinary memfd.
            assert await whole(world, "vm-1") == ("memfd" if carried and kind == "guest_memfd" else kind)
            await host.finish()
        assert world.host.machine.memory.free_huge_pages(HUGE) == POOL - (SIZE // HUGE if kind == "hugetlb" and carried else 0)

    asyncio.run(scenario())


def test_several_files_of_one_instance_go_each_its_way(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await world.khod()
        kinds = ("guest_memfd", "memfd", "hugetlb")
        fds = [(kind, world.workload.give(filled(world, kind), world.process)) for kind in kinds]
        await world.host.register(ME, world.asked("vm-1", options={"carry": "yes"}), fds)
        host = await world.jump()
        view = await only(world)
        assert (view.state, sorted(view.fds)) == ("restored", sorted(kinds)), view.problem
        entry = world.entry("vm-1")
        for kind in kinds:
            assert world.process.peek(entry.fds[kind], SIZE - 4, 4) == f"{(SIZE - 4) % 1000:04}".encode()
        assert "every byte compared" not in view.detail["memfd"]
        assert host.machine.files.stat(entry.fds["hugetlb"]).page_size == HUGE

    asyncio.run(scenario())


def test_a_private_guest_memfd_is_refused_and_why(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.workload.special("guest_memfd", SIZE, private=True)
        with pytest.raises(Refused, match="nobody but the guest can read it") as caught:
            await world.register("vm-1", fd)
        assert "GUEST_MEMFD_FLAG_INIT_SHARED" in str(caught.value.hint)
        assert not await world.host.instances()

    asyncio.run(scenario())


def test_a_private_one_needs_no_copy_where_the_kernel_preserves_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, preserves=("guest_memfd",))
        await world.khod()
        await world.register("vm-1", world.workload.special("guest_memfd", SIZE, private=True))
        await world.jump()
        process, mine = await world.claimed("vm-1")
        stat = process.call("stat", mine)
        assert (stat["kind"], stat["size"], stat["mappable"]) == ("guest_memfd", SIZE, False)

    asyncio.run(scenario())


def test_huge_pages_are_carried_when_asked_for_and_otherwise_refused_with_the_numbers(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await world.khod()
        fd = filled(world, "hugetlb")
        with pytest.raises(Refused, match=rf"takes {SIZE} bytes of ordinary memory, and \d+ can be had") as caught:
            await world.register("vm-1", fd)
        assert "carry=yes" in str(caught.value.hint)

    asyncio.run(scenario())


def test_a_pool_that_is_too_small_after_the_jump_damages_and_loses_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await world.khod()
        await world.register("vm-1", filled(world, "hugetlb"), options={"carry": "yes"})
        short = world.host.machine.kexec.running_cmdline().replace(f"hugepages={POOL}", "hugepages=1")
        with pytest.raises(Refused, match=rf"{SIZE} bytes are to be made anew in huge pages.* asks for {HUGE}"):
            await world.update(cmdline=short)
        with pytest.raises(ProcessDied):
            await world.update(cmdline=short, overrides=["hugetlb"])
        world.boot()
        await world.khod()
        view = await only(world)
        assert view.state == "damaged"
        assert "needs 2 huge pages of 2097152 bytes and 1 are free: 1 are missing" in view.problem
        area = world.entry("vm-1").states["carrier-memory"]
        assert world.process.peek(area.fd, SIZE - 4, 4) == f"{(SIZE - 4) % 1000:04}".encode()

    asyncio.run(scenario())


def test_a_copy_that_does_not_fit_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, memory=64 * MIB)
        await world.khod()
        fd = filled(world, "guest_memfd", 28 * MIB)
        holes = 28 * MIB - int(world.workload.call("resident", fd))
        await world.register("vm-1", fd)
        with (
            world.kernel.faults.recorded(world.process.pid) as calls,
            pytest.raises(Refused, match=rf"not enough memory: \d+ .*holes {holes}, .*states {28 * MIB}.* can be had"),
        ):
            await world.update()
        assert not {"create_session", "preserve_fd", "copy"} & set(calls)
        await world.host.unregister(ME, "vm-1")
        await world.register("vm-1", filled(world, "guest_memfd", 8 * MIB))
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


class Device:
    """Something that writes to a guest's memory by DMA for as long as its driver has not frozen it."""

    name = "device"

    def __init__(self, world: World, memory: int) -> None:
        self.world, self.memory = world, memory
        self.writes = 0

    def dma(self) -> None:
        self.writes += 1
        self.world.workload.poke(self.memory, SIZE - 4, self.writes.to_bytes(4, "little"))

    @hookimpl
    def khod_compatible(self) -> str:
        return "test,device-v1"

    @hookimpl
    def khod_declare(self, request: Request) -> Declaration:
        return Declaration("test,device-v1", tuple(Preserve(n, fd) for n, fd in request.fds.items()), requires=("vm-1",))

    @hookimpl
    def khod_prepare(self) -> None:
        self.dma()

    @hookimpl
    def khod_freeze(self, instance: Instance) -> Mapping[str, bytes]:
        self.dma()  # its last: bus mastering is off from here on
        return {}


def test_what_a_device_wrote_last_is_found_after_the_jump(world: World) -> None:
    """Decision 12: memory is frozen after whatever writes to it."""

    async def scenario() -> None:
        memory = filled(world, "guest_memfd")
        device = Device(world, memory)
        world.plugins = [device]
        await world.khod()
        await world.register("vm-1", memory)
        await world.register("device", world.memory(), "device")
        task = await world.held(State.PREPARED)
        device.dma()
        await world.host.proceed()
        await asyncio.gather(task, return_exceptions=True)
        world.boot()
        await world.khod()
        process, mine = await world.claimed("vm-1")
        assert device.writes == 3
        assert process.peek(mine, SIZE - 4, 4) == (3).to_bytes(4, "little")

    asyncio.run(scenario())


def meeting(barrier: threading.Barrier) -> type[ports.Files]:
    class Meeting(ports.Files):
        """Copies once everybody wants to copy."""

        def copy(self, source: int, target: int, offset: int, length: int) -> None:
            barrier.wait(20)
            super().copy(source, target, offset, length)

    return Meeting


def test_two_guests_are_copied_at_once(world: World) -> None:
    async def scenario() -> None:
        files = meeting(threading.Barrier(2))

        def fit(machine: Machine) -> Machine:
            return replace(machine, files=files(world.process))

        world.fit = fit
        await world.khod()
        for name in ("vm-1", "vm-2"):
            await world.register(name, filled(world, "guest_memfd"))
        assert (await world.jump()).state is State.RESTORED
        for name in ("vm-1", "vm-2"):
            await whole(world, name)

    asyncio.run(scenario())


@pytest.mark.parametrize("carried", [True, False])
def test_bytes_that_change_on_the_way_are_found(world: World, carried: bool) -> None:
    """Beside the sample: the hash is over every byte."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", filled(world, "guest_memfd" if carried else "memfd"), options={"hash": "yes"})
        task = await world.held(State.FROZEN)
        entry = world.entry("vm-1")
        fd = entry.states["carrier-memory"].fd if carried else entry.fds["memory"]
        # The sample is taken already; where it has this page, its difference is told first.
        world.process.poke(fd, MIB + 77, b"!")
        await world.host.proceed()
        await asyncio.gather(task, return_exceptions=True)
        world.boot()
        await world.khod()
        view = await only(world)
        assert view.state == "damaged"
        assert "bytes" in view.problem

    asyncio.run(scenario())


def test_what_changed_since_it_was_registered_is_said_before_anything_is_touched(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await world.khod()
        fd = filled(world, "hugetlb")
        await world.register("vm-1", fd, options={"carry": "yes"})
        world.workload.truncate(fd, SIZE + HUGE)
        with pytest.raises(Refused, match=rf"has {SIZE + HUGE} bytes, and had {SIZE} when it was registered"):
            await world.update()
        world.workload.truncate(fd, SIZE)
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_seals_of_huge_pages_are_set_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await world.khod()
        fd = filled(world, "hugetlb")
        world.workload.call("add_seals", fd, F_SEAL_GROW | F_SEAL_SHRINK)
        await world.register("vm-1", fd, options={"carry": "yes"})
        await world.jump()
        process, mine = await world.claimed("vm-1")
        assert process.call("stat", mine)["seals"] == F_SEAL_GROW | F_SEAL_SHRINK

    asyncio.run(scenario())


def test_huge_pages_of_others_than_administrators_are_sealed_against_every_change_of_size(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        host = await world.khod()
        fd = filled(world, "hugetlb")
        somebody = caller("vmm", [Right.OBSERVE, Right.INSTANCES])
        asked = Registration(name="vm-1", driver="guestmemfd", options={"carry": "yes"}, lifetime=Lifetime.CONNECTION)
        for seal in (F_SEAL_GROW, F_SEAL_SHRINK):
            given = [("memory", world.workload.give(fd, world.process))]
            with pytest.raises(NotPermitted, match="can still change its size"):
                await host.register(somebody, asked, given)
            world.workload.call("add_seals", fd, seal)
        await host.register(somebody, asked, [("memory", world.workload.give(fd, world.process))])

    asyncio.run(scenario())


def test_a_continuity_that_only_a_later_kernel_gives_can_be_demanded(tmp_path: Path) -> None:
    async def scenario() -> None:
        for kinds in ((), ("guest_memfd",)):
            settings = replace(QUICK, require=Continuity.PRESERVED)
            world = World(tmp_path / str(len(kinds)), settings=settings, preserves=kinds)
            await world.khod()
            await world.register("vm-1", filled(world, "guest_memfd"))
            if kinds:
                assert (await world.jump()).state is State.RESTORED
            else:
                with pytest.raises(Refused, match="will be rebuilt"):
                    await world.update()

    asyncio.run(scenario())


def test_a_copy_that_fails_or_is_aborted_leaves_the_guest_as_it_was(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = filled(world, "guest_memfd")
        await world.register("vm-1", fd)
        world.kernel.faults.fail("copy", errno.ENOMEM)
        with pytest.raises(UpdateFailed, match=r"copy: .*\[ENOMEM\]"):
            await world.update()
        assert not world.kernel.luo.outgoing
        task = await world.held(State.FROZEN)
        await world.host.abort()
        await asyncio.gather(task, return_exceptions=True)
        assert not world.kernel.luo.outgoing
        assert world.workload.peek(fd, SIZE - 4, 4) == f"{(SIZE - 4) % 1000:04}".encode()
        assert (await world.jump()).state is State.RESTORED
        await whole(world, "vm-1")

    asyncio.run(scenario())


@pytest.mark.parametrize("options", [{"carry": "perhaps"}, {"speed": "high"}])
def test_options_that_do_nothing_are_refused(world: World, options: dict[str, str]) -> None:
    async def scenario() -> None:
        await world.khod()
        with pytest.raises(InvalidRequest, match=r"guestmemfd|say yes or no"):
            await world.register("vm-1", world.memory(), options=options)

    asyncio.run(scenario())


def test_how_fast_it_was_is_told(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", filled(world, "guest_memfd"))
        assert "MiB/s" not in (await only(world)).detail["memory"]
        task = await world.held(State.FROZEN)
        assert f"copied in freeze ({SIZE} bytes in " in (await only(world)).detail["memory"]
        await world.host.abort()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())


def test_a_copy_that_is_aborted_ends_before_its_carrier_is_closed(tmp_path: Path) -> None:
    """Its descriptor's number may be another file's a moment later."""
    pieces = 20
    started, proceed = threading.Event(), threading.Event()
    copied: list[int] = []

    class Slow(ports.Files):
        def copy(self, source: int, target: int, offset: int, length: int) -> None:
            started.set()
            proceed.wait(20)
            copied.append(self.stat(target).size)

    async def scenario() -> None:
        world = World(tmp_path, memory=1024 * MIB, settings=replace(QUICK, freezing=1, carry_rate=0))
        world.fit = lambda machine: replace(machine, files=Slow(world.process))
        host = await world.khod()
        fd = filled(world, "guest_memfd", pieces * PIECE)
        await world.register("vm-1", fd)
        update = asyncio.create_task(world.update())
        assert await asyncio.to_thread(started.wait, 20)
        abort = asyncio.create_task(host.abort())
        # The second time by the deadline of freezing: it passes for an abort that hangs as well.
        await asyncio.wait([abort, update], timeout=1.5 * world.settings.freezing)
        assert world.kernel.luo.outgoing, "the carrier stays for as long as somebody copies"
        proceed.set()
        await asyncio.wait([abort, update])
        assert isinstance(update.exception(), UpdateFailed)
        assert 0 < len(copied) < pieces
        assert set(copied) == {pieces * PIECE}, "each copied into the carrier"
        assert not world.kernel.luo.outgoing
        assert world.workload.peek(fd, 0, 4) == b"0000"

    asyncio.run(scenario())


def test_deadlines_allow_for_what_is_copied(tmp_path: Path) -> None:
    started, proceed = threading.Event(), threading.Event()

    class Slow(ports.Files):
        def copy(self, source: int, target: int, offset: int, length: int) -> None:
            started.set()
            assert proceed.wait(20)
            super().copy(source, target, offset, length)

    async def waited_for(task: asyncio.Task[Any], deadline: float) -> None:
        assert await asyncio.to_thread(started.wait, 20)
        await asyncio.wait([task], timeout=3 * deadline)
        assert not task.done(), "given up"
        started.clear()
        proceed.set()
        await asyncio.wait([task])
        proceed.clear()

    async def scenario() -> None:
        settings = replace(QUICK, freezing=0.3, restoring=0.3, carry_rate=SIZE // 15)
        world = World(tmp_path, huge_pages=POOL, settings=settings)
        world.fit = lambda machine: replace(machine, files=Slow(world.process))
        await world.khod()
        await world.register("vm-1", filled(world, "hugetlb"), options={"carry": "yes"})
        table = await world.host.preflight(str(world.image))
        (check,) = [c for c in table.checks if c.name == "standstill"]
        assert check.evidence.startswith(f"{SIZE} bytes are copied or hashed"), check
        assert "15 s are allowed beside the 0.3 s" in check.evidence
        await waited_for(asyncio.create_task(world.jump_away()), settings.freezing)
        await waited_for(asyncio.create_task(world.khod()), settings.restoring)
        view = await only(world)
        assert view.state == "restored", view.problem

    asyncio.run(scenario())


async def both(world: World) -> list[int]:
    """One instance of two files that are carried; the workload's descriptors."""
    await world.khod()
    mine = [filled(world, kind) for kind in ("guest_memfd", "hugetlb")]
    fds = list(zip(("gmem", "huge"), (world.workload.give(fd, world.process) for fd in mine), strict=True))
    await world.host.register(ME, world.asked("vm-1", options={"carry": "yes"}), fds)
    return mine


def test_a_failure_at_any_call_before_the_jump_undoes_all_of_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        mine = await both(world)
        before = [world.workload.peek(fd, 0, SIZE) for fd in mine]
        with world.kernel.faults.recorded(world.process.pid) as calls:
            task = await world.held(State.FROZEN)
            await world.host.abort()
            await asyncio.gather(task, return_exceptions=True)
        assert {"memfd", "preserve_fd", "copy", "read", "write"} <= set(calls)
        undone = set()
        for call in sorted(set(calls)):
            for nth in (1, calls.count(call)):
                world.kernel.faults.fail(call, errno.EIO, nth=nth, pid=world.process.pid)
                try:
                    task = await world.held(State.FROZEN)
                except KhodError as error:
                    undone.add(call)
                    assert "copy" not in str(error) or "EIO" in str(error)
                else:  # it came after the jump would have, or nobody minds
                    with suppress(KhodError):
                        await world.host.abort()
                    await asyncio.gather(task, return_exceptions=True)
                world.kernel.faults.clear()
                if world.host.state is State.FAILED:
                    await world.host.abort()
                assert not world.kernel.luo.outgoing, call
                assert [world.workload.peek(fd, 0, SIZE) for fd in mine] == before, call
        assert {"memfd", "create_session", "preserve_fd", "copy", "read", "stat"} <= undone
        assert (await world.jump()).state is State.RESTORED
        assert (await only(world)).state == "restored"

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["copy", "hugetlb", "free_huge_pages", "duplicate"])
def test_a_failure_while_it_is_made_anew_damages_and_keeps_every_byte(tmp_path: Path, call: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=POOL)
        await both(world)
        await world.jump_away()
        process = world.kernel.spawn("khod")
        world.kernel.faults.fail(call, errno.EIO, pid=process.pid)
        await world.khod_in(process)
        view = await only(world)
        assert (view.state, "EIO" in view.problem) == ("damaged", True), view.problem
        assert sorted(world.entry("vm-1").states) == ["carrier-gmem", "carrier-huge"]
        for area in world.entry("vm-1").states.values():
            assert process.peek(area.fd, SIZE - 4, 4) == f"{(SIZE - 4) % 1000:04}".encode()
        assert world.host.machine.memory.free_huge_pages(HUGE) == POOL, "what was begun is let go of"

    asyncio.run(scenario())
