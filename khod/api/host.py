# SPDX-License-Identifier: LGPL-2.1-or-later
"""The varlink interface ``org.khod.Host``. Its description, with these docstrings as comments, is in docs/varlink.md."""

# No postponed annotations in this module: asyncvarlink makes the description of those that are there.

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, TypedDict, runtime_checkable

from asyncvarlink import AnnotatedResult, FileDescriptor, VarlinkInterface, varlinkmethod

from khod.api import descriptors
from khod.api.descriptors import Bridge
from khod.api.faults import FAULTS
from khod.api.wire import INTERFACE, list_of, optional, wire_type
from khod.core.callers import Caller, Lifetime
from khod.core.driver import StateBound
from khod.core.service import Registration, Service
from khod.core.state import HOLDABLE, State
from khod.core.views import (
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    LifecycleView,
    PlanView,
    PreflightView,
    RegisteredView,
    StatusView,
    UpdateView,
)
from khod.errors import InvalidRequest

_INT32, _PAGES = (1 << 31) - 1, 1 << 47
_MAX_OVERRIDES = 4100
"""A few, and one an instance."""


@dataclass
class Descriptor:
    """A descriptor that travels with the message; `fd` is its index among those."""

    name: str
    fd: FileDescriptor


@dataclass
class ForeignDescriptor:
    """A descriptor of another process, by its number there."""

    name: str
    number: int


@dataclass
class StateDeclaration:
    """A state that the client will write when it stands still, and the most bytes that it will need."""

    name: str
    size: int


@dataclass
class ClaimAnswer:
    """'fds': here they are; 'cold': no such instance came, start from disk; 'hold': it exists, do not start."""

    answer: str
    reason: str
    fds: list[Descriptor]
    states: list[str]
    """Which of `fds` are states."""
    handle: str
    lifetime: str
    process: int
    early: bool


# Not a class: mypy would want to know the twin's type.
RegisteredAnswer = TypedDict("RegisteredAnswer", {"instance": wire_type(InstanceView), "handle": str})  # type: ignore[misc]  # noqa: UP013


