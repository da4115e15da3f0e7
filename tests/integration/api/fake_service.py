# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small khod in memory, for tests of what stands between it and people: it keeps state, holds descriptors, and refuses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from khod.core.callers import Caller, Lifetime
from khod.core.service import Registration, Service
from khod.core.state import State
from khod.core.views import (
    ClaimView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    LifecycleView,
    MemoryView,
    OrderView,
    PlanView,
    RegisteredView,
    SpanView,
    StatusView,
    StepView,
    UpdateView,
)
from khod.errors import BadDescriptor, FdNotPreservable, InvalidRequest, NotAKernel, Refused, UpdateFailed


class FakeFiles:
    """A machine's descriptor table: numbers of its own over real descriptors, and none may be left over."""

    def __init__(self) -> None:
        self.table: dict[int, int] = {}
        self._next = 1000

    def adopt(self, real: int) -> int:
        if not Path(f"/proc/self/fd/{real}").exists():
            raise BadDescriptor(f"descriptor {real}")
        self._next += 1
        self.table[self._next] = real
        return self._next

    def export(self, fd: int) -> int:
        return os.dup(self.table[fd])

    def duplicate(self, fd: int) -> int:
        return self.adopt(os.dup(self.table[fd]))

    def close(self, fd: int) -> None:
        os.close(self.table.pop(fd))


@dataclass
class Held:
    view: InstanceView
    fds: list[int]


