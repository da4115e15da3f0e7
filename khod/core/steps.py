# SPDX-License-Identifier: LGPL-2.1-or-later
"""The steps of an update: each can be described before it runs, applied, and undone.

``undo`` runs for every step that was begun, last first, whether ``apply`` ended well or not; so each undoes what is there and
assumes nothing. A step that deals with instances tells the update which of them fail; the update decides what that means.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING

from khod.core.blocking import blocking, opening
from khod.core.driver import Continuity, Declaration
from khod.core.node import SESSION
from khod.core.question import Phase
from khod.core.registry import MAX_INSTANCES, Entry, Grade, InstanceState, order
from khod.core.state import State
from khod.errors import DeadlinePassed, KhodError, Refused, UpdateFailed

if TYPE_CHECKING:
    from khod.core.update import Update

logger = logging.getLogger(__name__)

AT_ONCE = 4
"""Instances that are preserved at once: the calls block, and who waits for a thread must not be taken for one that hangs."""
HEARING = 1.0
"""Seconds for which the jump waits for clients to take the news of it: everything stands still meanwhile."""


class Step(ABC):
    """One step. `limit` is what bounds its apply as a whole, in seconds; None where it bounds its parts itself."""

    name: str
    phase: State

    def __init__(self, update: Update) -> None:
        self.update = update

    @property
    def limit(self) -> float | None:
        """Seconds, or None."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """What it will do, in a sentence, before it does."""

    @abstractmethod
    async def apply(self) -> None:
        """Do it."""

    async def undo(self) -> None:  # noqa: B027 - a step that holds nothing has nothing to take back
        """Take it back, however far it came."""


class Announce(Step):
    """Tell the clients before anything is preserved (decision 1), and when everything is undone."""

    name, phase = "announce", State.PREPARING

    def describe(self) -> str:
        return f"tell the clients of {_attended(self.update)} instances that memory is about to be preserved"

    async def apply(self) -> None:
        await self.update.ask_clients(Phase.PREPARING, self.update.settings.preparing)

    async def undo(self) -> None:
        update = self.update
        for entry in update.all_entries:
            if entry.grade is Grade.OPAQUE:  # its client may have asked for its session before any other was made
                await blocking(entry.close_session, update.machine)
        update.broker.aborted(update.id, update.reason)


class Settle(Step):
    """Drivers say which way instances go of which that could not be told before, and each is held to the least that is demanded
    (`Settings.require`): nothing is preserved yet."""

    name, phase = "settle", State.PREPARING

    def __init__(self, update: Update) -> None:
        super().__init__(update)
        self._declared: dict[Entry, Declaration] = {}

    def describe(self) -> str:
        names = _names(e for e in self.update.entries if e.declaration.unsettled)
        return f"find out what this kernel preserves of {names or 'nothing'}"

    async def apply(self) -> None:
        unsettled = [e for e in self.update.entries if e.declaration.unsettled]  # what is required comes first
        for entry in unsettled:
            if entry in self.update.left_behind:
                continue
            try:
                async with asyncio.timeout(self.update.settings.preparing):
                    await self._one(entry)
            except TimeoutError:
                late = DeadlinePassed(f"which way it goes was not settled within {self.update.settings.preparing:g} s")
                await self.update.instance_failed(entry, late)
            except KhodError as error:
                await self.update.instance_failed(entry, error)

    async def _one(self, entry: Entry) -> None:
        update, declared, wanted = self.update, entry.declaration, Continuity(self.update.settings.require)
        assert entry.driver is not None
        settled = await entry.driver.settle(entry.view(update.machine, update.entries), declared)
        if not settled.continuity.meets(wanted):
            raise Refused(
                f"it will be {settled.continuity}, and `require` is {wanted}",
                hint="this kernel does not preserve it: unregister it, or lower `require`",
            )
        self._declared[entry] = declared
        self._declare(entry, settled)
        update.say("instance", f"will be {settled.continuity} ({settled.strategy})", instance=entry.label)

    @staticmethod
    def _declare(entry: Entry, declaration: Declaration) -> None:
        entry.declaration, entry.properties = declaration, dict(declaration.properties)

    async def undo(self) -> None:
        while self._declared:
            self._declare(*self._declared.popitem())


class OpenSessions(Step):
    """One kernel session per instance, in the order in which the kernel shall freeze them, khod's own last (decision 2)."""

    name, phase = "sessions", State.PREPARING

    def describe(self) -> str:
        return f"create {len(self.update.entries)} sessions khod.{self.update.id}.N and the session {SESSION!r}"

    async def apply(self) -> None:
        update = self.update
        for entry in update.against_order():
            if entry.grade is Grade.REGISTERED:
                await blocking(update.outgoing.create_session, entry)
        update.outgoing.session = await opening(update.machine.files.close, update.machine.liveupdate.create_session, SESSION)

    async def undo(self) -> None:
        update = self.update
        for entry in update.all_entries:
            if entry.session >= 0:
                await blocking(entry.close_session, update.machine)
            if entry.state in (InstanceState.PRESERVED, InstanceState.FROZEN):
                entry.state = update.state_before[entry]
            entry.properties = dict(entry.declaration.properties)
        await blocking(update.outgoing.close)


