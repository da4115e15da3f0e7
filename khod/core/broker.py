# SPDX-License-Identifier: LGPL-2.1-or-later
"""Between khod and its clients: who answers for which instance, what they are asked and told, and what their answers are worth
(decisions 1 and 13).

A client subscribes to its instances and answers READY or FAILED to what it hears. An answer counts for the instances that it
names; nobody's answer, or silence, is another's harm. Nothing here waits for a client longer than the limit that is given.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from khod.core.callers import Caller, Presence
from khod.core.ports import Clock
from khod.core.question import ANSWERED, Lease, Phase, Question
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.core.subscription import Subscription
from khod.core.views import LifecycleView
from khod.errors import DeadlinePassed, InvalidRequest, KhodError, Lost, Refused, UpdateFailed

QUIET_AT_MOST = 3600.0
"""Seconds for which a client may promise to stand still."""
PASSED_AT_MOST = 1e6
"""Seconds that a client may say have passed since something."""
REASON_AT_MOST = 300
"""Characters of a client's reason that are passed on."""
_GONE = "its connection is gone"
_CAME_THROUGH = (InstanceState.RESTORED, InstanceState.CLAIMED)
_STOPPING = frozenset({State.FREEZING, State.FROZEN, State.EXECUTING, State.ABORTING})


class Attended(Protocol):
    """An instance, as far as the broker sees it: a `khod.core.registry.Entry`."""

    attended: bool

    @property
    def handle(self) -> str:
        """Unguessable."""
        ...

    @property
    def label(self) -> str:
        """What people call it."""
        ...

    @property
    def state(self) -> InstanceState:
        """Where it is."""
        ...

    @property
    def incoming(self) -> str:
        """Name of the session that it came through a jump in; '' when that is finished, or there was none."""
        ...


Entry = TypeVar("Entry", bound=Attended)


class Instances(Protocol):
    """Where instances are found: a `khod.core.registry.Registry`."""

    def by_handle(self, caller: Caller, handle: str) -> Attended:
        """The caller's own, or any for one who may administer. Raises InvalidRequest for all others."""
        ...


