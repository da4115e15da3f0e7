# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose preserved memory is, range by range, and what is at one address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from khod.folio.units import PAGE_SHIFT, PAGE_SIZE
from khod.inspect.memfds import Memfd
from khod.inspect.preserved import Preserved, joined, without
from khod.inspect.views import (
    KERNEL,
    KHOD,
    AddressInfo,
    FileInfo,
    HandoverInfo,
    Inspection,
    MemfdInfo,
    OwnerInfo,
    ReservationInfo,
    Span,
)
from khod.inspect.whose import Whose

UNKNOWN = "unknown"


class Ledger:
    """Of one handover. What nobody is written down for stays, and is named so."""

    def __init__(self, preserved: Preserved) -> None:
        self._preserved = preserved
        self._owners: list[OwnerInfo] = []
        self._taken: list[Span] = []
        self.memfds: list[MemfdInfo] = []

    def kernel(self, what: str, spans: Iterable[Span]) -> None:
        """Something that the kernel keeps for itself."""
        self._add("kernel", what, "", KERNEL, spans)

    def reservation(self, region: ReservationInfo) -> None:
        """A region of ``reserve_mem=``."""
        self._add(f"reserve_mem {region.name!r}", "region", "", KERNEL, [(region.start, region.start + region.size)])

    def memfd(self, one: Memfd, by: str, file: FileInfo | None, whose: Whose | None) -> None:
        """A memfd: its memory, and what the kernel keeps to find it. `by` is how we came upon it, `file` what the kernel calls
        it, `whose` what khod does."""
        name = whose.owner if whose else f"memfd at {one.address:#x}"
        session = file.session if file else whose.session if whose else ""
        what = whose.what if whose else f"token {file.token}" if file else "memory"
        known = KHOD if whose else by
        self._add(name, what, session, known, one.spans())
        self._add("kernel", f"list of folios of {name}, {what}", session, by, one.storage)
        self.memfds.append(
            MemfdInfo(
                address=one.address,
                compatible=one.compatible,
                size=one.struct.size,
                position=one.struct.position,
                seals=one.struct.seals,
                folios=one.struct.folios,
                orders=one.folios(),
                extents=one.extents(),
                owner=f"{name}, {what}" if whose else name,
                session=session,
                by=known,
            )
        )

    def owners(self) -> list[OwnerInfo]:
        """All, and what is left over."""
        rest = without(self._preserved.spans, joined(self._taken))
        if rest:
            self._add(UNKNOWN, "blocks of sessions and files, or what nothing here reads", "", "", rest)
        return self._owners

    def _add(self, owner: str, what: str, session: str, by: str, spans: Iterable[Span]) -> None:
        whole = joined((start // PAGE_SIZE * PAGE_SIZE, -(-end // PAGE_SIZE) * PAGE_SIZE) for start, end in spans)
        self._taken += whole
        total = sum(end - start for start, end in whole)
        self._owners.append(OwnerInfo(owner=owner, what=what, session=session, by=by, bytes=total, ranges=whole))


def sessions(handover: HandoverInfo) -> dict[str, int]:
    """Bytes by session."""
    out: dict[str, int] = {}
    for one in handover.owners:
        if one.session:
            out[one.session] = out.get(one.session, 0) + one.bytes
    return out


def address(inspection: Inspection, preserved: Preserved | None, phys: int) -> AddressInfo:
    """What is at `phys`."""
    folio = preserved.find(phys >> PAGE_SHIFT) if preserved else None
    kind = "scratch" if _in(inspection.scratch, phys) else "RAM" if _in(inspection.ram, phys) else "no RAM"
    owners = []
    for handover in (inspection.outgoing, inspection.incoming):
        if handover is None:
            continue
        owners += [_words(one) for one in handover.owners if _in(one.ranges, phys)]
        if handover.direction == "incoming":
            regions = [r for r in handover.reservations if r.start <= phys < r.start + r.size]
            owners += [f"reserve_mem {r.name!r}, incoming" for r in regions]
    if _in(inspection.khod_map, phys) and inspection.khod is not None:
        owners.append(f"listed in khod's folio map, {inspection.khod.source}")
    known: bool | None = None
    if preserved is not None:
        known = folio is not None
    elif inspection.outgoing is not None and inspection.outgoing.owners:  # of a file: every preserved byte has an owner in it
        known = any(_in(one.ranges, phys) for one in inspection.outgoing.owners)
    return AddressInfo(
        address=phys, kind=kind, preserved=known,
        order=folio.order if folio else -1, folio=folio.pfn << PAGE_SHIFT if folio else 0, owners=owners,
    )  # fmt: skip


def _words(one: OwnerInfo) -> str:
    session = f", session {one.session!r}" if one.session else ""
    return f"{one.owner}: {one.what}{session}" + (f" (by {one.by})" if one.by else "")


def _in(spans: Sequence[Span], phys: int) -> bool:
    return any(start <= phys < end for start, end in spans)
