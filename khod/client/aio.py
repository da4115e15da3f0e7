# SPDX-License-Identifier: LGPL-2.1-or-later
"""The participant for programs on an event loop: `khod.client.Participant`, awaited, calling coroutines.

It is that one, with its two blocking connections and its thread, and every call to the workload brought into the loop. Why not
asyncvarlink's client? Descriptors that it receives are inherited by whatever a VMM forks at that moment (it asks for no
MSG_CMSG_CLOEXEC, and 0.3.3 sets the flag nowhere), it does not see that some were lost on the way (MSG_CTRUNC), and it closes
those of a message that takes two reads. And what stands between a workload and a jump should be there once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from khod.client import participant, workload
from khod.client.answers import Claimed, Cold, Hold
from khod.client.participant import DEFAULT_SOCKET, PATIENCE
from khod.client.workload import Notice
from khod.core.blocking import uninterrupted
from khod.errors import KhodError

P = ParamSpec("P")
T = TypeVar("T")


class Workload:
    """`khod.client.Workload` in coroutines: see there what each means, and when."""

    async def preparing(self, notice: Notice) -> None:
        """Memory is about to be preserved."""

    async def quiesce(self, notice: Notice) -> None:
        """Stop, and write the states."""

    async def commit(self, notice: Notice) -> None:
        """Do you still stand still?"""

    async def executing(self, notice: Notice) -> None:
        """The jump is next."""

    async def aborted(self, notice: Notice) -> None:
        """Run."""

    async def restored(self, notice: Notice) -> None:
        """Everything has been restored."""

    async def lost(self, error: KhodError) -> None:
        """Nobody answers for the instances any more."""


class Participant:
    """An asynchronous context manager, which connects and closes. Methods are those of `khod.client.Participant`."""

    def __init__(self, workload: Workload, *, path: str | Path = DEFAULT_SOCKET, patience: float = PATIENCE) -> None:
        self._workload, self._path, self._patience = workload, path, patience
        self._inner: participant.Participant
        self._calls: _InLoop

    async def __aenter__(self) -> Self:
        self._calls = _InLoop(self._workload, asyncio.get_running_loop())

        def connect() -> participant.Participant:
            return participant.Participant(self._calls, path=self._path, patience=self._patience)

        self._inner = await _threaded(participant.Participant.close, connect)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def claim(
        self,
        name: str,
        *,
        owner: str = "",
        lifetime: str | None = None,
        unverified: bool = False,
        exclusive: bool = False,
        opaque: bool = False,
    ) -> Claimed | Cold | Hold:
        """Take over what came through a jump. A caller who is cancelled has claimed all the same, and owns nothing."""
        return await _threaded(
            _discard,
            self._inner.claim,
            name,
            owner=owner,
            lifetime=lifetime,
            unverified=unverified,
            exclusive=exclusive,
            opaque=opaque,
        )

    async def register(
        self,
        name: str,
        fds: Mapping[str, int],
        *,
        states: Mapping[str, int] | None = None,
        driver: str = "guestmemfd",
        required: bool = True,
        requires: tuple[str, ...] = (),
        options: Mapping[str, str] | None = None,
        lifetime: str = "connection",
        shareable: bool = False,
    ) -> None:
        """Register an instance. `fds` stay the caller's, and open until this returns."""
        await _threaded(
            _nothing, self._inner.register, name, fds, states=states, driver=driver, required=required, requires=requires,
            options=options, lifetime=lifetime, shareable=shareable,
        )  # fmt: skip

    async def register_opaque(self, name: str, *, lifetime: str = "connection") -> None:
        """Register an instance whose kernel session the workload fills by itself."""
        await _threaded(_nothing, self._inner.register_opaque, name, lifetime=lifetime)

    async def start(self) -> None:
        """Answer for everything that was registered and claimed."""
        await _threaded(_nothing, self._inner.start)

    async def finished(self, name: str, *, since: float = 0.0) -> None:
        """Say of what was claimed that it lives."""
        await _threaded(_nothing, self._inner.finished, name, since=since)

    async def unregister(self, name: str) -> None:
        """Let khod forget it."""
        await _threaded(_nothing, self._inner.unregister, name)

    async def close(self) -> None:
        """Hang up, and wait for the call to the workload that is under way, unless this is called by it."""
        if self._calls.under_way is asyncio.current_task():
            self._inner.hang_up()
        else:
            await _threaded(_nothing, self._inner.close)


class _InLoop(workload.Workload):
    """What the participant's thread calls: each is run in the loop, and waited for."""

    def __init__(self, asynchronous: Workload, loop: asyncio.AbstractEventLoop) -> None:
        self._asynchronous, self._loop = asynchronous, loop
        self.under_way: asyncio.Task[None] | None = None

    def _run(self, call: Coroutine[Any, Any, None]) -> None:
        async def inside() -> None:
            self.under_way = asyncio.current_task()
            try:
                await call
            finally:
                self.under_way = None

        running = inside()
        try:
            asyncio.run_coroutine_threadsafe(running, self._loop).result()
        finally:  # of one that never began, where the loop is closed
            running.close()
            call.close()

    def preparing(self, notice: Notice) -> None:
        self._run(self._asynchronous.preparing(notice))

    def quiesce(self, notice: Notice) -> None:
        self._run(self._asynchronous.quiesce(notice))

    def commit(self, notice: Notice) -> None:
        self._run(self._asynchronous.commit(notice))

    def executing(self, notice: Notice) -> None:
        self._run(self._asynchronous.executing(notice))

    def aborted(self, notice: Notice) -> None:
        self._run(self._asynchronous.aborted(notice))

    def restored(self, notice: Notice) -> None:
        self._run(self._asynchronous.restored(notice))

    def lost(self, error: KhodError) -> None:
        self._run(self._asynchronous.lost(error))


async def _threaded(discard: Callable[[T], object], function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a call in a thread, to its end; `discard` takes the result that a cancelled caller does not."""
    return await uninterrupted(asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs)), discard)


def _discard(answer: Claimed | Cold | Hold) -> None:
    if isinstance(answer, Claimed):
        answer.close()


def _nothing(_: None) -> None:
    return None
