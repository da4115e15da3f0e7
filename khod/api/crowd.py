# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all connections of one user may cost together: no number of them gets more of khod than one of another user's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

ANSWERS = 16
"""Answers to those who look that may be waiting to be read, of one user. Such an answer can be megabytes."""
DESCRIPTORS = 8192
"""Descriptors that came with calls which are not answered yet, of one user."""
REFUSAL = 0.02
"""Seconds that a refusal takes, one after another: what is refused costs a line in the log each time."""


class Crowd:
    """The connections of one user."""

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.connections = 0
        self.descriptors = 0
        self._turn = asyncio.Lock()
        self._answers = asyncio.Semaphore(ANSWERS)
        self._looking = asyncio.Lock()
        self._refusing = asyncio.Lock()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The user's turn to have a call begun: one each time that the loop comes round."""
        async with self._turn:
            await asyncio.sleep(0)
            yield

    @asynccontextmanager
    async def answer(self) -> AsyncIterator[None]:
        """Room for an answer that can be large."""
        async with self._answers:
            yield

    @asynccontextmanager
    async def looking(self) -> AsyncIterator[None]:
        """The user's turn to have something looked up, which can take the machine some time."""
        async with self._looking:
            yield

    async def refuse(self) -> None:
        """Let a refusal take its time."""
        async with self._refusing:
            await asyncio.sleep(REFUSAL)
