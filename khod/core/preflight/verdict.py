# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a check comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from khod.core.views import CheckView
from khod.errors import InvalidRequest, Refused


class Verdict(StrEnum):
    """In the order of what they mean to an update."""

    OK = "ok"
    UNKNOWN = "unknown"
    """It cannot be told; the update may go on."""
    WARNING = "warning"
    """Something will not be as it was; the update may go on."""
    BLOCKER = "blocker"
    """The update is refused."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row."""

    name: str
    """What it is overridden by; ``NAME:SUBJECT`` where there is one for each of something."""
    verdict: Verdict
    evidence: str
    """What was seen, in a sentence."""
    remedy: str = ""
    """What to do about it."""
    final: bool = False
    """A blocker that nobody can override, for nothing good can come of it."""

    def view(self, overridden: bool = False) -> CheckView:
        """For people."""
        return CheckView(
            name=self.name,
            verdict=self.verdict,
            evidence=self.evidence,
            remedy=self.remedy,
            overridable=self.verdict is Verdict.BLOCKER and not self.final,
            overridden=overridden,
        )

    @property
    def sentence(self) -> str:
        """Evidence and remedy."""
        return f"{self.evidence} ({self.remedy})" if self.remedy else self.evidence


def ok(name: str, evidence: str) -> Check:
    """Nothing to be done."""
    return Check(name, Verdict.OK, evidence)


def unknown(name: str, evidence: str, remedy: str = "") -> Check:
    """It cannot be told."""
    return Check(name, Verdict.UNKNOWN, evidence, remedy)


def warning(name: str, evidence: str, remedy: str) -> Check:
    """To be looked at."""
    return Check(name, Verdict.WARNING, evidence, remedy)


def blocker(name: str, evidence: str, remedy: str, *, final: bool = False) -> Check:
    """The update is refused."""
    return Check(name, Verdict.BLOCKER, evidence, remedy, final)


def standing(checks: Sequence[Check], overrides: Iterable[str]) -> list[Check]:
    """The blockers that are left when those named in `overrides` are passed over.

    Raises InvalidRequest for a name that no check bears, Refused for a blocker that cannot be overridden.
    """
    names = {check.name: check for check in checks}
    chosen = set(overrides)
    if strange := sorted(chosen - set(names)):
        raise InvalidRequest(f"no check is called {', '.join(strange)}", hint="see `khoctl preflight`")
    blocking = [check for check in checks if check.verdict is Verdict.BLOCKER]
    for check in blocking:
        if check.final and check.name in chosen:
            raise Refused(f"{check.name} cannot be overridden: {check.evidence}", hint=check.remedy)
    return [check for check in blocking if check.name not in chosen]


def used(checks: Sequence[Check], overrides: Iterable[str]) -> list[Check]:
    """The blockers that `overrides` passes over: what is to be recorded."""
    chosen = set(overrides)
    return [check for check in checks if check.verdict is Verdict.BLOCKER and check.name in chosen]
