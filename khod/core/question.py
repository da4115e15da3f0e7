# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients are asked, and what their answers are worth."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from khod.core.callers import Presence
from khod.errors import KhodError


class Phase(StrEnum):
    """What a client hears."""

    SUBSCRIBED = "subscribed"
    PREPARING = "preparing"
    """Memory is about to be preserved: from now on no size may change and no hole be punched (decision 1)."""
    QUIESCE = "quiesce"
    """Stand still; READY is a lease on that (decision 13)."""
    COMMIT = "commit"
    """The last question: does the lease hold?"""
    EXECUTING = "executing"
    RESTORED = "restored"
    ABORTED = "aborted"


ANSWERED = (Phase.PREPARING, Phase.QUIESCE, Phase.COMMIT)
"""Those that want READY or FAILED."""


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A client's READY to 'quiesce': "I stand still"."""

    connection: Presence
    """The one that gave it."""
    until: int
    """The machine's monotonic clock, in ns, up to which it holds whatever becomes of the connection; 0: while that is open."""
    since: int = 0
    """By the same clock: from when on the workload stands still, as its client says."""

    def lapsed(self, now: int) -> str:
        """Why it does not hold at `now`; '' when it does."""
        if self.until:
            return "" if now < self.until else "the time for which its client said to stay quiet is over"
        return "" if self.connection.there else "the connection on which its client said READY is gone"


class Question:
    """What is being asked: by handle, who was meant and what came back."""

    def __init__(self, phase: Phase, update: str, asked_at: int) -> None:
        self.phase, self.update = phase, update
        self.asked_at = asked_at
        """The machine's monotonic clock, in ns."""
        self.open: set[str] = set()
        """Must still be answered."""
        self.may: set[str] = set()
        """May be answered, and need not."""
        self.failures: dict[str, KhodError] = {}
        self.answered = asyncio.Event()

    def settle(self, handle: str, failure: KhodError | None = None) -> None:
        """This one's answer is in."""
        self.open.discard(handle)
        self.may.discard(handle)
        if failure is not None:
            self.failures[handle] = failure
        if not self.open:
            self.answered.set()