class Broker:
    """All subscriptions, and the question that is open. Everything runs in one event loop."""

    def __init__(self, instances: Instances, clock: Clock, where: Callable[[], tuple[State, str]]) -> None:
        self._instances, self._clock = instances, clock
        self._where = where
        """khod's state and the update that it is about."""
        self._subscriptions: dict[str, Subscription] = {}
        """Living ones, by handle."""
        self._leases: dict[str, Lease] = {}
        """Of the update under way, by handle."""
        self._clients: dict[object, dict[Subscription, None]] = {}
        """Living ones, by connection, and by owner and process."""
        self._watched: dict[int, Presence] = {}
        """Connections whose end it is told of."""
        self._heard: dict[str, Subscription] = {}
        """Who heard of the update under way and not yet how it ended, by handle."""
        self._question: Question | None = None
        self._jump_before = 0
        """The machine's monotonic clock, in ns, of the last question's limit."""

    # For clients

    def subscribe(self, caller: Caller, handles: Sequence[str]) -> Subscription:
        """Everything that becomes of these instances. They are attended from now on: without a living subscriber they do not
        come along. The caller closes it.

        What came through a jump and is not finished is told as 'restored' at once. Raises InvalidRequest for no or an unknown
        handle; Refused for one that has a subscriber, and while the workload is
        being stopped: who comes then was not asked to stand still.
        """
        entries = self._own(caller, handles)
        if not entries:
            raise InvalidRequest("nothing to subscribe to", hint="name the handles that registering answered with")
        state, update = self._where()
        if state in _STOPPING:
            raise Refused(f"khod is {state}: too late to take part in this update", hint="subscribe when it has ended")
        for entry in entries:
            if self._living(entry.handle) is not None:
                raise Refused(f"instance {entry.label} has a subscriber", hint="that one's connection must end first")
        subscription = Subscription(caller, (e.handle for e in entries), self._ended)
        self._watch(caller.connection)
        for key in _keys(caller):
            self._clients.setdefault(key, {})[subscription] = None
        subscription.tell(_view(Phase.SUBSCRIBED, update, subscription.handles, reason=state))
        for entry in entries:
            entry.attended = True
            self._subscriptions[entry.handle] = subscription
            if state.outgoing:
                self._heard[entry.handle] = subscription
        if restored := [e.handle for e in entries if e.state in _CAME_THROUGH and e.incoming]:
            subscription.tell(_view(Phase.RESTORED, update, restored))
        return subscription

    def ready(
        self,
        caller: Caller,
        update: str,
        phase: str,
        handles: Sequence[str] = (),
        *,
        quiet_for: float = 0.0,
        stood: float = 0.0,
    ) -> None:
        """READY for these instances; () for all that the caller's own subscription is asked about.

        To 'quiesce' it is a lease: it holds while the caller's connection is open, or instead for `quiet_for` seconds of the
        machine's clock, whatever becomes of the connection. They count from the question, so that nothing on the way makes
        them more than the client meant. 'commit' is answered on the connection of the lease; a lease by
        time that lasts until commit's deadline is its own answer, and needs none. `stood`: for how many seconds the workload
        stands still already, of those since the question.

        Raises InvalidRequest for a phase that wants no answer, an unknown handle or a time that is none; Refused for an answer
        to what was not asked, was answered, or was asked of another lease. Then it has no effect at all.
        """
        if not 0 <= quiet_for <= QUIET_AT_MOST:  # nan is not
            raise InvalidRequest(f"cannot stay quiet for {quiet_for:g} s", hint=f"0 to {QUIET_AT_MOST:g}")
        if quiet_for and phase != Phase.QUIESCE:
            raise InvalidRequest(f"{_short(phase)} is no lease: it takes no time to stay quiet", hint="give it to 'quiesce'")
        check_seconds("stood", stood)
        question, meant = self._meant(caller, update, phase, handles)
        if question.phase is Phase.COMMIT:
            for handle in meant:
                lease = self._leases[handle]
                if not lease.until and lease.connection is not caller.connection:
                    raise Refused(
                        "'commit' is answered on the connection that said READY to 'quiesce'",
                        hint="one who has no lasting connection says to 'quiesce' for how long he stays quiet",
                    )
        elif question.phase is Phase.QUIESCE:
            until = question.asked_at + math.ceil(quiet_for * 1e9) if quiet_for else 0
            since = max(question.asked_at, self._now() - int(stood * 1e9))
            lease = Lease(caller.connection, until, since)
            self._leases.update(dict.fromkeys(meant, lease))
        for handle in meant:
            question.settle(handle)

    def failed(self, caller: Caller, update: str, phase: str, handles: Sequence[str], reason: str) -> None:
        """These instances, and no others, cannot come along. Raises what `ready` raises."""
        question, meant = self._meant(caller, update, phase, handles)
        said = _short(reason, REASON_AT_MOST) if reason else "it gave no reason"
        for handle in meant:
            question.settle(handle, UpdateFailed(f"its client says no to {question.phase}: {said}"))

    def forget(self, handle: str) -> None:
        """The handle is void: the instance is unregistered, or claimed anew. None such: no effect."""
        self._leases.pop(handle, None)
        self._heard.pop(handle, None)
        if self._question is not None and handle in self._question.open:
            self._question.settle(handle, Lost("it was unregistered"))
        subscription = self._subscriptions.pop(handle, None)
        if subscription is not None:
            del subscription.handles[handle]
            if not subscription.handles:
                subscription.end("its instances are unregistered, or claimed by others")

    def check_asked(self, entry: Attended, phase: Phase) -> None:
        """Whether this is being asked of the instance's client, and not answered. Raises Refused."""
        question = self._question
        if question is None or question.phase is not phase or entry.handle not in question.open:
            raise Refused(
                f"instance {entry.label}: not now: khod is {self._where()[0]}",
                hint=f"ask after you heard {phase}, and before you answer it",
            )

    def answers(self, handle: str) -> bool:
        """Whether a living client answers for this instance."""
        return self._living(handle) is not None

    def who_answers(self, handle: str) -> Caller | None:
        """The living client that answers for this instance."""
        subscription = self._living(handle)
        return subscription.caller if subscription is not None else None

    # For the update

    def standing(self, entries: Iterable[Entry]) -> dict[str, int]:
        """Since when the workload of each of these stands still that a client answers for, by label: the machine's monotonic
        clock, in ns."""
        return {e.label: self._leases[e.handle].since for e in entries if e.handle in self._leases}

    def without_client(self, entries: Iterable[Entry]) -> list[Entry]:
        """Those that a client has to answer for, and nobody is there who does."""
        return [e for e in entries if e.attended and not self.answers(e.handle)]

    async def ask(self, phase: Phase, update: str, entries: Sequence[Entry], limit: float) -> dict[str, KhodError]:
        """Ask the clients of these instances, all at once, and wait at most `limit` seconds. Returns which instances failed, by
        handle, and why.

        To 'commit' clients promise to stand still for twice the limit: the jump begins in the first half or not at all
        (`check_promise`), and the other half is the kernel's, which shuts down devices while user space still runs.
        """
        assert self._question is None, "one question at a time"
        question = self._question = Question(phase, update, self._now())
        promised = 2 * limit if phase is Phase.COMMIT else limit
        self._jump_before = question.asked_at + math.ceil(limit * 1e9)
        try:
            asked = [e.handle for e in entries if self._to_be_asked(question, e, promised)]
            self._tell(question.phase, update, asked, deadline=promised)
            if question.open:
                async with asyncio.timeout(limit):
                    await question.answered.wait()
        except TimeoutError:
            for handle in list(question.open):
                question.settle(handle, DeadlinePassed(f"its client did not answer {phase} within {limit:g} s"))
        finally:
            self._question = None
        self._check_leases(question, entries)
        return question.failures

    def check_promise(self) -> None:
        """The last look before the jump. Raises DeadlinePassed when it is too late: a client that answered to 'commit' might go
        on by itself before the kernel is gone. Nobody who could: no effect."""
        if self._leases and (late := self._now() - self._jump_before) >= 0:
            raise DeadlinePassed(
                f"{late / 1e9:.1f} s too late to jump: clients that answered to {Phase.COMMIT} go on by themselves soon",
                hint="the disk under khod's journal is slow, or a client is; raise `freezing`",
            )

    async def executing(self, update: str, entries: Sequence[Entry], limit: float) -> list[Entry]:
        """Tell the clients of these instances that the jump is next, and wait at most `limit` seconds until they have taken it.
        Returns those whose client did not, or is not there: one who stands still by time need not be."""
        clients = {e.handle: self._living(e.handle) for e in entries}
        told = self._tell(Phase.EXECUTING, update, clients)
        waiting = {asyncio.create_task(s.read()): s for s in told}
        try:
            if waiting:
                await asyncio.wait(waiting, timeout=limit)
        finally:
            for task in waiting:
                task.cancel()
        heard = {s for task, s in waiting.items() if task.done() and not task.cancelled() and task.result()}
        return [e for e in entries if (e.handle in self._leases or clients[e.handle]) and clients[e.handle] not in heard]

    def aborted(self, update: str, reason: str, entries: Iterable[Attended] | None = None) -> None:
        """Tell whoever heard of the update, and was not told yet, that it is over for their instances; `entries` None: for
        all of them."""
        handles = list(self._heard) if entries is None else [e.handle for e in entries if e.handle in self._heard]
        for subscription, theirs in self._by_subscription(handles, self._heard).items():
            subscription.tell(_view(Phase.ABORTED, update, theirs, reason=reason))
        for handle in handles:
            del self._heard[handle]
            self._leases.pop(handle, None)

    # Within

    def _now(self) -> int:
        return self._clock.stamp().monotonic

    def _own(self, caller: Caller, handles: Iterable[str]) -> list[Attended]:
        return [self._instances.by_handle(caller, handle) for handle in dict.fromkeys(handles)]

    def _living(self, handle: str) -> Subscription | None:
        """Who answers for an instance."""
        subscription = self._subscriptions.get(handle)
        if subscription is not None and not subscription.caller.connection.there:
            subscription.end(_GONE)
        return self._subscriptions.get(handle)

    def _meant(self, caller: Caller, update: str, phase: str, handles: Sequence[str]) -> tuple[Question, list[str]]:
        """The question that an answer is to, and the handles that it is for: all or none."""
        if phase not in ANSWERED:
            raise InvalidRequest(f"{_short(phase)} takes no answer", hint=f"one of {', '.join(ANSWERED)}")
        meant = [e.handle for e in self._own(caller, handles)]
        question = self._question
        if question is None:
            raise Refused("nothing is being asked", hint=f"khod is {self._where()[0]}")
        if (update, phase) != (question.update, question.phase):
            raise Refused(
                f"{_short(phase)} of update {_short(update)} is not being asked",
                hint=f"{question.phase} of {question.update} is",
            )
        if not handles:
            meant = [h for h in self._subscription_of(caller).handles if h in question.open or h in question.may]
            if not meant:
                raise Refused(f"{question.phase}: answered already, or not asked")
        for handle in meant:
            if handle not in question.open and handle not in question.may:
                entry = self._instances.by_handle(caller, handle)
                raise Refused(f"instance {entry.label}: {question.phase} was answered already, or was not asked of it")
        return question, meant

    def _subscription_of(self, caller: Caller) -> Subscription:
        """What the caller's own connection subscribed to, or else his process, if that is one."""
        mine = next((list(found) for key in _keys(caller) if (found := self._clients.get(key))), [])
        if len(mine) != 1:
            raise InvalidRequest(
                f"{len(mine)} subscriptions are this caller's: whom the answer is for cannot be told", hint="name the handles"
            )
        return mine[0]

    def _to_be_asked(self, question: Question, entry: Attended, promised: float) -> bool:
        """Enter one instance into the question; False where nobody is to be asked for it."""
        handle, client = entry.handle, self._living(entry.handle)
        if client is None and not entry.attended:
            return False
        if question.phase is Phase.COMMIT:
            lease = self._leases.get(handle)
            if lease is None:
                question.failures[handle] = Lost("its client gave no lease")
                return False
            if lease.until:
                return self._lasts(question, lease, handle, promised) and client is not None
            if why := lease.lapsed(question.asked_at):
                question.failures[handle] = Lost(why)
                return False
        if client is None:
            question.failures[handle] = Lost("nobody is there to answer for it", hint="its client subscribes again, or ends it")
            return False
        question.open.add(handle)
        return True

    def _lasts(self, question: Question, lease: Lease, handle: str, promised: float) -> bool:
        """Whether a lease by time is its own answer to 'commit'."""
        if lease.until < question.asked_at + promised * 1e9:
            question.failures[handle] = DeadlinePassed(
                f"its client stays quiet for too short a time: it must last {promised:g} s from 'commit' on"
            )
            return False
        question.may.add(handle)
        return True

    def _check_leases(self, question: Question, entries: Iterable[Attended]) -> None:
        """Who said READY and went away while others were still waited for."""
        now = self._now()
        for entry in entries if question.phase is not Phase.PREPARING else ():
            lease = self._leases.get(entry.handle)
            if lease is not None and entry.handle not in question.failures and (why := lease.lapsed(now)):
                question.failures[entry.handle] = Lost(why)

    def _watch(self, connection: Presence) -> None:
        """Be told of its end: once, however often it subscribes."""
        if id(connection) not in self._watched:
            self._watched[id(connection)] = connection
            connection.on_end(lambda: self._gone(connection))

    def _gone(self, connection: Presence) -> None:
        self._watched.pop(id(connection), None)
        for subscription in list(self._clients.get(id(connection), ())):
            subscription.end(_GONE)

    def _ended(self, subscription: Subscription) -> None:
        """A client is gone, and with it the answers that it still owes."""
        for key in _keys(subscription.caller):
            if (living := self._clients.get(key)) is not None:
                living.pop(subscription, None)
                if not living:
                    del self._clients[key]
        for handle in subscription.handles:
            if self._subscriptions.get(handle) is subscription:
                del self._subscriptions[handle]
            if self._question is not None and handle in self._question.open:
                self._question.settle(handle, Lost(f"its client is gone while {self._question.phase} was asked"))

    def _tell(self, phase: Phase, update: str, handles: Iterable[str], *, deadline: float = 0.0) -> list[Subscription]:
        """Tell the clients of these instances, each once. Returns them."""
        told = self._by_subscription(handles, self._subscriptions)
        until = asyncio.get_running_loop().time() + deadline if deadline else 0.0
        for subscription, theirs in told.items():
            self._heard.update(dict.fromkeys(theirs, subscription))
            subscription.tell(_view(phase, update, theirs, deadline=deadline), until)
        return list(told)

    @staticmethod
    def _by_subscription(handles: Iterable[str], of: Mapping[str, Subscription]) -> dict[Subscription, list[str]]:
        found: dict[Subscription, list[str]] = {}
        for handle in handles:
            if (subscription := of.get(handle)) is not None:
                found.setdefault(subscription, []).append(handle)
        return found


def check_seconds(name: str, value: float) -> None:
    """Whether a client's figure can be seconds that have passed. Raises InvalidRequest."""
    if not 0 <= value <= PASSED_AT_MOST:  # nan is not
        raise InvalidRequest(f"{name}: {value:g} s", hint=f"seconds that have passed: 0 to {PASSED_AT_MOST:g}")


def _keys(caller: Caller) -> list[object]:
    """What tells a client by: its connection, then its process."""
    return [id(caller.connection), *([(caller.owner, caller.pid)] if caller.pid else [])]


def _view(phase: Phase, update: str, handles: Iterable[str], *, deadline: float = 0.0, reason: str = "") -> LifecycleView:
    return LifecycleView(phase=phase, update=update, handles=tuple(handles), deadline=deadline, reason=reason)


def _short(text: str, most: int = 40) -> str:
    """Somebody else's words, made fit for a message."""
    text = "".join(c if c.isprintable() else "?" for c in text[:most])
    return text if most > 40 else repr(text)
