# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verification beside the running workload: every folio of what came through is compared with what was noted of it, and all of
them with the map (decision 22).

What differs is reported, not judged: after a retrieve the kernel may migrate pages again, bytes and all.
"""

from __future__ import annotations

from collections.abc import Sequence

from khod.core.blocking import blocking
from khod.core.incoming import Incoming
from khod.core.learning import FramesDigest, windows
from khod.core.ports import Machine
from khod.core.registry import Entry
from khod.errors import KhodError
from khod.folio.blocks import Blocks, OrderDifference


class Rest:
    """What is left to be compared after the samples. `compare` each instance, then `end`; `problems` has what differs."""

    def __init__(self, machine: Machine, incoming: Incoming) -> None:
        self._machine, self._incoming = machine, incoming
        self._noted = {carried.key: carried for carried in incoming.carried}
        """Instances that were not compared yet."""
        self._union = Blocks()
        self.problems: list[str] = []

    @property
    def folios(self) -> int:
        """Compared so far."""
        return self._union.folio_count

    async def compare(self, entry: Entry) -> None:
        """An instance's, if it is whole. Its owner may let go of it meanwhile: what is compared are duplicates, made while it
        is there."""
        carried = self._noted.get(entry.key)
        if carried is None or not entry.state.sound or entry.session < 0:
            return
        names = [carried.fds[index] for index in carried.memory]
        if not (entry.fds.keys() >= set(names) and entry.states.keys() >= set(carried.states)):
            return  # handed out by an administrator though it did not come through whole
        duplicates: list[int] = []
        try:
            for fd in (*(entry.fds[name] for name in names), *(entry.states[name].fd for name in carried.states)):
                duplicates.append(self._machine.files.duplicate(fd))
            same = await blocking(self._same, duplicates, carried.frames)
        except KhodError as error:
            # Its owner has it already and may do with it what he likes: make a hole, for one.
            self.problems.append(f"{entry.label}: not every folio could be compared: {error}")
            return
        finally:
            for fd in duplicates:
                self._machine.files.close(fd)
        del self._noted[entry.key]
        if not same:
            self.problems.append(f"{entry.label}: some of its pages are in other frames than before the jump")

    def _same(self, fds: Sequence[int], noted: Sequence[bytes]) -> bool:
        """Whether the folios of all these files are those that were noted. Looks at all, for the sake of the union."""
        return [self._digest(fd) for fd in fds] == list(noted)

    def _digest(self, fd: int) -> bytes:
        digest = FramesDigest()
        for window in windows(self._machine, fd):
            self._union.add(window.pfns, window.orders)
            digest.add(window)
        return digest.digest()

    def end(self) -> None:
        """khod's own files, and the map, if every instance was compared. Blocks."""
        for fd in (self._incoming.tree_fd, self._incoming.map_fd):
            if fd >= 0:
                self._digest(fd)
        if self._incoming.map is not None and not self._noted:
            missing, extra = self._incoming.map.difference(self._union)
            self.problems += [f"the folio map lacks {_said(d)}" for d in missing]
            self.problems += [f"the folio map lists {_said(d)}, which nothing has" for d in extra]


def _said(difference: OrderDifference) -> str:
    first = ", ".join(f"{folio.pfn:#x}" for folio in difference.first)
    return f"{difference.folios} folios of order {difference.order} (first frames {first})"
