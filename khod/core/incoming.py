# SPDX-License-Identifier: LGPL-2.1-or-later
"""What came through the jump: khod's own session, read and judged before anything of it is used.

A tree or map that does not check is a verdict on khod's bookkeeping, not on anybody's memory (decision 23): it stops the
automatic restore, and the sessions that the journal names are taken into custody all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from khod.abi import tree as abi
from khod.core import ledger
from khod.core.callers import Owner
from khod.core.journal import Record
from khod.core.node import DIGEST, MAP_TOKEN, SESSION, TREE_TOKEN, Carried, from_node, parse_shares
from khod.core.ports import Machine, Stamp
from khod.core.registry import ROOT, Grade, Key
from khod.core.sample import Sample
from khod.errors import FormatError, KhodError, MachineError, MapError, TokenUnknown, TreeError
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE
from khod.folio.walk import FolioMap, validate

logger = logging.getLogger(__name__)

MAX_TREE_FILE = (1 << 20) + (1 << 16)
"""A tree has at most 1 MiB; its file is rounded up to pages and ends with the stamp."""


@dataclass(slots=True)
class Incoming:
    """The bookkeeping of the update that brought us here. Its descriptors are owned, until `close`."""

    session: int
    tree_fd: int = -1
    map_fd: int = -1
    tree: abi.HandoverTree | None = None
    map: FolioMap | None = None
    stamp: Stamp | None = None
    """The last words of the old kernel."""
    verdict: str = ""
    """Why the bookkeeping cannot be relied on; '' when it can."""
    carried: list[Carried] = field(default_factory=list)

    @property
    def update(self) -> str:
        """The update's id; '' when the tree does not say."""
        return self.tree.update_id if self.tree else ""

    def close(self, machine: Machine) -> None:
        """Close khod's descriptors of its own session, which stays in custody; instances' sessions are their entries'."""
        for name in ("tree_fd", "map_fd", "session"):
            fd = getattr(self, name)
            if fd >= 0:
                setattr(self, name, -1)
                machine.files.close(fd)


def open_incoming(machine: Machine) -> Incoming:
    """Retrieve khod's session and what is in it. Blocks.

    Raises what `LiveUpdate.retrieve_session` raises; nothing that is wrong with the contents: that is its `verdict`.
    """
    incoming = Incoming(machine.liveupdate.retrieve_session(SESSION))
    try:
        incoming.tree_fd = machine.liveupdate.retrieve_fd(incoming.session, TREE_TOKEN)
        incoming.map_fd = _retrieve_optional(machine, incoming.session, MAP_TOKEN)
    except MachineError as error:
        incoming.verdict = f"the session {SESSION!r} came without its contents: {error}"
    return incoming


def _retrieve_optional(machine: Machine, session: int, token: int) -> int:
    try:
        return machine.liveupdate.retrieve_fd(session, token)
    except TokenUnknown:
        return -1  # an update without instances has no map


def read_tree(machine: Machine, incoming: Incoming) -> None:
    """Read the tree and every node of it, or set the verdict."""
    if incoming.verdict:
        return
    try:
        size = machine.files.stat(incoming.tree_fd).size
        if size > MAX_TREE_FILE:
            raise TreeError(f"the handover tree's file has {size} bytes, more than any tree")
        data = machine.files.read(incoming.tree_fd, 0, size)
        incoming.stamp = ledger.decode_stamp(data[-ledger.STAMP_SIZE :])
        tree = abi.decode(data)
        incoming.carried = [from_node(node) for node in tree.instances]
        _check_unique(incoming.carried)
        incoming.tree = tree
    except Exception as error:
        _unforeseen(error)
        incoming.carried = []
        incoming.verdict = f"the handover tree is not what was written: {error}"


def _check_unique(carried: Iterable[Carried]) -> None:
    keys: set[Key] = set()
    sessions: set[str] = set()
    for one in carried:
        if one.key in keys or one.session in sessions:
            raise TreeError(f"instance {one.label!r} or its session {one.session!r} is in the tree twice")
        keys.add(one.key)
        sessions.add(one.session)


class MapFile:
    """The map's memory by physical address: what the chunks' pointers mean, through the frames of the retrieved memfd.

    The frames are those of this moment, right after the retrieve; later the kernel may move pages.
    """

    def __init__(self, machine: Machine, fd: int) -> None:
        pages = machine.files.stat(fd).size // PAGE_SIZE
        where = machine.frames.pages(fd, range(pages))
        self._page_of = {pfn: index for index, (pfn, _) in enumerate(where)}
        self._data = machine.files.read(fd, 0, pages * PAGE_SIZE)

    def read(self, phys: int, length: int) -> bytes:
        """Bytes of the map. Raises ValueError outside of it; a read never crosses a page."""
        offset = phys % PAGE_SIZE
        page = self._page_of.get(phys >> PAGE_SHIFT)
        if page is None or offset + length > PAGE_SIZE:
            raise ValueError(f"{phys:#x} is not in the map's memory")
        return self._data[page * PAGE_SIZE + offset :][:length]


def read_map(machine: Machine, incoming: Incoming, max_order: int) -> None:
    """Validate the map, without numpy, or set the verdict."""
    tree = incoming.tree
    if incoming.verdict or tree is None or not tree.map_address:
        return
    try:
        if incoming.map_fd < 0:
            raise MapError("the tree names a map and the session holds none")
        incoming.map = validate(
            MapFile(machine, incoming.map_fd),
            tree.map_address,
            tree.map_pages,
            tree.map_sha256,
            ram=machine.memory.ram(),
            scratch=machine.memory.scratch(),
            max_order=max_order,
        )
    except Exception as error:
        _unforeseen(error)
        incoming.verdict = f"the folio map is not what was written: {error}"


def _unforeseen(error: Exception) -> None:
    """Log what is a bug of ours; it becomes a verdict all the same, for ending here would free what was retrieved."""
    if not isinstance(error, KhodError):
        logger.error("reading what came through", exc_info=error)


def from_journal(record: Record | None) -> list[Carried]:
    """What the journal's `executing` record says of the instances: enough to take their sessions into custody."""
    rows = record.data.get("sessions") if record else None
    return [_from_row(row) for row in rows or () if _is_row(row)]


def _owner(text: str) -> Owner:
    """Whose it is; what cannot be read is root's: somebody must be able to let go of it."""
    try:
        return Owner.parse(text)
    except FormatError:
        return ROOT


def _shares(row: Mapping[str, Any]) -> dict[str, tuple[Key, str]]:
    try:
        return parse_shares(row["shares"])
    except (KeyError, TypeError, ValueError, AttributeError, FormatError):
        return {}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, Mapping)
        and all(isinstance(row.get(key), str) for key in ("name", "driver", "owner", "session"))
        and isinstance(row.get("fds"), list)
        and all(isinstance(name, str) for name in row["fds"])
        and isinstance(row.get("size", 0), int)
    )


def _from_row(row: Mapping[str, Any]) -> Carried:
    return Carried(
        name=row["name"],
        driver=row["driver"],
        compatible="",
        owner=_owner(row["owner"]),
        required=True,
        requires=(),
        options={},
        session=row["session"],
        fds=tuple(row["fds"]),
        memory=(),
        sizes=(row.get("size", 0),),
        states=(),
        bounds=(),
        frames=(),
        sample=Sample((), 0, bytes(DIGEST)),
        grade=Grade.OPAQUE if row.get("grade") == Grade.OPAQUE else Grade.REGISTERED,
        shares=_shares(row),
    )
