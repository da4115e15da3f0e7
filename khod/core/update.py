# SPDX-License-Identifier: LGPL-2.1-or-later
"""One update in the old kernel: a transaction that goes through whole or is undone whole.

`Update.run` walks the steps of `khod.core.steps` phase by phase. Whatever fails before the kernel is gone (a step, a required
instance, a deadline, an operator's abort, reboot(2) that comes back), every step that was begun is undone, last first, past
undos that fail themselves; the workload goes on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from khod.core.alerts import OF_STATE, Alert, alert
from khod.core.blocking import blocking, opening
from khod.core.book import Book
from khod.core.broker import Broker
from khod.core.events import Broadcast
from khod.core.journal import Journal
from khod.core.jump import steps_for
from khod.core.ledger import Ledger
from khod.core.outgoing import Outgoing
from khod.core.ports import Boot, Image, Machine, Stamp
from khod.core.question import Phase
from khod.core.registry import Entry, dependents, order, users
from khod.core.settings import Settings
from khod.core.state import TRANSITIONS, State
from khod.core.steps import Step
from khod.core.views import EventView, StepView
from khod.errors import DeadlinePassed, KhodError, Lost, Refused, UpdateFailed

logger = logging.getLogger(__name__)

EXITING = 0.2
"""Seconds between the first and the last that is noticed of a process that exits."""

_PHASES = (
    (State.PREPARING, State.PREPARED),
    (State.FREEZING, State.FROZEN),
    (State.EXECUTING, None),
)


class Update:
    """One update. Its `state` is khod's until it ends."""

    def __init__(
        self,
        ident: str,
        *,
        machine: Machine,
        settings: Settings,
        boot: Boot,
        journal: Journal,
        events: Broadcast,
        entries: Sequence[Entry],
        broker: Broker,
        book: Book,
        image: Image | None,
        hold_at: State | None = None,
        jump: str = "direct",
    ) -> None:
        self.left_to_systemd = False
        """PID 1 is being asked for the jump, or has accepted it: it must not be undone."""
        self.accepted = False
        """It has: this is what khod is told to end for."""
        self._came_back = asyncio.Event()
        self._why_back = ""
        self.id, self.machine, self.settings, self.boot = ident, machine, settings, boot
        self.broker, self.book = broker, book
        self.image, self.hold_at, self.jump = image, hold_at, jump
        self.state = State.IDLE
        self.held = False
        self.all_entries = [e for generation in order(entries) for e in generation]
        """In dependency order, with those that are left behind."""
        self._users = users(entries)
        self.state_before = {e: e.state for e in entries}
        self.to_thaw: set[Entry] = set()
        """Whose driver was told to prepare and not yet to thaw."""
        self.left_behind: dict[Entry, str] = {}
        """Instances that do not come along, and why: optional ones, and those that ended meanwhile."""
        self._ended: list[Entry] = []
        self._opened: set[Entry] = set()
        """Opaque ones whose session was asked for."""
        self.outgoing = Outgoing(machine, settings, ident, boot.boot_id)
        self.overridden: list[str] = []
        """Blockers that an operator passed over, each with what it had to say."""
        self.ledger = Ledger()
        self.problems: list[str] = []
        self.reason = ""
        self._journal, self._events = journal, events
        self._steps = [step(self) for step in steps_for(self.jump)]
        self._begun: list[Step] = []
        self._go = asyncio.Event()
        self._task: asyncio.Task[State] | None = None
        self._aborting = False
        self._frozen_at: Stamp | None = None

    @property
    def entries(self) -> list[Entry]:
        """In dependency order, without those that are left behind."""
        return [e for e in self.all_entries if e not in self.left_behind]

    def against_order(self) -> list[Entry]:
        """The order of freezing: those that require others first (decision 12)."""
        return self.entries[::-1]

    def sessions(self) -> list[int]:
        """Every outgoing session, khod's own last; machine descriptors, borrowed."""
        return [*(e.session for e in self.against_order()), self.outgoing.session]

    def begun(self, kind: type[Step]) -> list[Step]:
        """The steps of that kind that were begun."""
        return [step for step in self._begun if isinstance(step, kind)]

    def came_back(self, reason: str) -> None:
        """The shutdown to which the jump was left does not happen: everything is undone."""
        self._why_back = reason
        self._came_back.set()

    async def returned(self) -> str:
        """Wait until `came_back`, usually for ever; the reason."""
        await self._came_back.wait()
        return self._why_back

    def plan(self) -> list[StepView]:
        """Every step, before any runs."""
        return [StepView(phase=s.phase, name=s.name, describe=s.describe()) for s in self._steps]

    # Driving

    def start(self) -> asyncio.Task[State]:
        """Run as a task of its own: it is khod's, not that of whoever asked for it."""
        self._task = asyncio.create_task(self.run(), name=f"update {self.id}")
        return self._task

    async def run(self) -> State:
        """Go through; returns the state that it ended in, which after a jump it never does."""
        try:
            for phase, reached in _PHASES:
                await self._phase(phase)
                if reached is not None:
                    await self._reach(reached)
        except asyncio.CancelledError:
            if self.left_to_systemd:  # PID 1 is on its way, with what would be taken from it
                raise
            self.reason = "aborted by an operator" if self._aborting else "khod is being stopped"
            await self._undo_shielded()
            if not self._aborting:
                raise
        except Exception as error:
            if not isinstance(error, KhodError):
                logger.exception("update %s", self.id)
            self.reason = str(error) or repr(error)
            await self._undo_shielded()
        return self.state

    def proceed(self) -> bool:
        """Let a held update go on; False if it is not held."""
        was, self.held = self.held, False
        self._go.set()
        return was

    async def abort(self) -> State:
        """Undo it; returns the state reached. A jump that is being tried can no longer be stopped: its failure is awaited. Of
        an update whose undo failed, try that again."""
        assert self._task is not None
        if self.state is State.FAILED:
            self.problems.clear()
            await self._undo_shielded()
        elif self.state not in (State.EXECUTING, State.ABORTING):
            self._aborting = True
            self._task.cancel()
        return self.state if self._task.done() else await asyncio.shield(self._task)

    def journal_preparing(self) -> None:
        """That it begins: before it does, for a khod that starts must know whether there is something to undo."""
        self._journal.note(self.id, "state", state=State.PREPARING, release=self.boot.release, overridden=self.overridden)

    def _enter(self, state: State, message: str = "") -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"no way from {self.state} to {state}")
        self.state = state
        self.say("state", message or state)

    def _end(self) -> None:
        """Enter the state that the undo led to. A journal that cannot take it costs the record, not the undo: the next khod
        would undo what is undone already."""
        self._enter(State.FAILED if self.problems else State.ABORTED, self.reason)
        try:
            self._journal.note(self.id, "state", state=self.state, **self._outcome())
        except KhodError as error:
            self.problem(f"the journal could not be written: {error}")

    async def _reach(self, state: State) -> None:
        """Enter a state and stay there if it is the one to hold at."""
        self._enter(state)
        if state is self.hold_at:
            self.held = True
            self.say("held", f"held at {state}: `khoctl continue` or `khoctl abort`")
            await self._go.wait()

    async def _phase(self, phase: State) -> None:
        if phase is not State.EXECUTING:  # that one is entered by its last step, with the intent on the disk
            await self._reach(phase)
        started = self.machine.clock.stamp()
        if phase is State.FREEZING:
            self._frozen_at = started
        steps = [s for s in self._steps if s.phase is phase]
        for number, step in enumerate(steps):
            await self._apply(step, number / len(steps))
        self.ledger.add(phase, _seconds(started, self.machine.clock.stamp()))

    async def _apply(self, step: Step, fraction: float) -> None:
        self._begun.append(step)
        started = self.machine.clock.stamp()
        try:
            async with asyncio.timeout(step.limit):
                await step.apply()
        except TimeoutError:
            raise DeadlinePassed(f"step {step.name!r}: no end within {step.limit:g} s") from None
        seconds = _seconds(started, self.machine.clock.stamp())
        self.say("step", step.describe(), seconds=seconds, fraction=fraction)
        await self._leave_ended_behind()

    def journal_executing(self) -> None:
        """The intent, durable before the syscall, with what a successor needs that finds no usable tree (decisions 16, 23)."""
        self.state = State.EXECUTING
        assert self._frozen_at is not None
        now = self.machine.clock.stamp()
        self.ledger.add("freezing to executing", _seconds(self._frozen_at, now))
        self._journal.note(
            self.id,
            "state",
            state=State.EXECUTING,
            sessions=self.outgoing.sessions_record(),
            image=self.image.sha256 if self.image else "",
            release=self.boot.release,
            spans=self.ledger.record(),
            frozen_at=self._frozen_at.monotonic,
            still=self.broker.standing(self.entries),
            left_behind=self._left_behind_record(),
        )
        self.say("state", State.EXECUTING)

    # Undoing

    async def _undo_shielded(self) -> None:
        """Undo to the end, whatever is cancelled meanwhile: half an undo is the one thing that nobody can want."""
        undo = asyncio.ensure_future(self._undo())
        while not undo.done():
            try:
                await asyncio.shield(undo)
            except asyncio.CancelledError:
                logger.warning("update %s: undoing goes on", self.id)
        undo.result()

    async def _undo(self) -> None:
        self.held = False
        self._enter(State.ABORTING, self.reason)
        for step in reversed(self._begun):
            try:
                await step.undo()
            except Exception as error:
                if not isinstance(error, KhodError):
                    logger.exception("undo of %s", step.name)
                self.problem(f"could not undo {step.name!r}: {error}")
            else:
                self.say("undo", f"undone: {step.name}")
        self._end()
        self.say("failed", self.reason)

    def _outcome(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "problems": self.problems,
            "spans": self.ledger.record(),
            "left_behind": self._left_behind_record(),
            "instances": [e.label for e in self.entries],
            "release": self.boot.release,
        }

    def _left_behind_record(self) -> dict[str, str]:
        return {entry.label: reason for entry, reason in self.left_behind.items()}

    async def thaw(self, entries: Iterable[Entry]) -> None:
        """Let drivers undo prepare and freeze, in dependency order; one that fails keeps nobody else frozen."""
        for entry in entries:
            if entry not in self.to_thaw:
                continue
            assert entry.driver is not None
            try:
                async with asyncio.timeout(self.settings.freezing):
                    await entry.driver.thaw(entry.view(self.machine))
                self.to_thaw.discard(entry)
                if entry.keepsake:
                    entry.keepsake = {}
                    await blocking(self.book.put, entry)  # or the next update's thaw would be told of this one
            except TimeoutError:
                self.problem(f"instance {entry.label}: its driver did not thaw it within {self.settings.freezing:g} s")
            except KhodError as error:
                self.problem(f"instance {entry.label}: its driver could not thaw it: {error}")

    # Instances and clients

    async def instance_failed(self, entry: Entry, error: KhodError) -> None:
        """A required instance fails the update, and so does an optional one that a required one depends on; an optional one
        is left behind with all that depend on it. Raises UpdateFailed."""
        leaving = [entry, *self._dependents(entry)]
        if required := [e for e in leaving if e.required]:
            by = "" if required[0] is entry else f", which {required[0].label} requires"
            raise UpdateFailed(f"instance {entry.label}{by}: {error.message}", hint=error.hint)
        for e in leaving:
            if e not in self.left_behind:
                await self._leave_behind(e, error.message if e is entry else f"requires {entry.label}, which stays behind")

    def _dependents(self, entry: Entry) -> list[Entry]:
        return [e for e in dependents(entry, self._users) if e not in self.left_behind]

    async def _leave_behind(self, entry: Entry, reason: str) -> None:
        self.left_behind[entry] = reason
        text = f"left behind: {entry.label}: {reason}"
        alert(logger, Alert.INSTANCE_LEFT_BEHIND, "%s", text, KHOD_INSTANCE=entry.name, KHOD_OWNER=str(entry.owner))
        self.say("problem", text, instance=entry.label)
        await self.thaw([entry])
        await blocking(self.outgoing.forget, entry)
        await blocking(entry.close_session, self.machine)
        entry.state = self.state_before[entry]
        self.broker.aborted(self.id, reason, [entry])

    def instance_ended(self, entry: Entry) -> None:
        """Its lifetime is over (decision 5): before everything stands frozen it stays behind, required or not; what requires
        it does not get away with that. Afterwards nothing changes any more."""
        if self.state in (State.PREPARING, State.PREPARED, State.FREEZING):
            self._ended.append(entry)
            self.broker.forget(entry.handle)  # nobody waits for the answer of who is gone

    @staticmethod
    async def _hear_of_ends(lost: Iterable[Entry]) -> None:
        """A process that exits ends the subscription and what its instances hang on, and either may be noticed first: wait a
        moment for the other, since an instance that ended is no failure."""
        ends = []
        for keeper in {e.keeper for e in lost if e.keeper is not None and e.keeper.there}:
            ends.append(end := asyncio.Event())
            keeper.on_end(end.set)
        if ends:
            with suppress(TimeoutError):
                async with asyncio.timeout(EXITING):
                    for end in ends:
                        await end.wait()

    async def _leave_ended_behind(self) -> None:
        while self._ended:
            entry = self._ended.pop()
            if entry in self.left_behind:
                continue
            await self._leave_behind(entry, "its lifetime is over")
            for other in self._dependents(entry):
                if other not in self.left_behind:
                    await self.instance_failed(other, UpdateFailed(f"requires {entry.label}, which ended meanwhile"))

    def instance_done(self, entry: Entry, started: Stamp) -> None:
        """An instance's share of the phase that is under way."""
        seconds = _seconds(started, self.machine.clock.stamp())
        self.ledger.add(self.state, seconds, instance=entry.label)
        self.say("instance", f"{self.state}: {entry.label}", instance=entry.label, seconds=seconds)

    async def ask_clients(self, phase: Phase, limit: float, *, may_leave: bool = True) -> None:
        """Ask the clients of all instances in this update. An instance whose client says no, or does not answer within `limit`
        seconds, fails; with `may_leave` False, the update does."""
        failures = await self.broker.ask(phase, self.id, self.entries, limit)
        if may_leave:
            await self._hear_of_ends([e for e in self.entries if isinstance(failures.get(e.handle), Lost)])
            await self._leave_ended_behind()
        for entry in self.entries:
            failure = failures.get(entry.handle)
            if failure is None or entry in self.left_behind:
                continue
            if not may_leave:
                raise UpdateFailed(f"instance {entry.label}: {failure.message}", hint=failure.hint)
            await self.instance_failed(entry, failure)

    async def open_session(self, entry: Entry) -> int:
        """The kernel session of an opaque instance (decision 4), a descriptor owned by the caller: once, while its client is
        asked 'preparing'. Raises Refused."""
        self.broker.check_asked(entry, Phase.PREPARING)
        if entry in self._opened:
            raise Refused(f"{entry.label} has had its session in this update", hint="a session is handed out once an update")
        self._opened.add(entry)
        name = self.outgoing.new_name()
        session = await opening(self.machine.files.close, self.machine.liveupdate.create_session, name)
        if self.state is not State.PREPARING or entry in self.left_behind:  # given up while the kernel was at it
            await blocking(self.machine.files.close, session)
            raise Refused(f"{entry.label} does not come along any more", hint=f"the update is {self.state}")
        entry.session, entry.session_name = session, name
        return self.machine.files.duplicate(session)

    # Telling

    def problem(self, text: str) -> None:
        """Something that could not be undone."""
        logger.error("update %s: %s", self.id, text)
        self.problems.append(text)
        self.say("problem", text)

    def say(self, kind: str, message: str, *, instance: str = "", seconds: float = 0.0, fraction: float = 0.0) -> None:
        """To whoever listens."""
        fields = {"KHOD_UPDATE": self.id, "KHOD_STATE": self.state, "KHOD_KIND": kind, "KHOD_INSTANCE": instance}
        if kind == "state" and self.state in OF_STATE:
            alert(logger, OF_STATE[self.state], "update %s: %s: %s", self.id, self.state, message, **fields)
        else:
            logger.info("update %s: %s: %s", self.id, kind, message, extra=fields)  # in the journal's entry, under systemd
        self._events.send(
            EventView(
                time=self.machine.clock.stamp().realtime,
                update=self.id,
                state=self.state,
                kind=kind,
                message=message,
                instance=instance,
                seconds=seconds,
                fraction=fraction,
            )
        )


def _seconds(start: Stamp, end: Stamp) -> float:
    return (end.monotonic - start.monotonic) / 1e9
