# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table: every check there is, in the order in which people read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from khod.core.preflight import people, room, running, target
from khod.core.preflight.situation import Situation
from khod.core.preflight.verdict import Check, Verdict
from khod.core.views import PreflightView


def judge(seen: Situation) -> list[Check]:
    """All checks of a situation."""
    return [*running.checks(seen), *room.checks(seen), *people.checks(seen), *target.checks(seen)]


def view(seen: Situation, checks: Sequence[Check], overrides: Iterable[str] = ()) -> PreflightView:
    """For people and programs."""
    chosen = set(overrides)
    blocked = [c for c in checks if c.verdict is Verdict.BLOCKER and c.name not in chosen]
    verdict = Verdict.BLOCKER if blocked else max((c.verdict for c in checks if c.name not in chosen), key=_ORDER.index)
    return PreflightView(
        running=seen.release,
        target=seen.target.header.version if seen.target else "",
        verdict=verdict,
        checks=[check.view(check.name in chosen and check.verdict is Verdict.BLOCKER) for check in checks],
    )


_ORDER = [*Verdict]
