# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a participant calls: the workload's side of an update."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from khod.client.answers import StateWriter
from khod.errors import KhodError


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What a workload is told, or asked. What it lends, it lends for the length of the call."""

    update: str
    """The update's id."""
    instances: tuple[str, ...]
    """Names of those that are meant."""
    until: float = 0.0
    """When the answer is due, by time.monotonic(); 0 where none is wanted. An answer that comes later fails the instances."""
    reason: str = ""
    states: Mapping[str, Mapping[str, StateWriter]] = field(default_factory=dict)
    """In `quiesce`: the states to be written, by instance and name."""
    sessions: Mapping[str, int] = field(default_factory=dict)
    """In `preparing`: a kernel session for each opaque instance, to preserve descriptors in. Borrowed; the participant
    keeps it open."""

    @property
    def left(self) -> float:
        """Seconds until the answer is due, at least 0."""
        return max(0.0, self.until - time.monotonic())


class Workload:
    """Override what concerns you: each does nothing here, which answers READY.

    The first three want an answer: to return says READY, to raise says FAILED with the exception's text, and the update
    is undone unless the instances are optional. They come one at a time, in one thread that is not the caller's.
    Once `preparing` was called, `aborted` follows, or the jump does.
    """

    def preparing(self, notice: Notice) -> None:
        """Memory is about to be preserved: from the return on no size may change and no hole be punched. The workload runs."""

    def quiesce(self, notice: Notice) -> None:
        """Stop, and write the states. From the return on nothing that is registered may change. Time stands still for a guest
        from here to the other side of the jump."""

    def commit(self, notice: Notice) -> None:
        """The last question before the jump: do you still stand still?"""

    def executing(self, notice: Notice) -> None:
        """The jump is next. When the process is told to end now, it should, at once and without touching its guest."""

    def aborted(self, notice: Notice) -> None:
        """The update was undone, or nobody can go on with it: run. Comes after any of the above, whether that was answered
        READY or FAILED; memory may stay preserved for a moment longer."""

    def restored(self, notice: Notice) -> None:
        """In the new kernel, everything has been restored and verified."""

    def lost(self, error: KhodError) -> None:
        """Nobody answers for the instances any more: khod stayed away for too long, or does not know them. What is
        registered for the length of a connection will not come through a jump. The participant has ended; make another."""
