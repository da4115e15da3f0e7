# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose a preserved memfd is, by khod's own records: its tree lies in one of them, and has a digest of the frames of each.

That digest names physical pages and their order in the file, so that no other memfd can have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from khod.abi import tree as abi
from khod.abi.tree_source import to_source
from khod.core.incoming import MAX_TREE_FILE
from khod.core.node import MAP_TOKEN, SESSION, TREE_TOKEN, from_node
from khod.errors import KhodError
from khod.folio.units import PhysicalMemory
from khod.inspect.memfds import Memfd

KHOD = "khod"


@dataclass(frozen=True, slots=True)
class Whose:
    """Who a memfd belongs to."""

    owner: str
    what: str
    session: str
    token: int


@dataclass(slots=True)
class Records:
    """What khod has written of one update."""

    tree: abi.HandoverTree | None = None
    by_address: dict[int, Whose] = field(default_factory=dict)
    """By the address of a memfd's struct."""
    problem: str = ""
    """Why there are none; ''."""


def records(memory: PhysicalMemory, found: Sequence[Memfd], said: str | None) -> Records:
    """khod's, from the memory of these memfds. `said` is the tree as khod tells it; None when it was not asked, or does not
    answer: then only a single tree among the memfds is believed."""
    trees = {one.address: tree for one in found if (tree := _tree(memory, one)) is not None}
    if said is not None:
        trees = {at: tree for at, tree in trees.items() if to_source(tree) == said}
    if len(trees) != 1:
        return Records(problem=_problem(len(trees), said))
    ((at, tree),) = trees.items()
    out = Records(tree=tree, by_address={at: Whose(KHOD, "its handover tree", SESSION, TREE_TOKEN)})
    try:
        by_digest = {digest: whose for node in tree.instances for digest, whose in _files(node)}
    except KhodError as error:
        return Records(problem=f"khod's tree at {at:#x} is not what khod writes: {error}")
    for one in found:
        if whose := by_digest.get(one.digest()):
            out.by_address[one.address] = whose
        elif tree.map_address and _holds(one, tree.map_address):
            out.by_address[one.address] = Whose(KHOD, "its folio map", SESSION, MAP_TOKEN)
    return out


def _problem(count: int, said: str | None) -> str:
    if said is not None:
        return "none of the preserved memfds holds the tree that khod tells"
    if count:
        return f"{count} preserved memfds look like khod's tree, and khod was not there to say which is"
    return "none of the preserved memfds holds a tree of khod's: it is written when an update is frozen"


def _tree(memory: PhysicalMemory, one: Memfd) -> abi.HandoverTree | None:
    if not 0 < one.struct.size <= MAX_TREE_FILE:
        return None
    try:
        return abi.decode(one.content(memory, MAX_TREE_FILE))
    except (KhodError, ValueError):
        return None


def _holds(one: Memfd, phys: int) -> bool:
    return any(start <= phys < end for start, end in one.spans())


def _files(node: abi.InstanceNode) -> list[tuple[bytes, Whose]]:
    """Digest and owner of every file of an instance's that has frames."""
    carried = from_node(node)
    rows = [(f"descriptor {carried.fds[i]!r}", i) for i in carried.memory]
    rows += [(f"state {name!r}", len(carried.fds) + number) for number, name in enumerate(carried.states)]
    return [
        (digest, Whose(carried.label, what, carried.session, token))
        for digest, (what, token) in zip(carried.frames, rows, strict=True)
    ]