class FakeService:
    """See `khod.core.service.Service`."""

    def __init__(self, files: FakeFiles) -> None:
        self.files = files
        self.state = State.IDLE
        self.held: dict[str, Held] = {}
        self.image: ImageView | None = None
        self.updates: list[UpdateView] = []
        self.fails = ""
        """Why the next update fails; '' when it does not."""
        self.hangs_at: State | None = None
        """Where the next update stands still, without saying so."""
        self.waiting = False
        self._go = asyncio.Event()
        self._aborting = False
        self._running: asyncio.Task[None] | None = None
        self.cancelled = False
        self.shown: list[InstanceView] = []
        """What is shown instead of what is held."""
        self.listed = 0
        """How often."""

    def forget(self) -> None:
        """Everything that is registered."""
        for held in self.held.values():
            for fd in held.fds:
                self.files.close(fd)
        self.held.clear()

    async def status(self) -> StatusView:
        return StatusView(
            state=self.state, update="u1" if self.updates else "", held=self.waiting, boot_id="b00t", release="7.3.0",
            version="0.1.0", device="ok", image=self.image, instances=len(self.held), unclaimed=0,
            pinned=sum(held.view.size for held in self.held.values()),
            problems=[held.view.problem for held in self.held.values() if held.view.problem],
        )  # fmt: skip

    async def register(self, caller: Caller, asked: Registration, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        name, driver = asked.name, asked.driver
        try:
            if driver == "broken":
                raise ZeroDivisionError("a bug")
            if driver != "guestmemfd":
                raise InvalidRequest(f"no driver is called {driver!r}", hint="known is guestmemfd")
            if name in self.held:
                raise Refused(f"{name} is registered already", hint="unregister it first")
            sizes = [os.fstat(self.files.table[fd]).st_size for _, fd in fds]
            if not sizes:
                raise FdNotPreservable("nothing was given")
        except BaseException:
            for _, fd in fds:
                self.files.close(fd)
            raise
        view = InstanceView(
            name=name, driver=driver, compatible="khod,guestmemfd-v1", owner=str(caller.owner), required=asked.required,
            requires=tuple(asked.requires), state="registered", size=sum(sizes), fds=tuple(fd_name for fd_name, _ in fds),
            detail=dict(asked.options),
        )  # fmt: skip
        self.held[name] = Held(view, [fd for _, fd in fds])
        return RegisteredView(instance=view, handle=f"handle of {name}")

    async def adopt(self, caller: Caller, asked: Registration, pid: int, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        if pid != os.getpid():
            raise InvalidRequest(f"there is no process {pid}")
        taken = [(fd_name, self.files.adopt(os.dup(number))) for fd_name, number in fds]
        return await self.register(caller, asked, taken)

    async def register_opaque(self, caller: Caller, name: str, lifetime: Lifetime) -> RegisteredView:
        raise Refused("not here")

    async def finished(self, caller: Caller, handle: str) -> None:
        raise Refused("not here")

    async def discard(self, caller: Caller, name: str, *, owner: str = "") -> None:
        await self.unregister(caller, name)

    async def subscribe(self, caller: Caller, handles: Sequence[str]) -> AsyncIterator[LifecycleView]:
        raise Refused("not here")

    async def ready(
        self, caller: Caller, update: str, phase: str, handles: Sequence[str] = (), *, quiet_for: float = 0.0
    ) -> None:
        raise Refused("not here")

    async def failed(self, caller: Caller, update: str, phase: str, handles: Sequence[str], reason: str) -> None:
        raise Refused("not here")

    async def states(self, caller: Caller, handle: str) -> Sequence[tuple[str, int]]:
        raise Refused("not here")

    async def open_session(self, caller: Caller, handle: str) -> int:
        raise Refused("not here")

    async def unregister(self, caller: Caller, name: str = "", *, owner: str = "", handle: str = "") -> None:
        for fd in self._find(name).fds:
            self.files.close(fd)
        del self.held[name]

    async def instances(self) -> Sequence[InstanceView]:
        self.listed += 1
        if self.shown:
            return self.shown
        return tuple(self.held[name].view for name in sorted(self.held))

    async def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> ImageView:
        if not kernel.endswith("bzImage"):
            raise NotAKernel(kernel)
        line = "root=/dev/vda console=ttyS0" if cmdline is None else cmdline
        self.image = ImageView(kernel=kernel, initrd=initrd, cmdline=line, sha256="ab" * 32, size=12 << 20)
        return self.image

    async def plan(self) -> PlanView:
        return PlanView(
            steps=(StepView(phase="preparing", name="preserve", describe="preserve vm1 [1 descriptor]"),),
            memory=MemoryView(need=8 << 20, have=4 << 30, parts={"holes": 8 << 20, "states": 0}, holes_filled=8 << 20),
            blockers=() if self.image else ("no kernel is loaded: khoctl load",),
            kills=("sshd[12]", "bash[13]"),
            kills_total=40,
        )

    async def update(self, hold_at: State | None = None, *, jump: str = "") -> AsyncIterator[EventView]:
        if self.image is None:
            raise Refused("no kernel is loaded", hint="khoctl load KERNEL")
        if self._running is not None and not self._running.done():
            raise Refused("an update is under way")
        events: asyncio.Queue[EventView | None] = asyncio.Queue(100)
        self._go.clear()
        self._aborting = False
        self._running = asyncio.create_task(self._run(events, hold_at))
        return self._follow(events, self._running)

    async def _follow(self, events: asyncio.Queue[EventView | None], running: asyncio.Task[None]) -> AsyncIterator[EventView]:
        while (event := await events.get()) is not None:
            yield event
            events.task_done()
        await asyncio.shield(running)

    async def _run(self, events: asyncio.Queue[EventView | None], hold_at: State | None) -> None:
        time = 1_700_000_000_000_000_000
        try:
            for state in (State.PREPARING, State.PREPARED, State.FREEZING, State.FROZEN, State.EXECUTING):
                self.state = state
                time += 1_000_000
                await events.put(EventView(time=time, update="u1", state=state, kind="state", message=f"now {state}"))
                if state is self.hangs_at:
                    await events.join()  # the caller has been told
                    self.waiting = True
                    await self._go.wait()
                if state is hold_at:
                    self.waiting = True
                    await events.put(EventView(time=time, update="u1", state=state, kind="held", message="waiting"))
                    await self._go.wait()
                    self.waiting = False
                if self._aborting or (self.fails and state is State.FREEZING):
                    self.state = State.ABORTED
                    reason = "aborted" if self._aborting else self.fails
                    self.updates.insert(0, self._record(State.ABORTED, reason))
                    raise UpdateFailed(reason, hint="everything was undone")
            self.updates.insert(0, self._record(State.EXECUTING, ""))
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            await events.put(None)

    def _record(self, outcome: State, reason: str) -> UpdateView:
        return UpdateView(
            update="u1", started=1_700_000_000_000_000_000, outcome=outcome, reason=reason, from_release="7.3.0",
            to_release="7.3.1", spans=(SpanView(phase="preparing", instance="", seconds=1.25, uncertainty=0.01),),
            instances=tuple(self.held), left_behind=(), checked="16 pages of each",
        )  # fmt: skip

    async def proceed(self) -> None:
        if not self.waiting:
            raise Refused("nothing is held")
        self._go.set()

    async def abort(self) -> str:
        if not self.waiting or self._running is None:
            raise Refused("no update is under way", hint="khoctl status says what is")
        self._aborting = True
        self._go.set()
        await asyncio.wait([self._running])
        return self.state

    async def claim(
        self,
        caller: Caller,
        name: str,
        *,
        owner: str = "",
        lifetime: Lifetime | None = None,
        unverified: bool = False,
    ) -> ClaimView:
        if name not in self.held:
            return ClaimView(answer="cold", reason=f"no instance {name} came")
        held = self.held[name]
        if held.view.problem and not unverified:
            return ClaimView(answer="hold", reason=held.view.problem)
        held.view = replace(held.view, state="claimed", owner=str(caller.owner))
        fds = [self.files.duplicate(fd) for fd in held.fds]
        return ClaimView(answer="fds", reason="", names=tuple(held.view.fds), fds=tuple(fds))

    def damage(self, name: str) -> None:
        """From now on `name` is damaged."""
        held = self.held[name]
        held.view = replace(held.view, state="damaged", problem="frame 5 is not where it was")

    async def finish(self) -> Sequence[str]:
        damaged = [name for name, held in self.held.items() if held.view.problem]
        if damaged:
            raise Refused(f"{damaged[0]} is damaged")
        return tuple(name for name, held in self.held.items() if held.view.state != "claimed")

    async def history(self, limit: int = 20) -> Sequence[UpdateView]:
        return tuple(self.updates[:limit])

    async def inspect(self) -> InspectionView:
        return InspectionView(
            source="outgoing", tree='/dts-v1/;\n\n/ {\n    compatible = "linux-kho,v1";\n};\n', map_address=0x12345000,
            map_pages=174, map_sha256="cd" * 32, orders=(OrderView(order=9, folios=3, bitmaps=1, bytes=6 << 20),),
        )  # fmt: skip

    def _find(self, name: str) -> Held:
        if name not in self.held:
            raise InvalidRequest(f"no instance is called {name!r}", hint="khoctl instances lists them")
        return self.held[name]


def _is_a_service(fake: FakeService) -> Service:
    """mypy's proof."""
    return fake
