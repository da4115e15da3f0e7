# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod itself writes about an instance into its node of the handover tree, and reads back.

The driver's own properties stand beside these; nobody's begin with ``khod,`` but ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from khod.abi import cells
from khod.abi.tree import InstanceNode
from khod.core.callers import Lifetime, Owner
from khod.core.driver import Continuity, StateBound, Strategy
from khod.core.registry import Grade, Key
from khod.core.sample import Sample
from khod.errors import FormatError, TreeError

SESSION = "khod"
"""Name of khod's own kernel session."""
TREE_TOKEN, MAP_TOKEN = 0, 1
"""What it holds, and nothing else (decision 2)."""
DIGEST = 32
"""Bytes of a SHA-256."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """One instance, as it crosses the jump."""

    name: str
    driver: str
    compatible: str
    owner: Owner
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]
    session: str
    """Name of its kernel session. Token n is descriptor n of `fds`, those of `shares` left out, then come `states`."""
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
    bulk: tuple[str, ...] = ()
    """Which of `states` are memory (`khod.core.driver.StateBound`)."""
    made: tuple[str, ...] = ()
    """Names of descriptors that its driver makes anew."""
    strategy: Strategy = Strategy.NATIVE
    continuity: Continuity = Continuity.PRESERVED
    handled: int = 0
    """Bytes that restore copies or hashes."""
    content: bytes = b""
    """SHA-256 of every byte of `memory`; b'' when that was not asked for."""
    properties: Mapping[str, bytes] = field(default_factory=dict)
    """The driver's."""
    grade: Grade = Grade.REGISTERED
    lifetime: Lifetime = Lifetime.PERSISTENT
    client_states: tuple[str, ...] = ()
    """Which of `states` are its client's: the last ones."""
    shares: Mapping[str, tuple[Key, str]] = field(default_factory=dict)
    """Which of `fds` are in another instance's session: its key, and the descriptor's name there."""
    shareable: bool = False

    def bound(self, name: str) -> StateBound:
        """Of one of `states`."""
        return StateBound(name, self.bounds[self.states.index(name)], name in self.bulk)

    @property
    def key(self) -> Key:
        """What names it."""
        return (self.owner, self.name)

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.name} of {self.owner}"


_DEFAULTS: Mapping[str, bytes] = {
    "khod,grade": cells.string(Grade.REGISTERED),
    "khod,lifetime": cells.string(Lifetime.PERSISTENT),
    "khod,bulk": cells.strings(()),
    "khod,made": cells.strings(()),
    "khod,strategy": cells.string(Strategy.NATIVE),
    "khod,continuity": cells.string(Continuity.PRESERVED),
    "khod,handled": cells.u64(0),
    "khod,client-states": cells.strings(()),
    "khod,shares": cells.strings(()),
    "khod,shareable": cells.u32(0),
}
"""What is not written where it is so: a tree has room for 256 bytes an instance when there are 4,096, and one of a khod that
knew nothing of these can be read (decision 23)."""


def to_node(unit: int, carried: Carried) -> InstanceNode:
    """The node of one instance."""
    own = {
        "khod,driver": cells.string(carried.driver),
        "khod,owner": cells.string(str(carried.owner)),
        "khod,grade": cells.string(carried.grade),
        "khod,lifetime": cells.string(carried.lifetime),
        "khod,required": cells.u32(carried.required),
        "khod,requires": cells.strings(carried.requires),
        "khod,options": cells.strings([f"{key}={value}" for key, value in carried.options.items()]),
        "khod,session": cells.string(carried.session),
        "khod,fds": cells.strings(carried.fds),
        "khod,memory": cells.u32s(carried.memory),
        "khod,sizes": cells.u64s(carried.sizes),
        "khod,states": cells.strings(carried.states),
        "khod,bounds": cells.u64s(carried.bounds),
        "khod,bulk": cells.strings(carried.bulk),
        "khod,made": cells.strings(carried.made),
        "khod,strategy": cells.string(carried.strategy),
        "khod,continuity": cells.string(carried.continuity),
        "khod,handled": cells.u64(carried.handled),
        "khod,client-states": cells.strings(carried.client_states),
        "khod,shares": cells.strings(flat_shares(carried.shares)),
        "khod,shareable": cells.u32(carried.shareable),
        "khod,frames-sha256": b"".join(carried.frames),
        "khod,sample-frames": cells.u64s(carried.sample.frames),
        "khod,sample-checked": cells.u32(carried.sample.checked),
        "khod,sample-sha256": carried.sample.digest,
        "khod,content-sha256": carried.content,
    }
    said = {name: value for name, value in own.items() if value != _DEFAULTS.get(name)}
    return InstanceNode(unit=unit, name=carried.name, compatible=carried.compatible, properties={**carried.properties, **said})