class PreserveInstances(Step):
    """Let drivers prepare, preserve every descriptor, learn the frames: in dependency order, independent ones at once."""

    name, phase = "preserve", State.PREPARING

    def describe(self) -> str:
        return f"preserve {len(self.update.entries)} instances and learn their frames: {_names(self.update.entries) or 'none'}"

    async def apply(self) -> None:
        generations = order(self.update.entries)
        await each(self.update, generations, self._one, self.update.settings.preparing, at_once=AT_ONCE)

    async def _one(self, entry: Entry) -> None:
        update = self.update
        if entry.grade is Grade.OPAQUE:
            if entry.session < 0:
                raise UpdateFailed(f"{entry.label}: its client asked for no session")
            update.outgoing.note_opaque(entry)
            entry.state = InstanceState.PRESERVED
            return
        assert entry.driver is not None
        update.to_thaw.add(entry)
        if keepsake := await entry.driver.prepare(entry.view(update.machine, update.entries)):
            entry.keepsake = keepsake
            await blocking(update.book.put, entry)
        await blocking(update.outgoing.create_states, entry)
        await blocking(update.outgoing.preserve, entry)
        entry.state = InstanceState.PRESERVED

    async def undo(self) -> None:
        await self.update.thaw(self.update.all_entries)


class PreserveBookkeeping(Step):
    """The handover tree and the folio map get their memory (decision 9)."""

    name, phase = "bookkeeping", State.PREPARING

    def describe(self) -> str:
        return "preserve the memory of the handover tree and of the folio map"

    @property
    def limit(self) -> float:
        return self.update.settings.preparing

    async def apply(self) -> None:
        await blocking(self.update.outgoing.preserve_bookkeeping)


class LoadImage(Step):
    """kexec_file_load, the last step of preparing (decision 11)."""

    name, phase = "load", State.PREPARING

    def describe(self) -> str:
        image = self.update.image
        if image is None:
            return "load the kernel image (none is named yet)"
        return f"load {image.kernel} {'with ' + image.initrd if image.initrd else 'without initrd'}: {image.cmdline!r}"

    @property
    def limit(self) -> float:
        return self.update.settings.preparing

    async def apply(self) -> None:
        assert self.update.image is not None, "checked before the update began"
        await blocking(self.update.machine.kexec.load, self.update.image)

    async def undo(self) -> None:
        await blocking(self.update.machine.kexec.unload)


class FirstSync(Step):
    """Write the file systems out while the workload still runs, so that the sync that counts is short (decision 15)."""

    name, phase = "first sync", State.PREPARING

    def describe(self) -> str:
        return "write out all file systems, to make the sync that counts short"

    @property
    def limit(self) -> float:
        return self.update.settings.sync

    async def apply(self) -> None:
        await blocking(self.update.machine.filesystems.sync)


class Quiesce(Step):
    """Every client stands still and gives a lease on that (decision 13)."""

    name, phase = "quiesce", State.FREEZING

    def describe(self) -> str:
        return f"have the clients of {_attended(self.update)} instances stand still"

    async def apply(self) -> None:
        await self.update.ask_clients(Phase.QUIESCE, self.update.settings.freezing)


class FreezeInstances(Step):
    """Drivers stop their instances and write their states, against the order of dependencies (decision 12)."""

    name, phase = "freeze", State.FREEZING

    def describe(self) -> str:
        return "freeze " + (", then ".join(_names(g) for g in reversed(order(self.update.entries))) or "nothing")

    async def apply(self) -> None:
        entries, settings = self.update.entries, self.update.settings
        # Those of a generation are frozen at once, and share what the machine can copy.
        limit = settings.freezing + settings.allowance(sum(e.declaration.handled for e in entries))
        await each(self.update, [*reversed(order(entries))], self._one, limit)

    async def _one(self, entry: Entry) -> None:
        if entry.driver is not None:
            view = entry.view(self.update.machine, self.update.entries)
            entry.properties.update(await entry.driver.freeze(view))
        for bound in entry.client_states:
            await blocking(entry.states[bound.name].check)
        entry.state = InstanceState.FROZEN


