# SPDX-License-Identifier: LGPL-2.1-or-later
"""Updates that go through, on the simulated machine."""

from __future__ import annotations

import asyncio

from khod.core.driver import StateBound
from khod.core.state import State
from tests.orchestration.world import MIB, Guest, Recorder, World


def run(coroutine: object) -> None:
    asyncio.run(coroutine)  # type: ignore[arg-type]


def test_memory_comes_through_with_the_same_bytes_in_the_same_frames(world: World) -> None:
    async def scenario() -> None:
        watcher = Recorder("watcher")
        frames_before: list[int] = []

        def remember(call: str) -> None:
            if call == "freeze eye":
                frames_before.extend(frames())

        def frames() -> list[int]:
            return [pfn for pfn, _ in world.host.machine.frames.pages(world.process_fd("vm-1"), range(256))]

        watcher.during = remember
        world.plugins = [watcher]
        await world.khod()
        world.memory(fill=b"nobody")
        await world.register("vm-1", world.memory())
        await world.register("eye", world.memory(4096), "watcher")
        assert world.contains(b"nobody")
        host = await world.jump()
        assert host.state is State.RESTORED
        process, fd = await world.claimed("vm-1")
        assert world.intact(fd, process=process)
        assert frames() == frames_before
        assert not world.contains(b"nobody"), "memory that nobody preserved must be destroyed"

    run(scenario())


def test_two_updates_in_a_row_without_registering_again(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory(fill=b"one"))
        await world.register("vm-2", world.memory(fill=b"two"))
        host = await world.jump()
        process, fd = await world.claimed("vm-1")
        process.write(fd, 0, b"changed in the second kernel")
        host = await world.jump()
        assert host.state is State.RESTORED
        assert host.boot.kexec_count == 2
        assert sorted(v.name for v in await host.instances()) == ["vm-1", "vm-2"]
        process, fd = await world.claimed("vm-1")
        assert process.read(fd, 0, 28) == b"changed in the second kernel"
        process, fd = await world.claimed("vm-2")
        assert world.intact(fd, fill=b"two", process=process)
        await host.verified()
        assert not host.problems
        assert await host.finish() == []
        assert str(host.state) == "idle"

    run(scenario())


def test_directions_of_dependency_and_what_may_go_at_once(world: World) -> None:
    async def scenario() -> None:
        log: list[str] = []
        world.plugins = [Recorder("recorder", log)]
        await world.khod()
        await world.register("ram", world.memory(), "recorder")
        await world.register("iommu", world.memory(), "recorder", requires=["ram"])
        await world.register("vfio", world.memory(), "recorder", requires=["iommu"])
        host = await world.jump()
        await host.verified()
        await host.finish()
        assert [line for line in log if "b'" not in line] == [
            *("prepare ram", "prepare iommu", "prepare vfio"),
            *("freeze vfio", "freeze iommu", "freeze ram"),
            *("restore ram", "restore iommu", "restore vfio"),
            *("finish iommu", "finish ram", "finish vfio"),
        ]
        assert "vfio b'state' b'frozen'" in log, "states and properties written in freeze are there in restore"

    run(scenario())


def test_clients_are_asked_in_order_and_told_before_the_jump(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        guest = Guest("vm-1")
        await world.register("vm-1", world.memory())
        await guest.attend(world.host)
        host = await world.jump()
        assert host.state is State.RESTORED
        assert guest.log == ["subscribed", "preparing", "quiesce", "commit", "executing"]

    run(scenario())


def test_registering_touches_nothing_in_the_kernel(world: World) -> None:
    """Decision 1: until preparing the memfd can be changed; in preparing not, and after an abort again."""

    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        await world.register("vm-1", fd)
        world.workload.truncate(fd, 2 * MIB)
        task = await world.held(State.PREPARED)
        try:
            world.workload.truncate(fd, MIB)
        except PermissionError:
            pass
        else:
            raise AssertionError("preserved memory must not change its size")
        assert await host.abort() == State.ABORTED
        await asyncio.wait([task])
        world.workload.truncate(fd, MIB)

    run(scenario())


def test_one_session_per_instance_and_khods_own(world: World) -> None:
    """Decision 2: names, and the order in which the kernel shall freeze: dependents first, khod's own last."""

    async def scenario() -> None:
        world.plugins = [Recorder()]
        host = await world.khod()
        await world.register("ram", world.memory(), "recorder")
        await world.register("device", world.memory(), "recorder", requires=["ram"])
        task = await world.held(State.FROZEN)
        update = host.last_update
        assert update is not None
        names = [name.decode() for name in world.kernel.luo.outgoing]
        assert names == [f"khod.{update.id}.1", f"khod.{update.id}.2", "khod"]
        assert world.entry("device").session_name == f"khod.{update.id}.1"
        await host.abort()
        await asyncio.wait([task])
        assert not world.kernel.luo.outgoing

    run(scenario())


def test_a_state_that_outgrows_its_bound_fails_the_freeze(world: World) -> None:
    """Decision 9."""

    async def scenario() -> None:
        recorder = Recorder()
        recorder.state = bytes(65)
        world.plugins = [recorder]
        host = await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        try:
            await world.update()
        except Exception as error:
            assert "65 bytes" in str(error)
            assert "64" in str(error)
        assert host.state is State.ABORTED
        recorder.state = bytes(64)
        host = await world.jump()
        assert host.state is State.RESTORED
        assert StateBound("registers", 64).size == 64

    run(scenario())


def test_the_ledger_spans_the_jump(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        await host.verified()
        (update,) = await host.history()
        spans = {s.phase: s for s in update.spans if not s.instance}
        assert {"preparing", "freezing", "between", "restoring", "blackout"} <= set(spans)
        assert spans["blackout"].uncertainty == 0.010
        assert spans["blackout"].seconds >= spans["between"].seconds + spans["restoring"].seconds
        assert [s.instance for s in update.spans if s.phase == "preparing" and s.instance] == ["vm-1"]
        assert update.outcome == "restored"
        assert "folios" in update.checked

    run(scenario())


def test_an_update_with_nothing_registered(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        host = await world.jump()
        assert host.state is State.RESTORED
        assert (await host.inspect()).map_address == 0
        await host.finish()
        assert str(host.state) == "idle"

    run(scenario())


def test_inspect_shows_tree_and_totals_on_both_sides(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        task = await world.held(State.FROZEN)
        before = await host.inspect()
        assert before.source == "outgoing"
        assert 'khod,name = "vm-1"' in before.tree
        assert sum(o.bytes for o in before.orders) >= MIB
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        after = await host.inspect()
        assert (after.source, after.tree, after.map_sha256) == ("incoming", before.tree, before.map_sha256)
        assert list(after.orders) == list(before.orders)

    run(scenario())
