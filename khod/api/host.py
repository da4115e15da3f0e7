# SPDX-License-Identifier: LGPL-2.1-or-later
"""The varlink interface ``org.khod.Host``. Its description, with these docstrings as comments, is docs/varlink.md."""

# No postponed annotations in this module: asyncvarlink makes the description of those that are there.

from collections.abc import AsyncIterator
from dataclasses import dataclass

from asyncvarlink import AnnotatedResult, FileDescriptor, VarlinkInterface, varlinkmethod

from khod.api import descriptors
from khod.api.descriptors import Bridge
from khod.api.faults import FAULTS
from khod.api.wire import INTERFACE, list_of, optional, wire_type
from khod.core.callers import Caller, Lifetime
from khod.core.service import Registration, Service
from khod.core.state import State
from khod.core.views import EventView, ImageView, InspectionView, InstanceView, PlanView, StatusView, UpdateView
from khod.errors import InvalidRequest


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
class ClaimAnswer:
    """'fds': here they are; 'cold': no such instance came, start from disk; 'hold': it exists, do not start."""

    answer: str
    reason: str
    fds: list[Descriptor]


class HostInterface(VarlinkInterface, name=INTERFACE):
    """khod: moves this host onto another kernel while what runs on it keeps its memory.

    Sizes are bytes, durations seconds, times nanoseconds since 1970. '' and [] stand for "none".
    """

    errors = tuple(FAULTS.values())

    def __init__(self, service: Service, files: Bridge, caller: Caller) -> None:
        """The interface as one peer sees it: `caller` is who that is."""
        self._service = service
        self._files = files
        self._caller = caller

    @varlinkmethod(return_parameter="status", return_type=wire_type(StatusView))
    async def GetStatus(self) -> object:
        """khod in one look."""
        return await self._service.status()

    @varlinkmethod(return_parameter="instance", return_type=wire_type(InstanceView))
    async def Register(
        self,
        name: str,
        driver: str,
        fds: list[Descriptor],
        required: bool = True,
        requires: list[str] | None = None,
        options: dict[str, str] | None = None,
    ) -> object:
        """Register an instance, whose descriptors come with this call. Touches nothing in the kernel.

        An update fails when an instance that is required cannot come along, and leaves one behind that is not.
        """
        adopted = await descriptors.adopt(self._files, [(entry.name, entry.fd) for entry in fds])
        asked = _registration(name, driver, required, requires, options)
        return (await self._service.register(self._caller, asked, adopted)).instance

    @varlinkmethod(return_parameter="instance", return_type=wire_type(InstanceView))
    async def Adopt(
        self,
        name: str,
        driver: str,
        pid: int,
        fds: list[ForeignDescriptor],
        required: bool = True,
        requires: list[str] | None = None,
        options: dict[str, str] | None = None,
    ) -> object:
        """Register an instance, whose descriptors are taken out of a running process."""
        numbers = [(entry.name, entry.number) for entry in fds]
        asked = _registration(name, driver, required, requires, options)
        return (await self._service.adopt(self._caller, asked, pid, numbers)).instance

    @varlinkmethod
    async def Unregister(self, name: str) -> None:
        """Forget an instance and let go of its memory; of one that is damaged: discard it for good."""
        await self._service.unregister(self._caller, name)

    @varlinkmethod(return_parameter="instances", return_type=list_of(InstanceView))
    async def ListInstances(self) -> object:
        """All instances, by name."""
        return await self._service.instances()

    @varlinkmethod(return_parameter="image", return_type=wire_type(ImageView))
    async def Load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> object:
        """Check and record the image for the next update. Without a command line: that of the running kernel."""
        return await self._service.load(kernel, initrd, cmdline)

    @varlinkmethod(return_parameter="plan", return_type=wire_type(PlanView))
    async def Plan(self) -> object:
        """What an update would do now. Changes nothing."""
        return await self._service.plan()

    @varlinkmethod(return_parameter="event", return_type=optional(EventView))
    async def Update(self, hold_at: str | None = None) -> AsyncIterator[AnnotatedResult]:
        """Start an update; its events follow as they happen, the last answer has none.

        A caller who hangs up does not stop it. At the jump the connection ends, as everything does. With `hold_at` it
        waits in that state for Continue or Abort.
        """
        events = await self._service.update(_holdable(hold_at))
        async for event in events:
            yield AnnotatedResult({"event": event}, continues=True)
        yield AnnotatedResult({"event": None})

    @varlinkmethod
    async def Continue(self) -> None:
        """Go on from a hold."""
        await self._service.proceed()

    @varlinkmethod(return_parameter="state")
    async def Abort(self) -> str:
        """Undo the update under way; answers when it is undone, with the state reached."""
        return str(await self._service.abort())

    @varlinkmethod(return_parameter="claim")
    async def Claim(self, name: str, unverified: bool = False) -> ClaimAnswer:
        """Hand an instance's descriptors out: they come with the answer."""
        view = await self._service.claim(self._caller, name, unverified=unverified)
        sendable = await descriptors.export(self._files, view.fds)
        pairs = zip(view.names, sendable, strict=True)
        return ClaimAnswer(view.answer, view.reason, [Descriptor(fd_name, fd) for fd_name, fd in pairs])

    @varlinkmethod(return_parameter="unclaimed")
    async def Finish(self) -> list[str]:
        """End the update that brought this kernel here. Answers with what nobody claimed; it is registered again."""
        return list(await self._service.finish())

    @varlinkmethod(return_parameter="updates", return_type=list_of(UpdateView))
    async def GetHistory(self, limit: int = 20) -> object:
        """Updates, newest first."""
        return await self._service.history(limit)

    @varlinkmethod(return_parameter="inspection", return_type=wire_type(InspectionView))
    async def Inspect(self) -> object:
        """The handover tree and the folio map in force."""
        return await self._service.inspect()


def _registration(
    name: str, driver: str, required: bool, requires: list[str] | None, options: dict[str, str] | None
) -> Registration:
    return Registration(
        name=name,
        driver=driver,
        required=required,
        requires=requires or (),
        options=options or {},
        lifetime=Lifetime.PERSISTENT,
    )


def _holdable(name: str | None) -> State | None:
    if name is None:
        return None
    holdable = [state for state in State if state.holdable]
    if name not in holdable:
        raise InvalidRequest(f"{name!r} is no state to hold at", hint="one of " + ", ".join(holdable))
    return State(name)
