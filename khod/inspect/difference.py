# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is different between two inspections: before and after something, or of two hosts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from khod.errors import FormatError
from khod.folio.units import PHYS_BITS
from khod.inspect.preserved import joined, without
from khod.inspect.views import VERSION, HandoverInfo, Inspection, OwnerInfo, Span

_Key = tuple[str, str, str]


def load(data: bytes, name: str) -> Inspection:
    """An inspection from what `--json` printed. Raises FormatError for anything else."""
    import msgspec

    try:
        found = msgspec.json.decode(data, type=Inspection)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{name}: no inspection: {error}", hint="khoctl inspect --json prints them")
    if found.version != VERSION:
        raise FormatError(f"{name}: an inspection of form {found.version}, and {VERSION} is what we read")
    owners = [one.ranges for each in (found.outgoing, found.incoming) if each for one in each.owners]
    for start, end in chain(found.ram, found.scratch, found.khod_map, *owners):
        if not 0 <= start <= end <= 1 << PHYS_BITS:
            raise FormatError(f"{name}: {start:#x}-{end:#x} is no range of physical addresses")
    return found


def difference(before: Inspection, after: Inspection) -> list[str]:
    """In sentences; [] when nothing that is handed over differs."""
    out = []
    for what, one, other in (
        ("release", before.release, after.release),
        ("boot", before.boot_id, after.boot_id),
        ("scratch", _words(before.scratch), _words(after.scratch)),
    ):
        if one != other:
            out.append(f"{what}: {one or 'none'} -> {other or 'none'}")
    for direction in ("outgoing", "incoming"):
        out += _handovers(direction, getattr(before, direction), getattr(after, direction))
    if joined(before.khod_map) != joined(after.khod_map):
        out.append(f"khod's folio map: {_moved(before.khod_map, after.khod_map)}")
    return out


def _handovers(direction: str, before: HandoverInfo | None, after: HandoverInfo | None) -> Iterator[str]:
    if before is None or after is None:
        if before is not after:
            yield f"{direction}: {'appeared' if after else 'is gone'}"
        return
    if before.format != after.format:
        yield f"{direction} format: {before.format or 'unknown'} -> {after.format or 'unknown'}"
    totals = [{t.order: t.folios for t in one.totals} for one in (before, after)]
    for order in sorted({*totals[0], *totals[1]}):
        one, other = (total.get(order, 0) for total in totals)
        if one != other:
            yield f"{direction} folios of order {order}: {one} -> {other}"
    owners = [_by_owner(one) for one in (before, after)]
    for key in sorted({*owners[0], *owners[1]}):
        old, new = (each.get(key, ()) for each in owners)
        if old != new:
            owner, what, session = key
            yield f"{direction} {owner}: {what}{f', session {session!r}' if session else ''}: {_moved(old, new)}"


def _by_owner(handover: HandoverInfo) -> dict[_Key, tuple[Span, ...]]:
    out: dict[_Key, tuple[Span, ...]] = {}
    for one in handover.owners:
        out[_key(one)] = joined((*out.get(_key(one), ()), *one.ranges))
    return out


def _key(one: OwnerInfo) -> _Key:
    return (one.owner, one.what, one.session)


def _moved(before: Iterable[Span], after: Iterable[Span]) -> str:
    old, new = joined(before), joined(after)
    gone, came = without(old, new), without(new, old)
    kept = _size(old) - _size(gone)
    return f"{kept} bytes in the same place, {_size(gone)} gone, {_size(came)} new" + (f" ({_words(came[:3])})" if came else "")


def _size(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)


def _words(spans: Iterable[Span]) -> str:
    return ", ".join(f"{start:#x}-{end:#x}" for start, end in spans)
