# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a khod finds at its start, and what it makes of it (decisions 7, 14, 21 to 23, 25, 26)."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from khod.core.journal import decode
from khod.core.ports import Machine
from khod.core.state import State
from khod.errors import DeviceBusy, MachineError, Refused
from khod.simulated import ProcessDied, Release, machine
from khod.simulated.image import build
from khod.simulated.kernel import Kernel
from tests.orchestration.world import ME, MIB, Recorder, World


async def jumped(world: World, *overrides: str, cmdline: str | None = None) -> None:
    """Let the machine jump, past these checks; no khod runs in the new kernel yet."""
    with pytest.raises(ProcessDied):
        await world.update(overrides=overrides, cmdline=cmdline)
    world.boot()


def test_a_fresh_machine_is_idle(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        assert str(host.state) == "idle"
        assert not host.problems
        assert (await host.claim(ME, "vm-1")).answer == "cold"

    asyncio.run(scenario())


def test_a_cold_boot_after_an_update_that_meant_to_jump_is_lost(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        world.kernel.power_off()
        world.boot()
        host = await world.khod()
        assert host.state is State.LOST
        assert (await host.claim(ME, "vm-1")).answer == "cold"
        (update,) = await host.history()
        assert update.outcome == "lost"
        await world.register("vm-1", world.memory())
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize("cmdline", ["kho=on liveupdate=off", "kho=off"])
def test_a_kernel_without_the_device_leaves_memory_unreachable(world: World, cmdline: str) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world, "target-options", cmdline=cmdline)
        host = await world.khod()
        assert host.state is State.UNREACHABLE
        assert (await host.claim(ME, "vm-1")).answer == "hold", "its memory exists: no second life"
        assert "cannot be reached" in (await host.status()).problems[0]

    asyncio.run(scenario())


def test_a_kernel_that_cannot_read_what_was_handed_over_is_unreachable(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.image.write_bytes(build(Release(memfd="memfd-v9")))
        await jumped(world, "format:memfd")
        host = await world.khod()
        assert host.state is State.UNREACHABLE

    asyncio.run(scenario())


def test_an_update_without_a_journal_entry_is_restored(world: World) -> None:
    """Decision 21: the tree wins."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world)
        for path in (world.directory / "disk").iterdir():
            path.unlink()
        host = await world.khod()
        assert host.state is State.RESTORED
        assert [v.name for v in await host.instances()] == ["vm-1"]
        world.kill(world.process)
        for path in (world.directory / "disk").iterdir():  # as an operator does with a journal that is damaged
            path.unlink()
        host = await world.khod()
        assert host.state is State.RESTORED
        await host.finish()
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_a_device_that_is_held_is_neither_lost_nor_restored(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world)
        holder = world.kernel.spawn("luod")
        device = holder.open_device()
        with pytest.raises(DeviceBusy):
            await world.khod()
        holder.close(device)
        assert (await world.khod()).state is State.RESTORED

    asyncio.run(scenario())


def test_what_is_not_finished_is_finished_before_the_next_update(world: World) -> None:
    """Decision 7: the kernel does not pass on what is not finished."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        assert world.entry("vm-1").session >= 0
        host = await world.jump()
        assert host.state is State.RESTORED
        answer = await host.claim(ME, "vm-1")
        process, fd = world.received(answer.fds[0])
        assert world.intact(fd, process=process)

    asyncio.run(scenario())


def corrupt(world: World, name: str, offset: int) -> None:
    """Scribble over khod's own preserved files, as somebody with its /proc/PID/fd could."""
    update = world.host.last_update
    assert update is not None
    fd = getattr(update.outgoing, name)
    (byte,) = world.process.read(fd, offset, 1)
    world.process.write(fd, offset, bytes([byte ^ 0x40]))


@pytest.mark.parametrize(("what", "offset"), [("map_fd", 0), ("map_fd", 20), ("tree_fd", 60), ("tree_fd", 4)])
def test_corrupt_bookkeeping_stops_the_restore_and_loses_nothing(world: World, what: str, offset: int) -> None:
    """Decision 23."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        task = await world.held(State.FROZEN)
        corrupt(world, what, offset)
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        assert host.state is State.FAILED
        assert "not what was written" in (await host.status()).problems[0]
        answer = await host.claim(ME, "vm-1")
        assert answer.answer == "hold"
        with pytest.raises(Refused, match="vm-1"):
            await host.finish()
        answer = await host.claim(ME, "vm-1", unverified=True)
        process, fd = world.received(answer.fds[0])
        assert world.intact(fd, process=process)
        records, _ = decode(host.machine.store.read())
        assert records[-1].event == "claimed"
        assert records[-1].data["unverified"]
        await host.finish()
        assert str(host.state) == "idle"

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["map_fd", "tree_fd"])
def test_corrupt_bookkeeping_is_no_reason_to_retrieve_what_could_be_lost_by_it(world: World, what: str) -> None:
    """Decision 19: the sizes are known by the tree, or else by the journal."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("small", world.memory(4096))
        await world.register("large", world.memory(8 * MIB))
        task = await world.held(State.FROZEN)
        corrupt(world, what, 60 if what == "tree_fd" else 20)
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        world.workload.limit_custody(memory=4 * MIB)
        host = await world.khod()
        assert host.state is State.FAILED
        assert {e.name: str(e.state) for e in host.registry} == {"small": "damaged", "large": "waiting"}
        assert (await host.claim(ME, "large", unverified=True)).answer == "hold"
        world.workload.limit_custody(memory=16 * MIB)
        world.kill(world.process)
        await world.khod()
        process, fd = await world.claimed("large", unverified=True)
        assert world.intact(fd, 8 * MIB, process=process)

    asyncio.run(scenario())


def test_bytes_that_changed_on_the_way_damage_that_instance_alone(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory(4096)
        await world.register("vm-1", fd)
        await world.register("vm-2", world.memory())
        task = await world.held(State.FROZEN)
        world.workload.write(fd, 100, b"late DMA")
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        assert host.state is State.RESTORED
        states = {v.name: v.state for v in await host.instances()}
        assert states == {"vm-1": "damaged", "vm-2": "restored"}
        assert "bytes differ" in world.entry("vm-1").problem
        assert (await host.claim(ME, "vm-1")).answer == "hold"
        assert (await host.claim(ME, "vm-2")).answer == "fds"
        with pytest.raises(Refused, match="vm-1 is damaged"):
            await world.update()
        with pytest.raises(Refused, match="discard"):
            await host.unregister(ME, "vm-1")
        await host.discard(ME, "vm-1")
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_what_was_listed_and_never_preserved_is_damaged(world: World) -> None:
    """Decision 26: khod's map is to the kernel a file like any other."""

    class Forgetful:
        """Live update that preserves khod's own files and forgets everybody else's."""

        def __init__(self, machine: Machine) -> None:
            self.real, self.files = machine.liveupdate, machine.files

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def preserve_fd(self, session: int, fd: int, token: int) -> None:
            if self.real.session_name(session) == "khod":
                self.real.preserve_fd(session, fd, token)
                return
            briefly = self.real.create_session("briefly")  # its pages leave scratch, as they should, and are let go again
            self.real.preserve_fd(briefly, fd, token)
            self.files.close(briefly)

    async def scenario() -> None:
        host = await world.khod()
        object.__setattr__(host.machine, "liveupdate", Forgetful(host.machine))
        await world.register("vm-1", world.memory(fill=b"forgotten"))
        host = await world.jump()
        assert world.entry("vm-1").state == "damaged"
        assert not world.contains(b"forgotten")
        assert (await host.claim(ME, "vm-1", unverified=True)).answer == "hold"

    asyncio.run(scenario())


def test_a_retrieve_that_fails_damages_that_instance_alone(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("vm-2", world.memory())
        await jumped(world)
        world.kernel.faults.fail("retrieve_fd", errno.ENOMEM, nth=3)
        host = await world.khod()
        states = [v.state for v in await host.instances()]
        assert sorted(states) == ["damaged", "restored"]

    asyncio.run(scenario())


def test_an_instance_that_no_plugin_knows_is_quarantined_alone(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("odd", world.memory(), "recorder")
        world.plugins = []
        host = await world.jump()
        assert {v.name: v.state for v in await host.instances()} == {"vm-1": "restored", "odd": "quarantined"}
        assert (await host.claim(ME, "odd")).answer == "hold"
        assert (await host.claim(ME, "odd", unverified=True)).answer == "fds"

    asyncio.run(scenario())


def test_a_driver_that_cannot_restore_and_those_that_require_it(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        await world.khod()
        await world.register("ram", world.memory(), "recorder")
        await world.register("device", world.memory(), "recorder", requires=["ram"])
        recorder.fails = {"restore ram": "is broken"}
        host = await world.jump()
        states = {v.name: v.state for v in await host.instances()}
        assert states == {"ram": "damaged", "device": "damaged"}
        assert "restore device" not in recorder.log

    asyncio.run(scenario())


@pytest.mark.parametrize("torn", ["half", "nuls"])
def test_a_journal_torn_by_the_jump_is_read_up_to_the_tear(world: World, torn: str) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.kernel.faults.die("store_append", nth=2, torn=torn)
        with pytest.raises(ProcessDied):
            await world.update()
        host = await world.khod()
        assert host.state is State.ABORTED
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_khod_may_end_while_memory_is_unclaimed_for_it_is_in_custody(world: World) -> None:
    """Decisions 18 and 25: the custodian is who must not end then."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        assert not host.keeps_from_exit()
        await host.close()
        world.process.exit()
        host = await world.khod()
        assert host.state is State.RESTORED
        process, fd = await world.claimed("vm-1")
        assert world.intact(fd, process=process)

    asyncio.run(scenario())


def test_a_khod_that_ended_before_it_was_finished_says_what_is_gone(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.jump()
        world.kill(world.process, *world.twins())  # all who held it
        host = await world.khod()
        assert host.state is State.LOST
        assert "ended before" in host.problems[0]

    asyncio.run(scenario())


def test_a_whole_comparison_on_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        from dataclasses import replace

        from tests.orchestration.world import QUICK

        world = World(tmp_path, settings=replace(QUICK, full=True, sample_pages=1))
        host = await world.khod()
        fd = world.memory(4 * MIB)
        await world.register("vm-1", fd)
        task = await world.held(State.FROZEN)
        for page in range(0, 1024, 100):
            world.workload.write(fd, page * 4096 + 2000, b"x")
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        assert world.entry("vm-1").state == "damaged"

    asyncio.run(scenario())


def test_the_simulated_successor_gets_the_directory_and_nothing_else(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world)
        world.kernel.power_off()
        again = Kernel.boot(world.directory)
        assert machine(again.spawn("khod")).boot.boot().handover is False, "a power cut is a cold boot"

    asyncio.run(scenario())


@pytest.mark.parametrize("finished", [False, True])
def test_a_khod_that_may_end_lets_go_of_everything(world: World, finished: bool) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        answer = await host.claim(ME, "vm-1")
        process, fd = world.received(answer.fds[0])
        host.machine.files.close(answer.fds[0])
        if finished:
            await host.finish()
        await host.close()
        assert not world.kernel.task(world.process.pid).fds
        assert world.intact(fd, process=process), "what was claimed is the claimant's"

    asyncio.run(scenario())


def test_a_disk_that_takes_no_record_costs_nobody_his_memory(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world)
        world.kernel.faults.fail("store_append", errno.ENOSPC, forever=True)
        host = await world.khod()
        assert host.state is State.RESTORED
        await host.verified()
        assert any("journal" in text for text in host.problems)
        world.kernel.faults.clear()
        assert (await host.claim(ME, "vm-1")).answer == "fds"

    asyncio.run(scenario())


def test_a_finish_that_fails_can_be_tried_again(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        world.kernel.faults.fail("finish", errno.EIO, nth=2)
        with pytest.raises(MachineError):
            await host.finish()
        assert host.state is State.FAILED
        await host.finish()
        assert str(host.state) == "idle"
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_a_bug_in_khods_own_reading_ends_nobodys_memory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a mock of the code: a defect put into it. Whatever it raises, the process that holds the memory goes on."""

    def defect(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await jumped(world)
        monkeypatch.setattr("khod.core.incoming.validate", defect)
        host = await world.khod()
        assert host.state is State.FAILED
        answer = await host.claim(ME, "vm-1", unverified=True)
        process, fd = world.received(answer.fds[0])
        assert world.intact(fd, process=process)

    asyncio.run(scenario())
