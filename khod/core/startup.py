# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a khod does first: find out which boot this is, and undo, restore, or say what was lost (decisions 14, 21, 23)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from khod.core import ledger, resumed
from khod.core.alerts import Alert, alert
from khod.core.blocking import blocking
from khod.core.book import Book
from khod.core.driver import Drivers
from khod.core.history import spans_of
from khod.core.incoming import Incoming, from_journal, open_incoming, read_map, read_tree
from khod.core.instances import enter, revive
from khod.core.journal import Journal, Record
from khod.core.ledger import Gaps, Ledger
from khod.core.ports import Boot, Machine
from khod.core.registry import Entry, Key
from khod.core.restore import Restorer, Verification
from khod.core.settings import Settings
from khod.core.state import State
from khod.core.verifying import Rest
from khod.errors import DeviceBroken, DeviceMissing, KhodError, MachineError, Refused, SessionUnknown

logger = logging.getLogger(__name__)


class Startup:
    """One start. After `run`, its attributes are the host's."""

    def __init__(
        self, machine: Machine, settings: Settings, drivers: Drivers, journal: Journal, boot: Boot, book: Book
    ) -> None:
        self.machine, self.settings, self.drivers, self.journal, self.boot = machine, settings, drivers, journal, boot
        self.book = book
        self.started = machine.clock.stamp()
        self.last = journal.last_state()
        self.update = self.last.update if self.last else ""
        self.incoming: Incoming | None = None
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.ledger = Ledger()
        self.gaps = Gaps()
        self._verification: Verification | None = None
        self.progress: Callable[[str, float], None] = lambda text, seconds: None
        """Told in a sentence whenever something is done, and within how many seconds the next will be."""
        self._done = 0

    async def run(self) -> State:
        """Returns the state that khod is in from now on. Raises MachineError when that cannot be known now, CustodianGone
        when nobody answers for what is in custody."""
        await blocking(self.book.open)
        state = await self._run()
        if self.incoming is None:
            self.problems += await blocking(self.drivers.load)
            self.entries = await self._revived({})
            await self._thaw(state)
        return state

    async def _run(self) -> State:
        if self._half_way:
            return await self._undo()
        try:
            self.incoming = await blocking(open_incoming, self.machine)
        except SessionUnknown:
            return self._nothing_came()
        except (DeviceMissing, DeviceBroken) as error:
            return self._no_device(error)
        except MachineError:
            if self._jumped:
                raise  # what came through is there and somebody is in the way: neither lost nor restored, try again
            logger.exception("the live-update device cannot be used")
            return self._settle(State.IDLE)
        return await self._restore(self.incoming)

    async def _revived(self, there: Mapping[Key, Entry]) -> list[Entry]:
        """The instances of which the book says that their descriptors are in custody, but for those that are `there`."""
        found = []
        for page in self.book.contents.pages.values():
            if page.key in there or page.session:
                continue
            try:
                found.append(await revive(self.machine, self.drivers, page))
            except KhodError as error:
                logger.exception("instance %s", page.name)
                self.problems.append(f"{page.name} of {page.owner} is in custody and cannot be taken up again: {error}")
        return found

    async def _thaw(self, state: State) -> None:
        """Have drivers undo what a predecessor that ended in the middle of an update had them do."""
        if not self._half_way or state is not State.ABORTED:
            return
        for entry in self.entries:
            if entry.driver is None:
                continue
            try:
                async with asyncio.timeout(self.settings.freezing):
                    await entry.driver.thaw(entry.view(self.machine))
                if entry.keepsake:
                    entry.keepsake = {}
                    await blocking(self.book.put, entry)
            except (KhodError, TimeoutError) as error:
                self.problems.append(f"{entry.label}: its driver could not thaw it: {str(error) or 'no end in time'}")

    @property
    def _same_boot(self) -> bool:
        return self.last is not None and self.last.boot == self.boot.boot_id

    @property
    def _half_way(self) -> bool:
        """A predecessor in this boot was in the middle of an update, or failed to undo one."""
        if not self._same_boot or self.last is None or self.last.state is None:
            return False
        began = any(r.state is State.PREPARING and r.boot == self.boot.boot_id for r in self.journal.of(self.last.update))
        return self.last.state.outgoing or (self.last.state is State.FAILED and began)

    @property
    def _jumped(self) -> bool:
        """The journal's last word is that the jump was next, and this is another boot."""
        return self.last is not None and self.last.state is State.EXECUTING and not self._same_boot

    async def _undo(self) -> State:
        """Decision 14: a predecessor in this boot got part of the way. Its sessions were closed when it ended; the image is
        still loaded. Never on towards the jump: its clients may have resumed when the connection broke."""
        assert self.last is not None
        await blocking(self.machine.custody.withdraw)
        await blocking(self.machine.kexec.unload)
        reason = f"khod ended while {self.last.state}, and undid what was left at its next start"
        return self._settle(State.ABORTED, reason=reason)

    def _nothing_came(self) -> State:
        """ENOENT: a cold boot, an update that lost everything, or a khod that ended before it had finished."""
        assert self.last is None or self.last.state is not None
        if self._jumped:
            self.problems.append(f"update {self.update} jumped and nothing came across")
            return self._settle(State.LOST, reason="the jump happened and nothing came across")
        if self._same_boot and self.last and self.last.state is State.FINISHING and self.book.contents.accepted:
            return self._settle(State.IDLE)  # all was over but for the last word of it
        if self._same_boot and self.last and self.last.state in (State.RESTORING, State.RESTORED, State.FINISHING):
            self.problems.append("khod ended before the update was finished: what nobody had claimed is gone")
            return self._settle(State.LOST, reason="khod ended before the update was finished")
        if self.last is not None and self.last.state is State.UNREACHABLE and self._same_boot:
            return State.UNREACHABLE
        return self._settle(State.IDLE)

    def _no_device(self, error: MachineError) -> State:
        """No device, or a dead one: what came across, if anything did, is out of reach until a cold boot."""
        came = isinstance(error, DeviceBroken) or self.boot.handover
        if self._jumped and came:
            self.problems.append(f"update {self.update}: its memory came across and cannot be reached: {error}")
            return self._settle(State.UNREACHABLE, reason=str(error))
        if self._jumped:
            self.problems.append(f"update {self.update} jumped and nothing came across: {error}")
            return self._settle(State.LOST, reason=str(error))
        if self._same_boot and self.last is not None and self.last.state is State.UNREACHABLE:
            return State.UNREACHABLE
        logger.warning("no live update here: %s", error)
        return self._settle(State.IDLE)

    async def _restore(self, incoming: Incoming) -> State:
        self.problems += await blocking(self.drivers.load)
        others = {entry.key: entry for entry in await self._revived({})}
        self.progress("Reading what came through", self.settings.restoring)
        await blocking(read_tree, self.machine, incoming)
        again = bool(incoming.update) and self.book.contents.accepted == incoming.update
        if not again:
            await blocking(read_map, self.machine, incoming, self.settings.max_order)
        self.update = incoming.update or self.update
        if self.last is not None and self.last.update != self.update and incoming.update:
            logger.warning("the journal speaks of update %s, the tree of %s: the tree wins", self.last.update, self.update)
        if not again:
            self._note(State.RESTORING, release=self.boot.release, count=self.boot.kexec_count)
        stage = await blocking(resumed.read, self.machine)
        restorer = Restorer(self.machine, self.settings, self.drivers, incoming, self.book)
        restorer.on_instance = lambda entry: self._note_restored(entry, restorer.limit)
        self.progress(f"Restoring {len(incoming.carried)} instances", restorer.limit)
        restorer.running = resumed.running(stage)
        restored: list[Entry] = []
        if not incoming.verdict:
            try:
                restored = await restorer.restore(others)
            except Refused as error:
                incoming.verdict = f"the handover tree is not what was written: {error}"
        if incoming.verdict:
            return await self._take_custody(restorer, incoming, others)
        self.entries = [*others.values(), *restored]
        self.problems += restorer.verification.problems
        for entry in restored:
            await enter(self.machine, self.book, entry)
        for entry in restored:
            if entry.incoming in restorer.running:
                resumed.take_up(entry, restorer.running[entry.incoming])
        self.gaps = self._gaps(incoming)
        if again:
            return self._restored_again(restorer.verification)
        await blocking(self.book.note_accepted, self.update)
        self._reckon(incoming, stage.marks.get("resumed"))
        resumed.reckon(self.ledger, stage, incoming.stamp, self.started)
        self._note(
            State.RESTORED,
            spans=self.ledger.record(),
            checked=restorer.verification.sentence(),
            problems=restorer.verification.problems,
            instances=[e.label for e in self.entries],
        )
        self._verification = restorer.verification
        return State.RESTORED

    def _note_restored(self, entry: Entry, limit: float) -> None:
        logger.info("restored: %s: %s", entry.label, entry.state)
        self._done += 1
        assert self.incoming is not None
        self.progress(f"Restored {self._done} of {len(self.incoming.carried)} instances", limit)

    def _restored_again(self, verification: Verification) -> State:
        """What came through was accepted earlier in this boot, and taken up again by a khod that was started anew; with a
        journal that knows nothing of it, where that had to be moved away."""
        if self.last is None or self.last.state is not State.RESTORED:
            self._note(State.RESTORED, problems=verification.problems)
        return State.RESTORED

    async def _take_custody(self, restorer: Restorer, incoming: Incoming, others: Mapping[Key, Entry]) -> State:
        """Decision 23: a verdict on khod's bookkeeping. Take what the tree names, or else the journal, and stop."""
        logger.error("restoring nothing by itself: %s", incoming.verdict)
        named = incoming.carried or from_journal(self._executing())
        taken = await restorer.take_custody(named)
        for entry in taken:
            await enter(self.machine, self.book, entry)
        self.entries = [*others.values(), *taken]
        self.problems.append(f"nothing was restored: {incoming.verdict}")
        self._note(State.FAILED, reason=incoming.verdict, instances=[e.label for e in self.entries])
        return State.FAILED

    def _executing(self) -> Record | None:
        """The journal's record of the jump that brought us here."""
        records = [r for r in self.journal.records if r.state is State.EXECUTING and r.boot != self.boot.boot_id]
        return records[-1] if records else None

    def _gaps(self, incoming: Incoming) -> Gaps:
        """What the old kernel noted of workloads that stand still; a journal that was lost costs the figures."""
        executing = self._executing()
        still = executing.data.get("still") if executing is not None and executing.update == self.update else None
        return Gaps(incoming.stamp, {k: v for k, v in still.items() if isinstance(v, int)} if isinstance(still, dict) else {})

    def _reckon(self, incoming: Incoming, resumed_at: int | None) -> None:
        """The ledger's rows of this side, and those that span the jump. `resumed_at`: when the restore stage had started a
        guest, by this kernel's monotonic clock; None where it started none."""
        now = self.machine.clock.stamp()
        executing = self._executing()
        if executing is not None and executing.update == self.update:
            self.ledger.rows += spans_of(executing)
        restoring = (now.monotonic - self.started.monotonic) / 1e9
        if incoming.stamp is not None:
            between, uncertainty = ledger.across(incoming.stamp, self.started)
            self.ledger.add("between", between, uncertainty=uncertainty)
            frozen_at = executing.data.get("frozen_at") if executing is not None else None
            if isinstance(frozen_at, int):
                frozen = (incoming.stamp.monotonic - frozen_at) / 1e9
                after = restoring if resumed_at is None else (resumed_at - self.started.monotonic) / 1e9
                self.ledger.add("blackout", frozen + between + after, uncertainty=uncertainty)
        self.ledger.add(State.RESTORING, restoring)

    async def verify(self, problems: list[str], there: Callable[[Entry], bool]) -> None:
        """The rest of the verification, beside the workload; what differs is added to `problems`. Only a first restore has
        one: frames may move any time after it. `there` says of an instance whether it was let go of meanwhile."""
        assert self.incoming is not None
        if self._verification is None:
            return
        rest = Rest(self.machine, self.incoming)
        try:
            for entry in self.entries:
                if there(entry):
                    await rest.compare(entry)
            await blocking(rest.end)
        except Exception as error:  # finishing waits for this: it must come to an end
            if not isinstance(error, KhodError):
                logger.exception("verification beside the workload")
            problems.append(f"not every folio could be compared: {error}")
            return
        problems += rest.problems
        if rest.problems:
            alert(logger, Alert.MEMORY_DIFFERS, "%s", "; ".join(rest.problems), KHOD_UPDATE=self.update)
        self._verification.folios = rest.folios
        checked = self._verification.sentence()
        self._journal("verified", checked=checked, problems=rest.problems, folios=rest.folios)

    def _settle(self, state: State, **data: Any) -> State:
        """Enter a resting state, noting it where it is news."""
        if self.last is not None and not (self.last.state is state is State.IDLE):
            self._note(state, **data)
        return state

    def _note(self, state: State, **data: Any) -> None:
        self._journal("state", state=state, **data)

    def _journal(self, event: str, **data: Any) -> None:
        """Note it if the disk takes it. A khod that ended here for want of a record would free what it has retrieved."""
        try:
            self.journal.note(self.update, event, **data)
        except KhodError as error:
            alert(logger, Alert.NO_JOURNAL, "%s", error)
            self.problems.append(f"the journal could not be written: {error}")
