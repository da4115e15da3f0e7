# SPDX-License-Identifier: LGPL-2.1-or-later
"""The answer to a claim (decision 24): descriptors, 'cold' (boot from disk), or 'hold' (it exists, do not start)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from khod.core.alerts import Alert, alert
from khod.core.broker import Broker
from khod.core.callers import Caller, Lifetime, Presence, Right
from khod.core.instances import check_lifetime, kept_by, new_handle
from khod.core.journal import Journal
from khod.core.ports import Machine
from khod.core.registry import Entry, Grade, InstanceState, Registry
from khod.core.state import State
from khod.core.views import ClaimView
from khod.errors import KhodError, Lost, NotPermitted

logger = logging.getLogger(__name__)

SESSION_FD = "session"
"""What the one descriptor of an opaque instance is called."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """What is said, and what else follows from it."""

    view: ClaimView
    entry: Entry | None = None
    """The entry that hangs on the claimant from now on; None where nothing changed hands."""
    void: str = ""
    """The handle that is void now."""
    held: Entry | None = None
    """The entry that the claimant's process has from now on; None where it got descriptors and no more."""


class Claims:
    """Answers claims."""

    def __init__(self, machine: Machine, registry: Registry, journal: Journal, broker: Broker) -> None:
        self._machine, self._registry, self._journal, self._broker = machine, registry, journal, broker

    async def answer(
        self,
        caller: Caller,
        name: str,
        owner: str,
        state: State,
        update: str,
        *,
        lifetime: Lifetime | None,
        unverified: bool,
        exclusive: bool,
    ) -> Claimed:
        """See `khod.core.service.Service.claim`."""
        if unverified and not caller.may(Right.ADMINISTER):
            raise NotPermitted("only who may administer khod takes what is not verified", hint="ask an administrator")
        if lifetime is not None:
            check_lifetime(caller, lifetime)
        entry = self._known(caller, name, owner)
        if isinstance(entry, ClaimView):
            return Claimed(entry)
        if entry is None:
            return Claimed(_unknown(name, state))
        if entry.runner is not None and entry.runner.there and caller.pid != entry.runner_pid:
            reason = f"{entry.label} runs already: the initrd started it as process {entry.runner_pid}"
            return Claimed(hold(reason, process=entry.runner_pid, early=True))
        if reason := _held_back(entry, state, unverified):
            return Claimed(hold(reason))
        if exclusive and (taken := self._taken(entry, caller)) is not None:
            return Claimed(taken)
        changes_hands = self._changes_hands(entry, caller, lifetime)
        if changes_hands:
            _check_keeper(entry, caller, lifetime or entry.lifetime)
        self._record(entry, caller, update)
        claimed = self._hand_out(entry, lifetime, changes_hands=changes_hands)
        return replace(claimed, held=entry) if changes_hands or exclusive else claimed

    def _taken(self, entry: Entry, caller: Caller) -> ClaimView | None:
        """The answer to who would be alone with it, when somebody else has it who lives: a second life of a guest ruins its
        disk, and both write to the same memory."""
        if _anothers(entry, caller):
            reason = f"process {entry.holder_pid} has {entry.label}, and lives"
            return hold(reason, process=entry.holder_pid, early=entry.holder_early)
        client = self._broker.who_answers(entry.handle)
        if client is not None and not _is(caller, client.pid, client.process):
            return hold(f"process {client.pid} answers for {entry.label}, and lives", process=client.pid)
        if entry.keeper is not None and entry.keeper.there and not _is(caller, entry.keeper_pid, entry.keeper):
            return hold(f"{entry.label} hangs on {kept_by(entry)}, which lives", process=entry.keeper_pid)
        return None

    def _record(self, entry: Entry, caller: Caller, update: str) -> None:
        """Journal the claim. A guest does not stand still for want of a record; what is not verified is handed out on record
        only (decision 23)."""
        unverified = not entry.state.sound
        who = {"name": entry.name, "owner": str(entry.owner), "by": str(caller.owner)}
        try:
            self._journal.note(update, "claimed", **who, unverified=unverified, problem=entry.problem)
        except KhodError as error:
            if unverified:
                raise
            alert(logger, Alert.NO_JOURNAL, "the claim of %s is not in the journal: %s", entry.label, error)

    def _known(self, caller: Caller, name: str, owner: str) -> Entry | ClaimView | None:
        """The entry that is meant; None when there is no such, an answer when it is another's: who must not know what others
        have is told the same as where the name is free, unless the disk that he would boot from may be in use."""
        named = self._registry.named(name)
        if not named:
            return None
        try:
            return self._registry.find(caller, name, owner)
        except NotPermitted:
            raise
        except KhodError:
            if caller.may(Right.ADMINISTER):
                raise
            return hold(f"an instance {name!r} of somebody else is here: a second life could ruin its disk")

    def _changes_hands(self, entry: Entry, caller: Caller, lifetime: Lifetime | None) -> bool:
        """Whether who claims it is its client from now on. Of one whose client is there others get descriptors, and no more:
        with another handle it would not hear of the next update, and its guest would run into the jump. Who claims his own
        with another lifetime means that."""
        if entry.state is InstanceState.REGISTERED:
            return False
        if entry.runner is not None:  # the initrd started it, and this is its first word, or its successor's
            return True
        if lifetime not in (None, entry.lifetime) and entry.keeper in (caller.connection, caller.process):
            return True
        kept = entry.keeper is not None and entry.keeper.there
        kept = kept or _anothers(entry, caller)
        return entry.state is not InstanceState.CLAIMED or not (kept or self._broker.answers(entry.handle))

    def _hand_out(self, entry: Entry, lifetime: Lifetime | None, *, changes_hands: bool) -> Claimed:
        duplicate = self._machine.files.duplicate
        void = entry.handle
        entry.runner = None
        if changes_hands:
            self._registry.set_handle(entry, new_handle())
            entry.lifetime = lifetime or entry.lifetime
            entry.state = InstanceState.CLAIMED
            entry.attended = False  # until the claimant subscribes
        states = [bound.name for bound in entry.client_states if bound.name in entry.states]
        if entry.grade is Grade.OPAQUE:
            names, borrowed = [SESSION_FD], [entry.session]
        else:
            names = [*entry.fds, *states]
            borrowed = [*entry.fds.values(), *(entry.states[name].fd for name in states)]
        view = ClaimView(
            answer="fds",
            reason=entry.problem,
            names=names,
            fds=[duplicate(fd) for fd in borrowed],
            states=states,
            handle=entry.handle,
            lifetime=entry.lifetime,
        )
        return Claimed(view, entry, void) if changes_hands else Claimed(view)


