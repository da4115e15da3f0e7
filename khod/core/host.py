# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod itself: a `khod.core.service.Service` over one machine. Joins registry, updates, restoration and the journal."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from khod import __version__
from khod.core import views
from khod.core.blocking import blocking
from khod.core.checks import blockers
from khod.core.clients import Client
from khod.core.driver import Drivers
from khod.core.events import Broadcast
from khod.core.history import update_view
from khod.core.incoming import Incoming
from khod.core.inspection import inspect_incoming, inspect_nothing, inspect_outgoing
from khod.core.instances import Registration, instance_view, new_entry
from khod.core.journal import Journal
from khod.core.ports import Image, Machine
from khod.core.registry import Entry, InstanceState, Registry
from khod.core.settings import Settings
from khod.core.startup import Startup
from khod.core.state import HOLDABLE, State
from khod.errors import InvalidRequest, KhodError, MachineError, Refused, UpdateFailed

if TYPE_CHECKING:
    from khod.core.update import Update

logger = logging.getLogger(__name__)


class Host:
    """One khod. `start` must have returned before anything else is called."""

    def __init__(self, machine: Machine, settings: Settings, drivers: Drivers) -> None:
        self.machine, self.settings, self.drivers = machine, settings, drivers
        self.boot = machine.boot.boot()
        self.journal = Journal(machine.store, self.boot, lambda: machine.clock.stamp().realtime)
        self.registry = Registry()
        self.clients: list[Client] = []
        self.incoming: Incoming | None = None
        self.problems: list[str] = []
        self.last_update: Update | None = None
        self._state = State.IDLE
        self._ident = ""
        self._image: Image | None = None
        self._events = Broadcast()
        self._lock = asyncio.Lock()
        self._startup: Startup | None = None
        self._verifying: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """Where khod is."""
        return self.last_update.state if self.last_update else self._state

    async def start(self) -> State:
        """Find out which boot this is, and undo or restore accordingly (decisions 14 and 21).

        Raises MachineError when that cannot be known now (the device is held by somebody): nothing was lost by it, start
        again. After it, `verify` compares what restoring has left to be compared.
        """
        startup = Startup(self.machine, self.settings, self.drivers, self.journal, self.boot)
        self._state = await startup.run()
        self._ident = startup.update
        self.incoming = startup.incoming
        self.problems = startup.problems
        for entry in startup.entries:
            self.registry.add_restored(entry)
        self._startup = startup
        return self._state

    def verify(self) -> asyncio.Task[None] | None:
        """Begin the verification beside the workload, once: when those who wait for their memory can be answered. None when
        there is nothing to verify."""
        if self._verifying is None and self._startup is not None and self._state is State.RESTORED:
            self._verifying = asyncio.create_task(self._startup.verify(self.problems), name="verify")
        return self._verifying

    async def verified(self) -> None:
        """Wait until it is through."""
        if (verifying := self.verify()) is not None:
            await asyncio.shield(verifying)

    def attach(self, client: Client) -> None:
        """From now on this client is asked and told."""
        self.clients.append(client)

    def detach(self, client: Client) -> None:
        """It is not any more."""
        self.clients.remove(client)

    def keeps_from_exit(self) -> str:
        """Why khod must not exit now (decision 25); '' when it may."""
        alone = [e.name for e in self.registry if e.state.unclaimed]
        if self.state.outgoing:
            return f"an update is {self.state}"
        if alone:
            return f"nobody but khod holds the memory of {', '.join(alone)}"
        return ""

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
            update=self.last_update.id if self.last_update else self._ident,
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
        return [await instance_view(self.machine, entry) for entry in self.registry]

    async def plan(self) -> views.PlanView:
        """See Service."""
        entries = list(self.registry)
        found, need = await blockers(self.machine, self.settings, entries, self._image)
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
    ) -> views.InstanceView:
        """See Service."""
        entry: Entry | None = None
        try:
            async with self._lock:
                self._require_still("register an instance")
                request = Registration(name, driver, fds, owner, required, tuple(requires), options or {})
                entry = await new_entry(self.machine, self.registry, self.drivers, request)
                self.registry.add(entry)
        except BaseException:
            for _, fd in fds:
                self.machine.files.close(fd)
            raise
        return await instance_view(self.machine, entry)

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
    ) -> views.InstanceView:
        """See Service."""
        taken: list[tuple[str, int]] = []
        try:
            for fd_name, number in fds:
                taken.append((fd_name, await blocking(self.machine.processes.descriptor, pid, number)))
        except BaseException:
            for _, fd in taken:
                self.machine.files.close(fd)
            raise
        return await self.register(name, driver, taken, owner=owner, required=required, requires=requires, options=options)

    async def unregister(self, name: str) -> None:
        """See Service."""
        async with self._lock:
            self._require_still("unregister an instance")
            entry = self.registry.remove(name)
            if not entry.state.sound:
                self.journal.note(self._ident, "discarded", name=name, owner=entry.owner, problem=entry.problem)
            await blocking(entry.close, self.machine)

    async def claim(self, name: str, *, owner: str, unverified: bool = False) -> views.ClaimView:
        """See Service."""
        async with self._lock:
            if name not in self.registry:
                return self._claim_unknown(name)
            entry = self.registry.get(name)
            if entry.state in (InstanceState.PRESERVED, InstanceState.FROZEN):
                return _hold(f"{name} is {entry.state}: an update is {self.state}")
            if not entry.state.sound and not unverified:
                return _hold(f"{name} is {entry.state}: {entry.problem}")
            if not entry.fds:
                return _hold(f"{name}: nothing of it could be retrieved: {entry.problem}")
            self.journal.note(
                self._ident, "claimed", name=name, owner=owner, unverified=not entry.state.sound, problem=entry.problem
            )
            fds = [self.machine.files.duplicate(fd) for fd in entry.fds.values()]
            if entry.state is not InstanceState.REGISTERED:
                entry.state = InstanceState.CLAIMED
            return views.ClaimView(answer="fds", reason=entry.problem, names=list(entry.fds), fds=fds)

    def _claim_unknown(self, name: str) -> views.ClaimView:
        """No such instance: it never was, or what came through cannot be read (decision 24)."""
        if self.state in (State.FAILED, State.UNREACHABLE, State.RESTORING):
            return _hold(f"no instance {name!r} is known, and the last update is {self.state}: it may exist")
        return views.ClaimView(answer="cold", reason=f"no instance {name!r} came through")

    # Service: updates

    async def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> views.ImageView:
        """See Service."""
        async with self._lock:
            self._require_still("name another kernel")
            image = await blocking(self.machine.kexec.open, kernel, initrd, cmdline)
            await self._drop_image()
            self._image = image
            return _image_view(image)

    async def _drop_image(self) -> None:
        if self._image is not None:
            image, self._image = self._image, None
            await blocking(self.machine.kexec.release, image)

    async def update(self, hold_at: State | None = None) -> AsyncIterator[views.EventView]:
        """See Service."""
        if hold_at is not None and not hold_at.holdable:
            raise InvalidRequest(f"cannot hold at {hold_at}", hint=f"one of {', '.join(HOLDABLE)}")
        async with self._lock:
            if not self.state.resting:
                raise Refused(f"no update can start while khod is {self.state}", hint="see `khoctl status`")
            entries = list(self.registry)
            found, _ = await blockers(self.machine, self.settings, entries, self._image)
            if found:
                raise Refused(f"the update is refused: {'; '.join(found)}")
            if self.incoming is not None:
                await self._finish()  # decision 7: what is not finished is not passed on
            self.problems = []
            update = self.last_update = self._new_update(secrets.token_hex(8), entries, hold_at)
            events = self._events.listen()
            task = update.start()
            task.add_done_callback(self._ended)
        return self._follow(update, task, events)

    def _new_update(self, ident: str, entries: list[Entry], hold_at: State | None) -> Update:
        from khod.core.update import Update  # numpy is behind it: not on the way to restored

        return Update(
            ident,
            machine=self.machine,
            settings=self.settings,
            boot=self.boot,
            journal=self.journal,
            events=self._events,
            entries=entries,
            clients=self.clients,
            image=self._image,
            hold_at=hold_at,
        )

    def _ended(self, task: asyncio.Task[State]) -> None:
        self._events.close()
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            logger.error("the update ended by %r", error)

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
        if self.last_update is None or not (self.last_update.state.outgoing or self.last_update.state is State.FAILED):
            raise Refused("no update is under way")
        return await self.last_update.abort()

    async def finish(self) -> Sequence[str]:
        """See Service."""
        async with self._lock:
            return await self._finish()

    async def _finish(self) -> list[str]:
        if self.incoming is None or self.state not in (State.RESTORED, State.FAILED):
            raise Refused("there is nothing to finish", hint=f"khod is {self.state}")
        await self.verified()
        if unsound := [f"{e.name} is {e.state}: {e.problem}" for e in self.registry if not e.state.sound]:
            raise Refused(
                f"not finished: {'; '.join(unsound)}",
                hint="`khoctl claim --unverified` hands out what is damaged, `khoctl unregister` discards it",
            )
        self._set_state(State.FINISHING)
        try:
            for entry in self.registry:
                await self._finish_one(entry)
            await blocking(self.machine.liveupdate.finish, self.incoming.session)
            await blocking(self.incoming.close, self.machine)
        except KhodError:
            self._set_state(State.FAILED)  # from where it can be tried again
            raise
        self.incoming = None
        self._set_state(State.IDLE)
        return [e.name for e in self.registry if e.state is InstanceState.RESTORED]

    async def _finish_one(self, entry: Entry) -> None:
        """Everything of its session is retrieved and held: finishing frees nothing."""
        if entry.session < 0:
            return
        await blocking(self.machine.liveupdate.finish, entry.session)
        await blocking(entry.close_session, self.machine)
        if entry.driver is not None:
            try:
                await entry.driver.finish(entry.view(self.machine))
            except KhodError as error:
                self.problems.append(f"{entry.name}: its driver could not finish it: {error}")

    def _set_state(self, state: State, **data: Any) -> None:
        self._state = state
        self.journal.note(self._ident, "state", state=state, **data)

    def _require_still(self, what: str) -> None:
        if self.state not in (State.IDLE, State.ABORTED, State.RESTORED, State.LOST, State.FAILED, State.UNREACHABLE):
            raise Refused(f"cannot {what} while khod is {self.state}", hint="wait for the update, or `khoctl abort`")

    async def close(self) -> None:
        """Let go of everything; what nobody else holds is freed by the kernel. Ask `keeps_from_exit` first."""
        if self.last_update is not None and self.last_update.state.outgoing:
            await self.last_update.abort()
        if self._verifying is not None:
            self._verifying.cancel()
            await asyncio.wait([self._verifying])
        await self._drop_image()
        for entry in self.registry:
            await blocking(entry.close, self.machine)
        if self.incoming is not None:
            await blocking(self.incoming.close, self.machine)


def _image_view(image: Image) -> views.ImageView:
    return views.ImageView(
        kernel=image.kernel, initrd=image.initrd, cmdline=image.cmdline, sha256=image.sha256, size=image.size
    )


def _hold(reason: str) -> views.ClaimView:
    return views.ClaimView(answer="hold", reason=reason)
