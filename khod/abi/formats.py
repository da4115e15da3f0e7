# SPDX-License-Identifier: LGPL-2.1-or-later
"""The names of the formats in which kernels hand things over (include/linux/kho/abi), found in a kernel, and compared.

A name is ``base(;sub)*``, each part ``word-vN``: kernels after 7.3 append the versions of the structures that the base is built
of. The kernel that reads compares the whole text, so that a difference in any part is one; which part it is, is for people.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from struct import Struct

from khod.abi import elf
from khod.errors import FormatError

KHO, LUO, MEMFD = "kho", "luo", "memfd"
CORE = (KHO, LUO, "luo-session", "luo-flb", "memblock", "reserve-mem")
"""Names that are plain strings in a kernel. The rest are file handlers, found by the struct that they stand in."""
COMPATIBLE_LENGTH = 48
"""LIVEUPDATE_HNDL_COMPAT_LENGTH."""
VERSIONS_SECTION = ".liveupdate_versions"
"""Proposed for vmlinux: a header, then names in fields of `COMPATIBLE_LENGTH`."""
VERSIONS_MAGIC, VERSIONS_VERSION = 0x4C565550, 1

_PART = r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*-v[0-9]{1,9}"
_WHOLE = rf"{_PART}(?:;{_PART}){{0,15}}"
# Patterns are compiled where they are used first: this module is imported on the way to restored.
_STRING = _WHOLE.encode() + rb"(?=\0)"
_INSIDE = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789;-")
"""A name does not begin after one of these."""
# struct liveupdate_file_handler and liveupdate_flb: a pointer to operations (a kernel address, whose upper half is all ones),
# then char compatible[48].
_HANDLER = rb"\xff\xff\xff\xff(?=(" + _WHOLE.encode() + rb")\0)"
_VERSIONS_HEADER = Struct("<II")


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """One name, taken apart."""

    base: str
    subs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Without its version: 'kho', 'memfd'."""
        return self.base.rpartition("-v")[0]

    def __str__(self) -> str:
        return ";".join((self.base, *self.subs))


def parse(text: str) -> Format:
    """Raises FormatError for what is no such name."""
    if not re.fullmatch(_WHOLE, text):
        raise FormatError(f"{text[:80]!r} is not the name of a format, such as kho-v4 or kho-v4;radix-v1")
    base, *subs = text.split(";")
    return Format(base, tuple(subs))


def find(kernel: bytes) -> tuple[Format, ...]:
    """All that an uncompressed kernel understands, in its file or in memory, sorted."""
    found = set(_strings(kernel))
    for match in re.finditer(_HANDLER, kernel):
        field = kernel[match.end() : match.end() + COMPATIBLE_LENGTH]
        if len(field) == COMPATIBLE_LENGTH and not field[len(match[1]) :].strip(b"\0"):
            found.add(match[1])
    return tuple(sorted(parse(text.decode("ascii")) for text in found))


def _strings(kernel: bytes) -> Iterator[bytes]:
    """Plain strings of `CORE`. Looked for one by one: that is ten times as fast as one expression for all of them."""
    whole = re.compile(_STRING)
    for name in CORE:
        start, at = f"{name}-v".encode(), -1
        while (at := kernel.find(start, at + 1)) >= 0:
            match = whole.match(kernel, at)
            if match and (at == 0 or kernel[at - 1] not in _INSIDE):
                yield match[0]


def listed(kernel: bytes, sections: dict[str, elf.Extent]) -> tuple[Format, ...]:
    """What the section `VERSIONS_SECTION` of a vmlinux lists; () where there is none.

    Raises FormatError when it is not laid out as proposed."""
    extent = sections.get(VERSIONS_SECTION)
    if extent is None:
        return ()
    table = kernel[extent.offset : extent.offset + extent.size]
    if len(table) < _VERSIONS_HEADER.size or (len(table) - _VERSIONS_HEADER.size) % COMPATIBLE_LENGTH:
        raise FormatError(f"its section {VERSIONS_SECTION} of {len(table)} bytes is no list of versions")
    if (head := _VERSIONS_HEADER.unpack_from(table)) != (VERSIONS_MAGIC, VERSIONS_VERSION):
        raise FormatError(f"its section {VERSIONS_SECTION} begins with {head[0]:#x}, version {head[1]}, which we do not know")
    fields = (table[at : at + COMPATIBLE_LENGTH] for at in range(_VERSIONS_HEADER.size, len(table), COMPATIBLE_LENGTH))
    return tuple(sorted({parse(field.rstrip(b"\0").decode("ascii", "replace")) for field in fields}))


