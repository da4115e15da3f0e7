# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a driver is to the core, and what an instance is to a driver.

``khod.plugin`` makes `Driver` objects out of plugins and re-exports the value types here to their authors.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from khod.core.ports import Files, Machine
from khod.errors import FormatError, InvalidRequest, UpdateFailed
from khod.folio.units import PAGE_SIZE

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether a driver can do its work on this machine, and why not."""

    supported: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Preserve:
    """One descriptor that goes into the instance's session. Its token is its place in `Declaration.fds`."""

    name: str
    fd: int
    """Borrowed: khod keeps its own duplicate from registration until it is claimed after the jump (decision 3)."""
    folios: bool = True
    """Whether memory of frames lies behind it, that the folio map shall list and restore shall verify."""


@dataclass(frozen=True, slots=True)
class StateBound:
    """A piece of state that is written in freeze, with the most bytes that it can need (decision 9)."""

    name: str
    size: int
    bulk: bool = False
    """Memory, and not a record: exactly `size` bytes from offset 0 of its file, which may be mapped."""


class Strategy(StrEnum):
    """How an instance crosses the jump."""

    NATIVE = "native"
    """The kernel preserves its descriptors themselves."""
    CARRIED = "carried"
    """Its state is copied into memory that the kernel preserves, and it is made anew from that."""


class Continuity(StrEnum):
    """What its owner finds afterwards, best first."""

    PRESERVED = "preserved"
    """The same object, as it was."""
    REBUILT = "rebuilt"
    """Another object, of the same contents."""
    RESET = "reset"
    """Another object that starts from the beginning."""

    def meets(self, wanted: Continuity) -> bool:
        """Whether it is as good as what is wanted."""
        return [*Continuity].index(self) <= [*Continuity].index(wanted)


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a driver says of an instance when it is registered; the core does the rest.

    States get the tokens after those of `fds`, in order. `properties` are raw device-tree values (see ``khod.abi.cells``
    makes them) whose names do not begin with ``khod,``; `size` is what people are told. Their sizes bound the handover
    tree before it is preserved: freeze may change values, never make them longer.
    """

    compatible: str
    fds: tuple[Preserve, ...]
    states: tuple[StateBound, ...] = ()
    properties: Mapping[str, bytes] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    size: int = 0
    made: tuple[str, ...] = ()
    """Names of descriptors of the request that the kernel does not preserve, and that restore makes anew."""
    strategy: Strategy = Strategy.NATIVE
    continuity: Continuity = Continuity.PRESERVED
    handled: int = 0
    """Bytes that freeze copies or hashes, and restore again: their deadlines allow for it (`Settings.allowance`)."""
    unsettled: bool = False
    """This is the most that it takes and the least that it gives: which way it goes is settled in preparing."""


@dataclass(frozen=True, slots=True)
class Request:
    """A registration, as a driver is asked about it."""

    name: str
    fds: Mapping[str, int]
    """Names and borrowed descriptors, in the order in which they were given."""
    options: Mapping[str, str]


class StateArea:
    """The preserved memfd of one declared state: written in freeze, read in restore.

    On the wire: u64 length, little-endian, then the bytes. The memfd is of the declared size plus that, in whole pages,
    made and preserved in prepare: nothing is preserved in freeze.
    """

    def __init__(self, files: Files, fd: int, bound: StateBound) -> None:
        self._files, self.fd, self.bound = files, fd, bound

    @staticmethod
    def file_size(bound: StateBound) -> int:
        """Bytes of the memfd behind a state."""
        head = 0 if bound.bulk else _LENGTH.size
        return -(-(bound.size + head) // PAGE_SIZE) * PAGE_SIZE

    def write(self, data: bytes) -> None:
        """Store `data`, replacing what was there. Raises UpdateFailed when it outgrows the declared bound."""
        if len(data) > self.bound.size:
            raise UpdateFailed(
                f"state {self.bound.name!r} has {len(data)} bytes and was declared to need at most {self.bound.size}",
                hint="the driver's declared bound is too small",
            )
        self._files.write(self.fd, 0, _LENGTH.pack(len(data)) + data)

    def check(self) -> None:
        """Hold what somebody else wrote to the bound. Raises UpdateFailed."""
        if self.bound.bulk:
            return
        (length,) = _LENGTH.unpack(self._files.read(self.fd, 0, _LENGTH.size))
        if length > self.bound.size:
            raise UpdateFailed(
                f"state {self.bound.name!r} says that it has {length} bytes and was declared to need at most {self.bound.size}",
                hint="its client writes the length first, u64 little-endian, then the bytes; or its bound is too small",
            )

    def read(self) -> bytes:
        """What was written; b'' if nothing was. Raises FormatError when the length is more than the memfd holds."""
        size = self._files.stat(self.fd).size
        (length,) = _LENGTH.unpack(self._files.read(self.fd, 0, _LENGTH.size).ljust(_LENGTH.size, b"\0"))
        if length > size - _LENGTH.size:
            raise FormatError(f"state {self.bound.name!r}: length {length} in a file of {size} bytes")
        return self._files.read(self.fd, _LENGTH.size, length)


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as its driver sees it during an update and after it. Every descriptor is borrowed."""

    name: str
    options: Mapping[str, str]
    machine: Machine
    fds: Mapping[str, int]
    states: Mapping[str, StateArea]
    properties: Mapping[str, bytes]
    """Its node's properties: as declared, or on restore as the previous kernel's khod left them (`khod.abi.cells` reads)."""
    keepsake: Mapping[str, bytes] = field(default_factory=dict)
    """What prepare said that thaw needs to know: there in thaw even if khod was killed in between."""
    required: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Descriptors of the instances that it requires, by their names: in check, settle, prepare, freeze and restore."""
    anew: Collection[str] = ()
    """Which of those will have other descriptors after the jump: in settle."""
    users: Sequence[Instance] = ()
    """The instances that require it, whose turn is next: in restore."""

    @property
    def path(self) -> str:
        """What to call it in messages about its properties."""
        return self.name


class Driver(Protocol):
    """One plugin, isolated: whatever it raises that is no KhodError arrives as one, with the plugin's name in it."""

    @property
    def name(self) -> str:
        """The plugin's name, by which instances refer to it."""
        ...

    @property
    def compatible(self) -> Sequence[str]:
        """The strings it reads; it writes the first."""
        ...

    async def probe(self, machine: Machine) -> Probe:
        """Whether it can work here."""
        ...

    async def declare(self, machine: Machine, request: Request) -> Declaration:
        """Accept a registration, or raise InvalidRequest or Refused with the reason. Touches nothing in the kernel."""
        ...

    async def check(self, instance: Instance) -> Sequence[str]:
        """Reasons why an update with this instance would fail; () when there are none."""
        ...

    async def settle(self, instance: Instance, declared: Declaration) -> Declaration:
        """Which way an instance goes whose declaration is unsettled. Preserves nothing that lasts. Raises when that cannot be
        known now."""
        ...

    async def prepare(self, instance: Instance) -> Mapping[str, bytes]:
        """Before the instance's descriptors are preserved, the workload running. Returns what thaw has to know."""
        ...

    async def freeze(self, instance: Instance) -> Mapping[str, bytes]:
        """Stop it and write its states. Returns properties whose values changed."""
        ...

    async def thaw(self, instance: Instance) -> None:
        """Undo prepare and freeze, whichever ran; must work after either, and when either failed half-way."""
        ...

    async def describe(self, instance: Instance) -> Mapping[str, str]:
        """What people should know of it."""
        ...

    async def restore(self, instance: Instance) -> Mapping[str, int]:
        """In the new kernel, with everything retrieved and the sample verified; once. Returns the descriptors that it made
        anew (`Declaration.made`), owned by the caller. Raises when it is damaged."""
        ...

    async def finish(self, instance: Instance) -> None:
        """The update is over: let go of whatever was kept for it."""
        ...


