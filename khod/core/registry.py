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

from khod.core.driver import Declaration, Driver, Instance, StateArea
from khod.core.ports import Machine
from khod.errors import InvalidRequest, Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,47}")
MAX_INSTANCES = 4000
"""The handover tree has at most 4,096 nodes, one an instance."""


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

    @property
    def unclaimed(self) -> bool:
        """It came through a jump and nobody but khod has it."""
        return self in (InstanceState.RESTORED, InstanceState.DAMAGED, InstanceState.QUARANTINED)

    @property
    def sound(self) -> bool:
        """It may be handed out and take part in an update."""
        return self not in (InstanceState.DAMAGED, InstanceState.QUARANTINED)


@dataclass(slots=True, eq=False)
class Entry:
    """One instance in khod's hands."""

    name: str
    driver: Driver | None
    """None for a quarantined one."""
    driver_name: str
    owner: str
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]
    declaration: Declaration
    fds: dict[str, int]
    """Owned."""
    state: InstanceState = InstanceState.REGISTERED
    problem: str = ""
    states: dict[str, StateArea] = field(default_factory=dict)
    """Memfds of its states; owned. There from prepare until the update is finished or undone."""
    properties: dict[str, bytes] = field(default_factory=dict)
    session: int = -1
    """Its kernel session, owned: outgoing during an update, incoming from restore until finish; -1 for none."""
    session_name: str = ""

    def __post_init__(self) -> None:
        self.properties = self.properties or dict(self.declaration.properties)

    def view(self, machine: Machine) -> Instance:
        """As its driver sees it."""
        return Instance(self.name, self.options, machine, dict(self.fds), dict(self.states), dict(self.properties))

    def close_session(self, machine: Machine) -> None:
        """Close its session and its states. Of an outgoing session that undoes every preserve."""
        if self.session >= 0:
            machine.files.close(self.session)
            self.session, self.session_name = -1, ""
        for area in self.states.values():
            machine.files.close(area.fd)
        self.states.clear()

    def close(self, machine: Machine) -> None:
        """Let go of everything."""
        self.close_session(machine)
        while self.fds:
            machine.files.close(self.fds.popitem()[1])


class Registry:
    """All entries, by name."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda e: e.name))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def get(self, name: str) -> Entry:
        """By name. Raises InvalidRequest."""
        try:
            return self._entries[name]
        except KeyError:
            raise InvalidRequest(f"no instance {name!r}", hint="`khoctl instances` lists them") from None

    def add(self, entry: Entry) -> None:
        """Add one. Raises what `check_new` raises."""
        self.check_new(entry.name, entry.requires)
        self._entries[entry.name] = entry

    def add_restored(self, entry: Entry) -> None:
        """Add one that came through a jump: it may require what did not come along, and is kept all the same."""
        self._entries[entry.name] = entry

    def check_new(self, name: str, requires: Sequence[str]) -> None:
        """Whether an instance of this name may be added. Raises InvalidRequest for a bad name or dependency, Refused if it is
        taken or there are too many."""
        if not NAME.fullmatch(name):
            raise InvalidRequest(
                f"instance name {name!r} is not allowed",
                hint="1 to 48 characters: letters, digits, '.', '_', '@', '-'; a letter or digit first",
            )
        if name in self._entries:
            raise Refused(f"instance {name!r} is registered already", hint=f"`khoctl unregister {name}` lets go of it")
        if len(self) >= MAX_INSTANCES:
            raise Refused(f"{len(self)} instances are registered, which is the most that one handover tree holds")
        for other in requires:
            if other not in self._entries:
                raise InvalidRequest(f"{name}: requires {other!r}, which is not registered", hint="register that one first")

    def remove(self, name: str) -> Entry:
        """Take one out; its descriptors go with it. Raises InvalidRequest, or Refused while another requires it."""
        entry = self.get(name)
        if users := sorted(e.name for e in self if name in e.requires):
            raise Refused(f"{name}: required by {', '.join(users)}", hint="unregister those first")
        del self._entries[name]
        return entry


def order(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Dependency order as generations: what a generation requires is in those before it; within one, all are independent.

    Dependencies outside of `entries` do not count. Raises Refused on a cycle, which only a tree from elsewhere can bring.
    """
    by_name = {e.name: e for e in entries}
    sorter = TopologicalSorter({e.name: [r for r in e.requires if r in by_name] for e in by_name.values()})
    try:
        sorter.prepare()
    except CycleError as error:
        raise Refused(f"instances require each other in a circle: {' -> '.join(error.args[1])}") from None
    generations = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        generations.append([by_name[name] for name in ready])
        sorter.done(*ready)
    return generations


def dependents(entry: Entry, entries: Iterable[Entry]) -> list[Entry]:
    """Those of `entries` that require `entry`, directly or through others."""
    found: dict[str, Entry] = {}
    pool = list(entries)
    names = {entry.name}
    while more := [e for e in pool if e.name not in found and names.intersection(e.requires)]:
        found.update((e.name, e) for e in more)
        names.update(e.name for e in more)
    return list(found.values())
