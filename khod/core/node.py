# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod itself writes about an instance into its node of the handover tree, and reads back.

The driver's own properties stand beside these; nobody's begin with ``khod,`` but ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from khod.abi import cells
from khod.abi.tree import InstanceNode
from khod.core.sample import Sample
from khod.errors import TreeError

SESSION = "khod"
"""Name of khod's own kernel session."""
TREE_TOKEN, MAP_TOKEN = 0, 1
"""What it holds, and nothing else (decision 2)."""
DIGEST = 32
"""Bytes of a SHA-256."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One instance, as it crosses the jump."""

    name: str
    driver: str
    compatible: str
    owner: str
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]
    session: str
    """Name of its kernel session. Token n is descriptor n of `fds`, then come `states`."""
    fds: tuple[str, ...]
    memory: tuple[int, ...]
    """Indices into `fds` of those with folios behind them: what is sampled, in this order."""
    sizes: tuple[int, ...]
    """Bytes of each of `memory`, then of each state's memfd."""
    states: tuple[str, ...]
    bounds: tuple[int, ...]
    frames: tuple[bytes, ...]
    """Of each of `memory` and each state's memfd: SHA-256 over its folios in file order (see `khod.core.outgoing.learn`)."""
    sample: Sample
    content: bytes = b""
    """SHA-256 of every byte of `memory`; b'' when that was not asked for."""
    properties: Mapping[str, bytes] = field(default_factory=dict)
    """The driver's."""


def to_node(unit: int, carried: Carried) -> InstanceNode:
    """The node of one instance."""
    own = {
        "khod,driver": cells.string(carried.driver),
        "khod,owner": cells.string(carried.owner),
        "khod,required": cells.u32(carried.required),
        "khod,requires": cells.strings(carried.requires),
        "khod,options": cells.strings([f"{key}={value}" for key, value in carried.options.items()]),
        "khod,session": cells.string(carried.session),
        "khod,fds": cells.strings(carried.fds),
        "khod,memory": cells.u32s(carried.memory),
        "khod,sizes": cells.u64s(carried.sizes),
        "khod,states": cells.strings(carried.states),
        "khod,bounds": cells.u64s(carried.bounds),
        "khod,frames-sha256": b"".join(carried.frames),
        "khod,sample-frames": cells.u64s(carried.sample.frames),
        "khod,sample-checked": cells.u32(carried.sample.checked),
        "khod,sample-sha256": carried.sample.digest,
        "khod,content-sha256": carried.content,
    }
    return InstanceNode(unit=unit, name=carried.name, compatible=carried.compatible, properties={**carried.properties, **own})


def from_node(node: InstanceNode) -> Carried:
    """Read a node back. Raises TreeError naming node and property, for a value that contradicts another too."""
    options = cells.as_strings(node, "khod,options")
    if bad := [text for text in options if "=" not in text]:
        raise TreeError(f"{node.path}: property 'khod,options': {bad[0]!r} is no key=value")
    frames = cells.as_bytes(node, "khod,frames-sha256")
    carried = Carried(
        name=node.name,
        driver=cells.as_string(node, "khod,driver"),
        compatible=node.compatible,
        owner=cells.as_string(node, "khod,owner"),
        required=bool(cells.as_u32(node, "khod,required")),
        requires=cells.as_strings(node, "khod,requires"),
        options=dict(text.split("=", 1) for text in options),
        session=cells.as_string(node, "khod,session"),
        fds=cells.as_strings(node, "khod,fds"),
        memory=cells.as_u32s(node, "khod,memory"),
        sizes=cells.as_u64s(node, "khod,sizes"),
        states=cells.as_strings(node, "khod,states"),
        bounds=cells.as_u64s(node, "khod,bounds"),
        frames=tuple(frames[at : at + DIGEST] for at in range(0, len(frames), DIGEST)),
        sample=Sample(
            cells.as_u64s(node, "khod,sample-frames"),
            cells.as_u32(node, "khod,sample-checked"),
            cells.as_bytes(node, "khod,sample-sha256"),
        ),
        content=cells.as_bytes(node, "khod,content-sha256"),
        properties={name: value for name, value in node.properties.items() if not name.startswith("khod,")},
    )
    _check(node, carried)
    return carried


def _check(node: InstanceNode, carried: Carried) -> None:
    """The relations between properties that everything after this relies on."""
    files = len(carried.memory) + len(carried.states)
    claims = {
        "khod,memory": len(set(carried.memory)) == len(carried.memory) and all(i < len(carried.fds) for i in carried.memory),
        "khod,sizes": len(carried.sizes) == files,
        "khod,bounds": len(carried.bounds) == len(carried.states),
        "khod,fds": len(set(carried.fds)) == len(carried.fds),
        "khod,states": len(set(carried.states)) == len(carried.states),
        "khod,frames-sha256": len(carried.frames) == files and all(len(f) == DIGEST for f in carried.frames),
        "khod,sample-checked": carried.sample.checked <= len(carried.sample.frames),
        "khod,sample-sha256": len(carried.sample.digest) == DIGEST,
        "khod,content-sha256": len(carried.content) in (0, DIGEST),
    }
    for name, holds in claims.items():
        if not holds:
            raise TreeError(f"{node.path}: property {name!r} contradicts the others: {node.properties[name].hex()[:64]}")