class Drivers(Protocol):
    """All drivers there are."""

    def load(self) -> Sequence[str]:
        """Find the plugins that are installed; blocks. Returns a sentence about each that cannot be used."""
        ...

    def get(self, name: str) -> Driver:
        """By name. Raises InvalidRequest naming those that exist."""
        ...

    def for_compatible(self, compatible: str) -> Driver | None:
        """The one that reads nodes of this compatible string, if any."""
        ...

    def names(self) -> Sequence[str]:
        """Sorted."""
        ...


def check_declaration(request: Request, declaration: Declaration) -> None:
    """Hold a driver to the contract of `Declaration`. Raises InvalidRequest naming what breaks it."""
    problems = []
    names = [p.name for p in declaration.fds] + [s.name for s in declaration.states]
    if len(set(names)) != len(names):
        problems.append("two descriptors or states of one name")
    if unknown := {p.fd for p in declaration.fds} - set(request.fds.values()):
        problems.append(f"descriptors {sorted(unknown)} that were not in the request")
    if strange := set(declaration.made) ^ (set(request.fds) - {p.name for p in declaration.fds}):
        problems.append(f"descriptors {sorted(strange)} that are neither preserved nor made anew, or both")
    if reserved := [n for n in declaration.properties if n.startswith("khod,") or n == "compatible"]:
        problems.append(f"properties {reserved} that belong to khod")
    if negative := [s.name for s in declaration.states if s.size < 0]:
        problems.append(f"states {negative} of negative size")
    if problems:
        raise InvalidRequest(
            f"{request.name}: the driver declares {'; '.join(problems)}", hint="report it to the plugin's author"
        )


def check_settled(instance: Instance, declared: Declaration, settled: Declaration) -> None:
    """Hold what a driver settled to what it had declared, by which memory was reckoned. Raises InvalidRequest."""
    check_declaration(Request(instance.name, instance.fds, instance.options), settled)
    if (settled.compatible, settled.requires) != (declared.compatible, declared.requires):
        raise InvalidRequest(f"{instance.name}: the driver settles another compatible string or other dependencies")
    if strange := sorted(s.name for s in settled.states if s not in declared.states):
        raise InvalidRequest(f"{instance.name}: the driver settles states {strange} that it did not declare so")
    if not settled.continuity.meets(declared.continuity):
        raise InvalidRequest(f"{instance.name}: the driver settles less than it had declared: {settled.continuity}")
