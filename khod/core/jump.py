# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of an update that have to do with PID 1: holding off shutdowns by others, leaving the jump to it (decision 17).

A direct jump ends everything as by a power cut. One by systemd stops the host first, as for any reboot: units run their
ExecStop=, processes are killed, and systemd-shutdown makes the jump, or a cold reboot where the jump fails. So khod's sessions
must lie in PID 1's store by then, and the point of no return is the call of ``systemctl kexec``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from khod.core.blocking import blocking, opening
from khod.core.registry import Entry
from khod.core.state import State
from khod.core.steps import STEPS, Commit, Execute, Step
from khod.errors import DeadlinePassed, KexecFailed, KhodError, NotPermitted, Refused

if TYPE_CHECKING:
    from khod.core.update import Update

DIRECT, SYSTEMD = "direct", "systemd"
JUMPS = (DIRECT, SYSTEMD)
"""What `Settings.jump` and the parameter of `Service.update` may be."""


class HoldOff(Step):
    """Have logind hold off shutdowns by others while this is under way; as the first step it is the last to be undone, so
    that a shutdown waits until everything is (as long as InhibitDelayMaxSec= lets it). Refuse a jump that would lose all."""

    name, phase = "hold off", State.PREPARING

    def __init__(self, update: Update) -> None:
        super().__init__(update)
        self._inhibitor = -1

    def describe(self) -> str:
        return "have logind hold off shutdowns by others"

    async def apply(self) -> None:
        update = self.update
        if update.jump == SYSTEMD and (doubt := await blocking(update.machine.manager.doubt)):
            raise Refused(f"no jump by systemd: {doubt}", hint="a direct jump needs no systemd")
        if not await blocking(update.machine.manager.present):
            return
        try:
            self._inhibitor = await opening(
                update.machine.files.close, update.machine.manager.inhibit, f"live update {update.id} is under way"
            )
        except NotPermitted:  # a shutdown is under way already
            raise
        except Refused as error:  # no logind: nobody but PID 1 can shut this host down, and it tells khod by SIGTERM
            update.say("problem", f"shutdowns by others are not held off: {error}")

    async def undo(self) -> None:
        if self._inhibitor >= 0:
            inhibitor, self._inhibitor = self._inhibitor, -1
            await blocking(self.update.machine.files.close, inhibitor)


class Offer(Step):
    """Put the sessions into PID 1's store, and all else out of it: what only processes hold is gone when PID 1 jumps."""

    name, phase = "offer", State.EXECUTING

    def describe(self) -> str:
        return "put the sessions into PID 1's store, and everything else out of it"

    @property
    def limit(self) -> float:
        return self.update.settings.freezing

    async def apply(self) -> None:
        await blocking(self.update.machine.custody.offer, self.update.sessions())

    async def undo(self) -> None:
        await blocking(self.update.machine.custody.withdraw)


class ExecuteBySystemd(Execute):
    """Journal the intent, let go of the inhibitor, and have PID 1 jump."""

    def describe(self) -> str:
        return "journal the jump, and systemctl kexec: units are stopped, then every process on this host ends"

    async def jump(self, deaf: list[Entry]) -> None:
        update = self.update
        if deaf:  # stopping the host may take longer than a client stands still that does not know
            raise DeadlinePassed(f"not told that the jump is next: the clients of {', '.join(e.label for e in deaf)}")
        for step in update.begun(HoldOff):
            await step.undo()
        update.left_to_systemd = True
        try:
            await blocking(update.machine.manager.kexec)
            update.accepted = True  # SIGTERM is PID 1's, and there is nothing left to do but to go
            reason = await update.returned()
            raise KexecFailed(f"systemctl kexec: {reason}", errno=0, hint="see `journalctl -u systemd-logind -u init.scope`")
        except KhodError:
            update.left_to_systemd = update.accepted = False
            raise


def steps_for(jump: str) -> tuple[type[Step], ...]:
    """The steps of an update that jumps that way."""
    if jump == DIRECT:
        return (HoldOff, *STEPS)
    *before, commit, execute = STEPS
    assert (commit, execute) == (Commit, Execute), "the last question is asked last"
    return (HoldOff, *before, Offer, commit, ExecuteBySystemd)
