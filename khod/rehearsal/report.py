# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rehearsal came to: plain values, for people and programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from khod.core.views import CheckView, SpanView, UpdateView
from khod.rehearsal.machine import Result
from khod.rehearsal.qemu import Outcome


class Verdict(StrEnum):
    """How the rehearsed update went."""

    WORKS = "works"
    BLOCKED = "blocked"
    UNDONE = "undone"
    DAMAGED = "damaged"
    LOST = "lost"
    UNREACHABLE = "unreachable"
    DEAD = "dead"
    UNKNOWN = "unknown"

    @property
    def sentence(self) -> str:
        """For people."""
        return _SENTENCES[self]

    @property
    def exit_status(self) -> int:
        """As khoctl's own commands end: see `khod.errors`."""
        return {Verdict.WORKS: 0, Verdict.BLOCKED: 3, Verdict.UNKNOWN: 7}.get(self, 6)


_SENTENCES = {
    Verdict.WORKS: "the update went through, and everything came through it whole",
    Verdict.BLOCKED: "khod refused the update: a check of its preflight stands in the way",
    Verdict.UNDONE: "the update failed before the jump, and was undone",
    Verdict.DAMAGED: "the jump was made, and not everything came through it whole",
    Verdict.LOST: "the jump was made, and nothing came across",
    Verdict.UNREACHABLE: "the jump was made, and the memory is out of reach until a cold boot",
    Verdict.DEAD: "the jump was made, and the target did not come up",
    Verdict.UNKNOWN: "the rehearsal itself did not come to an end: nothing is known of the update",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One stand-in."""

    name: str
    size: int
    """Bytes, in the rehearsal."""
    state: str
    """In the new kernel; '' when it was not reached."""
    whole: bool | None
    """Whether its owner found the bytes that it had left; None when nobody could look."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it."""

    verdict: Verdict
    reason: str
    """In a sentence, or several lines; '' where the verdict says it all."""
    running: str
    """Release of the kernel that was jumped from."""
    target: str
    """And of the one that was jumped to, as its image says."""
    landed: str
    """And as the machine said after the jump; ''."""
    seconds: float
    parts: Sequence[Part] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    """What is registered on the host and has no stand-in, with the reason."""
    differs: Sequence[str] = ()
    """What was not as it will be on the host, in sentences."""
    checks: Sequence[CheckView] = ()
    """Of the preflight in the machine, those that are not ok."""
    ledger: Sequence[SpanView] = ()
    checked: str = ""
    """Which bytes khod compared."""
    problems: Sequence[str] = ()
    overridden: Sequence[str] = ()
    logs: str = ""
    """Where the console and khod's logs are; '' when there was no need to keep them."""


def judge(result: Result) -> tuple[Verdict, str]:
    """What the records of a run say, and the reason."""
    told = {record.name: record.facts for record in result.records}
    if landed := told.get("landed"):
        return _landed(landed)
    if undone := told.get("undone"):
        return Verdict.UNDONE, str(undone["said"])
    if blocked := told.get("blocked"):
        names = [check.name for check in checks(result) if check.verdict == "blocker" and not check.overridden]
        return Verdict.BLOCKED, ", ".join(names) or str(blocked["said"])
    if result.outcome is Outcome.LOST and "executing" in told and "landing" not in told:
        return Verdict.DEAD, _last_words(result)
    return Verdict.UNKNOWN, result.reason


def _landed(told: dict[str, Any]) -> tuple[Verdict, str]:
    state, problems = told["state"], [str(problem) for problem in (*told["problems"], *told["left_behind"])]
    if state in (Verdict.LOST, Verdict.UNREACHABLE):
        return Verdict(state), told["reason"] or "; ".join(problems)
    torn = [name for name, (_, whole) in told["parts"].items() if not whole]
    if state != "restored" or torn or problems:
        said = [f"khod is {state}"] if state != "restored" else []
        said += [f"not whole: {', '.join(torn)}"] if torn else []
        return Verdict.DAMAGED, "; ".join([*said, *problems])
    return Verdict.WORKS, ""


def _last_words(result: Result) -> str:
    """Why the target is dead, as its console has it."""
    panics = re.findall(r"Kernel panic.*", result.console())
    return panics[-1].strip() if panics else result.reason


def parts(result: Result) -> list[Part]:
    """Every stand-in, as far as the run came."""
    told = {record.name: record.facts for record in result.records}
    found = told.get("landed", {}).get("parts", {})
    made = told.get("registered", {}).get("sizes", {})
    return [Part(name=n, size=s, state=found.get(n, ("", None))[0], whole=found.get(n, ("", None))[1]) for n, s in made.items()]


def update(result: Result) -> UpdateView | None:
    """What khod's journal says of the update, if it was asked."""
    told = {record.name: record.facts for record in result.records}
    facts = told.get("landed") or told.get("undone") or {}
    return msgspec.convert(facts["update"], UpdateView) if facts.get("update") else None


def checks(result: Result) -> list[CheckView]:
    """What the preflight in the machine found fault with."""
    told = {record.name: record.facts for record in result.records}
    rows = msgspec.convert(told.get("preflight", {}).get("checks", []), list[CheckView])
    return [row for row in rows if row.verdict != "ok"]
