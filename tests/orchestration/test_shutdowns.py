# SPDX-License-Identifier: LGPL-2.1-or-later
"""Shutdowns that are not khod's own: an update under way is undone by what logind says, never by SIGTERM alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod import supervision
from khod.core.state import State
from khod.errors import DeadlinePassed
from khod.supervision import beside, undo_at_shutdown, until_it_may_end
from tests.orchestration.world import World
from tests.unit.kernel.buses import Logind, bus


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Logind]:
    with bus(tmp_path) as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        login = Logind(address)
        yield login
        login.close()


class PidOne:
    """What it says of itself, in order; the last for ever."""

    def __init__(self, *says: bool | DeadlinePassed) -> None:
        self.says = list(says)

    def coming(self) -> bool:
        return self.stopping()

    def stopping(self) -> bool:
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, DeadlinePassed):
            raise said
        return said


def test_logind_undoes_an_update_in_time(world: World, login: Logind) -> None:
    async def play() -> None:
        await world.khod()
        fd = world.memory()
        await world.register("vm", fd)
        held = await world.held(State.FROZEN)
        watching = asyncio.create_task(undo_at_shutdown(world.host, PidOne(False)))
        await asyncio.to_thread(login.listening.wait, 10)
        login.prepare(True)
        await asyncio.wait([held], timeout=10)
        assert world.host.state is State.ABORTED
        assert world.intact(fd)
        watching.cancel()

    asyncio.run(play())


def test_sigterm_waits_for_the_update_and_undoes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "STATUS_INTERVAL", 0.05)

    async def play() -> None:
        await world.khod()
        held = await world.held(State.PREPARED)
        told, thrice = asyncio.Event(), asyncio.Event()
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if len(said) == 3:
                thrice.set()

        told.set()
        waiting = asyncio.create_task(until_it_may_end(told, world.host, PidOne(DeadlinePassed("busy"), False), say))
        await asyncio.wait_for(thrice.wait(), 10)
        assert world.host.state is State.PREPARED
        assert set(said) == {"Not stopping yet: an update is prepared"}
        await world.host.abort()
        await asyncio.wait_for(waiting, 10)
        await asyncio.wait([held])

    asyncio.run(play())


def test_sigterm_of_a_system_that_goes_down_without_logind_undoes(world: World) -> None:
    async def play() -> None:
        await world.khod()
        held = await world.held(State.PREPARED)
        told = asyncio.Event()
        told.set()
        await asyncio.wait_for(until_it_may_end(told, world.host, PidOne(True), lambda _: None), 10)
        assert world.host.state is State.ABORTED
        await asyncio.wait([held])

    asyncio.run(play())


def test_what_runs_beside_may_fail_without_the_main_thing(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("the bus is on fire")

    async def play() -> None:
        await beside(asyncio.sleep(0.01), fail(), asyncio.sleep(3600))

    asyncio.run(play())
    assert "the bus is on fire" in caplog.text
