# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a rehearsal went, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from khod.cli import show
from khod.cli.output import print_pairs, print_table, say
from khod.cli.show import seconds, size

if TYPE_CHECKING:
    from khod.rehearsal.report import Part, Report


def rehearsal(report: Report) -> None:
    """The report: verdict first."""
    say()
    say(f"{report.verdict}: {report.verdict.sentence}")
    for line in report.reason.splitlines():
        say(f"  {line}")
    say()
    print_pairs(
        [
            ("kernels", f"{report.running} -> {report.landed or report.target or '?'}"),
            ("took", f"{seconds(report.seconds)}, under emulation"),
            ("checked", report.checked),
            ("overridden", "; ".join(report.overridden)),
            ("logs", report.logs),
        ]
    )
    for problem in report.problems:
        say(f"problem: {problem}")
    if report.parts:
        say()
        rows = [(part.name, size(part.size), part.state, _whole(part)) for part in report.parts]
        print_table(("stand-in", "size", "after the jump", "its bytes"), rows, right=("size",))
    if report.checks:
        say()
        show.checks(report.checks)
    if report.ledger:
        say()
        show.ledger(report.ledger)
    if report.left_out:
        say()
        print_table(("left out", "why"), list(report.left_out.items()))
    if report.differs:
        say()
        say("not as on this host:")
        for sentence in report.differs:
            say(f"  {sentence}")


def _whole(part: Part) -> str:
    return {True: "as they were", False: "NOT as they were", None: "not seen"}[part.whole]