class HostInterface(VarlinkInterface, name=INTERFACE):
    """khod: moves this host onto another kernel while what runs on it keeps its memory.

    Sizes are bytes, durations seconds, times nanoseconds since 1970. '' and [] stand for "none". A field `fd` (and the answer
    `session`) is the index of a descriptor that travels beside the message.

    An instance is named by its owner and its name, or by its handle, a secret that registering and claiming answer with and
    that any connection of the same owner may use. `owner` is 'user:NAME' or 'unit:NAME'; '' is the caller, or else, for who
    may administer, the only one that has an instance of that name.
    """

    errors = tuple(FAULTS.values())

    def __init__(self, service: Service, files: Bridge, caller: Caller) -> None:
        """The interface as one peer sees it: `caller` is who that is."""
        self._service = service
        self._files = files
        self._caller = caller

    # --- looking

    @varlinkmethod(return_parameter="status", return_type=wire_type(StatusView))
    async def GetStatus(self) -> object:
        """khod in one look."""
        return await self._service.status()

    @varlinkmethod(return_parameter="instances", return_type=list_of(InstanceView))
    async def ListInstances(self) -> object:
        """All instances, by owner and name.

        `state` is 'registered'; 'preserved' and 'frozen' during an update; 'restored' after it, then 'claimed'; or 'damaged'
        and 'quarantined', for what came through and cannot be vouched for. `grade` is 'registered' or 'opaque', `lifetime`
        'connection', 'process' or 'persistent', `keeper` who keeps it registered, in words.
        """
        return await self._service.instances()

    @varlinkmethod(return_parameter="plan", return_type=wire_type(PlanView))
    async def Plan(self) -> object:
        """What an update would do now. Changes nothing."""
        return await self._service.plan()

    @varlinkmethod(return_parameter="preflight", return_type=wire_type(PreflightView))
    async def Preflight(self, overrides: list[str] | None = None) -> object:
        """Whether an update to the kernel that was loaded would go through. Changes nothing.

        `overrides` are names of checks whose blockers are passed over, as Update takes them.
        """
        return await self._service.preflight(overrides=_names(overrides))

    @varlinkmethod(return_parameter="preflight", return_type=wire_type(PreflightView))
    async def PreflightImage(
        self, kernel: str, initrd: str = "", cmdline: str | None = None, overrides: list[str] | None = None
    ) -> object:
        """The same for another kernel, which is not loaded. Without a command line: that of the running kernel."""
        if not kernel:
            raise InvalidRequest("no kernel is named", hint="Preflight asks about the one that was loaded")
        return await self._service.preflight(kernel, initrd, cmdline, overrides=_names(overrides))

    @varlinkmethod(return_parameter="updates", return_type=list_of(UpdateView))
    async def GetHistory(self, limit: int = 20) -> object:
        """Updates, newest first."""
        return await self._service.history(_within("limit", limit, 0, _INT32))

    @varlinkmethod(return_parameter="inspection", return_type=wire_type(InspectionView))
    async def Inspect(self) -> object:
        """The handover tree and the folio map in force."""
        return await self._service.inspect()

    # --- instances

    @varlinkmethod(return_type=RegisteredAnswer)
    async def Register(
        self,
        name: str,
        fds: list[Descriptor],
        driver: str = "guestmemfd",
        required: bool = True,
        requires: list[str] | None = None,
        options: dict[str, str] | None = None,
        lifetime: str = "connection",
        states: list[StateDeclaration] | None = None,
        shareable: bool = False,
    ) -> object:
        """Register an instance, whose descriptors come with this call. Touches nothing in the kernel.

        An update fails when an instance that is `required` cannot come along, and leaves one behind that is not. `requires`
        are names of the same owner's instances. `lifetime`: 'connection' and 'process' end with the caller's, 'persistent' by
        Unregister alone and takes the right to operate. `states` is what the client itself will write when it stands still,
        with upper bounds. A file that is registered already is refused unless both registrations say `shareable`.
        Of callers who may not administer, only memfds that are sealed against growing are taken.
        """
        asked = _registration(name, driver, required, requires, options, lifetime, states, shareable)
        adopted = await descriptors.adopt(self._files, [(entry.name, entry.fd) for entry in fds])
        return _registered(await self._service.register(self._caller, asked, adopted))

    @varlinkmethod(return_type=RegisteredAnswer)
    async def Adopt(
        self,
        name: str,
        pid: int,
        fds: list[ForeignDescriptor],
        driver: str = "guestmemfd",
        required: bool = True,
        requires: list[str] | None = None,
        options: dict[str, str] | None = None,
        lifetime: str = "process",
        states: list[StateDeclaration] | None = None,
        shareable: bool = False,
    ) -> object:
        """Register an instance, whose descriptors are taken out of a running process, which keeps it registered."""
        asked = _registration(name, driver, required, requires, options, lifetime, states, shareable)
        numbers = [(entry.name, _within("number", entry.number, 0, _INT32)) for entry in fds]
        return _registered(await self._service.adopt(self._caller, asked, _within("pid", pid, 1, _INT32), numbers))

    @varlinkmethod(return_type=RegisteredAnswer)
    async def RegisterOpaque(self, name: str, lifetime: str = "connection") -> object:
        """Register an instance whose kernel session its client fills by itself, from OpenSession. khod does not know what is
        in it: it brings the session across, hands it to who claims it, and checks nothing."""
        return _registered(await self._service.register_opaque(self._caller, name, _lifetime(lifetime)))

    @varlinkmethod
    async def Unregister(self, name: str = "", owner: str = "", handle: str = "") -> None:
        """Forget an instance and let go of its memory. Refused for what came through a jump and is not claimed: that is
        Discard's."""
        await self._service.unregister(self._caller, name, owner=owner, handle=handle)

    @varlinkmethod(return_parameter="claim")
    async def Claim(
        self,
        name: str,
        owner: str = "",
        lifetime: str | None = None,
        unverified: bool = False,
        exclusive: bool = False,
    ) -> ClaimAnswer:
        """Hand an instance's descriptors out: they come with the answer.

        `answer` is 'fds'; 'cold' when no such instance came (start from disk); 'hold' when it exists and must not be started,
        from disk neither; `process` is then that which has it already, or 0, and `early` says that the initrd started that one.
        Of `fds`, those that `states` names are what the client wrote: a u64 length, little-endian, then the bytes. `handle` is
        the instance's from now on. The first claim after a jump registers it again with `lifetime`, by default that which it
        had; later ones change nothing while the claimant lives, or has subscribed to it, but for his own with another lifetime.
        Who starts the workload with what he is given says `exclusive`: while a process lives that has the instance (it claimed
        or registered it, or answers for it), and is not the caller's own, the answer is 'hold'; otherwise more than one may
        have the memory. `unverified`, for who may administer, hands out what khod cannot vouch for.
        """
        asked = None if lifetime is None else _lifetime(lifetime)
        view = await self._service.claim(
            self._caller, name, owner=owner, lifetime=asked, unverified=unverified, exclusive=exclusive
        )
        sendable = await descriptors.export(self._files, view.fds)
        pairs = zip(view.names, sendable, strict=True)
        sent = [Descriptor(fd_name, fd) for fd_name, fd in pairs]
        return ClaimAnswer(
            view.answer, view.reason, sent, list(view.states), view.handle, view.lifetime, view.process, view.early
        )

    @varlinkmethod
    async def Finished(self, handle: str, ran: float = 0.0) -> None:
        """The claimant has taken over: nothing of the jump is needed for this instance any more. Its workload runs, since `ran`
        seconds ago: that ends its blackout in the update's ledger."""
        await self._service.finished(self._caller, handle, ran=ran)

    @varlinkmethod
    async def Discard(self, name: str, owner: str = "") -> None:
        """Let go, for good, of something that came through a jump: an orphan, what is damaged, an opaque session."""
        await self._service.discard(self._caller, name, owner=owner)

    # --- the life cycle

    @varlinkmethod(return_parameter="event", return_type=optional(LifecycleView))
    async def Subscribe(self, handles: list[str]) -> AsyncIterator[AnnotatedResult]:
        """Everything that becomes of these instances, as it happens; the caller must answer for them from now on.

        `phase` is 'subscribed' at first, with khod's state as `reason`. 'preparing', 'quiesce' and 'commit' want Ready or
        Failed within `deadline` seconds, for the instances in `handles`: else these fail. 'executing', 'restored' and 'aborted'
        (with a `reason`) want none. The last answer, when the last of the instances is gone, has no event. Hanging up
        unsubscribes; instances that had a subscriber do not come along without one.
        """
        events = await self._service.subscribe(self._caller, handles)
        try:
            async for event in events:
                yield AnnotatedResult({"event": event}, continues=True)
        finally:
            await _close(events)
        yield AnnotatedResult({"event": None})

    @varlinkmethod
    async def Ready(
        self, update: str, phase: str, handles: list[str] | None = None, quiet_for: float = 0.0, stood: float = 0.0
    ) -> None:
        """The answer to 'preparing', 'quiesce' or 'commit', for these instances; without any, for all that the caller's own
        subscription was asked about.

        To 'quiesce' it is a lease: it holds while this connection is open, or for `quiet_for` seconds from the question
        on, whatever becomes of the connection. 'commit' is answered on the same lease; one by time that lasts until
        commit's deadline needs no answer. `stood` is for how many seconds the workload stands still by then: from there on the
        update's ledger counts its blackout.
        """
        await self._service.ready(self._caller, update, phase, handles or (), quiet_for=quiet_for, stood=stood)

    @varlinkmethod
    async def Failed(self, update: str, phase: str, handles: list[str] | None = None, reason: str = "") -> None:
        """The other answer: these instances cannot come along."""
        await self._service.failed(self._caller, update, phase, handles or (), reason)

    @varlinkmethod(return_parameter="states")
    async def GetStates(self, handle: str) -> list[Descriptor]:
        """The state memfds of an instance that is asked to stand still: they come with the answer, to be written (a u64
        length, little-endian, then the bytes) before Ready. Their sizes cannot change. Refused at any other time."""
        given = await self._service.states(self._caller, handle)
        sendable = await descriptors.export(self._files, [fd for _, fd in given])
        return [Descriptor(name, fd) for (name, _), fd in zip(given, sendable, strict=True)]

    @varlinkmethod(return_parameter="session")
    async def OpenSession(self, handle: str) -> FileDescriptor:
        """A kernel session (/dev/liveupdate's) for an opaque instance: it comes with the answer, to be filled before Ready to
        'quiesce'. From 'preparing' on, once an update. Refused at any other time."""
        (session,) = await descriptors.export(self._files, [await self._service.open_session(self._caller, handle)])
        return session

    # --- updates

    @varlinkmethod(return_parameter="image", return_type=wire_type(ImageView))
    async def Load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> object:
        """Check and record the image for the next update; paths are khod's to open. Without a command line: that of the
        running kernel."""
        return await self._service.load(kernel, initrd, cmdline)

    @varlinkmethod(return_parameter="event", return_type=optional(EventView))
    async def Update(
        self, hold_at: str | None = None, jump: str = "", overrides: list[str] | None = None
    ) -> AsyncIterator[AnnotatedResult]:
        """Start an update; its events follow as they happen, the last answer has none.

        A caller who hangs up does not stop it. At the jump the connection ends, as everything does. With `hold_at`
        ('preparing', 'prepared', 'freezing', 'frozen') it waits in that state for Continue or Abort. `jump` is 'direct' or
        'systemd', '' what is configured. `overrides` are names of checks whose blockers are passed over, and recorded.
        """
        events = await self._service.update(_holdable(hold_at), jump=jump, overrides=_names(overrides))
        try:
            async for event in events:
                yield AnnotatedResult({"event": event}, continues=True)
        finally:
            await _close(events)
        yield AnnotatedResult({"event": None})

    @varlinkmethod
    async def Continue(self) -> None:
        """Go on from a hold."""
        await self._service.proceed()

    @varlinkmethod(return_parameter="state")
    async def Abort(self) -> str:
        """Undo the update under way; answers when it is undone, with the state reached."""
        return str(await self._service.abort())

    @varlinkmethod(return_parameter="unclaimed")
    async def Finish(self) -> list[str]:
        """End the update that brought this kernel here. Answers with what nobody claimed; it is registered again."""
        return list(await self._service.finish())


