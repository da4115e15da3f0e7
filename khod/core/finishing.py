# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of an update in the new kernel: a session is finished when all that is in it is held otherwise (decision 18)."""

from __future__ import annotations

from khod.core.blocking import blocking
from khod.core.book import Book
from khod.core.incoming import Incoming
from khod.core.node import SESSION
from khod.core.ports import Machine
from khod.core.registry import Entry, Grade, Registry
from khod.errors import KhodError


class Finisher:
    """Finishes sessions. What a driver could not do is added to `problems`."""

    def __init__(self, machine: Machine, registry: Registry, book: Book, problems: list[str]) -> None:
        self._machine, self._registry, self._book, self._problems = machine, registry, book, problems

    def blockers(self) -> list[str]:
        """Instances that stand against finishing everything, in sentences: what came with them would be lost (decision 7)."""
        found = [f"{e.label} is {e.state}: {e.problem}" for e in self._registry if not e.state.sound]
        return found + [e.unfinished for e in self._registry if e.state.sound and e.unfinished]

    async def one(self, entry: Entry) -> None:
        """Finish an instance's session: everything of it is in custody by itself before. Finished already: no effect."""
        name = entry.incoming
        if entry.session < 0 or not name:
            return
        for holder in (entry, *self._registry.sharers(entry)):
            await blocking(self._book.deposit, holder)
            await blocking(self._book.put, holder)
        if entry.grade is Grade.REGISTERED:  # an opaque one is its owner's to finish, and he has said that he did
            await blocking(self._machine.liveupdate.finish, entry.session)
        await blocking(entry.close_session, self._machine)
        entry.incoming = ""
        await blocking(self._book.end_session, entry, name)
        await blocking(self._machine.custody.release, name)
        if entry.driver is not None:
            try:
                await entry.driver.finish(entry.view(self._machine))
            except KhodError as error:
                self._problems.append(f"{entry.label}: its driver could not finish it: {error}")

    async def bookkeeping(self, incoming: Incoming) -> None:
        """Finish khod's own session, the last one."""
        await blocking(self._machine.liveupdate.finish, incoming.session)
        await blocking(incoming.close, self._machine)
        await blocking(self._machine.custody.release, SESSION)
