# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod itself: a `khod.core.service.Service` over one machine. Joins registry, updates, restoration and the journal."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

from khod import __version__
from khod.core import views
from khod.core.alerts import Alert, alert, alert_start
from khod.core.blocking import blocking
from khod.core.broker import check_seconds
from khod.core.callers import Caller, Lifetime
from khod.core.driver import Drivers
from khod.core.events import Broadcast
from khod.core.finishing import Finisher
from khod.core.history import update_view
from khod.core.holdings import Holdings
from khod.core.incoming import Incoming
from khod.core.inspection import inspect_incoming, inspect_nothing, inspect_outgoing
from khod.core.journal import Journal
from khod.core.keepers import Watch
from khod.core.ledger import Ledger
from khod.core.ports import Image, Machine, Stamp
from khod.core.preflight.preflight import Preflight
from khod.core.question import Phase
from khod.core.registry import Entry, Grade, InstanceState
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.startup import Startup
from khod.core.state import HOLDABLE, State
from khod.errors import InvalidRequest, KhodError, MachineError, Refused, UpdateFailed

if TYPE_CHECKING:
    from khod.core.update import Update

logger = logging.getLogger(__name__)


def _nobody(pid: int) -> None:
    """A host whose processes cannot be watched."""


_MAKE_ROOM = "the file system of `state_directory` must have room and be writable"


