# SPDX-License-Identifier: LGPL-2.1-or-later
"""Claims by who starts a guest with what he is given: nobody gets it while a process lives that has it already."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from khod.core.callers import Caller, Lifetime
from khod.core.registry import InstanceState
from khod.core.views import ClaimView
from tests.orchestration.owners import registered
from tests.orchestration.test_resumed import PID, Vmm, jumped, started
from tests.orchestration.world import ME, Link, World, settled

ALL = pytest.mark.parametrize("lifetime", list(Lifetime))


class Process(Link):
    """A process, told from others by its number and by when it began."""

    def __init__(self, pid: int, since: int = 77) -> None:
        super().__init__()
        self.pid, self.since = pid, since

    def calls(self) -> Caller:
        """Its next connection."""
        return replace(ME, pid=self.pid, connection=Link(), process=self)


async def alone(world: World, who: Caller, lifetime: Lifetime | None = None) -> ClaimView:
    return await world.host.claim(who, "vm", lifetime=lifetime, exclusive=True)


def watching(world: World, processes: Sequence[Process]) -> None:
    by_pid = {process.pid: process for process in processes}
    world.watch = lambda pid: by_pid[pid] if pid in by_pid and by_pid[pid].there else None


async def came(world: World, lifetime: Lifetime) -> None:
    await world.khod()
    await world.register("vm", world.memory(), lifetime=Lifetime.PERSISTENT)
    await world.jump()
    world.entry("vm").lifetime = lifetime


@ALL
def test_who_comes_second_gets_nothing(world: World, lifetime: Lifetime) -> None:
    async def scenario() -> None:
        await came(world, lifetime)
        first, second = Process(501), Process(502)
        assert (await alone(world, first.calls())).answer == "fds"
        answer = await alone(world, second.calls())
        assert (answer.answer, answer.process, answer.early, answer.fds) == ("hold", 501, False, ())
        assert "process 501 has vm, and lives" in answer.reason
        assert world.entry("vm").holder is first
        assert (await world.host.claim(second.calls(), "vm")).answer == "fds", "who only looks is not kept from it"
        assert (await alone(world, second.calls())).answer == "hold", "nor has it, because it looked"
        assert (await alone(world, first.calls())).answer == "fds", "its own process is no second life"

    asyncio.run(scenario())


def test_when_it_has_died_the_next_one_gets_what_lives_on(world: World) -> None:
    async def scenario() -> None:
        await came(world, Lifetime.PERSISTENT)
        first, second, third = Process(501), Process(502), Process(503)
        assert (await alone(world, first.calls())).answer == "fds"
        first.end()
        await settled()
        assert (await alone(world, second.calls())).answer == "fds"
        assert (await alone(world, third.calls())).process == 502

    asyncio.run(scenario())


def test_what_hung_on_the_dead_process_is_gone_with_it(world: World) -> None:
    async def scenario() -> None:
        await came(world, Lifetime.PROCESS)
        first = Process(501)
        assert (await alone(world, first.calls())).answer == "fds"
        first.end()
        await settled()
        await world.host.holdings.settled()
        assert (await alone(world, Process(502).calls())).answer == "cold"

    asyncio.run(scenario())


@ALL
def test_who_registered_it_runs_it(world: World, lifetime: Lifetime) -> None:
    async def scenario() -> None:
        await world.khod()
        vmm = Process(501)
        await registered(world, vmm.calls(), "vm", lifetime=lifetime)
        assert (await alone(world, Process(502).calls())).process == 501
        assert (await alone(world, vmm.calls())).answer == "fds"

    asyncio.run(scenario())


def test_of_what_nobody_has_one_gets_it(world: World) -> None:
    """An operator registered it, with a command that has ended; or nobody claimed it, and khod registered it again."""

    async def scenario() -> None:
        await world.khod()
        operator, first = Process(500), Process(501)
        handle = await registered(world, operator.calls(), "vm", lifetime=Lifetime.PERSISTENT)
        operator.end()
        await settled()
        answer = await alone(world, first.calls())
        assert (answer.answer, answer.handle) == ("fds", handle)
        assert world.entry("vm").state is InstanceState.REGISTERED
        assert (await alone(world, Process(502).calls())).process == 501

    asyncio.run(scenario())


def test_who_answers_for_it_has_it(world: World) -> None:
    """A process that came by its handle: its parent claimed it, and has ended."""

    async def scenario() -> None:
        await came(world, Lifetime.PERSISTENT)
        parent, child = Process(501), Process(502)
        claim = await alone(world, parent.calls())
        events = await world.host.subscribe(child.calls(), [claim.handle])
        parent.end()
        await settled()
        answer = await alone(world, Process(503).calls())
        assert (answer.answer, answer.process) == ("hold", 502)
        await events.aclose()  # type: ignore[attr-defined]
        assert (await alone(world, Process(503).calls())).answer == "fds"

    asyncio.run(scenario())


@pytest.mark.parametrize("lives", [True, False])
def test_a_khod_that_starts_anew_knows_who_has_it(world: World, lives: bool) -> None:
    async def scenario() -> None:
        await came(world, Lifetime.PERSISTENT)
        first = Process(501)
        assert (await alone(world, first.calls())).answer == "fds"
        # Its number is another's: of one that began later.
        watching(world, [first if lives else Process(501, since=78)])
        world.kill(world.process)
        await world.khod()
        answer = await alone(world, Process(502).calls())
        assert (answer.answer, answer.process) == (("hold", 501) if lives else ("fds", 0))

    asyncio.run(scenario())


@pytest.mark.parametrize("anew", [False, True])
def test_what_the_initrd_started_stays_its_own_after_its_first_word(world: World, anew: bool) -> None:
    """The unit that was to start it may come later than the VMM itself, and adopts it then."""

    async def scenario() -> None:
        await jumped(world)
        await started(world, "early")
        vmm = Vmm()
        world.watch = lambda pid: vmm if pid == PID else None
        host = await world.khod()
        before = await host.claim(Process(502).calls(), "early", exclusive=True)
        assert (before.answer, before.process, before.early) == ("hold", PID, True)
        assert (await host.claim(replace(ME, pid=PID, connection=Link(), process=vmm), "early")).answer == "fds"
        if anew:
            world.kill(world.process)
            host = await world.khod()
        after = await host.claim(Process(502).calls(), "early", exclusive=True)
        assert (after.answer, after.process, after.early) == ("hold", PID, True)

    asyncio.run(scenario())
