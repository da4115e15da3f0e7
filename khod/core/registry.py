# SPDX-License-Identifier: LGPL-2.1-or-later
"""The instances that khod knows, and in which order they depend on each other.

An `Entry` holds khod's own duplicates of an instance's descriptors, from registration until it is unregistered
(decision 3); whoever takes an entry out closes them with `Entry.close`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

from khod.core.callers import Caller, Kind, Lifetime, Owner, Presence, Right
from khod.core.driver import Declaration, Driver, Instance, StateArea, StateBound
from khod.core.ports import Machine
from khod.errors import InvalidRequest, NotPermitted, Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,47}")
MAX_INSTANCES = 4000
"""The handover tree has at most 4,096 nodes, one an instance."""


class Grade(StrEnum):
    """What khod knows of an instance (decision 4)."""

    REGISTERED = "registered"
    """It has the descriptors: mapped, verified, counted, preserved again next time."""
    OPAQUE = "opaque"
    """Its owner fills a kernel session by himself: contents unknown."""


OPAQUE_DRIVER, OPAQUE_COMPATIBLE = "opaque", "khod,opaque-v1"
"""What stands for a driver where there is none."""

Key: TypeAlias = tuple[Owner, str]
"""What names an instance: names are unique among an owner's."""


class InstanceState(StrEnum):
    """Where one instance is."""

    REGISTERED = "registered"
    PRESERVED = "preserved"
    FROZEN = "frozen"
    RESTORED = "restored"
    CLAIMED = "claimed"
    DAMAGED = "damaged"
    """Came through, and something about it is not as it was: kept, not handed out unless asked for by name."""
    QUARANTINED = "quarantined"
    """Came through, and no plugin here knows what it is."""
    WAITING = "waiting"
    """Came through, and is not retrieved: it cannot be proven that this would succeed (decision 19)."""

    @property
    def unclaimed(self) -> bool:
        """It came through a jump and nobody but khod has it."""
        return self is InstanceState.RESTORED or not self.sound

    @property
    def sound(self) -> bool:
        """It may be handed out and take part in an update."""
        return self not in (InstanceState.DAMAGED, InstanceState.QUARANTINED, InstanceState.WAITING)


