# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod holds for its clients: taken in, handed out, and let go of, by request or when what it hangs on ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from khod.core import resumed, views
from khod.core.alerts import Alert, alert
from khod.core.blocking import blocking
from khod.core.book import Book
from khod.core.broker import Broker
from khod.core.callers import Caller, Lifetime, Presence
from khod.core.claims import Claims
from khod.core.driver import Drivers
from khod.core.instances import instance_view, new_entry, new_opaque
from khod.core.journal import Journal
from khod.core.keepers import Keepers, Watch
from khod.core.ports import Machine
from khod.core.registry import Entry, Registry
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.state import State
from khod.errors import InvalidRequest, Lost, Refused

logger = logging.getLogger(__name__)


class Where(Protocol):
    """Where khod is, as far as what it holds depends on that."""

    @property
    def state(self) -> State:
        """Its state."""
        ...

    @property
    def update_id(self) -> str:
        """Of the update under way, or of the last one."""
        ...

    def require_still(self, what: str) -> None:
        """Raises Refused while an update is under way."""
        ...

    def ended_in_update(self, entry: Entry) -> bool:
        """Whether an update is under way, which has been told that the entry's keeper is gone."""
        ...

    def let_go_of(self, entry: Entry) -> None:
        """Told of each that is forgotten."""
        ...