class Host:
    """One khod. `start` must have returned before anything else is called.

    `watch` finds a living process, for instances that hang on one.
    """

    def __init__(self, machine: Machine, settings: Settings, drivers: Drivers, watch: Watch = _nobody) -> None:
        self.machine, self.settings, self.drivers = machine, settings, drivers
        self.boot = machine.boot.boot()
        self.journal = Journal(machine.store, self.boot, lambda: machine.clock.stamp().realtime)
        self.holdings = Holdings(machine, settings, drivers, self.journal, self, watch)
        self.registry, self.book, self.broker = self.holdings.registry, self.holdings.book, self.holdings.broker
        self.incoming: Incoming | None = None
        self.problems: list[str] = []
        self.last_update: Update | None = None
        self._preflight = Preflight(machine, settings, self.broker)
        self._finisher = Finisher(machine, self.registry, self.book, self.problems)
        self._state = State.IDLE
        self._ident = ""
        self._image: Image | None = None
        self._events = Broadcast()
        self._lock = self.holdings.lock
        self._startup: Startup | None = None
        self._verifying: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Where khod is."""
        return self.last_update.state if self.last_update else self._state

    @property
    def update_id(self) -> str:
        """Of the update under way, or of the last one; ''."""
        return self.last_update.id if self.last_update else self._ident

    async def start(self, progress: Callable[[str, float], None] = lambda text, seconds: None) -> State:
        """Find out which boot this is, and undo or restore accordingly (decisions 14 and 21).

        Raises MachineError when that cannot be known now (the device is held by somebody): nothing was lost by it, start
        again. After it, `verify` compares what restoring has left to be compared. `progress` is told in a sentence whenever
        something is done on the way, and within how many seconds the next will be.
        """
        startup = Startup(self.machine, self.settings, self.drivers, self.journal, self.boot, self.book)
        startup.progress = progress
        self._state = await startup.run()
        self._ident = startup.update
        self.incoming = startup.incoming
        self.problems[:] = startup.problems
        self.holdings.take_up(startup.entries)
        self._startup = startup
        alert_start(logger, self._state, self._ident, self.problems)
        return self._state

    def verify(self) -> asyncio.Task[None] | None:
        """Begin the verification beside the workload, once: when those who wait for their memory can be answered. None when
        there is nothing to verify."""
        if self._verifying is None and self._startup is not None and self._state is State.RESTORED:
            self._verifying = asyncio.create_task(self._startup.verify(self.problems, self.registry.holds), name="verify")
        return self._verifying

    async def verified(self) -> None:
        """Wait until it is through: before anything is finished, and without the lock, for others want their memory now."""
        if (verifying := self.verify()) is not None:
            await asyncio.shield(verifying)

    def keeps_from_exit(self) -> str:
        """Why khod must not exit now; '' when it may. Memory is no reason: it is in custody (decision 25)."""
        return f"an update is {self.state}" if self.state.outgoing else ""

    def ended_in_update(self, entry: Entry) -> bool:
        """See `khod.core.holdings.Where`."""
        if self.last_update is None or not self.last_update.state.outgoing:
            return False
        self.last_update.instance_ended(entry)
        return True

    def let_go_of(self, entry: Entry) -> None:
        """See `khod.core.holdings.Where`: what could not be thawed needs it no more."""
        if self.last_update is not None:
            self.last_update.to_thaw.discard(entry)

    # Service: looking

    async def status(self) -> views.StatusView:
        """See Service."""
        try:
            await blocking(self.machine.liveupdate.probe)
            device = "ok"
        except MachineError as error:
            device = str(error)
        return views.StatusView(
            state=self.state,
            update=self.update_id,
            held=bool(self.last_update and self.last_update.held),
            boot_id=self.boot.boot_id,
            release=self.boot.release,
            version=__version__,
            device=device,
            image=_image_view(self._image) if self._image else None,
            instances=len(self.registry),
            unclaimed=sum(e.state.unclaimed for e in self.registry),
            pinned=sum(e.declaration.size for e in self.registry),
            problems=[*self.problems, *(self.last_update.problems if self.last_update else ())],
        )

    async def instances(self) -> Sequence[views.InstanceView]:
        """See Service."""
        return await self.holdings.view()

    async def plan(self) -> views.PlanView:
        """See Service."""
        entries = list(self.registry)
        found, need = await self._preflight.blockers(entries, self._image)
        if not self.state.resting:
            found.insert(0, f"khod is {self.state}")
        processes = await blocking(self.machine.processes.listing)
        update = self._new_update("0" * 16, entries, None)
        return views.PlanView(
            steps=update.plan(),
            memory=need.view(),
            blockers=found,
            kills=[f"{p.name}[{p.pid}]" for p in processes[:100]],
            kills_total=len(processes),
        )

    async def preflight(
        self, kernel: str = "", initrd: str = "", cmdline: str | None = None, *, overrides: Sequence[str] = ()
    ) -> views.PreflightView:
        """See Service."""
        if kernel:
            return await self._preflight.view_of(self.registry, kernel, initrd, cmdline, overrides)
        return await self._preflight.view(self.registry, self._image, overrides)

    async def history(self, limit: int = 20) -> Sequence[views.UpdateView]:
        """See Service."""
        idents = self.journal.updates()[::-1][: max(0, limit)]
        return [update_view(ident, self.journal.of(ident)) for ident in idents]

    async def inspect(self) -> views.InspectionView:
        """See Service."""
        if self.last_update is not None and self.last_update.outgoing.tree is not None:
            return inspect_outgoing(self.last_update.outgoing)
        if self.incoming is not None and self.incoming.tree is not None:
            return inspect_incoming(self.incoming)
        return inspect_nothing()

    # Service: instances

    async def register(self, caller: Caller, asked: Registration, fds: Sequence[tuple[str, int]]) -> views.RegisteredView:
        """See Service."""
        return await self.holdings.register(caller, asked, fds)

    async def adopt(
        self, caller: Caller, asked: Registration, pid: int, fds: Sequence[tuple[str, int]]
    ) -> views.RegisteredView:
        """See Service."""
        return await self.holdings.adopt(caller, asked, pid, fds)

    async def register_opaque(self, caller: Caller, name: str, lifetime: Lifetime) -> views.RegisteredView:
        """See Service."""
        return await self.holdings.register_opaque(caller, name, lifetime)

    async def unregister(self, caller: Caller, name: str = "", *, owner: str = "", handle: str = "") -> None:
        """See Service."""
        await self.holdings.unregister(caller, name, owner=owner, handle=handle)

    async def discard(self, caller: Caller, name: str, *, owner: str = "") -> None:
        """See Service."""
        await self.holdings.discard(caller, name, owner=owner)

    async def claim(
        self,
        caller: Caller,
        name: str,
        *,
        owner: str = "",
        lifetime: Lifetime | None = None,
        unverified: bool = False,
        exclusive: bool = False,
    ) -> views.ClaimView:
        """See Service."""
        return await self.holdings.claim(
            caller, name, owner=owner, lifetime=lifetime, unverified=unverified, exclusive=exclusive
        )

    async def finished(self, caller: Caller, handle: str, *, ran: float = 0.0) -> None:
        """See Service."""
        heard = self.machine.clock.stamp()
        check_seconds("ran", ran)
        await self.verified()
        async with self._lock:
            entry = self.registry.by_handle(caller, handle)
            if entry.state is not InstanceState.CLAIMED:
                raise Refused(f"{entry.label} is {entry.state}", hint="it is claimed first, and finished then")
            self._note_gap(entry, heard, ran)
            await self._finisher.one(entry)
            restored = self.incoming is not None and self.state is State.RESTORED
            if restored and not any(e.incoming for e in self.registry):
                await self._finish()

    def _note_gap(self, entry: Entry, heard: Stamp, ran: float) -> None:
        """Journal for how long its workload did not run. A disk that does not take it costs the figure."""
        gap = self._startup.gaps.take(entry.label, heard, ran) if self._startup else None
        if gap is None:
            return
        ledger = Ledger()
        ledger.add("blackout", gap[0], instance=entry.label, uncertainty=gap[1])
        try:
            self.journal.note(self._ident, "runs", spans=ledger.record())
        except KhodError as error:
            alert(logger, Alert.NO_JOURNAL, "the blackout of %s is not in the journal: %s", entry.label, error)

    # Service: the life cycle, for clients

    async def subscribe(self, caller: Caller, handles: Sequence[str]) -> AsyncIterator[views.LifecycleView]:
        """See Service."""
        entries = [self.registry.by_handle(caller, handle) for handle in handles]
        subscription = self.broker.subscribe(caller, handles)
        try:
            for entry in entries:
                self.holdings.keepers.came_back(entry, caller)
                await self.holdings.note(entry)
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

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
        """See Service."""
        self.broker.ready(caller, update, phase, handles, quiet_for=quiet_for, stood=stood)

    async def failed(self, caller: Caller, update: str, phase: str, handles: Sequence[str], reason: str) -> None:
        """See Service."""
        self.broker.failed(caller, update, phase, handles, reason)

    async def states(self, caller: Caller, handle: str) -> Sequence[tuple[str, int]]:
        """See Service."""
        entry = self.registry.by_handle(caller, handle)
        self.broker.check_asked(entry, Phase.QUIESCE)
        duplicate = self.machine.files.duplicate
        return [(bound.name, duplicate(entry.states[bound.name].fd)) for bound in entry.client_states]

    async def open_session(self, caller: Caller, handle: str) -> int:
        """See Service."""
        entry = self.registry.by_handle(caller, handle)
        if entry.grade is not Grade.OPAQUE:
            raise Refused(f"{entry.label} is not opaque", hint="its descriptors are khod's to preserve")
        if self.last_update is None:
            raise Refused(f"{entry.label}: no update is under way")
        return await self.last_update.open_session(entry)

    # Service: updates

    async def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> views.ImageView:
        """See Service."""
        async with self._lock:
            self.require_still("name another kernel")
            image = await blocking(self.machine.kexec.open, kernel, initrd, cmdline)
            await self._drop_image()
            self._image = image
            return _image_view(image)

    async def _drop_image(self) -> None:
        if self._image is not None:
            image, self._image = self._image, None
            await blocking(self.machine.kexec.release, image)

    async def update(
        self, hold_at: State | None = None, *, jump: str = "", overrides: Sequence[str] = ()
    ) -> AsyncIterator[views.EventView]:
        """See Service."""
        if jump not in ("", "direct", "systemd"):
            raise InvalidRequest(f"no way to jump is called {jump!r}", hint="direct or systemd")
        if hold_at is not None and hold_at not in HOLDABLE:
            raise InvalidRequest(f"cannot hold at {hold_at}", hint=f"one of {', '.join(HOLDABLE)}")
        await self.verified()
        async with self._lock:
            if not self.state.resting:
                raise Refused(f"no update can start while khod is {self.state}", hint="see `khoctl status`")
            entries = list(self.registry)
            overridden = await self._preflight.pass_over(entries, self._image, overrides)
            if self.incoming is not None:
                await self._finish()  # decision 7: what is not finished is not passed on
            update = self._new_update(secrets.token_hex(8), entries, hold_at, jump)
            update.overridden = overridden
            try:
                update.journal_preparing()
            except KhodError as error:
                raise Refused(f"no update can start, for the journal cannot be written: {error.message}", hint=_MAKE_ROOM)
            self.problems.clear()
            self.last_update = update
            events = self._events.listen()
            task = update.start()
            task.add_done_callback(self._ended)
        return self._follow(update, task, events)

    def _new_update(self, ident: str, entries: list[Entry], hold_at: State | None, jump: str = "") -> Update:
        from khod.core.update import Update  # numpy is behind it: not on the way to restored

        return Update(
            ident,
            machine=self.machine,
            settings=self.settings,
            boot=self.boot,
            journal=self.journal,
            events=self._events,
            entries=entries,
            broker=self.broker,
            book=self.book,
            image=self._image,
            hold_at=hold_at,
            jump=jump or self.settings.jump,
        )

    def _ended(self, task: asyncio.Task[State]) -> None:
        self._events.close()
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            logger.error("the update ended by %r", error)
        self.holdings.sweep()

    async def _follow(
        self, update: Update, task: asyncio.Task[State], events: AsyncIterator[views.EventView]
    ) -> AsyncIterator[views.EventView]:
        async for event in events:
            yield event
        await asyncio.shield(task)
        undone = "everything was undone" if not update.problems else f"could not undo: {'; '.join(update.problems)}"
        raise UpdateFailed(f"update {update.id}: {update.reason}; {undone}")

    async def proceed(self) -> None:
        """See Service."""
        if self.last_update is None or not self.last_update.proceed():
            raise Refused("nothing is held")

    async def abort(self) -> str:
        """See Service."""
        if self.last_update is not None and self.last_update.state is State.FAILED:
            async with self._lock:  # nothing of what is still to be undone is let go of meanwhile
                return await self.last_update.abort()
        if self.last_update is None or not self.last_update.state.outgoing:
            raise Refused("no update is under way")
        return await self.last_update.abort()

    async def finish(self) -> Sequence[str]:
        """See Service."""
        await self.verified()
        async with self._lock:
            return await self._finish()

    async def _finish(self) -> list[str]:
        if self.incoming is None or self.state not in (State.RESTORED, State.FAILED):
            raise Refused("there is nothing to finish", hint=f"khod is {self.state}")
        if found := self._finisher.blockers():
            raise Refused(
                f"not finished: {'; '.join(found)}",
                hint="`khoctl claim` hands it out (--unverified what is damaged), `khoctl discard` lets go of it for good",
            )
        self._set_state(State.FINISHING)
        try:
            for entry in self.registry:
                await self._finisher.one(entry)
            await self._finisher.bookkeeping(self.incoming)
        except KhodError:
            self._set_state(State.FAILED)  # from where it can be tried again
            raise
        self.incoming = None
        self._set_state(State.IDLE)
        return [e.label for e in self.registry if e.state is InstanceState.RESTORED]

    def _set_state(self, state: State, **data: Any) -> None:
        self._state = state
        self.journal.note(self._ident, "state", state=state, **data)

    def require_still(self, what: str) -> None:
        """Raises Refused while an update is under way."""
        if self.state not in (State.IDLE, State.ABORTED, State.RESTORED, State.LOST, State.FAILED, State.UNREACHABLE):
            raise Refused(f"cannot {what} while khod is {self.state}", hint="wait for the update, or `khoctl abort`")

    async def close(self) -> None:
        """Close everything; custody keeps what is registered and what came through. Ask `keeps_from_exit` first."""
        if self.last_update is not None and self.last_update.state.outgoing:
            await self.last_update.abort()
        if self._verifying is not None:
            self._verifying.cancel()
            await asyncio.wait([self._verifying])
        await self._drop_image()
        await self.holdings.close()
        if self.incoming is not None:
            await blocking(self.incoming.close, self.machine)


def _image_view(image: Image) -> views.ImageView:
    return views.ImageView(
        kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline, sha256=image.sha256, size=image.size
    )