class WriteBookkeeping(Step):
    """Sample frames and bytes, write map and tree into their preserved memory."""

    name, phase = "write", State.FREEZING

    def describe(self) -> str:
        settings = self.update.settings
        how = "every byte" if settings.full else f"up to {settings.sample_pages} pages each"
        return f"sample {how}, write the folio map and the handover tree"

    async def apply(self) -> None:
        await blocking(self.update.outgoing.take_samples)
        await blocking(self.update.outgoing.write)


class Sync(Step):
    """Write out what guests believe to be on disk; never best-effort (decision 15).

    After a hold, which may have been long: what was written meanwhile counts too.
    """

    name, phase = "sync", State.EXECUTING

    def describe(self) -> str:
        return "write out all file systems: the page cache does not survive, what guests believe on disk must be there"

    @property
    def limit(self) -> float:
        return self.update.settings.sync

    async def apply(self) -> None:
        await blocking(self.update.machine.filesystems.sync)


class Commit(Step):
    """Ask every client once more, on the lease it gave (decision 13); it is the last question."""

    name, phase = "commit", State.EXECUTING

    def describe(self) -> str:
        return "ask every client whether it still stands still"

    async def apply(self) -> None:
        update = self.update
        await update.ask_clients(Phase.COMMIT, update.settings.freezing, may_leave=False)
        if not await blocking(update.machine.kexec.loaded):
            raise Refused("the loaded kernel image is gone", hint="somebody else unloaded it; start the update again")


class Execute(Step):
    """Journal the intent, then jump (decision 16)."""

    name, phase = "execute", State.EXECUTING

    def describe(self) -> str:
        return "journal the jump, and reboot(LINUX_REBOOT_CMD_KEXEC): every process on this host ends"

    async def apply(self) -> None:
        update = self.update
        update.journal_executing()
        deaf = await update.broker.executing(update.id, update.entries, HEARING)
        for entry in deaf:
            update.say("problem", f"{entry.label}: its client did not take {Phase.EXECUTING!r} within {HEARING:g} s")
        await blocking(update.outgoing.write_stamp)
        update.broker.check_promise()
        await self.jump(deaf)

    async def jump(self, deaf: list[Entry]) -> None:
        """Returns only by failing, and then everything is undone like after any other failure. The clients of `deaf` did not
        hear that it is next; a direct jump takes no longer than they stand still without."""
        await blocking(self.update.machine.kexec.execute)


STEPS: tuple[type[Step], ...] = (
    Announce,
    Settle,
    OpenSessions,
    PreserveInstances,
    PreserveBookkeeping,
    FirstSync,
    LoadImage,
    Quiesce,
    FreezeInstances,
    WriteBookkeeping,
    Sync,
    Commit,
    Execute,
)


def _attended(update: Update) -> int:
    return sum(e.attended for e in update.entries)


async def each(
    update: Update,
    generations: Iterable[list[Entry]],
    work: Callable[[Entry], Awaitable[None]],
    limit: float,
    *,
    at_once: int = MAX_INSTANCES,
) -> None:
    """Do `work` for every entry that is still part of the update; generations one after the other, one's entries at once, or
    `at_once` of them. Each has `limit` seconds from its turn.

    A failure is the instance's own: `Update.instance_failed` decides whether it is the update's too.
    """
    turns = asyncio.Semaphore(at_once)
    for generation in generations:
        present = [e for e in generation if e not in update.left_behind]
        failures = await asyncio.gather(*(_bounded(update, e, work, limit, turns) for e in present))
        for entry, failure in zip(present, failures, strict=True):
            if failure is not None:
                await update.instance_failed(entry, failure)


async def _bounded(
    update: Update, entry: Entry, work: Callable[[Entry], Awaitable[None]], limit: float, turns: asyncio.Semaphore
) -> KhodError | None:
    async with turns:
        started = update.machine.clock.stamp()
        try:
            async with asyncio.timeout(limit):
                await work(entry)
        except TimeoutError:
            return DeadlinePassed(f"no end within {limit:g} s")
        except KhodError as error:
            return error
        except Exception as error:  # a bug of ours: were it raised, everything would be undone beneath the others' work
            logger.exception("instance %s", entry.label)
            return UpdateFailed(f"khod failed at it: {error!r}")
    update.instance_done(entry, started)
    return None


def _names(entries: Iterable[Entry]) -> str:
    return ", ".join(e.label for e in entries)
