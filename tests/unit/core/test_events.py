# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import asyncio
import gc
import weakref

from khod.core.events import BACKLOG, Broadcast
from khod.core.views import EventView


def event(number: int) -> EventView:
    return EventView(time=number, update="u", state="preparing", kind="step", message="")


def test_everybody_hears_all_from_when_he_listens_to_the_end() -> None:
    async def scenario() -> None:
        source = Broadcast()
        first = source.listen()
        source.send(event(1))
        second = source.listen()
        source.send(event(2))
        source.close()
        source.send(event(3))
        assert [e.time async for e in first] == [1, 2]
        assert [e.time async for e in second] == [2]

    asyncio.run(scenario())


def test_who_does_not_read_loses_the_oldest_and_still_comes_to_the_end() -> None:
    async def scenario() -> None:
        source = Broadcast()
        slow = source.listen()
        for number in range(BACKLOG + 5):
            source.send(event(number))
        source.close()
        heard = [e.time async for e in slow]
        assert heard[-1] == BACKLOG + 4
        assert len(heard) == BACKLOG - 1

    asyncio.run(scenario())


def test_who_never_begins_to_read_is_forgotten() -> None:
    async def scenario() -> None:
        source = Broadcast()
        source.listen()
        message = event(1)
        kept = weakref.ref(message)
        source.send(message)
        del message
        source.close()
        gc.collect()
        assert kept() is None

    asyncio.run(scenario())
