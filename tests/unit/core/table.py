# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of the broker sit at: instances, callers, and a clock that is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from khod.core.broker import Broker
from khod.core.callers import Caller, Kind, Owner, Right
from khod.core.ports import Stamp
from khod.core.question import Phase
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.core.subscription import Subscription
from khod.core.views import LifecycleView
from khod.errors import InvalidRequest, KhodError

S = 10**9
UPDATE = "0123456789abcdef"


@dataclass(eq=False)
class Link:
    """A connection, or a process."""

    there: bool = True
    since: int = 0
    told: list[Callable[[], None]] = field(default_factory=list)

    def on_end(self, told: Callable[[], None]) -> None:
        self.told.append(told)

    def end(self) -> None:
        self.there = False
        for told in self.told:
            told()


@dataclass(eq=False)
class Thing:
    """An instance."""

    handle: str
    owner: Owner
    state: InstanceState = InstanceState.REGISTERED
    attended: bool = False
    incoming: str = ""

    @property
    def label(self) -> str:
        return f"vm-{self.handle}"


def caller(user: str = "alice", pid: int = 0, rights: Iterable[Right] = (Right.INSTANCES,)) -> Caller:
    return Caller(owner=Owner(Kind.USER, user), rights=frozenset(rights), pid=pid, connection=Link(), process=Link())


def hang_up(client: Caller) -> None:
    assert isinstance(client.connection, Link)
    client.connection.end()


class Table:
    """What the broker needs of khod: instances, a clock that is set by hand, and a state."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.now = 1000 * S
        self.state, self.update = State.IDLE, ""
        self.broker = Broker(self, self, lambda: (self.state, self.update))

    def stamp(self) -> Stamp:
        return Stamp(realtime=0, monotonic=self.now)

    def by_handle(self, caller: Caller, handle: str) -> Thing:
        thing = self.things.get(handle)
        if thing is None or (thing.owner != caller.owner and not caller.may(Right.ADMINISTER)):
            raise InvalidRequest("no instance has this handle")
        return thing

    def add(self, *handles: str, user: str = "alice") -> list[Thing]:
        added = [Thing(h, Owner(Kind.USER, user)) for h in handles]
        self.things.update({t.handle: t for t in added})
        return added

    async def ask(self, phase: Phase, limit: float = 5.0) -> dict[str, KhodError]:
        self.update = UPDATE
        return await self.broker.ask(phase, UPDATE, list(self.things.values()), limit)

    def asking(self, phase: Phase, limit: float = 5.0) -> asyncio.Task[dict[str, KhodError]]:
        return asyncio.create_task(self.ask(phase, limit))


async def hears(stream: Subscription, *phases: str) -> LifecycleView:
    """The next messages; returns the last."""
    heard = [await asyncio.wait_for(anext(stream), 5) for _ in phases]
    assert [v.phase for v in heard] == list(phases)
    return heard[-1]


def run(scenario: Callable[[Table], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Table())

    asyncio.run(main())


async def quiesced(table: Table, client: Caller, stream: Subscription, quiet_for: float = 0.0) -> None:
    """Up to a lease."""
    task = table.asking(Phase.QUIESCE)
    await hears(stream, "quiesce")
    table.broker.ready(client, UPDATE, "quiesce", list(stream.handles), quiet_for=quiet_for)
    assert await task == {}
