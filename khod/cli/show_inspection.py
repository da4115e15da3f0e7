# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `khoctl inspect` found, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from khod.cli import show
from khod.cli.output import print_pairs, print_table, say
from khod.cli.show import moment, size

if TYPE_CHECKING:
    from khod.inspect.views import AddressInfo, HandoverInfo, Inspection


def plain(text: str) -> str:
    """Text that does nothing to a terminal: names of sessions are any bytes, and a file can say anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_SHOWN = 8
"""Ranges of an owner that are printed; all are in --json."""


def inspection(view: Inspection) -> None:
    """All of it."""
    if view.khod is not None:
        show.inspection(view.khod)
        say()
    if view.source != "khod":
        what = plain(f"kernel {view.release}" if view.release else view.source)
        print_pairs(
            [
                ("memory of", f"{what}, {moment(view.time)}"),
                ("RAM", f"{size(sum(e - s for s, e in view.ram))} in {len(view.ram)} ranges"),
                ("scratch", ", ".join(f"{s:#x}-{e:#x}" for s, e in view.scratch) or "unknown"),
            ]
        )
    for one in (view.outgoing, view.incoming):
        if one is not None:
            say()
            _handover(one)
    if view.missing:
        say()
        say("not to be had now:")
        for missing in view.missing:
            say(plain(f"  {missing.what}: {missing.why}"))


def _handover(view: HandoverInfo) -> None:
    say({"outgoing": "To the next kernel", "incoming": "From the previous kernel"}[view.direction])
    print_pairs(
        [
            ("format", view.format),
            ("root", f"{view.address:#x}" if view.address else ""),
            ("map", f"{view.map:#x}" if view.map else ""),
            ("blobs", ", ".join(f"{b.name} at {b.address:#x}" + (f" ({b.size} B)" if b.size else "") for b in view.blobs)),
            ("written by", f"{plain(view.previous_release)}, kexec {view.kexec_count}" if view.previous_release else ""),
            ("reserve_mem", ", ".join(f"{r.name} at {r.start:#x}, {size(r.size)}" for r in view.reservations)),
            ("live update", f"{view.luo.format}, number {view.luo.number}" if view.luo else ""),
            ("sessions", plain(", ".join(view.luo.sessions)) if view.luo else ""),
        ]
    )
    if view.totals:
        say()
        rows = [(str(t.order), str(t.folios), size(t.bytes)) for t in view.totals]
        rows.append(("all", str(sum(t.folios for t in view.totals)), size(sum(t.bytes for t in view.totals))))
        print_table(("order", "folios", "size"), rows, right=("order", "folios", "size"))
    if view.owners:
        say()
        print_table(
            ("owner", "what", "session", "size", "known by", "where"),
            [(plain(o.owner), plain(o.what), plain(o.session), size(o.bytes), o.by, _ranges(o.ranges)) for o in view.owners],
            right=("size",),
        )
        _sessions(view)


def _sessions(view: HandoverInfo) -> None:
    from khod.inspect.owners import sessions

    if rows := [(plain(name), size(count)) for name, count in sorted(sessions(view).items())]:
        say()
        print_table(("session", "size"), rows, right=("size",))


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    more = f" and {len(ranges) - _SHOWN} more" if len(ranges) > _SHOWN else ""
    return " ".join(f"{start:#x}-{end:#x}" for start, end in ranges[:_SHOWN]) + more


def addresses(found: Sequence[AddressInfo]) -> None:
    """One after the other."""
    for one in found:
        if one.preserved is None:
            preserved = "unknown: the map of preserved folios cannot be had now"
        elif one.preserved:
            preserved = f"yes, in a folio of order {one.order} at {one.folio:#x}" if one.order >= 0 else "yes"
        else:
            preserved = "no"
        print_pairs(
            [
                ("address", f"{one.address:#x}"),
                ("kind", one.kind),
                ("preserved", preserved),
                ("owner", plain("; ".join(one.owners))),
            ]
        )


def differences(lines: Sequence[str]) -> None:
    """One a line."""
    for line in lines or ("nothing that is handed over differs",):
        say(plain(line))
