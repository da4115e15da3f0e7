# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one update holds in the old kernel: its sessions, what was learned of frames, the map and the tree.

The session `SESSION` holds the tree under token 0 and the map under token 1, nothing else; every instance has a session of its
own (decision 2). Nothing of this exists before an update or after its end.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from khod import __version__
from khod.abi import tree as abi
from khod.core import ledger, sample
from khod.core.driver import StateArea
from khod.core.learning import FramesDigest, windows
from khod.core.node import DIGEST, MAP_TOKEN, SESSION, TREE_TOKEN, Carried, flat_shares, to_node
from khod.core.ports import Machine
from khod.core.registry import Entry
from khod.core.sample import Sample
from khod.core.settings import Settings
from khod.errors import UpdateFailed
from khod.folio.tracker import Tracker
from khod.folio.units import PAGE_SIZE
from khod.folio.writer import SerializedMap, pages_needed, serialize


@dataclass(slots=True)
class Part:
    """What was learned of one instance while it was preserved."""

    entry: Entry
    frames: list[bytes] = field(default_factory=list)
    learned: list[tuple[int, int]] = field(default_factory=list)
    """Descriptor, and how many of its windows are in the tracker."""
    sample: Sample | None = None
    content: bytes = b""
    sizes: tuple[int, ...] = ()
    """Bytes of each of `memory`, then of each state's memfd."""

    def memory(self) -> list[int]:
        """Descriptors with folios behind them that are in the instance's session, in token order."""
        return [p.fd for p in self.entry.declaration.fds if p.folios and p.name not in self.entry.shares]


