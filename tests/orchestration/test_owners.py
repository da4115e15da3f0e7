# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose instances are whose, what they hang on, and what an owner may have (decisions 4 to 8, 24)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.core.callers import Lifetime, Right
from khod.core.driver import StateBound
from khod.core.state import State
from khod.errors import InvalidRequest, NotPermitted, Refused, UpdateFailed
from tests.orchestration.owners import VMM, names, registered, settled, vmm
from tests.orchestration.world import ME, MIB, QUICK, Guest, Link, World, caller


def test_names_are_an_owners_own_and_nobody_reaches_anothers(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        one, two = vmm("vmm@1.service"), vmm("vmm@2.service")
        handle = await registered(world, one, "ram")
        await registered(world, two, "ram")
        assert names(world) == ["ram of unit:vmm@1.service", "ram of unit:vmm@2.service"]
        with pytest.raises(InvalidRequest, match="no instance has this handle"):
            await host.unregister(two, handle=handle)
        with pytest.raises(NotPermitted):
            await host.unregister(two, "ram", owner="unit:vmm@1.service")
        with pytest.raises(InvalidRequest, match=r"unit:vmm@1.service, unit:vmm@2.service"):
            await host.unregister(ME, "ram")
        await host.unregister(ME, "ram", owner="unit:vmm@2.service")
        await host.unregister(one, "ram")
        assert not names(world)

    asyncio.run(scenario())


def test_after_the_jump_it_belongs_to_whom_it_belonged_before(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await registered(world, vmm("vmm@1.service"), "ram")
        host = await world.jump()
        thief = vmm("vmm@2.service")
        answer = await host.claim(thief, "ram")
        assert (answer.answer, list(answer.fds)) == ("hold", []), "not cold either: its disk may be the same"
        with pytest.raises(NotPermitted):
            await host.claim(thief, "ram", owner="unit:vmm@1.service")
        with pytest.raises(InvalidRequest):
            await host.discard(thief, "ram")
        with pytest.raises(NotPermitted, match="administer"):
            await host.claim(vmm("vmm@1.service"), "ram", unverified=True)
        answer = await host.claim(vmm("vmm@1.service"), "ram")
        assert answer.answer == "fds"
        assert answer.handle

    asyncio.run(scenario())


@pytest.mark.parametrize("lifetime", [Lifetime.CONNECTION, Lifetime.PROCESS])
def test_the_end_of_its_keeper_lets_the_memory_go(world: World, lifetime: Lifetime) -> None:
    async def scenario() -> None:
        host = await world.khod()
        who = vmm()
        await registered(world, who, "ram", lifetime=lifetime)
        link = who.connection if lifetime is Lifetime.CONNECTION else who.process
        other = who.process if lifetime is Lifetime.CONNECTION else who.connection
        assert isinstance(link, Link) and isinstance(other, Link)
        other.end()
        await settled(world)
        assert names(world), "that is not what it hangs on"
        link.end()
        await settled(world)
        assert not names(world)
        assert host.machine.custody.kept() == ["book"]

    asyncio.run(scenario())


def test_between_frozen_and_its_claim_the_end_of_a_keeper_changes_nothing(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        link = Link()
        await registered(world, vmm(connection=link), "ram")
        task = await world.held(State.FROZEN)
        link.end()
        await settled(world)
        assert names(world)
        await world.host.proceed()
        await asyncio.wait([task])
        world.boot()
        host = await world.khod()
        assert names(world) == ["ram of unit:vmm@1.service"]
        again = Link()
        await host.claim(vmm(connection=again), "ram")
        again.end()
        await settled(world)
        assert not names(world), "claimed with the lifetime that it had: the claimant's end is its end"
        assert len(world.kernel.luo.incoming) == 1, "khod's own session is left"

    asyncio.run(scenario())


@pytest.mark.parametrize("state", [State.PREPARING, State.PREPARED, State.FREEZING])
def test_a_guest_that_shuts_down_before_it_is_frozen_stays_behind_and_the_update_goes_on(world: World, state: State) -> None:
    async def scenario() -> None:
        await world.khod()
        link = Link()
        await registered(world, vmm(connection=link), "ram")
        await registered(world, vmm("vmm@2.service"), "ram")
        task = await world.held(state)
        link.end()
        await world.host.proceed()
        await asyncio.wait([task])
        assert world.kernel.jumped
        world.boot()
        host = await world.khod()
        assert names(world) == ["ram of unit:vmm@2.service"]
        (update,) = await host.history(1)
        assert update.left_behind == ["ram of unit:vmm@1.service: its lifetime is over"]

    asyncio.run(scenario())


def test_what_ended_during_an_update_that_is_undone_is_let_go_of_then(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        link = Link()
        await registered(world, vmm(connection=link), "ram")
        task = await world.held(State.FROZEN)
        link.end()
        await world.host.abort()
        await asyncio.wait([task])
        await settled(world)
        assert not names(world)

    asyncio.run(scenario())


def test_after_khods_restart_a_client_may_come_back_in_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, reconnect=0.05))
        await world.khod()
        await registered(world, vmm("vmm@1.service"), "ram")
        handle = await registered(world, vmm("vmm@2.service"), "ram")
        world.kill(world.process)
        host = await world.khod()
        assert len(names(world)) == 2
        subscription = await host.subscribe(vmm("vmm@2.service"), [handle])
        assert (await anext(subscription)).phase == "subscribed"
        async with asyncio.timeout(5):
            while len(names(world)) > 1:  # noqa: ASYNC110 - the end of the grace is nobody's event
                await asyncio.sleep(0.01)
        assert names(world) == ["ram of unit:vmm@2.service"]

    asyncio.run(scenario())


def test_who_does_not_come_back_during_an_update_that_is_undone_is_let_go_of_then(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, reconnect=0.3))
        await world.khod()
        await registered(world, vmm("vmm@1.service"), "ram")
        handle = await registered(world, vmm("vmm@2.service"), "ram")
        world.kill(world.process)
        host = await world.khod()
        task = await world.held(State.FROZEN)
        async with asyncio.timeout(20):
            while {view.keeper for view in await host.instances()} != {"nobody: its client did not come back in time"}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert len(names(world)) == 2
        await host.abort()
        await asyncio.wait([task])
        assert isinstance(task.exception(), UpdateFailed)
        await settled(world)
        assert not names(world)
        with pytest.raises(InvalidRequest, match="no instance has this handle"):
            await host.subscribe(vmm("vmm@2.service"), [handle])

    asyncio.run(scenario())


def test_processes_are_watched_again_after_a_restart(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await registered(world, vmm("vmm@1.service"), "ram", lifetime=Lifetime.PROCESS)
        world.kill(world.process)
        process = Link()
        world.watch = lambda pid: process if pid == 4711 else None
        await world.khod()
        assert names(world)
        process.end()
        await settled(world)
        assert not names(world)
        await registered(world, vmm("vmm@1.service"), "ram", lifetime=Lifetime.PROCESS)
        world.kill(world.process)
        other = Link()
        other.since = 5
        world.watch = lambda pid: other  # it ended while khod was not there, and its number is another's
        await world.khod()
        await settled(world)
        assert not names(world)

    asyncio.run(scenario())


def test_only_an_operator_registers_what_nothing_ends_and_only_an_administrator_what_can_grow(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        with pytest.raises(NotPermitted, match="nothing but an operator ends"):
            await registered(world, vmm(), "ram", lifetime=Lifetime.PERSISTENT)
        grows = [("memory", world.workload.give(world.memory(), world.process))]
        with pytest.raises(NotPermitted, match="can still grow"):
            await host.register(vmm(), world.asked("ram", lifetime=Lifetime.CONNECTION), grows)
        assert len(world.kernel.task(world.process.pid).fds) == 1, "descriptors of what is refused are closed"
        await registered(world, caller("op", [*VMM, Right.OPERATE]), "ram", lifetime=Lifetime.PERSISTENT)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("quota", "match"),
    [
        ({"quota_instances": 2}, "3 instances registered and may have 2"),
        ({"quota_descriptors": 2}, "3 descriptors registered and may have 2"),
        ({"quota_bytes": 2 * MIB}, f"{3 * MIB} bytes registered and may have {2 * MIB}"),
    ],
)
def test_quotas_hold_for_each_owner(tmp_path: Path, quota: dict[str, Any], match: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, **quota))
        await world.khod()
        for name in ("a", "b"):
            await registered(world, vmm(), name)
        with pytest.raises(Refused, match=match):
            await registered(world, vmm(), "c")
        await registered(world, vmm("vmm@2.service"), "c")

    asyncio.run(scenario())


def test_a_clients_own_state_comes_through(world: World) -> None:
    """Decision 9: khod makes the memory for it at its bound, the client writes it while it stands still."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("vcpus", 64)])
        guest = Guest("vm-1")
        refused: list[str] = []

        async def write() -> None:
            ((name, fd),) = await host.states(guest.me, world.entry("vm-1").handle)
            assert name == "vcpus"
            host.machine.files.write(fd, 0, (9).to_bytes(8, "little") + b"registers")

        guest.on["quiesce"] = write

        async def too_early() -> None:
            with pytest.raises(Refused, match="quiesce"):
                await host.states(guest.me, world.entry("vm-1").handle)
            refused.append("yes")

        guest.on["preparing"] = too_early
        await guest.attend(host)
        host = await world.jump()
        assert refused
        answer = await host.claim(ME, "vm-1")
        assert list(answer.names) == ["memory", "vcpus"]
        assert list(answer.states) == ["vcpus"]
        assert host.machine.files.read(answer.fds[1], 8, 9) == b"registers"

    asyncio.run(scenario())


def test_states_that_nobody_has_claimed_are_not_finished_away(world: World) -> None:
    """The memory without them is no guest: what could not be passed on blocks by name (decision 7)."""

    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("vcpus", 64)])
        guest = Guest("vm-1")

        async def write() -> None:
            ((_, fd),) = await host.states(guest.me, world.entry("vm-1").handle)
            host.machine.files.write(fd, 0, (9).to_bytes(8, "little") + b"registers")

        guest.on["quiesce"] = write
        await guest.attend(host)
        host = await world.jump()
        with pytest.raises(Refused, match="vm-1 came with states of its client, which nobody has claimed"):
            await host.finish()
        with pytest.raises(Refused, match="instance:vm-1: vm-1 came with states"):
            await world.update()
        answer = await host.claim(ME, "vm-1")
        assert host.machine.files.read(answer.fds[1], 8, 9) == b"registers"
        await host.finish()

    asyncio.run(scenario())


def test_an_instance_with_states_needs_its_client(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("vcpus", 64)])
        with pytest.raises(Refused, match="client has to answer"):
            await world.update()

    asyncio.run(scenario())


async def opaque(world: World, name: str = "db") -> tuple[Guest, list[int]]:
    """A client that fills a session by itself when it hears 'preparing'; the descriptor of its memory is in the list."""
    host = world.host
    await host.register_opaque(ME, name, Lifetime.PERSISTENT)
    client = world.kernel.spawn("database")
    memory = [client.memfd(4096)]
    client.write(memory[0], 0, b"rows")
    guest = Guest(name)

    async def fill() -> None:
        session = await host.open_session(guest.me, world.entry(name).handle)
        theirs = client.call("descriptor", world.process.pid, session)
        host.machine.files.close(session)
        client.call("preserve_fd", theirs, memory[0], 7)
        with pytest.raises(Refused, match="db has had its session"):
            await host.open_session(guest.me, world.entry(name).handle)

    guest.on["preparing"] = fill
    await guest.attend(host)
    return guest, memory


def test_an_opaque_session_crosses_and_is_its_owners_to_finish(world: World) -> None:
    """Decision 4."""

    async def scenario() -> None:
        await world.khod()
        await opaque(world)
        await world.register("vm-1", world.memory())
        host = await world.jump()
        views = {view.name: view for view in await host.instances()}
        assert (views["db"].grade, views["db"].detail, views["db"].state) == ("opaque", {"contents": "unknown"}, "restored")
        with pytest.raises(Refused, match="db is opaque"):
            await host.finish()
        with pytest.raises(Refused, match="db is opaque"):
            await world.update()
        answer = await host.claim(ME, "db")
        process, session = world.received(answer.fds[0])
        assert answer.names == ["session"]
        fd = process.call("kernel_retrieve_fd", session, 7)
        assert process.read(fd, 0, 4) == b"rows"
        process.call("finish", session)
        await host.finished(ME, answer.handle)
        await host.finish()
        assert str(host.state) == "idle"
        assert not world.kernel.luo.incoming.keys() - {name for name in world.kernel.luo.incoming if b"khod." in name}

    asyncio.run(scenario())


def test_an_opaque_session_that_is_undone_leaves_nothing_of_khods(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        guest, _ = await opaque(world)
        task = await world.held(State.PREPARED)
        await host.abort()
        await asyncio.wait([task])
        assert world.entry("db").session < 0
        assert guest.log[-1] == "aborted"

    asyncio.run(scenario())


def test_orphans_are_told_of_by_name_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        world = World(tmp_path, settings=replace(QUICK, orphans_after=0.0))
        await world.khod()
        await registered(world, vmm(), "ram")
        await registered(world, vmm("vmm@2.service"), "ram")
        host = await world.jump()
        await host.claim(vmm("vmm@2.service"), "ram")
        told = [r.getMessage() for r in caplog.records if "orphan" in r.getMessage()]
        assert any("ram of unit:vmm@1.service, 1048576 bytes, unclaimed" in text for text in told)
        orphans = {view.owner: view.orphan for view in await host.instances()}
        assert orphans == {"unit:vmm@1.service": True, "unit:vmm@2.service": False}
        await host.finish()
        host = await world.jump()  # decision 7: registered again under its old owner
        assert names(world) == ["ram of unit:vmm@1.service", "ram of unit:vmm@2.service"]
        await host.discard(ME, "ram", owner="unit:vmm@1.service")
        assert names(world) == ["ram of unit:vmm@2.service"]

    asyncio.run(scenario())


def test_what_requires_an_instance_that_ended_blocks_by_name(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        link = Link()
        await registered(world, vmm(connection=link), "ram")
        await registered(world, vmm(), "device", requires=["ram"])
        link.end()
        await settled(world)
        with pytest.raises(Refused, match=r"device of unit:vmm@1.service requires ram, which is not registered"):
            await world.update()
        await world.host.unregister(vmm(), "device")
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


class Fleeting(Link):
    """A process that is watched only while something hangs on it."""

    def __init__(self) -> None:
        super().__init__()
        asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self.there = bool(self._told)


def test_what_is_adopted_hangs_on_the_process_it_was_taken_from(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        fd = world.memory()
        world.watch = lambda pid: Fleeting() if pid == world.workload.pid else None
        world.kill(world.process)
        host = await world.khod()
        asked = world.asked("ram", lifetime=Lifetime.PROCESS)
        await host.adopt(ME, asked, world.workload.pid, [("memory", fd)])
        await asyncio.sleep(0)
        await settled(world)
        (entry,) = host.registry
        assert isinstance(entry.keeper, Fleeting)
        assert entry.keeper.there
        entry.keeper.end()
        await asyncio.sleep(0)
        await settled(world)
        assert not names(world)
        other = world.kernel.spawn("gone")
        theirs = world.memory(process=other)
        with pytest.raises(InvalidRequest, match=f"no process {other.pid} to keep ram"):
            await host.adopt(ME, asked, other.pid, [("memory", theirs)])
        assert host.machine.custody.kept() == ["book"]

    asyncio.run(scenario())
