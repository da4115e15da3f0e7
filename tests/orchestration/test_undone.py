# SPDX-License-Identifier: LGPL-2.1-or-later
"""Updates that do not go through: everything is undone, the workload never notices, the next one works."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.callers import Lifetime
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.state import HOLDABLE, State
from khod.errors import Lost, Refused, UpdateFailed
from khod.simulated import ProcessDied
from tests.orchestration.world import ME, MIB, QUICK, Guest, Recorder, World

Scenario = Callable[[World], Awaitable[None]]


async def fails(world: World, match: str) -> str:
    """An update that must fail with these words; everything must be as before, and the next update go through."""
    with pytest.raises(UpdateFailed) as caught:
        await world.update()
    assert re.search(match, str(caught.value)), str(caught.value)
    untouched(world)
    return str(caught.value)


def untouched(world: World) -> None:
    assert world.host.state is State.ABORTED
    assert not world.kernel.luo.outgoing, "sessions are left"
    assert not world.host.machine.kexec.loaded(), "the image is still loaded"
    assert {e.state for e in world.host.registry} <= {"registered", "restored", "claimed"}
    assert not any(e.states or e.session >= 0 for e in world.host.registry)
    assert not world.kernel.jumped


@pytest.mark.parametrize(
    ("call", "nth"),
    [
        *(("create_session", n) for n in (1, 2, 3)),
        *(("preserve_fd", n) for n in (1, 2, 3, 4, 5)),
        *(("frames", 1), ("window", 1), ("window", 5), ("memfd", 1), ("memfd", 2), ("memfd", 3)),
        *(("sync", 1), ("sync", 2), ("load", 1), ("loaded", 2), ("execute", 1)),
        *(("write", 1), ("write", 2), ("write", 3), ("read", 1)),
    ],
)
def test_a_failure_of_any_call_is_undone(world: World, call: str, nth: int) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        memory = world.memory()
        await world.register("vm-1", memory)
        await world.register("vm-2", world.memory(), "recorder", requires=["vm-1"])
        world.kernel.faults.fail(call, errno.ENOMEM, nth=nth)
        await fails(world, "everything was undone")
        world.kernel.faults.clear()
        assert world.intact(memory)
        world.workload.truncate(memory, 2 * MIB)
        world.workload.truncate(memory, MIB)
        host = await world.jump()
        assert host.state is State.RESTORED
        assert not host.problems

    asyncio.run(scenario())


@pytest.mark.parametrize("state", HOLDABLE)
def test_abort_from_every_state_that_can_be_held(world: World, state: State) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        host = await world.khod()
        await world.register("vm-1", memory := world.memory(), "recorder")
        guest = Guest("vm-1")
        await guest.attend(host)
        task = await world.held(state)
        assert host.state is state
        assert (await host.status()).held
        assert await host.abort() == State.ABORTED
        with pytest.raises(UpdateFailed, match="aborted by an operator"):
            await task
        untouched(world)
        assert world.intact(memory)
        await asyncio.sleep(0)  # the guest's turn to hear of it
        assert guest.log[-1] == ("aborted" if "preparing" in guest.log else "subscribed")
        assert ("thaw vm-1" in recorder.log) == ("prepare vm-1" in recorder.log)
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_undo_goes_backwards_and_past_an_undo_that_fails(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        host = await world.khod()
        await world.register("ram", world.memory(), "recorder")
        await world.register("device", world.memory(), "recorder", requires=["ram"])
        recorder.fails = {"freeze ram": "will not freeze", "thaw ram": "will not thaw"}
        with pytest.raises(UpdateFailed, match=r"will not freeze.*could not undo.*will not thaw"):
            await world.update()
        assert host.state is State.FAILED
        assert recorder.log[-2:] == ["thaw ram", "thaw device"], "the other one is thawed all the same"
        assert not world.kernel.luo.outgoing
        assert not host.machine.kexec.loaded()

    asyncio.run(scenario())


def test_a_hang_runs_into_the_deadline_of_its_phase(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, preparing=0.05, freezing=0.05))
        world.plugins = [recorder := Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        for hook in ("prepare", "freeze"):
            recorder.hangs = {f"{hook} vm-1"}
            await fails(world, "vm-1.*0.05 s")
        recorder.hangs = set()
        world.host.settings = world.settings = QUICK
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["preparing", "quiesce", "commit"])
def test_a_client_that_does_not_answer_fails_the_update_and_all_resume(tmp_path: Path, what: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, preparing=0.2, freezing=0.2))
        host = await world.khod()
        good, bad = Guest("vm-1"), Guest("vm-2", silent={what})
        await world.register("vm-1", world.memory())
        await world.register("vm-2", world.memory())
        await good.attend(host)
        await bad.attend(host)
        await fails(world, f"vm-2: its client did not answer {what}")
        await asyncio.sleep(0)  # the guests' turn to hear of it
        assert good.log[-1] == bad.log[-1] == "aborted"

    asyncio.run(scenario())


def test_a_lease_that_ended_stops_the_jump(world: World) -> None:
    """Decision 13: READY holds while the connection that gave it is open."""

    async def scenario() -> None:
        host = await world.khod()
        guest = Guest("vm-1")
        await world.register("vm-1", world.memory())
        await guest.attend(host)
        task = await world.held(State.FROZEN)
        guest.link.end()
        await host.proceed()
        with pytest.raises(UpdateFailed, match=r"vm-1.*gone"):
            await task
        untouched(world)
        assert "executing" not in guest.log

    asyncio.run(scenario())


def test_an_optional_instance_is_left_behind_with_all_that_require_it(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("extra", world.memory(), "recorder", required=False)
        await world.register("more", world.memory(), "recorder", required=False, requires=["extra"])
        recorder.fails = {"freeze extra": "is stuck"}
        host = await world.jump()
        assert [v.name for v in await host.instances()] == ["vm-1"]
        await host.verified()
        assert not host.problems, "the map must not list what stayed behind"
        (update,) = await host.history()
        assert len(update.left_behind) == 2
        assert any("extra: is stuck" in text for text in update.left_behind)
        assert {"thaw extra", "thaw more"} <= set(recorder.log)

    asyncio.run(scenario())


def test_an_optional_one_that_a_required_one_needs_fails_the_update(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        await world.khod()
        await world.register("ram", world.memory(), "recorder", required=False)
        await world.register("device", world.memory(), "recorder", requires=["ram"])
        recorder.fails = {"prepare ram": "is stuck"}
        await fails(world, "ram, which device requires")

    asyncio.run(scenario())


def test_what_the_kernel_refuses_is_left_behind_when_optional_and_fails_when_required(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [Recorder()]
        await world.khod()
        await world.register("vm-1", world.memory())
        huge = world.workload.special("hugetlb", 2 * MIB)
        await world.register("huge", huge, "recorder")
        await fails(world, "huge")
        await world.host.unregister(ME, "huge")
        await world.register("huge", huge, "recorder", required=False)
        host = await world.jump()
        (update,) = await host.history(1)
        assert "ENOENT" in update.left_behind[0]
        assert host.state is State.RESTORED

    asyncio.run(scenario())


def test_a_client_that_exited_can_claim_its_memory_after_an_abort(world: World) -> None:
    """Decision 3: an outgoing session must never be the only holder."""

    async def scenario() -> None:
        host = await world.khod()
        client = world.kernel.spawn("client")
        fd = world.memory(process=client)
        asked = Registration(name="vm-1", lifetime=Lifetime.PERSISTENT)
        await host.register(ME, asked, [("memory", client.give(fd, world.process))])
        task = await world.held(State.FROZEN)
        client.exit()
        await host.abort()
        await asyncio.wait([task])
        answer = await host.claim(ME, "vm-1")
        heir, inherited = world.received(answer.fds[0], "heir")
        assert world.intact(inherited, process=heir)

    asyncio.run(scenario())


@pytest.mark.parametrize("call", ["preserve_fd", "sync", "load", "execute", "store_append"])
def test_a_khod_that_died_in_an_update_is_followed_by_one_that_undoes(world: World, call: str) -> None:
    """Decision 14: never on towards the jump."""

    async def scenario() -> None:
        host = await world.khod()
        memory = world.memory()
        await world.register("vm-1", memory)
        world.kernel.faults.die(call, nth=2 if call in ("store_append", "sync") else 1, after=call == "load")
        with pytest.raises(ProcessDied):
            await world.update()
        assert not world.kernel.jumped
        host = await world.khod()
        assert host.state is State.ABORTED
        assert not host.machine.kexec.loaded(), "the image that the dead khod loaded is still there"
        assert world.intact(memory)
        assert world.entry("vm-1").state == "registered", "khod's own end unregisters nothing"
        assert (await world.jump()).state is State.RESTORED
        assert world.entry("vm-1").state == "restored"

    asyncio.run(scenario())


def test_the_intent_is_on_the_disk_before_the_jump(world: World) -> None:
    """Decision 16."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        journal = (world.directory / "disk").glob("*")
        text = b"".join(path.read_bytes() for path in journal if path.is_file())
        assert b'"state":"executing"' in text.splitlines()[-1]

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [State.PREPARED, State.FROZEN])
def test_file_systems_are_written_out_after_the_last_ready(world: World, state: State) -> None:
    """Decision 15: a sync that fails fails the update, whichever of the two it is."""

    async def scenario() -> None:
        await world.khod()
        guest = Guest("vm-1")
        await world.register("vm-1", world.memory())
        await guest.attend(world.host)
        world.kernel.faults.fail("sync", errno.EIO, nth=2 if state is State.FROZEN else 1)
        await fails(world, "EIO")
        assert ("quiesce" in guest.log) == (state is State.FROZEN)

    asyncio.run(scenario())