class Outgoing:
    """One update's holdings. Methods block; those that touch the tracker may be called from several threads."""

    def __init__(self, machine: Machine, settings: Settings, update: str, boot_id: str) -> None:
        self.machine, self.settings, self.update, self.boot_id = machine, settings, update, boot_id
        self.tracker = self._new_tracker()
        self.parts: dict[Entry, Part] = {}
        self.session = self.tree_fd = self.map_fd = -1
        """Owned; -1 for none."""
        self.map_frames: list[int] = []
        self.written: SerializedMap | None = None
        self.tree: abi.HandoverTree | None = None
        self._tree_size = 0
        self._sessions = 0
        self._lock = threading.Lock()

    def _new_tracker(self) -> Tracker:
        memory = self.machine.memory
        return Tracker(ram=memory.ram(), scratch=memory.scratch(), max_order=self.settings.max_order)

    def new_name(self) -> str:
        """Of one more session."""
        self._sessions += 1
        return f"{SESSION}.{self.update}.{self._sessions}"

    def create_session(self, entry: Entry) -> None:
        """A session for an instance (decision 2). It is the entry's."""
        name = self.new_name()
        entry.session, entry.session_name = self.machine.liveupdate.create_session(name), name

    def create_states(self, entry: Entry) -> None:
        """The memfds of an instance's states, at their bounds (decision 9)."""
        for bound in entry.bounds:
            fd = self.machine.files.memfd(f"khod-state-{bound.name}", StateArea.file_size(bound))
            entry.states[bound.name] = StateArea(self.machine.files, fd, bound)

    def preserve(self, entry: Entry) -> None:
        """Preserve an instance's descriptors and states in its session, and learn their frames."""
        part = self.parts[entry] = Part(entry)
        preserve_fd = self.machine.liveupdate.preserve_fd
        for token, preserve in enumerate(entry.declaration.fds):
            if preserve.name not in entry.shares:
                preserve_fd(entry.session, preserve.fd, token)
        for token, area in enumerate(entry.states.values(), len(entry.declaration.fds)):
            preserve_fd(entry.session, area.fd, token)
        # Only now: preserving moves pages (out of CMA, out of swap), and from here on they stay.
        for fd in [*part.memory(), *(area.fd for area in entry.states.values())]:
            part.frames.append(self._learn(part, fd))

    def note_opaque(self, entry: Entry) -> None:
        """Nothing of it is known but its session: a node in the tree."""
        self.parts[entry] = Part(entry)

    def _learn(self, part: Part, fd: int) -> bytes:
        digest = FramesDigest()
        part.learned.append((fd, 0))
        for number, window in enumerate(windows(self.machine, fd), 1):
            with self._lock:
                self.tracker.preserve_folios(window.pfns, window.orders)
            part.learned[-1] = (fd, number)
            digest.add(window)
        return digest.digest()

    def forget(self, entry: Entry) -> None:
        """Take an instance's folios out again; its session is still open. Nothing learned: no effect."""
        part = self.parts.pop(entry, None)
        for fd, count in part.learned if part else ():
            for number, window in enumerate(windows(self.machine, fd), 1):
                if number > count:
                    break
                with self._lock:
                    self.tracker.unpreserve_folios(window.pfns, window.orders)

    def preserve_bookkeeping(self) -> None:
        """Make and preserve the tree's and the map's memfd, at sizes that can only be too large, and learn their frames."""
        files, liveupdate = self.machine.files, self.machine.liveupdate
        draft = self._draft()
        self._tree_size = -(-(len(draft) + ledger.STAMP_SIZE) // PAGE_SIZE) * PAGE_SIZE
        self.tree_fd = files.memfd("khod-tree", self._tree_size)
        liveupdate.preserve_fd(self.session, self.tree_fd, TREE_TOKEN)
        for window in windows(self.machine, self.tree_fd):
            self.tracker.preserve_folios(window.pfns, window.orders)
        if not self.parts:
            return
        # One order more than there are: the map's own pages may be the first of theirs.
        pages = pages_needed(self.tracker.blocks(), len(self.tracker.totals()) + 1)
        self.map_fd = files.memfd("khod-map", pages * PAGE_SIZE)
        liveupdate.preserve_fd(self.session, self.map_fd, MAP_TOKEN)
        for window in windows(self.machine, self.map_fd):
            self.tracker.preserve_folios(window.pfns, window.orders)
        self.map_frames = [pfn for pfn, _ in self.machine.frames.pages(self.map_fd, range(pages))]

    def _draft(self) -> bytes:
        """The tree with every value as long as it can become: its length bounds the real one's."""
        nodes = [to_node(n, self._carried(part, draft=True)) for n, part in enumerate(self.parts.values(), 1)]
        return abi.encode(self._tree(nodes, address=PAGE_SIZE if nodes else 0, pages=1 if nodes else 0, digest=bytes(DIGEST)))

    def take_samples(self) -> None:
        """Look at every instance's sample of frames and bytes; all stand still. Bytes as far as the common budget goes."""
        clock, budget = self.machine.clock, int(self.settings.sample_budget * 1e9)
        started = clock.stamp().monotonic
        shares = len(self.parts)
        for number, part in enumerate(self.parts.values(), 1):
            memory = part.memory()
            sizes = [self.machine.files.stat(fd).size for fd in memory]
            chosen = sample.choose(self.update, part.entry.label, sizes, self.settings.sample_pages)
            until = started + budget * number // shares

            def enough(done: int, until: int = until) -> bool:
                return done > 0 and clock.stamp().monotonic > until

            part.sample = sample.take(self.machine.files, self.machine.frames, memory, chosen, enough)
            if self.settings.full:
                part.content = sample.content_digest(self.machine.files, memory, sizes)

    def write(self) -> None:
        """Fill map and tree with what they have to say."""
        files = self.machine.files
        address, pages, digest = 0, 0, bytes(DIGEST)
        if self.parts:
            self.written = serialize(self.tracker, self.map_frames)
            files.write(self.map_fd, 0, self.written.pages)
            address, pages, digest = self.written.address, self.written.page_count, self.written.sha256
        nodes = [to_node(n, self._carried(part)) for n, part in enumerate(self.parts.values(), 1)]
        self.tree = self._tree(nodes, address=address, pages=pages, digest=digest)
        blob = abi.encode(self.tree)
        if len(blob) > self._tree_size - ledger.STAMP_SIZE:
            raise UpdateFailed(f"the handover tree has {len(blob)} bytes and {self._tree_size} were preserved for it")
        files.write(self.tree_fd, 0, blob)

    def write_stamp(self) -> None:
        """The last words, right before the jump."""
        stamp = ledger.encode_stamp(self.machine.clock.stamp())
        self.machine.files.write(self.tree_fd, self._tree_size - len(stamp), stamp)

    def _tree(self, nodes: list[abi.InstanceNode], *, address: int, pages: int, digest: bytes) -> abi.HandoverTree:
        return abi.HandoverTree(
            update_id=self.update,
            boot_id=self.boot_id,
            version=__version__,
            map_address=address,
            map_pages=pages,
            map_sha256=digest,
            instances=tuple(nodes),
        )

    def _carried(self, part: Part, *, draft: bool = False) -> Carried:
        entry = part.entry
        fds = entry.declaration.fds
        areas = list(entry.states.values())
        stat = self.machine.files.stat
        part.sizes = tuple(stat(fd).size for fd in [*part.memory(), *(a.fd for a in areas)])
        seen = part.sample
        if draft:
            seen = Sample((0,) * self.settings.sample_pages, 0, bytes(DIGEST))
        assert seen is not None, "sampled before it is written"
        return Carried(
            name=entry.name,
            driver=entry.driver_name,
            compatible=entry.declaration.compatible,
            owner=entry.owner,
            required=entry.required,
            requires=entry.requires,
            options=entry.options,
            session=entry.session_name,
            fds=tuple(p.name for p in fds),
            memory=tuple(i for i, p in enumerate(fds) if p.folios and p.name not in entry.shares),
            sizes=part.sizes,
            states=tuple(a.bound.name for a in areas),
            bounds=tuple(a.bound.size for a in areas),
            bulk=tuple(a.bound.name for a in areas if a.bound.bulk),
            made=entry.declaration.made,
            strategy=entry.declaration.strategy,
            continuity=entry.declaration.continuity,
            handled=entry.declaration.handled,
            frames=tuple(part.frames),
            sample=seen,
            content=bytes(DIGEST) if draft else part.content,
            properties=entry.properties,
            grade=entry.grade,
            lifetime=entry.lifetime,
            client_states=tuple(bound.name for bound in entry.client_states),
            shares=entry.shares,
            shareable=entry.shareable,
        )

    def sessions_record(self) -> list[dict[str, object]]:
        """For the journal: what a successor needs to take every session into custody when the tree is no good."""
        return [
            {
                "name": part.entry.name,
                "driver": part.entry.driver_name,
                "owner": str(part.entry.owner),
                "session": part.entry.session_name,
                "grade": part.entry.grade,
                "fds": [p.name for p in part.entry.declaration.fds],
                "size": sum(part.sizes),
                "shares": flat_shares(part.entry.shares),
            }
            for part in self.parts.values()
        ]

    def close(self) -> None:
        """Close the bookkeeping session and its files, and forget what they held; instances' sessions are their entries'."""
        self.tracker, self.written, self.tree = self._new_tracker(), None, None
        self.parts.clear()
        for name in ("session", "tree_fd", "map_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                self.machine.files.close(fd)