def from_node(node: InstanceNode) -> Carried:
    """Read a node back. Raises TreeError naming node and property, for a value that contradicts another too."""
    node = replace(node, properties={**_DEFAULTS, **node.properties})
    options = cells.as_strings(node, "khod,options")
    if bad := [text for text in options if "=" not in text]:
        raise TreeError(f"{node.path}: property 'khod,options': {bad[0]!r} is no key=value")
    frames = cells.as_bytes(node, "khod,frames-sha256")
    carried = Carried(
        name=node.name,
        driver=cells.as_string(node, "khod,driver"),
        compatible=node.compatible,
        owner=_parsed(node, "khod,owner", Owner.parse),
        required=bool(cells.as_u32(node, "khod,required")),
        requires=cells.as_strings(node, "khod,requires"),
        options=dict(text.split("=", 1) for text in options),
        session=cells.as_string(node, "khod,session"),
        fds=cells.as_strings(node, "khod,fds"),
        memory=cells.as_u32s(node, "khod,memory"),
        sizes=cells.as_u64s(node, "khod,sizes"),
        states=cells.as_strings(node, "khod,states"),
        bounds=cells.as_u64s(node, "khod,bounds"),
        bulk=cells.as_strings(node, "khod,bulk"),
        made=cells.as_strings(node, "khod,made"),
        strategy=_parsed(node, "khod,strategy", Strategy),
        continuity=_parsed(node, "khod,continuity", Continuity),
        handled=cells.as_u64(node, "khod,handled"),
        frames=tuple(frames[at : at + DIGEST] for at in range(0, len(frames), DIGEST)),
        sample=Sample(
            cells.as_u64s(node, "khod,sample-frames"),
            cells.as_u32(node, "khod,sample-checked"),
            cells.as_bytes(node, "khod,sample-sha256"),
        ),
        content=cells.as_bytes(node, "khod,content-sha256"),
        properties={name: value for name, value in node.properties.items() if not name.startswith("khod,")},
        grade=_parsed(node, "khod,grade", Grade),
        lifetime=_parsed(node, "khod,lifetime", Lifetime),
        client_states=cells.as_strings(node, "khod,client-states"),
        shares=_shares(node),
        shareable=bool(cells.as_u32(node, "khod,shareable")),
    )
    _check(node, carried)
    return carried


def _parsed(node: InstanceNode, name: str, parse: Callable[[str], T]) -> T:
    text = cells.as_string(node, name)
    try:
        return parse(text)
    except (FormatError, ValueError):
        raise TreeError(f"{node.path}: property {name!r}: {text!r} is none") from None


def flat_shares(shares: Mapping[str, tuple[Key, str]]) -> list[str]:
    """Four strings a shared descriptor: its name here, whose it is, which instance's, and its name there."""
    return [text for mine, ((owner, name), theirs) in shares.items() for text in (mine, str(owner), name, theirs)]


def parse_shares(flat: Sequence[str]) -> dict[str, tuple[Key, str]]:
    """What `flat_shares` made flat. Raises ValueError, FormatError."""
    return {mine: ((Owner.parse(owner), name), theirs) for mine, owner, name, theirs in zip(*(iter(flat),) * 4, strict=True)}


def _shares(node: InstanceNode) -> dict[str, tuple[Key, str]]:
    try:
        return parse_shares(cells.as_strings(node, "khod,shares"))
    except (ValueError, FormatError) as error:
        raise TreeError(f"{node.path}: property 'khod,shares': {error}") from None


def _check(node: InstanceNode, carried: Carried) -> None:
    """The relations between properties that everything after this relies on."""
    files = len(carried.memory) + len(carried.states)
    clients = len(carried.client_states)
    no_memory = {name for i, name in enumerate(carried.fds) if i not in carried.memory}
    claims = {
        "khod,memory": len(set(carried.memory)) == len(carried.memory) and all(i < len(carried.fds) for i in carried.memory),
        "khod,sizes": len(carried.sizes) == files,
        "khod,bounds": len(carried.bounds) == len(carried.states),
        "khod,fds": len(set(carried.fds)) == len(carried.fds),
        "khod,states": len(set(carried.states)) == len(carried.states),
        "khod,bulk": set(carried.bulk) <= set(carried.states),
        "khod,made": not set(carried.made) & set(carried.fds),
        "khod,client-states": carried.states[len(carried.states) - clients :] == carried.client_states,
        "khod,shares": set(carried.shares) <= no_memory,
        "khod,grade": carried.grade is Grade.REGISTERED or not (carried.fds or carried.states),
        "khod,frames-sha256": len(carried.frames) == files and all(len(f) == DIGEST for f in carried.frames),
        "khod,sample-checked": carried.sample.checked <= len(carried.sample.frames),
        "khod,sample-sha256": len(carried.sample.digest) == DIGEST,
        "khod,content-sha256": len(carried.content) in (0, DIGEST),
    }
    for name, holds in claims.items():
        if not holds:
            raise TreeError(f"{node.path}: property {name!r} contradicts the others: {node.properties[name].hex()[:64]}")
