# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod offers to whoever talks to it: the API serves a `Service`, `khod.core.host.Host` is one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from khod.core.state import State
from khod.core.views import (
    ClaimView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    PlanView,
    StatusView,
    UpdateView,
)


class Service(Protocol):
    """Every method raises `khod.errors.KhodError` branches only. All are safe to call while an update is under way."""

    async def status(self) -> StatusView:
        """khod in one look."""
        ...

    async def register(
        self,
        name: str,
        driver: str,
        fds: Sequence[tuple[str, int]],
        *,
        owner: str,
        required: bool = True,
        requires: Sequence[str] = (),
        options: Mapping[str, str] | None = None,
    ) -> InstanceView:
        """Register an instance. Touches nothing in the kernel (decision 1).

        `fds` are names and machine descriptors; they are consumed, whether the call succeeds or not.
        Raises InvalidRequest (name, driver, dependency), Refused (a state that forbids it; a descriptor that the driver
        or the kernel cannot take, with the reason).
        """
        ...

    async def adopt(
        self,
        name: str,
        driver: str,
        pid: int,
        fds: Sequence[tuple[str, int]],
        *,
        owner: str,
        required: bool = True,
        requires: Sequence[str] = (),
        options: Mapping[str, str] | None = None,
    ) -> InstanceView:
        """Like `register`, the descriptors (names and numbers) being taken from the process `pid`."""
        ...

    async def unregister(self, name: str) -> None:
        """Forget an instance and close khod's descriptors of it; of one that is damaged: discard it for good."""
        ...

    async def instances(self) -> Sequence[InstanceView]:
        """All of them, by name."""
        ...

    async def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> ImageView:
        """Check and record the image for the next update (decision 11). `cmdline` None: the running kernel's."""
        ...

    async def plan(self) -> PlanView:
        """What an update would do now; changes nothing."""
        ...

    async def update(self, hold_at: State | None = None) -> AsyncIterator[EventView]:
        """Start an update; yields its events until it ended or, at the jump, the machine did.

        The update is khod's own: a caller who stops listening does not stop it. Raises Refused before the first event
        when it may not start; afterwards UpdateFailed, when everything was undone.
        """
        ...

    async def proceed(self) -> None:
        """Go on from a hold. Raises Refused when nothing is held."""
        ...

    async def abort(self) -> str:
        """Undo the update under way; returns when it is undone, with the state reached. Raises Refused when none is."""
        ...

    async def claim(self, name: str, *, owner: str, unverified: bool = False) -> ClaimView:
        """Hand an instance's descriptors out."""
        ...

    async def finish(self) -> Sequence[str]:
        """End the update that brought us here: finish every session. Returns the names of what remains unclaimed and is
        registered again. Raises Refused while something is damaged, unverified or not restored."""
        ...

    async def history(self, limit: int = 20) -> Sequence[UpdateView]:
        """Updates, newest first."""
        ...

    async def inspect(self) -> InspectionView:
        """The handover tree and the folio map in force."""
        ...
