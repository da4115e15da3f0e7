# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an instance hangs on: the connection or the process whose end is its end (decision 5); and which process has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeAlias

from khod.core.callers import ENDED, Caller, Lifetime, Presence
from khod.core.registry import Entry

Watch: TypeAlias = Callable[[int], Presence | None]
"""A living process by its number; None when there is none."""


class Keepers:
    """Watches the keepers of `entries`; `ended` is told, in the event loop, of each entry whose keeper came to its end."""

    def __init__(self, watch: Watch, entries: Iterable[Entry], ended: Callable[[Entry], None]) -> None:
        self.watch, self._entries, self._ended = watch, entries, ended
        self._watched: dict[int, Presence] = {}
        """By identity. Each is asked once to tell, whatever hangs on it: a client that registers and unregisters all day must
        leave nothing behind."""

    def bind(self, entry: Entry, caller: Caller) -> None:
        """From now on the entry hangs on this caller."""
        self.hang(entry, caller.keeper(entry.lifetime), caller.pid)

    def hang(self, entry: Entry, presence: Presence | None, pid: int) -> None:
        """From now on the entry hangs on that presence, which is of process `pid`; None: on nothing."""
        entry.keeper = presence
        entry.keeper_pid, entry.keeper_since = (pid, presence.since) if presence is not None else (0, 0)
        if presence is not None:
            self._attend(presence)

    def hold(self, entry: Entry, presence: Presence | None, pid: int, *, early: bool = False) -> None:
        """From now on that process, whose number is `pid`, has the entry, and may run its workload; None: no process that is
        known. `early`: the restore stage started it."""
        same = presence is not None and pid == entry.holder_pid and presence.since == entry.holder_since
        entry.holder_early = early or (same and entry.holder_early)
        entry.holder = presence
        entry.holder_pid, entry.holder_since = (pid, presence.since) if presence is not None else (0, 0)
        if presence is not None:
            self._attend(presence)  # else nobody would look at it once it has hung up

    def _attend(self, presence: Presence) -> None:
        if id(presence) not in self._watched:
            self._watched[id(presence)] = presence
            presence.on_end(lambda: self._gone(presence))

    def _gone(self, presence: Presence) -> None:
        del self._watched[id(presence)]
        for entry in [entry for entry in self._entries if entry.keeper is presence]:
            self._ended(entry)

    def came_back(self, entry: Entry, caller: Caller) -> None:
        """Its client uses its handle: where its keeper was lost with an earlier khod, the caller is it from now on."""
        if entry.keeper in (None, ENDED) and entry.lifetime is not Lifetime.PERSISTENT:
            self.bind(entry, caller)

    def resume(self, entries: Iterable[Entry], grace: float) -> None:
        """In a khod that was started anew: processes are watched again, and who had a connection has `grace` seconds to come
        back."""
        waiting = []
        for entry in entries:
            if entry.holder is None and entry.holder_pid:
                self._resume_holder(entry)
            if entry.lifetime is Lifetime.PERSISTENT or entry.keeper is not None:
                continue
            if entry.lifetime is Lifetime.CONNECTION or not entry.keeper_pid:
                waiting.append(entry)
                continue
            presence = self.watch(entry.keeper_pid)
            if presence is not None and presence.since == entry.keeper_since:
                self.hang(entry, presence, entry.keeper_pid)
            else:
                self._ended(entry)
        if waiting:
            asyncio.get_running_loop().call_later(grace, self._give_up, waiting)

    def _resume_holder(self, entry: Entry) -> None:
        presence = self.watch(entry.holder_pid)
        if presence is not None and presence.since != entry.holder_since:
            presence = None
        self.hold(entry, presence, entry.holder_pid)

    def _give_up(self, waiting: Iterable[Entry]) -> None:
        for entry in waiting:
            if entry.keeper is None:
                entry.keeper = ENDED  # which lasts, if this is the wrong moment to let go of it
                self._ended(entry)