def _is(caller: Caller, pid: int, presence: Presence) -> bool:
    """Whether what is there, the process of that number or a connection of it, is the caller's: nobody else has the number."""
    return presence in (caller.process, caller.connection) or caller.pid == pid != 0


def _anothers(entry: Entry, caller: Caller) -> bool:
    """Whether a process has it that lives and is not the caller's."""
    return entry.holder is not None and entry.holder.there and not _is(caller, entry.holder_pid, entry.holder)


def _check_keeper(entry: Entry, caller: Caller, lifetime: Lifetime) -> None:
    """Raises Lost where the instance would hang on what has ended: it would be let go of at once."""
    keeper = caller.keeper(lifetime)
    if keeper is not None and not keeper.there:
        raise Lost(f"{entry.label}: the {lifetime} that claims it is gone", hint="claim again")


def _held_back(entry: Entry, state: State, unverified: bool) -> str:
    """Why an instance is not handed out; '' when it is."""
    if entry.state in (InstanceState.PRESERVED, InstanceState.FROZEN):
        return f"{entry.label} is {entry.state}: an update is {state}"
    if entry.state is InstanceState.WAITING or (not entry.state.sound and not unverified):
        return f"{entry.label} is {entry.state}: {entry.problem}"
    if entry.grade is Grade.OPAQUE and entry.session < 0:
        return f"{entry.label} is opaque, and there is no session of it"
    if entry.grade is Grade.REGISTERED and not entry.fds:
        return f"{entry.label}: nothing of it could be retrieved: {entry.problem}"
    return ""


def _unknown(name: str, state: State) -> ClaimView:
    """No such instance: it never was, or what came through cannot be read."""
    if state in (State.FAILED, State.UNREACHABLE, State.RESTORING):
        return hold(f"no instance {name!r} is known, and the last update is {state}: it may exist")
    return ClaimView(answer="cold", reason=f"no instance {name!r} came through")


def hold(reason: str, *, process: int = 0, early: bool = False) -> ClaimView:
    """Do not start it."""
    return ClaimView(answer="hold", reason=reason, process=process, early=early)