class Match(StrEnum):
    """What a comparison comes to."""

    COMPATIBLE = "compatible"
    INCOMPATIBLE = "incompatible"
    UNKNOWN = "unknown"


class Outcome(StrEnum):
    """What happens to a machine that jumps all the same."""

    FINE = "fine"
    COLD = "cold"
    PANIC = "panic"
    DEAD = "dead"
    PARTLY = "partly"
    UNKNOWN = "unknown"

    @property
    def sentence(self) -> str:
        """For people."""
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.FINE: "the target reads it",
    Outcome.COLD: "the target boots as after power-on, and everything is lost",
    Outcome.PANIC: "the target panics while it boots, whatever its options",
    Outcome.DEAD: "/dev/liveupdate is dead for that whole boot: the memory stays reserved and out of reach until a cold boot",
    Outcome.PARTLY: "what reserve_mem= holds is lost; everything else comes through",
    Outcome.UNKNOWN: "nobody knows what will happen",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One format, between the kernel that writes and the one that reads."""

    name: str
    writes: Format | None
    """None: not known."""
    reads: tuple[Format, ...]
    match: Match
    outcome: Outcome
    reason: str
    """In a sentence; '' when they are compatible."""


def compare(name: str, writes: Format | None, reads: Iterable[Format] | None) -> Comparison:
    """Whether a kernel that understands `reads` (None: not known which) reads what `writes` (None: not known) names."""
    there = tuple(sorted(f for f in reads if f.name == name)) if reads is not None else ()
    if writes is None or reads is None:
        who = "the target" if reads is None else "the running kernel"
        return Comparison(name, writes, there, Match.UNKNOWN, Outcome.UNKNOWN, f"which {name} format {who} knows is not known")
    if writes in there:
        return Comparison(name, writes, there, Match.COMPATIBLE, Outcome.FINE, "")
    reason = _difference(writes, there)
    return Comparison(name, writes, there, Match.INCOMPATIBLE, _outcome(name, there), reason)


def compare_all(writes: Iterable[Format], reads: Iterable[Format] | None) -> list[Comparison]:
    """A comparison for every format that is written. Where a kernel knows several versions of one, any that is read will do."""
    by_name: dict[str, list[Comparison]] = {}
    known = None if reads is None else tuple(reads)
    for written in sorted(writes):
        by_name.setdefault(written.name, []).append(compare(written.name, written, known))
    return [min(all_of, key=lambda c: _RANK[c.match]) for all_of in by_name.values()]


def worst(comparisons: Iterable[Comparison]) -> Outcome:
    """What the jump as a whole comes to."""
    return max((c.outcome for c in comparisons), key=_SEVERITY.index, default=Outcome.UNKNOWN)


_RANK = {Match.COMPATIBLE: 0, Match.UNKNOWN: 1, Match.INCOMPATIBLE: 2}
# Cold comes before the others: a kernel that takes nothing over looks at nothing else.
_SEVERITY = [Outcome.FINE, Outcome.UNKNOWN, Outcome.PARTLY, Outcome.DEAD, Outcome.PANIC, Outcome.COLD]


def _outcome(name: str, there: tuple[Format, ...]) -> Outcome:
    if name == KHO:
        return Outcome.COLD
    if name.startswith(LUO):
        # Without any of it the kernel is built without CONFIG_LIVEUPDATE: it keeps the memory and offers no device.
        return Outcome.PANIC if there else Outcome.DEAD
    if name in ("memblock", "reserve-mem"):
        return Outcome.PARTLY
    return Outcome.DEAD


def _difference(writes: Format, there: tuple[Format, ...]) -> str:
    if not there:
        return f"the target knows no {writes.name} format; {writes} is written"
    reads = there[-1]
    parts = []
    if writes.base != reads.base:
        parts.append(f"{writes.base} is written, {reads.base} is read")
    mine, theirs = ({sub.rpartition("-v")[0]: sub for sub in f.subs} for f in (writes, reads))
    for sub in sorted({*mine, *theirs}):
        if mine.get(sub) != theirs.get(sub):
            parts.append(f"{mine.get(sub, f'no {sub}')} is written, {theirs.get(sub, f'no {sub}')} is read")
    return f"{writes.name}: {'; '.join(parts) or f'{writes} is written, {reads} is read'}"
