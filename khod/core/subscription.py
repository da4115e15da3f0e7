# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client's ear: what khod tells it of the instances that it answers for, in order, at its own pace."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

from khod.core.callers import Caller
from khod.core.views import LifecycleView
from khod.errors import Lost

BACKLOG = 64
"""Messages that a client may lag behind, and one more for each of its instances: an update has five for all of them, and one
for each that is left behind."""


class Subscription(AsyncIterator[LifecycleView]):
    """What one client is told, as an iterator, until it is closed or ends.

    It is ended with its connection, with the last of its instances, or when the client does not read; then the iterator raises
    Lost with the reason, for what was not read is not worth reading any more.
    """

    def __init__(self, caller: Caller, handles: Iterable[str], ended: Callable[[Subscription], None]) -> None:
        self.caller = caller
        self.handles = dict.fromkeys(handles)
        """In the order in which they were given."""
        self.over = False
        self._limit = BACKLOG + len(self.handles)
        self._ended = ended
        self._reason = ""
        self._backlog: deque[tuple[LifecycleView, float]] = deque()
        self._more, self._read = asyncio.Event(), asyncio.Event()

    def tell(self, view: LifecycleView, until: float = 0.0) -> None:
        """Add a message; over, or too far behind: the message is lost, and so then is the client. `until`: the loop's time
        that the view's deadline is to be reckoned from when it is read; 0 for none."""
        if self.over:
            return
        if len(self._backlog) >= self._limit:
            self.end(f"its client did not read {self._limit} messages")
            return
        self._backlog.append((view, until))
        self._more.set()
        self._read.clear()

    async def read(self) -> bool:
        """Wait until the client took everything, and came back for more; False when it never will."""
        await self._read.wait()
        return not self.over

    def end(self, reason: str = "") -> None:
        """It is over. Again: no effect."""
        if not self.over:
            self.over, self._reason = True, reason
            self._backlog.clear()
            self._more.set()
            self._read.set()
            self._ended(self)

    async def aclose(self) -> None:
        """The client does not listen any more."""
        self.end()

    async def __anext__(self) -> LifecycleView:
        while not self._backlog:
            if self.over:
                if self._reason:
                    raise Lost(f"the subscription is over: {self._reason}", hint="subscribe again")
                raise StopAsyncIteration
            self._read.set()
            self._more.clear()
            await self._more.wait()
        view, until = self._backlog.popleft()
        return replace(view, deadline=max(until - asyncio.get_running_loop().time(), 0.001)) if until else view
