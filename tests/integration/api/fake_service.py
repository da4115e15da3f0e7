# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small khod in memory, for tests of what stands between it and people: it keeps state, holds descriptors, and refuses."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from khod.core.callers import Caller, Lifetime, Owner, Presence, Right
from khod.core.service import Registration, Service
from khod.core.state import State
from khod.core.views import (
    CheckView,
    ClaimView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    LifecycleView,
    MemoryView,
    OrderView,
    PlanView,
    PreflightView,
    RegisteredView,
    SpanView,
    StatusView,
    StepView,
    UpdateView,
)
from khod.errors import BadDescriptor, FdNotPreservable, InvalidRequest, NotAKernel, NotPermitted, Refused, UpdateFailed


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


@dataclass(eq=False)
class Held:
    owner: Owner
    view: InstanceView
    fds: list[int]
    handle: str
    asked: Registration | None = None
    """None for an opaque one."""
    told: asyncio.Queue[LifecycleView | None] | None = None
    """Of its subscriber."""


class FakeService:
    """See `khod.core.service.Service`."""

    def __init__(self, files: FakeFiles) -> None:
        self.files = files
        self.state = State.IDLE
        self.held: dict[tuple[str, str], Held] = {}
        """By owner and name."""
        self.answers: list[tuple[str, ...]] = []
        """READY and FAILED, as they came."""
        self.jumps: list[str] = []
        self.overrides: list[str] = []
        """How each update was to jump."""
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
        for held in list(self.held.values()):
            self._drop(held)

    def of(self, name: str) -> Held:
        """The only one of that name."""
        (held,) = [held for held in self.held.values() if held.view.name == name]
        return held

    def start_anew(self) -> None:
        """As if nothing had been."""
        self.forget()
        self.state = State.IDLE

    def came_through(self) -> None:
        """As if after a jump: everything is restored, nobody holds it, and handles are void."""
        self.state = State.RESTORED
        for held in self.held.values():
            held.view = replace(held.view, state="restored", keeper="")
            held.handle = f"old-{held.handle}"

    def tell(self, name: str, view: LifecycleView | None) -> None:
        """The subscriber of an instance; None ends it."""
        told = self.of(name).told
        assert told is not None
        told.put_nowait(view)

    def _drop(self, held: Held) -> None:
        if self.held.pop((str(held.owner), held.view.name), None) is not None:
            for fd in held.fds:
                self.files.close(fd)

    async def status(self) -> StatusView:
        return StatusView(
            state=self.state, update="u1" if self.updates else "", held=self.waiting, boot_id="b00t", release="7.3.0",
            version="0.1.0", device="ok", image=self.image, instances=len(self.held), unclaimed=0,
            pinned=sum(held.view.size for held in self.held.values()),
            problems=[held.view.problem for held in self.held.values() if held.view.problem],
        )  # fmt: skip

    async def register(self, caller: Caller, asked: Registration, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        try:
            if asked.driver == "broken":
                raise ZeroDivisionError("a bug")
            if asked.driver != "guestmemfd":
                raise InvalidRequest(f"no driver is called {asked.driver!r}", hint="known is guestmemfd")
            sizes = [os.fstat(self.files.table[fd]).st_size for _, fd in fds]
            if not sizes:
                raise FdNotPreservable("nothing was given")
            view = self._view(caller, asked.name, asked.lifetime)
        except BaseException:
            for _, fd in fds:
                self.files.close(fd)
            raise
        names = (*(name for name, _ in fds), *(state.name for state in asked.states))
        view = replace(
            view, driver=asked.driver, compatible="khod,guestmemfd-v1", required=asked.required, requires=tuple(asked.requires),
            size=sum(sizes), fds=names, detail=dict(asked.options) | ({"shareable": "yes"} if asked.shareable else {}),
        )  # fmt: skip
        return self._hold(caller, view, [fd for _, fd in fds], asked)

    async def adopt(self, caller: Caller, asked: Registration, pid: int, fds: Sequence[tuple[str, int]]) -> RegisteredView:
        if pid != os.getpid():
            raise InvalidRequest(f"there is no process {pid}")
        taken = [(fd_name, self.files.adopt(os.dup(number))) for fd_name, number in fds]
        return await self.register(caller, asked, taken)

    async def register_opaque(self, caller: Caller, name: str, lifetime: Lifetime) -> RegisteredView:
        return self._hold(caller, replace(self._view(caller, name, lifetime), grade="opaque"), [], None)

    def _view(self, caller: Caller, name: str, lifetime: Lifetime) -> InstanceView:
        if (str(caller.owner), name) in self.held:
            raise Refused(f"{name} is registered already", hint="unregister it first")
        if lifetime is Lifetime.PERSISTENT and not caller.may(Right.OPERATE):
            raise NotPermitted("a persistent instance takes the right to operate")
        keeper = "" if lifetime is Lifetime.PERSISTENT else f"process {caller.pid}"
        return InstanceView(
            name=name, driver="", compatible="", owner=str(caller.owner), required=True, requires=(), state="registered",
            size=0, fds=(), lifetime=lifetime, keeper=keeper,
        )  # fmt: skip

    def _hold(self, caller: Caller, view: InstanceView, fds: list[int], asked: Registration | None) -> RegisteredView:
        held = Held(caller.owner, view, fds, secrets.token_hex(16), asked)
        self.held[str(caller.owner), view.name] = held
        self._keep(held, caller.keeper(Lifetime(view.lifetime)))
        return RegisteredView(instance=view, handle=held.handle)

    def _keep(self, held: Held, keeper: Presence | None) -> None:
        if keeper is not None:
            keeper.on_end(lambda: self._drop(held))

    def _find(self, caller: Caller, name: str, owner: str = "", handle: str = "") -> Held:
        if handle:
            found = [held for held in self.held.values() if held.handle == handle]
        else:
            found = [held for held in self.held.values() if held.view.name == name]
            mine = [held for held in found if str(held.owner) == (owner or str(caller.owner))]
            found = mine or ([] if owner else found)
        if not found:
            raise InvalidRequest(f"no instance is called {handle or name!r}", hint="khoctl instances lists them")
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} are called {name!r}")
        if found[0].owner != caller.owner and not caller.may(Right.ADMINISTER):
            raise NotPermitted(f"{name or 'that'} is another's")
        return found[0]

    async def unregister(self, caller: Caller, name: str = "", *, owner: str = "", handle: str = "") -> None:
        held = self._find(caller, name, owner, handle)
        if held.view.state == "restored":
            raise Refused(f"{held.view.name} came through a jump and is not claimed", hint="khoctl discard")
        self._drop(held)

    async def finished(self, caller: Caller, handle: str, *, ran: float = 0.0) -> None:
        held = self._find(caller, "", handle=handle)
        held.view = replace(held.view, state="registered")
        self.answers.append(("finished", held.view.name, str(ran)))

    async def discard(self, caller: Caller, name: str, *, owner: str = "") -> None:
        self._drop(self._find(caller, name, owner))

    async def subscribe(self, caller: Caller, handles: Sequence[str]) -> AsyncIterator[LifecycleView]:
        found = [self._find(caller, "", handle=handle) for handle in handles]
        if any(held.told for held in found):
            raise Refused("there is a subscriber")
        told: asyncio.Queue[LifecycleView | None] = asyncio.Queue()
        told.put_nowait(LifecycleView(phase="subscribed", update="", handles=tuple(handles), reason=self.state))
        for held in found:
            held.told = told
        return self._lifecycle(found, told)

    async def _lifecycle(self, found: list[Held], told: asyncio.Queue[LifecycleView | None]) -> AsyncIterator[LifecycleView]:
        try:
            while (view := await told.get()) is not None:
                yield view
        finally:
            for held in found:
                held.told = None

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
        names = [self._find(caller, "", handle=handle).view.name for handle in handles]
        self.answers.append(("ready", update, phase, *names, str(quiet_for), str(stood)))

    async def failed(self, caller: Caller, update: str, phase: str, handles: Sequence[str], reason: str) -> None:
        names = [self._find(caller, "", handle=handle).view.name for handle in handles]
        self.answers.append(("failed", update, phase, *names, reason))

    async def states(self, caller: Caller, handle: str) -> Sequence[tuple[str, int]]:
        held = self._find(caller, "", handle=handle)
        if held.asked is None or not held.asked.states:
            raise Refused(f"{held.view.name} has no states")
        made = []
        for state in held.asked.states:
            real = os.memfd_create(state.name, os.MFD_CLOEXEC)
            os.truncate(real, state.size + 8)
            made.append((state.name, self.files.adopt(real)))
        held.fds += [self.files.duplicate(fd) for _, fd in made]
        return made

    async def open_session(self, caller: Caller, handle: str) -> int:
        held = self._find(caller, "", handle=handle)
        if held.view.grade != "opaque" or held.fds:
            raise Refused(f"{held.view.name} gets no session")
        fd = self.files.adopt(os.memfd_create("session", os.MFD_CLOEXEC))
        held.fds.append(self.files.duplicate(fd))
        held.view = replace(held.view, fds=("session",))
        return fd

    async def instances(self) -> Sequence[InstanceView]:
        self.listed += 1
        if self.shown:
            return self.shown
        return tuple(self.held[key].view for key in sorted(self.held))

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

    async def preflight(
        self, kernel: str = "", initrd: str = "", cmdline: str | None = None, *, overrides: Sequence[str] = ()
    ) -> PreflightView:
        self.overrides = list(overrides)
        there = kernel or (self.image.kernel if self.image else "")
        image = CheckView(
            name="image", verdict="ok" if there else "blocker", evidence=there or "no kernel is named",
            remedy="" if there else "khoctl load", overridable=not there, overridden="image" in overrides,
        )  # fmt: skip
        config = CheckView(
            name="config", verdict="unknown", evidence=f"[{initrd}] [{cmdline}]", remedy="", overridable=False
        )  # fmt: skip
        verdict = "unknown" if there or image.overridden else "blocker"
        return PreflightView(running="7.3.4", target="7.4.0" if there else "", verdict=verdict, checks=(config, image))

    async def update(
        self, hold_at: State | None = None, *, jump: str = "", overrides: Sequence[str] = ()
    ) -> AsyncIterator[EventView]:
        if self.image is None:
            raise Refused("no kernel is loaded", hint="khoctl load KERNEL")
        if self._running is not None and not self._running.done():
            raise Refused("an update is under way")
        if jump not in ("", "direct", "systemd"):
            raise InvalidRequest(f"{jump!r} is no way to jump")
        self.jumps.append(jump)
        self.overrides = list(overrides)
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
            instances=tuple(name for _, name in self.held), left_behind=(), checked="16 pages of each",
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
        exclusive: bool = False,
    ) -> ClaimView:
        if unverified and not caller.may(Right.ADMINISTER):
            raise NotPermitted("that takes the right to administer")
        try:
            held = self._find(caller, name, owner)
        except NotPermitted as refusal:
            return ClaimView(answer="hold", reason=refusal.message)
        except InvalidRequest:
            return ClaimView(answer="cold", reason=f"no instance {name} came")
        if held.view.problem and not unverified:
            return ClaimView(answer="hold", reason=held.view.problem)
        states = tuple(state.name for state in held.asked.states) if held.asked else ()
        fds = [self.files.duplicate(fd) for fd in held.fds]
        names = tuple(held.view.fds)[: len(fds)]
        if held.view.state == "restored":
            held.handle = secrets.token_hex(16)
            held.view = replace(held.view, lifetime=lifetime or held.view.lifetime)
            self._keep(held, caller.keeper(Lifetime(held.view.lifetime)))
        held.view = replace(held.view, state="claimed")
        return ClaimView(
            answer="fds", reason="", names=names, fds=tuple(fds), states=tuple(n for n in states if n in names),
            handle=held.handle,
        )  # fmt: skip

    def damage(self, name: str) -> None:
        """From now on `name` is damaged."""
        held = self.of(name)
        held.view = replace(held.view, state="damaged", problem="frame 5 is not where it was")

    async def finish(self) -> Sequence[str]:
        damaged = [held.view.name for held in self.held.values() if held.view.problem]
        if damaged:
            raise Refused(f"{damaged[0]} is damaged")
        return tuple(held.view.name for held in self.held.values() if held.view.state != "claimed")

    async def history(self, limit: int = 20) -> Sequence[UpdateView]:
        return tuple(self.updates[:limit])

    async def inspect(self) -> InspectionView:
        return InspectionView(
            source="outgoing", tree='/dts-v1/;\n\n/ {\n    compatible = "linux-kho,v1";\n};\n', map_address=0x12345000,
            map_pages=174, map_sha256="cd" * 32, orders=(OrderView(order=9, folios=3, bitmaps=1, bytes=6 << 20),),
        )  # fmt: skip


def _is_a_service(fake: FakeService) -> Service:
    """mypy's proof."""
    return fake