async def _close(events: AsyncIterator[object]) -> None:
    """Listen no longer: an iterator of the service's is closed where it can be."""
    if isinstance(events, _Closable):
        await events.aclose()


@runtime_checkable
class _Closable(Protocol):
    async def aclose(self) -> None: ...


def _registration(
    name: str,
    driver: str,
    required: bool,
    requires: list[str] | None,
    options: dict[str, str] | None,
    lifetime: str,
    states: list[StateDeclaration] | None,
    shareable: bool,
) -> Registration:
    return Registration(
        name=name,
        driver=driver,
        required=required,
        requires=tuple(requires or ()),
        options=options or {},
        lifetime=_lifetime(lifetime),
        states=tuple(StateBound(state.name, _within("size", state.size, 0, _PAGES)) for state in states or ()),
        shareable=shareable,
    )


def _registered(view: RegisteredView) -> dict[str, object]:
    return {"instance": view.instance, "handle": view.handle}


def _lifetime(name: str) -> Lifetime:
    if name not in [*Lifetime]:
        raise InvalidRequest(f"{name!r} is no lifetime", hint="one of " + ", ".join(Lifetime))
    return Lifetime(name)


def _within(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} cannot be {value if -_PAGES < value < _PAGES else 'that'}", hint=f"{low} to {high}")
    return value


def _names(names: list[str] | None) -> list[str]:
    """Of checks. Raises InvalidRequest for more than there can be."""
    if names and len(names) > _MAX_OVERRIDES:
        raise InvalidRequest(f"{len(names)} overrides", hint=f"at most {_MAX_OVERRIDES}: there are no more checks")
    return names or []


def _holdable(name: str | None) -> State | None:
    if name is None:
        return None
    if name not in HOLDABLE:
        raise InvalidRequest(f"{name!r} is no state to hold at", hint=f"one of {', '.join(HOLDABLE)}")
    return State(name)