@dataclass(slots=True, eq=False)
class Entry:
    """One instance in khod's hands."""

    name: str
    driver: Driver | None
    """None for one that is quarantined, or opaque."""
    driver_name: str
    owner: Owner
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]
    declaration: Declaration
    fds: dict[str, int]
    """Owned."""
    inodes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What its files are, as far as somebody asked: looking at all again for each registration would be quadratic."""
    state: InstanceState = InstanceState.REGISTERED
    problem: str = ""
    states: dict[str, StateArea] = field(default_factory=dict)
    """Memfds of its states; owned. There from prepare until the update is finished or undone."""
    properties: dict[str, bytes] = field(default_factory=dict)
    session: int = -1
    """Its kernel session, owned: outgoing during an update, incoming from restore until finish; -1 for none."""
    session_name: str = ""
    """Of the outgoing one."""
    incoming: str = ""
    """Name of the session that it came through a jump in, until that is finished."""
    grade: Grade = Grade.REGISTERED
    handle: str = ""
    """Unguessable; lets any connection of the owner speak for it."""
    lifetime: Lifetime = Lifetime.PERSISTENT
    keeper: Presence | None = None
    """Whose end is its end; None for nobody's, or while its client has still to come back to a khod that was restarted."""
    keeper_pid: int = 0
    keeper_since: int = 0
    """`Presence.since` of a process, for a khod that is started anew."""
    runner: Presence | None = None
    """The process that the restore stage started for it, until that claims it."""
    runner_pid: int = 0
    runner_since: int = 0
    holder: Presence | None = None
    """The process that it was handed out to, or that registered it: it may run the workload, whatever the instance hangs on."""
    holder_pid: int = 0
    holder_since: int = 0
    """`Presence.since` of it, for a khod that is started anew."""
    holder_early: bool = False
    """Whether the restore stage started that process."""
    client_states: tuple[StateBound, ...] = ()
    """Written by its client and not by its driver."""
    shareable: bool = False
    """Whether others may register the same files."""
    shares: dict[str, tuple[Key, str]] = field(default_factory=dict)
    """Descriptors whose file another instance registered first, and preserves: by name, whose, and its name there."""
    attended: bool = False
    """Whether a client has to answer for it."""
    since: int = 0
    """CLOCK_REALTIME in nanoseconds when it came into its state."""
    deposits: dict[str, str] = field(default_factory=dict)
    """Under which name each of `fds` is in custody."""
    keepsake: Mapping[str, bytes] = field(default_factory=dict)
    """What its driver's thaw has to know; {} outside of an update."""

    def __post_init__(self) -> None:
        self.properties = self.properties or dict(self.declaration.properties)

    @property
    def key(self) -> Key:
        """What names it on this host."""
        return (self.owner, self.name)

    @property
    def label(self) -> str:
        """What people call it: its name, with the owner where that is not root."""
        return self.name if self.owner == ROOT else f"{self.name} of {self.owner}"

    @property
    def bounds(self) -> tuple[StateBound, ...]:
        """All states, its driver's and its client's, in token order."""
        return (*self.declaration.states, *self.client_states)

    @property
    def needs(self) -> set[Key]:
        """The instances without which it cannot come along."""
        return {(self.owner, name) for name in self.requires} | {key for key, _ in self.shares.values()}

    @property
    def unfinished(self) -> str:
        """Why khod cannot finish its session by itself: what came in it would be lost (decision 7). '' when it can."""
        if self.incoming and self.grade is Grade.OPAQUE:
            return f"{self.label} is opaque and came through a jump, and its owner has not said that it is finished"
        if self.incoming and self.client_states and self.state is InstanceState.RESTORED:
            return f"{self.label} came with states of its client, which nobody has claimed"
        return ""

    def view(self, machine: Machine, others: Iterable[Entry] = (), users: Iterable[Entry] = ()) -> Instance:
        """As its driver sees it; what it requires is looked for among `others`, and `users` are those that require it."""
        needed = [e for e in others if self._requires(e)] if self.requires else []
        return Instance(
            name=self.name,
            options=self.options,
            machine=machine,
            fds=dict(self.fds),
            states=dict(self.states),
            properties=dict(self.properties),
            keepsake=dict(self.keepsake),
            required={e.name: dict(e.fds) for e in needed},
            anew=frozenset(e.name for e in needed if e.declaration.made),
            users=tuple(e.view(machine) for e in users),
        )

    def _requires(self, other: Entry) -> bool:
        return other.name in self.requires and other.owner == self.owner

    def close_session(self, machine: Machine) -> None:
        """Close its session and its states. Of an outgoing session that undoes every preserve; an incoming one is still in
        custody."""
        if self.session >= 0:
            machine.files.close(self.session)
            self.session, self.session_name = -1, ""
        for area in self.states.values():
            machine.files.close(area.fd)
        self.states.clear()

    def close(self, machine: Machine) -> None:
        """Close all descriptors that khod has of it; what is in custody stays there."""
        self.close_session(machine)
        while self.fds:
            machine.files.close(self.fds.popitem()[1])


ROOT = Owner(Kind.USER, "root")


