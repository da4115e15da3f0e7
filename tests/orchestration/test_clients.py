# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whole updates with clients that answer well, badly and not at all. The broker by itself: tests/unit/core/test_broker.py."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.callers import Lifetime
from khod.core.driver import StateBound
from khod.core.question import ANSWERED, Phase
from khod.core.state import State
from khod.core.views import LifecycleView
from khod.errors import Refused, UpdateFailed
from khod.simulated import Process, ProcessDied, machine
from tests.orchestration.world import ME, MIB, QUICK, Guest, Hear, Recorder, Scripted, World, caller, refused, settled, vanish


async def no(client: Scripted, view: LifecycleView) -> None:
    await client.host.failed(client.me, view.update, view.phase, [], "the disk is busy")


def once(quiet_for: float) -> Hear:
    """Answer as varlinkctl does: on a connection that is gone as soon as the answer is given."""

    async def answer(client: Scripted, view: LifecycleView) -> None:
        call = caller()
        quiet = quiet_for if view.phase == "quiesce" else 0.0
        await client.host.ready(call, view.update, view.phase, view.handles, quiet_for=quiet)
        call.connection.end()  # type: ignore[attr-defined]

    return answer


# What clients hear, and when


def test_who_claims_what_a_client_answers_for_takes_nothing_from_it(world: World) -> None:
    """An operator who looks at it must not cut its guest off from the next update."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        guest = Guest("vm-1")
        claim = await host.claim(guest.me, "vm-1")
        await guest.attend(host)
        await host.finished(guest.me, claim.handle)
        assert (await host.claim(ME, "vm-1")).handle == claim.handle
        await world.jump()
        assert guest.log[-4:] == ["preparing", "quiesce", "commit", "executing"]

    asyncio.run(scenario())


def test_what_a_client_hears_is_true_when_it_hears_it(world: World) -> None:
    async def scenario() -> None:
        world.plugins = [recorder := Recorder()]
        host = await world.khod()
        memory = world.memory()
        await world.register("vm-1", memory, "recorder")
        seen: dict[str, object] = {}

        async def preparing(client: Scripted, view: LifecycleView) -> None:
            seen["sessions"] = list(world.kernel.luo.outgoing)
            world.workload.truncate(memory, 2 * MIB)
            world.workload.truncate(memory, MIB)
            await Guest.hear(client, view)

        async def quiesce(client: Scripted, view: LifecycleView) -> None:
            with pytest.raises(PermissionError):
                world.workload.truncate(memory, 2 * MIB)
            seen["before quiesce"] = list(recorder.log)
            await Guest.hear(client, view)

        async def executing(client: Scripted, view: LifecycleView) -> None:
            seen["journal"] = host.journal.of(view.update)[-1].state

        guest = Scripted("vm-1", preparing=preparing, quiesce=quiesce, executing=executing)
        await guest.attend(host)
        host = await world.jump()
        assert host.state is State.RESTORED
        assert guest.log == ["subscribed", "preparing", "quiesce", "commit", "executing"]
        assert seen == {"sessions": [], "before quiesce": ["prepare vm-1"], "journal": State.EXECUTING}
        deadlines = [guest.heard(phase).deadline for phase in ANSWERED]
        assert [round(d) for d in deadlines] == [5, 5, 10]
        assert len({v.update for v in guest.views[1:]}) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", ANSWERED)
def test_no_from_a_required_one_stops_the_update_and_everybody_goes_on(world: World, phase: str) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", memory := world.memory())
        await world.register("vm-2", world.memory())
        good, bad = Scripted("vm-1"), Scripted("vm-2", **{phase: no})
        await good.attend(host)
        await bad.attend(host)
        await refused(world, f"vm-2: its client says no to {phase}: the disk is busy")
        for client in (good, bad):
            assert client.log[-1] == "aborted"
            assert "the disk is busy" in client.heard("aborted").reason
            assert "executing" not in client.log
        world.workload.truncate(memory, 2 * MIB)
        world.workload.truncate(memory, MIB)
        del bad.scripts[phase]
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.QUIESCE])
def test_one_client_can_leave_an_optional_one_behind_and_bring_the_others(world: World, phase: str) -> None:
    async def scenario() -> None:
        host = await world.khod()
        for name, required in (("vm-1", True), ("extra", False), ("silent", False)):
            await world.register(name, world.memory(), required=required)

        async def some(client: Scripted, view: LifecycleView) -> None:
            vm, extra, _silent = (world.entry(n).handle for n in ("vm-1", "extra", "silent"))
            await client.host.failed(client.me, view.update, view.phase, [extra], "is not worth it")
            await client.host.ready(client.me, view.update, view.phase, [vm])

        guest = Scripted("vm-1", "extra", "silent", **{phase: some})
        await guest.attend(host)
        left = {world.entry(n).handle for n in ("extra", "silent")}
        vm = world.entry("vm-1").handle
        host.settings = replace(QUICK, preparing=0.2, freezing=0.2)
        loaded = world.events = []
        await host.load(str(world.image))
        with pytest.raises(ProcessDied):
            async for event in await host.update():
                loaded.append(event)
        told = [v for v in guest.views if v.phase == "aborted"]
        assert {h for v in told for h in v.handles} == left
        assert any("is not worth it" in v.reason for v in told)
        assert guest.heard("commit").handles == guest.heard("executing").handles == (vm,)
        world.boot()
        host = await world.khod()
        assert [v.name for v in await host.instances()] == ["vm-1"]

    asyncio.run(scenario())


def test_who_said_yes_to_everything_goes_on_when_the_kernel_comes_back(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Scripted("vm-1")
        await guest.attend(host)
        world.kernel.faults.fail("execute", errno.EIO)
        await refused(world, "EIO")
        assert guest.log[-2:] == ["executing", "aborted"]
        assert (await world.jump()).state is State.RESTORED
        assert guest.log[-4:] == ["preparing", "quiesce", "commit", "executing"]

    asyncio.run(scenario())


# Calls of one connection each


@pytest.mark.parametrize(
    ("quiet_for", "message"),
    [(0.0, "the connection on which its client said READY is gone"), (1.0, "too short a time"), (60.0, "")],
)
def test_a_client_whose_connections_do_not_last_says_how_long_it_stays_quiet(
    world: World, quiet_for: float, message: str
) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        answer = once(quiet_for)
        guest = Scripted("vm-1", preparing=answer, quiesce=answer, commit=vanish)
        await guest.attend(host)
        if message:
            await refused(world, message)
        else:
            assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


def test_quiet_time_that_runs_out_while_an_operator_holds_the_update_stops_it(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Scripted("vm-1", quiesce=once(60))
        await guest.attend(host)
        task = await world.held(State.FROZEN)
        world.kernel.host.elapse(55)
        await host.proceed()
        with pytest.raises(UpdateFailed, match="too short a time"):
            await task

    asyncio.run(scenario())


def test_a_jump_that_comes_too_late_after_commit_is_none(world: World) -> None:
    """Decision 13: a client that answered to commit goes on by itself when its deadline passed."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())

        async def slow_disk(client: Scripted, view: LifecycleView) -> None:
            world.kernel.host.elapse(5)

        guest = Scripted("vm-1", executing=slow_disk)
        await guest.attend(host)
        await refused(world, "too late to jump")
        assert guest.log[-2:] == ["executing", "aborted"]
        del guest.scripts["executing"]
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