def test_refused_before_anything_is_touched(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        await world.register("vm-1", fd)
        with pytest.raises(Refused, match="no kernel"):
            await host.update()
        junk = world.directory.parent / "junk"
        junk.write_bytes(bytes(8192))
        with pytest.raises(Exception, match="junk"):
            await host.load(str(junk))
        world.workload.load_old("kho=on")
        await host.load(str(world.image))
        with pytest.raises(Refused, match="did not load"):
            await host.update()
        host.machine.kexec.unload()
        keeper = world.kernel.spawn("luod")
        device = keeper.open_device()
        with pytest.raises(Refused, match="EBUSY"):
            await host.update()
        keeper.close(device)
        assert host.journal.records == []
        assert not world.kernel.luo.outgoing
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_an_image_that_changed_since_it_was_named_is_not_loaded(world: World) -> None:
    """Decision 11."""

    async def scenario() -> None:
        host = await world.khod()
        await host.load(str(world.image))
        os.truncate(world.image, 4096)
        with pytest.raises(UpdateFailed, match="changed"):
            _ = [event async for event in await host.update()]
        untouched(world)

    asyncio.run(scenario())


def test_memory_that_is_not_there_is_refused_with_the_numbers(tmp_path: Path) -> None:
    """Decision 8: holes are filled by preserving."""

    async def scenario() -> None:
        world = World(tmp_path, memory=128 * MIB)
        host = await world.khod()
        await world.register("vm-1", world.workload.memfd(200 * MIB))
        await host.load(str(world.image))
        plan = await host.plan()
        assert plan.memory.parts["holes"] == plan.memory.holes_filled == 200 * MIB
        assert plan.memory.need > plan.memory.have
        with pytest.raises(Refused, match=rf"not enough memory: {plan.memory.need} .*holes {200 * MIB}"):
            await host.update()
        await host.unregister(ME, "vm-1")
        await world.register("vm-1", world.memory())
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_the_reserve_stays_free(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=Settings(reserve=1 << 40))
        host = await world.khod()
        await world.register("vm-1", world.memory())
        await host.load(str(world.image))
        with pytest.raises(Refused, match="not enough memory"):
            await host.update()

    asyncio.run(scenario())


def test_one_update_at_a_time_and_no_registering_meanwhile(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        task = await world.held(State.PREPARED)
        with pytest.raises(Refused, match="prepared"):
            await host.update()
        with pytest.raises(Refused, match="prepared"):
            await world.register("vm-2", world.memory())
        with pytest.raises(Refused, match="prepared"):
            await host.unregister(ME, "vm-1")
        assert (await host.claim(ME, "vm-1")).answer == "hold"
        await host.abort()
        await asyncio.wait([task])
        assert isinstance(task.exception(), UpdateFailed)
        assert not isinstance(task.exception(), Lost)

    asyncio.run(scenario())


def test_a_second_abort_and_a_stray_continue_are_refused(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        with pytest.raises(Refused):
            await host.abort()
        with pytest.raises(Refused):
            await host.proceed()

    asyncio.run(scenario())


def test_an_undo_that_failed_can_be_tried_again(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        host = await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        recorder.fails = {"freeze vm-1": "will not freeze", "thaw vm-1": "will not thaw"}
        with pytest.raises(UpdateFailed):
            await world.update()
        assert host.state is State.FAILED
        with pytest.raises(Refused, match="failed"):
            await world.update()
        recorder.fails = {}
        assert await host.abort() == State.ABORTED
        assert recorder.log[-1] == "thaw vm-1"
        untouched(world)
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_an_undo_that_failed_ends_when_its_instance_is_gone(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        host = await world.khod()
        await world.register("vm-1", world.memory(), "recorder")
        recorder.fails = {"freeze vm-1": "will not freeze", "thaw vm-1": "will not thaw"}
        with pytest.raises(UpdateFailed):
            await world.update()
        await host.unregister(ME, "vm-1")
        assert await host.abort() == State.ABORTED

    asyncio.run(scenario())


def test_after_an_abort_nothing_is_shown_as_preserved(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        task = await world.held(State.FROZEN)
        assert (await host.inspect()).source == "outgoing"
        await host.abort()
        await asyncio.wait([task])
        assert (await host.inspect()).source == "none"
        assert task.exception()

    asyncio.run(scenario())


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_disk_that_takes_no_record(world: World, nth: int) -> None:
    """The first is of `preparing`, the second of `executing`: without them no step further. The last only tells what was."""

    async def scenario() -> None:
        host = await world.khod()
        memory = world.memory()
        await world.register("vm-1", memory)
        world.kernel.faults.fail("store_append", errno.ENOSPC, nth=nth, forever=nth < 3)
        if nth == 3:
            world.kernel.faults.fail("execute", errno.EIO)
        with pytest.raises(Refused if nth == 1 else UpdateFailed, match=r"ENOSPC|EIO"):
            await world.update()
        assert not world.kernel.jumped
        assert not world.kernel.luo.outgoing
        world.kernel.faults.clear()
        world.workload.truncate(memory, 2 * MIB)
        world.workload.truncate(memory, MIB)
        if host.state is State.FAILED:
            await host.abort()
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_the_same_file_is_registered_once(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        await world.register("vm-1", fd)
        with pytest.raises(Refused, match="same file as 'memory' of vm-1"):
            await world.register("vm-2", world.workload.reopen(fd))
        twice = [("a", world.workload.give(fd, world.process)), ("b", world.workload.give(fd, world.process))]
        await host.unregister(ME, "vm-1")
        with pytest.raises(Refused, match="'a' and 'b' are the same file"):
            await host.register(ME, Registration(name="vm-3"), twice)
        assert len(host.registry) == 0
        assert len(world.kernel.task(world.process.pid).fds) == 1, "a registration that is refused leaves no descriptor"
        assert host.machine.custody.kept() == ["book"]

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", ["hugetlb", "iommufd", "vfio", "other"])
def test_guestmemfd_turns_down_what_linux_does_not_preserve(world: World, kind: str) -> None:
    async def scenario() -> None:
        await world.khod()
        with pytest.raises(Refused, match=kind) as caught:
            await world.register("vm-1", world.workload.special(kind, 2 * MIB))
        assert caught.value.hint

    asyncio.run(scenario())


def test_guestmemfd_turns_down_what_would_come_back_otherwise(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        with pytest.raises(Refused, match="F_SEAL_EXEC"):
            await world.register("vm-1", world.workload.memfd(MIB, noexec=True))
        with pytest.raises(Refused, match="1099511627776"):
            await world.register("vm-1", world.workload.memfd(1 << 40))

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 3 * MIB + 5])
def test_sizes_of_every_kind_come_through(world: World, size: int) -> None:
    async def scenario() -> None:
        await world.khod()
        fd = world.workload.memfd(size)
        world.workload.write(fd, 0, b"x" * min(size, 5000))
        await world.register("vm-1", fd)
        await world.register("vm-2", world.memory())
        host = await world.jump()
        await host.verified()
        assert not host.problems
        assert host.machine.files.stat(world.process_fd("vm-1")).size == size
        assert host.machine.files.read(world.process_fd("vm-1"), 0, 5000) == b"x" * min(size, 5000)

    asyncio.run(scenario())


def test_seals_come_through_even_those_set_after_the_preserve(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        world.workload.call("add_seals", fd, 0x2)
        await world.register("vm-1", fd)
        task = await world.held(State.PREPARED)
        world.workload.call("add_seals", fd, 0x4)
        await host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        assert host.machine.files.stat(world.process_fd("vm-1")).seals & 0x6 == 0x6

    asyncio.run(scenario())
