# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an inspection found: plain values that go into a file and come back from it.

Addresses and sizes are bytes, a range is (start, end) with the end not in it. What could not be had is in `Inspection.missing`,
each with its reason; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from khod.core.views import InspectionView

Span = tuple[int, int]
VERSION = 1
"""Of this form."""

KERNEL, KHOD, GUESS = "kernel memory", "khod's records", "likeness"
"""By what we know whose something is: the kernel's own structures say so; khod's tree does, by the digest of the frames; or it
looks like one of these structures and leads to nothing but preserved memory."""


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Something that cannot be had at this moment."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class BlobInfo:
    """What a part of the kernel hands over."""

    name: str
    address: int
    """0 where only its contents are known."""
    size: int


@dataclass(frozen=True, kw_only=True)
class ReservationInfo:
    """A region of ``reserve_mem=``."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of a session."""

    session: str
    token: int
    compatible: str
    data: int


@dataclass(frozen=True, kw_only=True)
class LuoInfo:
    """What the live update orchestrator hands over."""

    format: str
    number: int
    sessions: Sequence[str] = ()
    files: Sequence[FileInfo] = ()
    flbs: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class MemfdInfo:
    """A preserved memfd."""

    address: int
    """Of its struct."""
    compatible: str
    size: int
    position: int
    seals: int | None
    folios: int
    orders: Mapping[str, int]
    """Folios by order."""
    extents: Sequence[tuple[int, int, int]]
    """Page of the file, first frame, pages: runs that go on in both."""
    owner: str
    session: str
    """'' when it is not known."""
    by: str


@dataclass(frozen=True, kw_only=True)
class OwnerInfo:
    """Preserved memory of one owner, of one kind."""

    owner: str
    """An instance's label, 'khod', 'kernel', 'reserve_mem NAME', 'memfd at ADDRESS'."""
    what: str
    session: str
    by: str
    bytes: int
    ranges: Sequence[Span]


@dataclass(frozen=True, kw_only=True)
class TotalInfo:
    """Folios of an order."""

    order: int
    folios: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class HandoverInfo:
    """One handover: to the next kernel, or from the previous one."""

    direction: str
    """'outgoing' or 'incoming'."""
    address: int
    """Of its root; 0 where it was not found."""
    format: str
    map: int
    """Address of the map of preserved folios."""
    blobs: Sequence[BlobInfo] = ()
    previous_release: str = ""
    kexec_count: int = 0
    reservations: Sequence[ReservationInfo] = ()
    luo: LuoInfo | None = None
    totals: Sequence[TotalInfo] = ()
    memfds: Sequence[MemfdInfo] = ()
    owners: Sequence[OwnerInfo] = ()


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All of it."""

    source: str
    """'live', or the path of a dump."""
    time: int
    """CLOCK_REALTIME in nanoseconds."""
    release: str = ""
    boot_id: str = ""
    ram: Sequence[Span] = ()
    scratch: Sequence[Span] = ()
    outgoing: HandoverInfo | None = None
    incoming: HandoverInfo | None = None
    khod: InspectionView | None = None
    """khod's own tree and map."""
    khod_map: Sequence[Span] = ()
    """What khod's folio map lists."""
    missing: Sequence[Missing] = ()
    version: int = field(default=VERSION)


@dataclass(frozen=True, kw_only=True)
class AddressInfo:
    """What is at a physical address."""

    address: int
    kind: str
    """'RAM', 'scratch', 'no RAM'."""
    preserved: bool | None
    """To the next kernel; None when it cannot be told."""
    order: int
    """Of the folio that it is in; -1 for none."""
    folio: int
    """Address of that folio."""
    owners: Sequence[str]
    """In words."""
