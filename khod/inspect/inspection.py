# SPDX-License-Identifier: LGPL-2.1-or-later
"""The inspection itself: what can be had now is had, of the rest it is said why not."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from khod.abi import chunk_list, kexec_handover
from khod.core.views import InspectionView
from khod.errors import FormatError, KhodError
from khod.folio.units import PAGE_SHIFT
from khod.inspect import blobs, khod_map, preserved, roots
from khod.inspect.memfds import Memfd, look, read
from khod.inspect.owners import Ledger
from khod.inspect.preserved import Preserved
from khod.inspect.source import Deadline, Source
from khod.inspect.views import GUESS, KERNEL, HandoverInfo, Inspection, LuoInfo, Missing, ReservationInfo, Span
from khod.inspect.whose import Records, records

SECONDS = 20.0
"""For a search through memory, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the person who asks knows, or wants."""

    seconds: float = SECONDS
    root: int | None = None
    """Address of the root to the next kernel."""
    bitmaps: int | None = None
    """Bytes of a bitmap of kho-v1."""


@dataclass(slots=True)
class Look:
    """An inspection being made."""

    source: Source
    wishes: Wishes = field(default_factory=Wishes)
    khod: InspectionView | None = None
    preserved: Preserved | None = None
    missing: list[Missing] = field(default_factory=list)

    def inspection(self) -> Inspection:
        """All that can be had. Raises nothing for what memory holds."""
        live = self.source.live
        incoming = self._incoming() if live else None
        outgoing = self._outgoing(incoming.address if incoming else 0)
        return Inspection(
            source=self.source.name,
            time=time.time_ns(),
            release=os.uname().release if live else "",
            boot_id=_boot_id() if live else "",
            ram=[(r.start, r.end) for r in self.source.ram()],
            scratch=[(r.start, r.end) for r in self.source.scratch()],
            outgoing=outgoing,
            incoming=incoming,
            khod=self.khod,
            khod_map=self._khod_map(),
            missing=tuple(self.missing),
        )

    def miss(self, what: str, why: object) -> None:
        """Something cannot be had."""
        self.missing.append(Missing(what=what, why=str(why)))

    # From the previous kernel

    def _incoming(self) -> HandoverInfo | None:
        address = self.source.incoming_address
        whole = self.source.said("in/fdt")
        if whole is None and not address:
            self.miss("incoming handover", "this kernel was booted without one")
            return None
        try:
            root = kexec_handover.decode(whole) if whole else roots.at(self.source, address)
        except FormatError as error:
            self.miss("incoming handover", error)
            return None
        self.miss(
            "incoming map of preserved folios", "its nodes were not preserved, and are other things by now: it is never read"
        )
        self.miss("incoming sessions and files", "the kernel has freed what leads to them; khod knows its instances")
        info = blobs.Reader(self.source, "in", self.miss).read(root, {"LUO"})
        return HandoverInfo(direction="incoming", address=address, format=str(root.format), map=root.map, **info)

    # To the next kernel

    def _outgoing(self, incoming: int) -> HandoverInfo | None:
        if not self.source.hands_over and self.wishes.root is None:
            self.miss("outgoing handover", "neither debugfs nor /dev/liveupdate is there: this kernel hands nothing over")
            return None
        deadline = Deadline(self.wishes.seconds)
        found = self._root(deadline, incoming)
        if found is None:
            return self._without_root()
        self.preserved = found.preserved
        info = blobs.Reader(self.source, "out", self.miss).read(found.root, set())
        luo: LuoInfo | None = info["luo"]
        return HandoverInfo(
            direction="outgoing", address=found.address, format=str(found.root.format), map=found.root.map,
            totals=found.preserved.totals(), **info,
            **self._owned(found, info["reservations"], luo, deadline),
        )  # fmt: skip

    def _root(self, deadline: Deadline, incoming: int) -> roots.Found | None:
        wishes = self.wishes
        bitmaps = wishes.bitmaps
        if bitmaps is None and self.source.live:
            bitmaps = chunk_list.bitmap_size_of(os.uname().release)
        try:
            if wishes.root is not None:
                root = roots.at(self.source, wishes.root)
                return roots.Found(wishes.root, root, roots.map_of(self.source, root, bitmaps))
            found = []
            for one in roots.outgoing(self.source, deadline, incoming=incoming, wanted_map=self._map_said(), bitmaps=bitmaps):
                found.append(one)
                if self.source.live:
                    break
        except FormatError as error:
            self.miss("outgoing handover", error)
            return None
        if len(found) == 1:
            return found[0]
        if found:
            at = ", ".join(f"{one.address:#x}" for one in found)
            self.miss("outgoing handover", f"there is a root at each of {at}: choose one with --root")
        elif deadline.passed:
            self.miss("root of the outgoing handover", f"not found within {wishes.seconds:g} s: give more with --seconds")
        else:
            self.miss("root of the outgoing handover", "there is none in memory: nothing is handed over by this kernel")
        return None

    def _map_said(self) -> int | None:
        """debugfs shows it on cold boots only, cut off on 7.1 to 7.3."""
        said = self.source.said("out/fdt")
        if said is None:
            return None
        try:
            return kexec_handover.map_of(said)
        except FormatError:
            try:
                return kexec_handover.decode(said).map
            except FormatError:
                return None

    def _without_root(self) -> HandoverInfo | None:
        """What debugfs tells all the same: the map of a kernel that has a radix tree."""
        said = self.source.said("out/fdt")
        address = self._map_said()
        if said is None or not address or b"kho-v1\0" in said:
            return None
        try:
            self.preserved = preserved.of_radix_tree(self.source, address)
        except FormatError as error:
            self.miss("outgoing map of preserved folios", error)
            return None
        return HandoverInfo(
            direction="outgoing", address=0, format="", map=address, totals=self.preserved.totals(),
        )  # fmt: skip

    def _owned(
        self, found: roots.Found, regions: Sequence[ReservationInfo], luo: LuoInfo | None, deadline: Deadline
    ) -> dict[str, Any]:
        ledger = Ledger(found.preserved)
        ledger.kernel("root", [(found.address, found.address + 1)])
        for one in found.root.blobs:
            if found.preserved.find(one.phys >> PAGE_SHIFT):
                ledger.kernel(f"blob {one.name}", [(one.phys, one.phys + min(max(1, one.size or 1), roots.MAX_BLOB))])
        for region in regions:
            ledger.reservation(region)
        memfds, by = self._memfds(found, luo, deadline)
        whose = self._whose(memfds)
        files = {f.data: f for f in (luo.files if luo else ())}
        for each in memfds:
            ledger.memfd(each, by, files.get(each.address), whose.by_address.get(each.address))
        return {"memfds": ledger.memfds, "owners": ledger.owners()}

    def _memfds(self, found: roots.Found, luo: LuoInfo | None, deadline: Deadline) -> tuple[list[Memfd], str]:
        files = [file for file in (luo.files if luo else ()) if file.compatible.startswith("memfd-")]
        if files:
            memfds = []
            for file in files:
                try:
                    memfds.append(read(self.source, found.preserved, file.compatible.split(";")[0], file.data))
                except FormatError as error:
                    self.miss(f"memfd of token {file.token} in session {file.session!r}", error)
            return memfds, KERNEL
        self.miss(
            "sessions and files",
            "the kernel writes them in reboot(2): until then memfds are known by the form of their structs",
        )
        memfds = list(look(self.source, found.preserved, deadline))
        if deadline.passed:
            self.miss(
                "some of the memfds", f"not looked for any longer than {self.wishes.seconds:g} s: give more with --seconds"
            )
        return memfds, GUESS

    def _whose(self, memfds: list[Memfd]) -> Records:
        said = self.khod.tree if self.khod is not None and self.khod.source == "outgoing" else None
        out = records(self.source, memfds, said)
        if out.problem and memfds:
            self.miss("owners by khod's records", out.problem)
        return out

    def _khod_map(self) -> tuple[Span, ...]:
        if self.khod is None or not self.khod.map_address:
            return ()
        try:
            return khod_map.spans(self.source, self.khod)
        except KhodError as error:
            self.miss("what khod's folio map lists", error)
            return ()


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
