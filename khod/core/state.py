# SPDX-License-Identifier: LGPL-2.1-or-later
"""The states of an update, and the one table that says which may follow which."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where khod is in the life of an update.

    ``idle`` to ``executing`` are the old kernel's, ``restoring`` to ``finishing`` the new one's.
    """

    IDLE = "idle"
    """Nothing is preserved; instances may be registered."""
    PREPARING = "preparing"
    """Sessions are made and filled while the workload runs; the image is loaded last."""
    PREPARED = "prepared"
    FREEZING = "freezing"
    """The workload is being stopped, against the order of dependencies."""
    FROZEN = "frozen"
    """Stopped, written, verified: only the jump is left."""
    EXECUTING = "executing"
    """Journalled and synced before reboot(2); it may still come back (decision 16)."""
    RESTORING = "restoring"
    RESTORED = "restored"
    """Everything can be claimed; the rest of the verification runs beside the workload."""
    FINISHING = "finishing"
    ABORTING = "aborting"
    ABORTED = "aborted"
    """Undone whole; the workload goes on."""
    FAILED = "failed"
    """Something could not be undone, or could not be restored: an operator decides."""
    LOST = "lost"
    """The jump happened and nothing came across (decision 21)."""
    UNREACHABLE = "unreachable"
    """The memory came across and this kernel cannot reach it before a cold boot (decision 21)."""

    @property
    def outgoing(self) -> bool:
        """In the old kernel, before the point of no return: a khod that starts here undoes (decision 14)."""
        return self in _OUTGOING

    @property
    def resting(self) -> bool:
        """Nothing is under way; an update may start from here if nothing else forbids it."""
        return self in _RESTING


HOLDABLE = (State.PREPARING, State.PREPARED, State.FREEZING, State.FROZEN)
"""``--hold-at`` may name these."""
_OUTGOING = frozenset({State.PREPARING, State.PREPARED, State.FREEZING, State.FROZEN, State.EXECUTING, State.ABORTING})
_RESTING = frozenset({State.IDLE, State.ABORTED, State.RESTORED, State.LOST})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.IDLE: frozenset({State.PREPARING, State.RESTORING}),
    State.PREPARING: frozenset({State.PREPARED, State.ABORTING}),
    State.PREPARED: frozenset({State.FREEZING, State.ABORTING}),
    State.FREEZING: frozenset({State.FROZEN, State.ABORTING}),
    State.FROZEN: frozenset({State.EXECUTING, State.ABORTING}),
    # Three ways on: the kernel came back; the jump happened and its successor took over; or it happened and lost all.
    State.EXECUTING: frozenset({State.ABORTING, State.RESTORING, State.LOST, State.UNREACHABLE}),
    State.RESTORING: frozenset({State.RESTORED, State.FAILED, State.LOST, State.UNREACHABLE}),
    State.RESTORED: frozenset({State.FINISHING, State.FAILED}),
    State.FINISHING: frozenset({State.IDLE, State.FAILED}),
    State.ABORTING: frozenset({State.ABORTED, State.FAILED}),
    State.ABORTED: frozenset({State.IDLE}),
    # An undo that failed is tried again by `abort`; a restore that failed ends when all is claimed or discarded.
    State.FAILED: frozenset({State.ABORTING, State.FINISHING, State.IDLE, State.RESTORING}),
    State.LOST: frozenset({State.IDLE}),
    State.UNREACHABLE: frozenset({State.IDLE}),
}