class Registry:
    """All entries, by owner and name."""

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._handles: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda e: e.key))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def holds(self, entry: Entry) -> bool:
        """Whether it was not let go of: another may have its name by now."""
        return self._entries.get(entry.key) is entry

    def get(self, key: Key) -> Entry:
        """By owner and name. Raises InvalidRequest."""
        try:
            return self._entries[key]
        except KeyError:
            raise _unknown(key[1]) from None

    def find(self, caller: Caller, name: str, owner: str = "") -> Entry:
        """The instance that a caller means: his own, or, for one who may administer, another's. `owner` '' means his own, or
        else the only one of that name. Raises InvalidRequest, NotPermitted, FormatError."""
        if owner:
            key = (Owner.parse(owner), name)
            if key[0] != caller.owner and not caller.may(Right.ADMINISTER):
                raise NotPermitted(f"{name} of {owner} is not {caller.owner}'s", hint=_ASK)
            return self.get(key)
        if (caller.owner, name) in self._entries or not caller.may(Right.ADMINISTER):
            return self.get((caller.owner, name))
        named = self.named(name)
        if len(named) > 1:
            owners = ", ".join(str(e.owner) for e in named)
            raise InvalidRequest(f"{name!r} can mean an instance of {owners}", hint="name the owner as well")
        if not named:
            raise _unknown(name)
        return named[0]

    def named(self, name: str) -> list[Entry]:
        """Everybody's instances of that name."""
        return [e for e in self if e.name == name]

    def of(self, owner: Owner) -> list[Entry]:
        """One owner's."""
        return [e for e in self._entries.values() if e.owner == owner]

    def by_handle(self, caller: Caller, handle: str) -> Entry:
        """The instance that a handle stands for. Raises InvalidRequest for an unknown one and for another's alike: a handle
        tells nobody whether it exists."""
        entry = self._handles.get(handle)
        if entry is None or (entry.owner != caller.owner and not caller.may(Right.ADMINISTER)):
            raise InvalidRequest("no instance has this handle", hint="registering or claiming again makes a new one")
        return entry

    def set_handle(self, entry: Entry, handle: str) -> None:
        """A new handle: the earlier one is void."""
        self._handles.pop(entry.handle, None)
        entry.handle = handle
        self._handles[handle] = entry

    def add(self, entry: Entry) -> None:
        """Add one. Raises what `check_new` raises."""
        self.check_new(entry.owner, entry.name, entry.requires)
        self.put(entry)

    def put(self, entry: Entry) -> None:
        """Add one that is there whatever it requires: it came through a jump, or was there before khod was restarted."""
        self._entries[entry.key] = entry
        if entry.handle:
            self._handles[entry.handle] = entry

    def check_new(self, owner: Owner, name: str, requires: Sequence[str]) -> None:
        """Whether an instance of this name may be added. Raises InvalidRequest for a bad name or dependency, Refused if it is
        taken or there are too many."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"instance name {name!r} is not allowed",
                hint="1 to 48 characters: letters, digits, '.', '_', '@', '-'; a letter or digit first",
            )
        if (owner, name) in self._entries:
            raise Refused(f"instance {name!r} is registered already", hint=f"`khoctl unregister {name}` lets go of it")
        if len(self) >= MAX_INSTANCES:
            raise Refused(f"{len(self)} instances are registered, which is the most that one handover tree holds")
        for other in requires:
            if (owner, other) not in self._entries:
                raise InvalidRequest(f"{name}: requires {other!r}, which is not registered", hint="register that one first")

    def check_removable(self, entry: Entry) -> None:
        """Raises Refused while another requires it."""
        if users := [e.label for e in self if e.owner == entry.owner and entry.name in e.requires]:
            raise Refused(f"{entry.label}: required by {', '.join(users)}", hint="unregister those first")

    def sharers(self, entry: Entry) -> list[Entry]:
        """Those whose files this one preserves."""
        return [e for e in self if any(key == entry.key for key, _ in e.shares.values())]

    def remove(self, entry: Entry) -> None:
        """Take one out; its descriptors go with it. Of those who share its files, the first preserves them from now on."""
        heirs: dict[str, tuple[Key, str]] = {}
        for other in self.sharers(entry):
            for fd_name, (key, theirs) in list(other.shares.items()):
                if key != entry.key:
                    continue
                if theirs in heirs:
                    other.shares[fd_name] = heirs[theirs]
                else:
                    del other.shares[fd_name]
                    heirs[theirs] = (other.key, fd_name)
        del self._entries[entry.key]
        self._handles.pop(entry.handle, None)


_ASK = "ask somebody who may administer khod"


def _unknown(name: str) -> InvalidRequest:
    return InvalidRequest(f"no instance {name!r}", hint="`khoctl instances` lists them")


def order(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Dependency order as generations: what a generation needs is in those before it; within one, all are independent.

    Dependencies outside of `entries` do not count. Raises Refused on a cycle, which only a tree from elsewhere can bring.
    """
    by_key = {e.key: e for e in entries}
    sorter = TopologicalSorter({e.key: [key for key in e.needs if key in by_key] for e in by_key.values()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(by_key[key].label for key in error.args[1])
        raise Refused(f"instances require each other in a circle: {circle}") from None
    generations = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        generations.append([by_key[key] for key in ready])
        sorter.done(*ready)
    return generations


def users(entries: Iterable[Entry]) -> dict[Key, list[Entry]]:
    """Who needs an instance directly, by what names it."""
    found: dict[Key, list[Entry]] = {}
    for entry in entries:
        for key in entry.needs:
            found.setdefault(key, []).append(entry)
    return found


def dependents(entry: Entry, users: Mapping[Key, Iterable[Entry]]) -> list[Entry]:
    """Those that need `entry`, directly or through others; `users` says who needs whom."""
    found: dict[Entry, None] = {}
    todo = [entry]
    while todo:
        new = [e for e in users.get(todo.pop().key, ()) if e not in found and e is not entry]
        found.update(dict.fromkeys(new))
        todo += new
    return list(found)
