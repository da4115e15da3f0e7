# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the views look to people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from khod.cli.output import print_pairs, print_table, say
from khod.core.views import (
    CheckView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    OrderView,
    PlanView,
    PreflightView,
    SpanView,
    StatusView,
    UpdateView,
)


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    value, unit = float(count), 0
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    while value >= 1024 and unit < len(units) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {units[unit]}" if value == int(value) else f"{value:.1f} {units[unit]}"


def seconds(value: float) -> str:
    """A duration with the digits that matter."""
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def moment(nanoseconds: int) -> str:
    """A time, UTC."""
    return datetime.fromtimestamp(nanoseconds // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def status(view: StatusView) -> None:
    """khod in one look."""
    claims = f", {view.unclaimed} not claimed yet" if view.unclaimed else ""
    print_pairs(
        [
            ("state", view.state + (", held: khoctl continue, or khoctl abort" if view.held else "")),
            ("update", view.update),
            ("instances", f"{view.instances}, {size(view.pinned)}{claims}"),
            ("next kernel", f"{view.image.kernel} [{view.image.cmdline}]" if view.image else "none: khoctl load"),
            ("running", f"{view.release}, boot {view.boot_id}"),
            ("live update", view.device),
            ("khod", view.version),
        ]
    )
    for problem in view.problems:
        say(f"problem: {problem}")


def instances(views: Sequence[InstanceView]) -> None:
    """All of them, one a line."""
    if not views:
        say("nothing is registered")
        return
    headers = ("name", "owner", "driver", "grade", "state", "size", "required", "lifetime", "keeper", "problem")
    rows = [
        (
            v.name, v.owner, v.driver, v.grade, v.state + (", orphan" if v.orphan else ""), size(v.size),
            "yes" if v.required else "no", v.lifetime, v.keeper, v.problem,
        )
        for v in views
    ]  # fmt: skip
    print_table(headers, rows, right=("size",))


def instance(view: InstanceView) -> None:
    """One, with what its plugin has to say."""
    print_pairs(
        [
            ("name", view.name),
            ("driver", f"{view.driver} [{view.compatible}]" if view.driver else ""),
            ("grade", "opaque: contents unknown" if view.grade == "opaque" else ""),
            ("state", view.state + (f" since {moment(view.since)}" if view.since else "")),
            ("orphan", "nobody has claimed it" if view.orphan else ""),
            ("size", size(view.size)),
            ("descriptors", ", ".join(view.fds)),
            ("required", "yes" if view.required else "no: an update may leave it behind"),
            ("requires", ", ".join(view.requires)),
            ("owner", view.owner),
            ("lifetime", view.lifetime),
            ("kept by", view.keeper),
            ("attended", "yes: its client must answer" if view.attended else ""),
            ("problem", view.problem),
            *view.detail.items(),
        ]
    )


def image(view: ImageView) -> None:
    """The kernel to jump to."""
    print_pairs(
        [
            ("kernel", view.kernel),
            ("initrd", view.initrd),
            ("command line", view.cmdline),
            ("size", size(view.size)),
            ("sha256", view.sha256),
        ]
    )


def plan(view: PlanView) -> None:
    """What an update would do, what it needs, what it ends, and why it would not start."""
    print_table(("phase", "step", "what"), [(step.phase, step.name, step.describe) for step in view.steps])
    say()
    parts = ", ".join(f"{size(count)} {part}" for part, count in view.memory.parts.items() if count)
    print_pairs(
        [
            ("memory needed", size(view.memory.need) + (f" ({parts})" if parts else "")),
            ("memory there", size(view.memory.have)),
            ("holes filled", size(view.memory.holes_filled) + ", which stay filled" if view.memory.holes_filled else ""),
            ("the jump ends", _kills(view) if view.kills_total else "no process but khod"),
        ]
    )
    for blocker in view.blockers:
        say(f"would be refused: {blocker}")


def preflight(view: PreflightView) -> None:
    """The table, and above it what it comes to."""
    say(f"from {view.running} to {view.target or 'no kernel yet'}: {view.verdict}")
    say()
    checks(view.checks)


def checks(views: Sequence[CheckView]) -> None:
    """Rows of a preflight."""
    rows = [(c.name, f"{c.verdict}, overridden" if c.overridden else c.verdict, c.evidence, c.remedy) for c in views]
    print_table(("check", "verdict", "evidence", "remedy"), rows)


def _kills(view: PlanView) -> str:
    more = view.kills_total - len(view.kills)
    return f"{view.kills_total} processes: {', '.join(view.kills)}{f' and {more} more' if more > 0 else ''}"


def event(view: EventView, start: int) -> str:
    """One line: since when, where, what."""
    who = f"{view.instance}: " if view.instance else ""
    took = f" ({seconds(view.seconds)})" if view.seconds else ""
    return f"{(view.time - start) / 1e9:9.3f}  {view.state:<10}  {who}{view.message}{took}"


def history(views: Sequence[UpdateView]) -> None:
    """Updates, one a line."""
    if not views:
        say("there was no update yet")
        return
    rows = [
        (v.update, moment(v.started), v.outcome, f"{v.from_release} -> {v.to_release or '?'}", _blackout(v), v.reason)
        for v in views
    ]
    print_table(("update", "started", "outcome", "kernels", "blackout", "reason"), rows, right=("blackout",))


def _blackout(view: UpdateView) -> str:
    spans = [span for span in view.spans if span.phase == "blackout" and not span.instance]
    return _span(spans[0]) if spans else ""


def _span(span: SpanView) -> str:
    return seconds(span.seconds) + (f" ±{seconds(span.uncertainty)}" if span.uncertainty else "")


def one_update(view: UpdateView) -> None:
    """One update with its ledger."""
    print_pairs(
        [
            ("update", view.update),
            ("started", moment(view.started)),
            ("outcome", view.outcome),
            ("reason", view.reason),
            ("kernels", f"{view.from_release} -> {view.to_release or '?'}"),
            ("instances", ", ".join(view.instances)),
            ("left behind", "; ".join(view.left_behind)),
            ("overridden", "; ".join(view.overridden)),
            ("checked", view.checked),
        ]
    )
    for problem in view.problems:
        say(f"problem: {problem}")
    if view.spans:
        say()
        ledger(view.spans)


def ledger(spans: Sequence[SpanView]) -> None:
    """How long each phase took, and each instance in it."""
    print_table(("phase", "instance", "time"), [(s.phase, s.instance, _span(s)) for s in spans], right=("time",))


def inspection(view: InspectionView) -> None:
    """The tree and the map's totals."""
    if view.source == "none":
        say("nothing is preserved")
        return
    say(view.tree.rstrip())
    say()
    print_pairs(
        [
            ("source", view.source),
            ("folio map", f"{view.map_address:#x}, {view.map_pages} pages"),
            ("sha256", view.map_sha256),
        ]
    )
    say()
    total = OrderView(
        order=-1,
        folios=sum(o.folios for o in view.orders),
        bitmaps=sum(o.bitmaps for o in view.orders),
        bytes=sum(o.bytes for o in view.orders),
    )
    rows = [
        ("all" if o is total else str(o.order), str(o.folios), str(o.bitmaps), size(o.bytes)) for o in (*view.orders, total)
    ]
    print_table(("order", "folios", "bitmaps", "size"), rows, right=("order", "folios", "bitmaps", "size"))
