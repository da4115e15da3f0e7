# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients: those whose workload stands still during a jump, as the core sees them (decisions 1 and 13).

A client speaks for instances. What it raises, or a deadline that it lets pass, fails those instances and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol


class Lease(Protocol):
    """A client's READY: "I stand still". It holds while the connection that gave it is open."""

    @property
    def valid(self) -> bool:
        """Whether the client still stands still, as far as can be known."""
        ...


class Client(Protocol):
    """Somebody to be asked."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def instances(self) -> Collection[str]:
        """Names of the instances that it speaks for."""
        ...

    async def preparing(self, update: str) -> None:
        """Memory is about to be preserved: from now on no size may change and no hole be punched."""
        ...

    async def quiesce(self, update: str) -> Lease:
        """Stand still. Returns once it does."""
        ...

    async def commit(self, update: str, lease: Lease) -> None:
        """The last question before the jump: does the lease still hold? From now on only `resume` lets it go on."""
        ...

    async def executing(self, update: str) -> None:
        """The jump is next. Nothing can be answered any more."""
        ...

    async def resume(self, update: str) -> None:
        """The update was undone: go on."""
        ...
