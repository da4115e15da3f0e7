# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events of an update, and those who listen. Nobody who listens slowly holds anything up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from khod.core.views import EventView

BACKLOG = 4096
"""Events that a listener may lag behind before the oldest are dropped for it; an update has a few per instance."""


class Broadcast:
    """One source, any number of listeners; each has its own bounded queue."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[EventView | None]] = set()

    def send(self, event: EventView) -> None:
        """To everybody who listens now."""
        for queue in self._queues:
            _put(queue, event)

    def close(self) -> None:
        """Everybody's iteration ends after what was sent; who never began one is forgotten."""
        for queue in self._queues:
            _put(queue, None)
        self._queues.clear()

    def listen(self) -> AsyncIterator[EventView]:
        """Everything that is sent from this call on, until `close`."""
        queue: asyncio.Queue[EventView | None] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        return self._iterate(queue)

    async def _iterate(self, queue: asyncio.Queue[EventView | None]) -> AsyncIterator[EventView]:
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)  # who leaves early


def _put(queue: asyncio.Queue[EventView | None], event: EventView | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(event)