# Coming and coming back


@pytest.mark.parametrize("state", [State.PREPARING, State.PREPARED, State.FREEZING, State.FROZEN])
def test_a_client_that_comes_during_an_update(world: World, state: State) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        task = await world.held(state)
        guest = Scripted("vm-1")
        if state in (State.FREEZING, State.FROZEN):
            with pytest.raises(Refused, match="too late"):
                await guest.attend(host)
            await host.abort()
            await asyncio.wait([task])
            return
        await guest.attend(host)
        await host.proceed()
        with pytest.raises(ProcessDied):
            await task
        assert guest.heard("subscribed").reason == state
        asked = list(ANSWERED) if state is State.PREPARING else [Phase.QUIESCE, Phase.COMMIT]
        assert guest.log == ["subscribed", *asked, "executing"]

    asyncio.run(scenario())


def test_a_client_comes_back_to_a_khod_that_was_started_anew(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Scripted("vm-1")
        await guest.attend(host)
        handle = world.entry("vm-1").handle
        world.kernel.faults.die("execute")
        with pytest.raises(ProcessDied):
            await world.update()
        assert guest.log[-1] == "executing"
        host = await world.khod()
        assert host.state is State.ABORTED
        assert world.entry("vm-1").handle == handle
        await refused(world, "nobody is there", "client:vm-1")
        again = Scripted("vm-1")
        await again.attend(host)
        assert (await world.jump()).state is State.RESTORED
        assert again.heard("subscribed").reason == "aborted"

    asyncio.run(scenario())


def test_who_claimed_what_came_through_hears_that_it_is_restored_until_it_is_finished(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        host = await world.jump()
        claim = await host.claim(ME, "vm-1")
        guest = Scripted("vm-1")
        await guest.attend(host)
        await asyncio.sleep(0)
        assert guest.log == ["subscribed", "restored"]
        assert guest.heard("restored").handles == (claim.handle,)
        await guest.leave()
        await host.finished(ME, claim.handle)
        again = Scripted("vm-1")
        await again.attend(host)
        assert (await world.jump()).state is State.RESTORED
        assert "restored" not in again.log

    asyncio.run(scenario())


def test_the_subscription_to_what_is_unregistered_or_claimed_by_another_ends(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        await world.register("vm-2", world.memory())
        one = Guest("vm-2")
        await one.attend(host)
        await host.unregister(ME, "vm-2")
        await asyncio.wait_for(one.listening, 5)
        host = await world.jump()
        early = Guest("vm-1")
        await early.attend(host)
        await settled()
        assert early.log == ["subscribed", "restored"]
        claim = await host.claim(ME, "vm-1")
        await asyncio.wait_for(early.listening, 5)
        assert (await anext(await host.subscribe(ME, [claim.handle]))).phase == "subscribed"

    asyncio.run(scenario())


# States and sessions


def test_a_client_writes_its_state_while_it_is_asked_to_stand_still_and_finds_it_after_the_jump(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("registers", 64)])
        handle = world.entry("vm-1").handle

        async def not_now(client: Scripted, view: LifecycleView) -> None:
            with pytest.raises(Refused, match="vm-1"):
                await host.states(client.me, handle)
            await Guest.hear(client, view)
            with pytest.raises(Refused, match="vm-1"):
                await host.states(client.me, handle)

        async def write(client: Scripted, view: LifecycleView) -> None:
            ((name, fd),) = await host.states(client.me, handle)
            assert name == "registers"
            vmm, mine = world.received(fd)
            vmm.write(mine, 0, (5).to_bytes(8, "little") + b"rax=1")
            await Guest.hear(client, view)
            with pytest.raises(Refused, match="vm-1"):
                await host.states(client.me, handle)

        await refused(world, "nobody is there", "client:vm-1")
        guest = Scripted("vm-1", preparing=not_now, quiesce=write, commit=not_now)
        await guest.attend(host)
        host = await world.jump()
        assert not guest.listening.done() or guest.listening.exception() is None
        claim = await host.claim(ME, "vm-1")
        assert claim.states == ["registers"]
        vmm, mine = world.received(claim.fds[list(claim.names).index("registers")])
        assert vmm.read(mine, 0, 13) == (5).to_bytes(8, "little") + b"rax=1"

    asyncio.run(scenario())


@pytest.mark.parametrize(("length", "fits"), [(0, True), (64, True), (65, False), (2**64 - 1, False)])
def test_a_state_that_outgrows_its_bound_fails_its_instance(world: World, length: int, fits: bool) -> None:
    """Decision 9."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("registers", 64)])

        async def write(client: Scripted, view: LifecycleView) -> None:
            ((_, fd),) = await host.states(client.me, view.handles[0])
            vmm, mine = world.received(fd)
            vmm.write(mine, 0, length.to_bytes(8, "little"))
            await Guest.hear(client, view)

        await Scripted("vm-1", quiesce=write).attend(host)
        if fits:
            assert (await world.jump()).state is State.RESTORED
        else:
            await refused(world, f"vm-1: state 'registers' says that it has {length} bytes .* at most 64")

    asyncio.run(scenario())


async def opaque(world: World, name: str = "agent") -> str:
    return (await world.host.register_opaque(ME, name, Lifetime.PERSISTENT)).handle


def test_a_client_fills_a_session_of_its_own_once_an_update_while_it_is_asked(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        handle = await opaque(world)
        memory = world.memory()

        async def fill(client: Scripted, view: LifecycleView) -> None:
            asked = [host.open_session(client.me, handle) for _ in range(3)]
            first, *more = await asyncio.gather(*asked, return_exceptions=True)
            assert isinstance(first, int), first
            assert all(isinstance(error, Refused) for error in more)
            assert len(world.kernel.luo.outgoing) == 1
            agent, session = world.received(first, "agent")
            agents.append(agent)
            host.machine.files.close(first)
            machine(agent).liveupdate.preserve_fd(session, world.workload.give(memory, agent), 77)
            await Guest.hear(client, view)
            with pytest.raises(Refused):
                await host.open_session(client.me, handle)

        async def close(client: Scripted, view: LifecycleView) -> None:
            agents[-1].exit()

        agents: list[Process] = []
        guest = Scripted("agent", preparing=fill, quiesce=no, aborted=close)
        await guest.attend(host)
        with pytest.raises(Refused):
            await host.open_session(guest.me, handle)
        with pytest.raises(UpdateFailed, match="no to quiesce"):
            await world.update()
        await settled()
        assert not world.kernel.luo.outgoing, "khod closed it, and then its client"
        del guest.scripts["quiesce"]
        host = await world.jump()
        assert host.state is State.RESTORED
        (view,) = await host.instances()
        assert (view.name, view.grade) == ("agent", "opaque")

    asyncio.run(scenario())


def test_a_client_that_asks_for_no_session_stops_the_update(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        handle = await opaque(world)

        async def late(client: Scripted, view: LifecycleView) -> None:
            await Guest.hear(client, view)
            with pytest.raises(Refused, match="before you answer"):
                await host.open_session(client.me, handle)
            assert not world.kernel.luo.outgoing

        guest = Scripted("agent", preparing=late)
        await guest.attend(host)
        await refused(world, "asked for no session")
        assert guest.log[-1] == "aborted"

    asyncio.run(scenario())


def test_a_session_that_is_made_too_late_is_closed(tmp_path: Path) -> None:
    """The update is given up while the kernel is at it."""

    async def scenario() -> None:
        world = World(tmp_path)
        host = await world.khod()
        handle = await opaque(world)
        asked: list[asyncio.Task[int]] = []

        async def ask_and_abort(client: Scripted, view: LifecycleView) -> None:
            asked.append(asyncio.create_task(host.open_session(client.me, handle)))
            await asyncio.sleep(0)
            await host.abort()

        guest = Scripted("agent", preparing=ask_and_abort)
        await guest.attend(host)
        with pytest.raises(UpdateFailed, match="aborted"):
            await world.update()
        with pytest.raises(Refused, match="does not come along"):
            await asked[0]
        assert not world.kernel.luo.outgoing

    asyncio.run(scenario())