class Holdings:
    """Everything that is registered or came through. `lock` is held whenever something is added or taken out."""

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        drivers: Drivers,
        journal: Journal,
        where: Where,
        watch: Watch,
    ) -> None:
        self.machine, self.settings, self.drivers, self.journal = machine, settings, drivers, journal
        self.lock = asyncio.Lock()
        self.registry = Registry()
        self.book = Book(machine)
        self.broker = Broker(self.registry, machine.clock, lambda: (where.state, where.update_id))
        self.keepers = Keepers(watch, self.registry, self._keeper_ended)
        self._where = where
        self._claims = Claims(machine, self.registry, journal, self.broker)
        self._ending: set[asyncio.Task[None]] = set()

    def take_up(self, entries: Sequence[Entry]) -> None:
        """What a khod finds at its start."""
        for entry in entries:
            self.registry.put(entry)
        resumed.hang(self.keepers, self.registry)
        self.keepers.resume([e for e in self.registry if not e.state.unclaimed], self.settings.reconnect)
        if any(e.state.unclaimed for e in self.registry):
            asyncio.get_running_loop().call_later(self.settings.orphans_after, self.report_orphans)

    async def view(self) -> Sequence[views.InstanceView]:
        """All of it, for people."""
        orphans = set(self.orphans())
        return [await instance_view(self.machine, entry, orphan=entry in orphans) for entry in self.registry]

    # In and out

    async def register(self, caller: Caller, asked: Registration, fds: Sequence[tuple[str, int]]) -> views.RegisteredView:
        """See `khod.core.service.Service`."""

        def keeper() -> Presence | None:
            return caller.keeper(asked.lifetime)

        entry = await self._register(caller, asked, fds, keeper, lambda: caller.process, caller.pid)
        return await self._registered(entry)

    async def _register(
        self,
        caller: Caller,
        asked: Registration,
        fds: Sequence[tuple[str, int]],
        keeper: Callable[[], Presence | None],
        holder: Callable[[], Presence | None],
        pid: int,
    ) -> Entry:
        """An entry in the registry, its descriptors in custody, that hangs on what `keeper` finds, and that the process has
        which `holder` finds; both are of process `pid`.

        They are asked in the same breath: a process that nothing hangs on is not watched for long.
        """
        async with self.lock:
            try:
                self._where.require_still("register an instance")
                entry = await new_entry(self.machine, self.registry, self.drivers, self.settings, caller, asked, fds)
                self.registry.add(entry)
            except BaseException:
                await blocking(self._close, [fd for _, fd in fds])
                raise
            try:
                await blocking(self.book.deposit, entry)
                presence = keeper()
                if presence is None and asked.lifetime is not Lifetime.PERSISTENT:
                    raise InvalidRequest(f"there is no process {pid} to keep {entry.label}")
                self.keepers.hang(entry, presence, pid)
                self.keepers.hold(entry, holder(), pid)
                await blocking(self.book.put, entry)
            except BaseException:
                await self._let_go(entry)
                raise
            return entry

    def _close(self, fds: Sequence[int]) -> None:
        """Blocks: the last descriptor of a memfd frees its memory."""
        for fd in fds:
            self.machine.files.close(fd)

    async def _registered(self, entry: Entry) -> views.RegisteredView:
        return views.RegisteredView(instance=await instance_view(self.machine, entry), handle=entry.handle)

    async def adopt(
        self, caller: Caller, asked: Registration, pid: int, fds: Sequence[tuple[str, int]]
    ) -> views.RegisteredView:
        """See `khod.core.service.Service`."""
        if asked.lifetime is Lifetime.CONNECTION:
            asked = replace(asked, lifetime=Lifetime.PROCESS)
        taken: list[tuple[str, int]] = []
        try:
            for fd_name, number in fds:
                taken.append((fd_name, await blocking(self.machine.processes.descriptor, pid, number)))
        except BaseException:
            await blocking(self._close, [fd for _, fd in taken])
            raise
        lasting = asked.lifetime is Lifetime.PERSISTENT

        def process() -> Presence | None:
            return self.keepers.watch(pid)

        entry = await self._register(caller, asked, taken, lambda: None if lasting else process(), process, pid)
        return await self._registered(entry)

    async def note(self, entry: Entry) -> None:
        """Note how an entry stands now, unless it has been let go of."""
        async with self.lock:
            if self.registry.holds(entry):
                await blocking(self.book.put, entry)

    async def register_opaque(self, caller: Caller, name: str, lifetime: Lifetime) -> views.RegisteredView:
        """See `khod.core.service.Service`."""
        async with self.lock:
            self._where.require_still("register an instance")
            entry = new_opaque(self.machine, self.registry, self.settings, caller, name, lifetime)
            self.registry.add(entry)
            try:
                self.keepers.bind(entry, caller)
                await blocking(self.book.put, entry)
            except BaseException:
                await self._let_go(entry)
                raise
        return await self._registered(entry)

    def _find(self, caller: Caller, name: str, owner: str, handle: str = "") -> Entry:
        return self.registry.by_handle(caller, handle) if handle else self.registry.find(caller, name, owner)

    async def unregister(self, caller: Caller, name: str = "", *, owner: str = "", handle: str = "") -> None:
        """See `khod.core.service.Service`."""
        async with self.lock:
            self._where.require_still("unregister an instance")
            entry = self._find(caller, name, owner, handle)
            if entry.state.unclaimed:
                raise Refused(
                    f"{entry.label} came through a jump and is {entry.state}: nobody has claimed it",
                    hint=f"`khoctl claim {entry.name}` hands it out, `khoctl discard {entry.name}` lets go of it for good",
                )
            self.registry.check_removable(entry)
            await self._let_go(entry)

    async def discard(self, caller: Caller, name: str, *, owner: str = "") -> None:
        """See `khod.core.service.Service`."""
        async with self.lock:
            self._where.require_still("discard an instance")
            entry = self.registry.find(caller, name, owner)
            if not entry.state.unclaimed and entry.session < 0:
                raise Refused(f"{entry.label} is {entry.state}, it did not come through a jump", hint="unregister it")
            self.registry.check_removable(entry)
            self.journal.note(
                self._where.update_id,
                "discarded",
                name=entry.name,
                owner=str(entry.owner),
                by=str(caller.owner),
                problem=entry.problem,
            )
            await self._let_go(entry)

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
        """See `khod.core.service.Service`."""
        async with self.lock:
            if not caller.connection.there:  # it waited for its turn: what hangs on who is gone would be let go of
                raise Lost("the connection that claimed it is gone", hint="claim again")
            claimed = await self._claims.answer(
                caller,
                name,
                owner,
                self._where.state,
                self._where.update_id,
                lifetime=lifetime,
                unverified=unverified,
                exclusive=exclusive,
            )
            if claimed.entry is not None:
                self.broker.forget(claimed.void)
                self.keepers.bind(claimed.entry, caller)
            if claimed.held is not None:
                self.keepers.hold(claimed.held, caller.process, caller.pid)
                await blocking(self.book.put, claimed.held)
            return claimed.view

    # What ends by itself

    def _keeper_ended(self, entry: Entry) -> None:
        """Decision 5: before everything stands frozen its memory is let go of; between that and its claim nothing changes."""
        if not self.registry.holds(entry) or entry.state.unclaimed:
            return
        if self._where.ended_in_update(entry):
            return
        task = asyncio.create_task(self._end(entry), name=f"end {entry.label}")
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _end(self, entry: Entry) -> None:
        async with self.lock:
            over = entry.keeper is None or not entry.keeper.there
            if over and self.registry.holds(entry):
                logger.info("instance %s: its %s is over: let go of", entry.label, entry.lifetime)
                await self._let_go(entry)

    def sweep(self) -> None:
        """After an update that was undone: what ended meanwhile."""
        for entry in list(self.registry):
            if entry.keeper is not None and not entry.keeper.there:
                self._keeper_ended(entry)

    async def _let_go(self, entry: Entry) -> None:
        """Forget an instance; what nobody else holds of it is freed."""
        session = entry.incoming
        if session and entry.session < 0:  # it waits to be retrieved: freeing it takes that
            entry.session = await blocking(self.machine.liveupdate.retrieve_session, session)
        sharers = self.registry.sharers(entry)
        for sharer in sharers:  # what came in this one's session is not in custody for them by itself (decision 18)
            await blocking(self.book.deposit, sharer)
        self.registry.remove(entry)
        self.broker.forget(entry.handle)
        self._where.let_go_of(entry)
        try:
            await blocking(self.book.remove, entry, over=session, heirs=sharers)
        finally:
            await blocking(entry.close, self.machine)
        if session:
            await blocking(self.machine.custody.release, session)

    def orphans(self) -> list[Entry]:
        """What came through a jump long ago, and nobody claimed."""
        now = self.machine.clock.stamp().realtime
        return [e for e in self.registry if e.state.unclaimed and now - e.since >= self.settings.orphans_after * 1e9]

    def report_orphans(self) -> None:
        """Tell of each, for whoever reads the journal."""
        for entry in self.orphans():
            age = (self.machine.clock.stamp().realtime - entry.since) / 1e9
            alert(
                logger,
                Alert.ORPHAN,
                "orphan: %s, %d bytes, unclaimed for %.0f s: kept until it is claimed or discarded",
                entry.label,
                entry.declaration.size,
                age,
                KHOD_INSTANCE=entry.name,
                KHOD_OWNER=str(entry.owner),
            )

    async def settled(self) -> None:
        """Wait until what has ended is let go of."""
        while self._ending:
            await asyncio.wait(set(self._ending))

    async def close(self) -> None:
        """Close khod's descriptors; what is in custody stays there."""
        await self.settled()
        for entry in self.registry:
            await blocking(entry.close, self.machine)
        await blocking(self.book.close)
