# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod offers to whoever talks to it: the API serves a `Service`, `khod.core.host.Host` is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from khod.core.callers import Caller, Lifetime
from khod.core.driver import StateBound
from khod.core.state import State
from khod.core.views import (
    ClaimView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    LifecycleView,
    PlanView,
    PreflightView,
    RegisteredView,
    StatusView,
    UpdateView,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What somebody asks khod to register."""

    name: str
    """Unique among the owner's."""
    driver: str = "guestmemfd"
    required: bool = True
    """Whether an update fails when it cannot come along."""
    requires: Sequence[str] = ()
    """Names of instances of the same owner."""
    options: Mapping[str, str] = field(default_factory=dict)
    lifetime: Lifetime = Lifetime.CONNECTION
    states: Sequence[StateBound] = ()
    """What the client itself will write when it stands still, with upper bounds (decision 9)."""
    shareable: bool = False
    """Whether others may register the same files as well (decision 6)."""


class Service(Protocol):
    """Every method raises `khod.errors.KhodError` branches only. All are safe to call while an update is under way.

    Rights are the API's to check, ownership is the service's: where a `caller` and an instance are named, the instance is
    the caller's own, or the caller may administer; NotPermitted otherwise. An instance is named by its owner and its name;
    `owner` '' means the caller, or else, for one who may administer, the only one of that name. `handle` may stand for both.
    """

    # Looking.

    async def status(self) -> StatusView:
        """khod in one look."""
        ...

    async def instances(self) -> Sequence[InstanceView]:
        """All of them, by owner and name."""
        ...

    async def plan(self) -> PlanView:
        """What an update would do now; changes nothing."""
        ...

    async def preflight(
        self, kernel: str = "", initrd: str = "", cmdline: str | None = None, *, overrides: Sequence[str] = ()
    ) -> PreflightView:
        """Whether an update to this kernel (``''``: the one that was loaded) would go through; changes nothing.

        `overrides` are names of checks, as `update` takes them, and refused in the same way. Raises what `load` raises.
        """
        ...

    async def history(self, limit: int = 20) -> Sequence[UpdateView]:
        """Updates, newest first."""
        ...

    async def inspect(self) -> InspectionView:
        """The handover tree and the folio map in force."""
        ...

    # Instances.

    async def register(self, caller: Caller, asked: Registration, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        """Register an instance. Touches nothing in the kernel (decision 1).

        `fds` are names and machine descriptors; they are consumed, whether the call succeeds or not.
        Raises InvalidRequest (name, driver, dependency), Refused (a state that forbids it; a quota; a descriptor that the
        driver or the kernel cannot take, with the reason), NotPermitted (a lifetime, or a file that could still grow).
        """
        ...

    async def adopt(self, caller: Caller, asked: Registration, pid: int, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        """Like `register`, the descriptors (names and numbers) being taken from the process `pid`, which becomes the keeper
        of an instance of lifetime 'process'."""
        ...

    async def register_opaque(self, caller: Caller, name: str, lifetime: Lifetime) -> RegisteredView:
        """Register an instance whose session its client will fill by itself (decision 4)."""
        ...

    async def unregister(self, caller: Caller, name: str = "", *, owner: str = "", handle: str = "") -> None:
        """Forget an instance and close khod's descriptors of it. Raises Refused for one that came through a jump and is not
        claimed: that is `discard`'s."""
        ...

    async def claim(
        self,
        caller: Caller,
        name: str,
        *,
        owner: str = "",
        lifetime: Lifetime | None = None,
        unverified: bool = False,
        exclusive: bool = False,
    ) -> ClaimView:
        """Hand an instance's descriptors out (decision 24). The first claim after a jump registers it again with the claimant's
        `lifetime`, None for that which it had; later ones change nothing while the claimant keeps it, or answers for it, but
        for his own with another lifetime. `exclusive`: only if nobody has it who lives, but for the caller's own process; else
        'hold', with that process. It is for who starts the workload with what he is given.

        Raises NotPermitted for `unverified` without the right to administer, Lost when the caller's connection has ended."""
        ...

    async def finished(self, caller: Caller, handle: str, *, ran: float = 0.0) -> None:
        """The claimant has taken over: nothing of the jump is needed for this instance any more. Its workload runs, since `ran`
        seconds ago: that ends its blackout in the update's ledger."""
        ...

    async def discard(self, caller: Caller, name: str, *, owner: str = "") -> None:
        """Let go, for good, of something that came through a jump: an orphan, what is damaged, an opaque session."""
        ...

    # The life cycle, for clients.

    async def subscribe(self, caller: Caller, handles: Sequence[str]) -> AsyncIterator[LifecycleView]:
        """Everything that becomes of these instances, from now on; the caller must answer for them from now on.

        Closing the iterator unsubscribes. Raises InvalidRequest for an unknown handle, Refused for one that has a subscriber.
        """
        ...

    async def ready(
        self,
        caller: Caller,
        update: str,
        phase: str,
        handles: Sequence[str] = (),
        *,
        quiet_for: float = 0.0,
        stood: float = 0.0,
    ) -> None:
        """The answer to 'preparing', 'quiesce' or 'commit', for these instances; () for all of the caller's subscription.

        To 'quiesce' it is a lease: it holds while the caller's connection is open, or for `quiet_for` seconds; 'commit'
        is answered on the same lease. `stood`: seconds for which the workload stands still by then, for the update's ledger.
        Raises Refused for an answer to what was not asked, or was answered.
        """
        ...

    async def failed(self, caller: Caller, update: str, phase: str, handles: Sequence[str], reason: str) -> None:
        """The other answer: these instances cannot come along."""
        ...

    async def states(self, caller: Caller, handle: str) -> Sequence[tuple[str, int]]:
        """The state memfds of an instance that is asked to stand still, to be written: names and machine descriptors, owned
        by the caller. Raises Refused at any other time."""
        ...

    async def open_session(self, caller: Caller, handle: str) -> int:
        """A kernel session for an opaque instance, a machine descriptor owned by the caller. From 'preparing' on, once an
        update. Raises Refused at any other time."""
        ...

    # Updates.

    async def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> ImageView:
        """Check and record the image for the next update (decision 11). `cmdline` None: the running kernel's."""
        ...

    async def update(
        self, hold_at: State | None = None, *, jump: str = "", overrides: Sequence[str] = ()
    ) -> AsyncIterator[EventView]:
        """Start an update; yields its events until it ended or, at the jump, the machine did.

        `jump` is 'direct' or 'systemd' (decision 17), '' for what is configured. `overrides` are names of checks whose blockers
        are passed over, and recorded: InvalidRequest for one that there is not, Refused for one that cannot be.

        The update is khod's own: a caller who stops listening does not stop it. Raises Refused before the first event when it
        may not start; afterwards UpdateFailed, when everything was undone.
        """
        ...

    async def proceed(self) -> None:
        """Go on from a hold. Raises Refused when nothing is held."""
        ...

    async def abort(self) -> str:
        """Undo the update under way; returns when it is undone, with the state reached. Raises Refused when none is."""
        ...

    async def finish(self) -> Sequence[str]:
        """End the update that brought us here: finish every session. Returns the names of what remains unclaimed and is
        registered again. Raises Refused while something is damaged, unverified or not restored."""
        ...
