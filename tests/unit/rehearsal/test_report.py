# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict: from what a run has told, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from khod.rehearsal import report
from khod.rehearsal.machine import Record, Result
from khod.rehearsal.qemu import Outcome
from khod.rehearsal.report import Part, Verdict

UPDATE = {
    "update": "u", "started": 1, "outcome": "restored", "reason": "", "from_release": "7.3.4", "to_release": "7.2.12",
    "spans": [{"phase": "blackout", "instance": "", "seconds": 2.5, "uncertainty": 0.01}], "instances": ["vm"],
    "left_behind": [], "checked": "every folio",
}  # fmt: skip


def run(at: Path, outcome: Outcome, *records: tuple[str, dict[str, Any]], console: str = "") -> Result:
    (at / "serial.log").write_text(console)
    return Result(at, outcome, "no word before the deadline", [Record(0, name, facts) for name, facts in records])


def landed(
    state: str = "restored", whole: bool | None = True, *problems: str, left: tuple[str, ...] = ()
) -> tuple[str, dict[str, Any]]:
    facts = {"state": state, "reason": "nothing came", "problems": problems, "left_behind": left}
    return "landed", {**facts, "parts": {"vm": ("claimed", whole)}, "release": "7.2.12", "update": UPDATE}


EXECUTING: tuple[str, dict[str, Any]] = ("executing", {"message": "executing"})
LANDING: tuple[str, dict[str, Any]] = ("landing", {"release": "7.2.12"})


@pytest.mark.parametrize(
    ("outcome", "records", "verdict", "why"),
    [
        (Outcome.PASSED, [EXECUTING, LANDING, landed()], Verdict.WORKS, ""),
        (Outcome.PASSED, [EXECUTING, landed(whole=False)], Verdict.DAMAGED, "not whole: vm"),
        (Outcome.PASSED, [EXECUTING, landed(whole=None)], Verdict.DAMAGED, "not whole: vm"),
        (Outcome.PASSED, [EXECUTING, landed("restored", True, "a frame moved")], Verdict.DAMAGED, "a frame moved"),
        (Outcome.PASSED, [EXECUTING, landed(left=("vm: huge",))], Verdict.DAMAGED, "vm: huge"),
        (Outcome.PASSED, [EXECUTING, landed("failed", True)], Verdict.DAMAGED, "khod is failed"),
        (Outcome.PASSED, [EXECUTING, landed("lost", None)], Verdict.LOST, "nothing came"),
        (Outcome.PASSED, [EXECUTING, landed("unreachable", None)], Verdict.UNREACHABLE, "nothing came"),
        (Outcome.PASSED, [("blocked", {"said": "format:kho"})], Verdict.BLOCKED, "format:kho"),
        (Outcome.PASSED, [("preparing", {}), ("undone", {"said": "no room"})], Verdict.UNDONE, "no room"),
        (Outcome.LOST, [EXECUTING], Verdict.DEAD, "Kernel panic - not syncing: no"),
        (Outcome.LOST, [EXECUTING, LANDING], Verdict.UNKNOWN, "deadline"),
        (Outcome.LOST, [("preparing", {})], Verdict.UNKNOWN, "deadline"),
        (Outcome.LOST, [], Verdict.UNKNOWN, "deadline"),
        (Outcome.FAILED, [EXECUTING, LANDING], Verdict.UNKNOWN, "deadline"),
    ],
)
def test_verdicts(
    tmp_path: Path, outcome: Outcome, records: list[tuple[str, dict[str, Any]]], verdict: Verdict, why: str
) -> None:
    console = "[    0.1] Kernel panic - not syncing: no\r\n[    0.2] more\r\n"
    found, reason = report.judge(run(tmp_path, outcome, *records, console=console))
    assert found is verdict
    assert why in reason
    assert bool(reason) == (verdict is not Verdict.WORKS)


def test_a_target_that_says_nothing_at_all_is_dead_by_the_deadline(tmp_path: Path) -> None:
    assert report.judge(run(tmp_path, Outcome.LOST, EXECUTING)) == (Verdict.DEAD, "no word before the deadline")


def test_exit_statuses_are_those_of_khoctl() -> None:
    assert {verdict: verdict.exit_status for verdict in Verdict} == {
        Verdict.WORKS: 0, Verdict.BLOCKED: 3, Verdict.UNDONE: 6, Verdict.DAMAGED: 6, Verdict.LOST: 6,
        Verdict.UNREACHABLE: 6, Verdict.DEAD: 6, Verdict.UNKNOWN: 7,
    }  # fmt: skip
    assert len({verdict.sentence for verdict in Verdict}) == len(Verdict)


def test_stand_ins_and_ledger_as_far_as_the_run_came(tmp_path: Path) -> None:
    registered = ("registered", {"sizes": {"vm": 4096}})
    checks = [
        {"name": "format:kho", "verdict": "blocker", "evidence": "e", "remedy": "r", "overridable": True, "overridden": False},
        {"name": "device", "verdict": "ok", "evidence": "e", "remedy": "", "overridable": False, "overridden": False},
    ]
    early = run(tmp_path, Outcome.LOST, registered, ("preflight", {"target": "7.2.12", "checks": checks}))
    assert report.parts(early) == [Part(name="vm", size=4096, state="", whole=None)]
    assert [check.name for check in report.checks(early)] == ["format:kho"]
    assert report.update(early) is None
    blocked = run(tmp_path, Outcome.PASSED, ("preflight", {"target": "", "checks": checks}), ("blocked", {"said": "long"}))
    assert report.judge(blocked) == (Verdict.BLOCKED, "format:kho")
    whole = run(tmp_path, Outcome.PASSED, registered, EXECUTING, landed())
    assert report.parts(whole) == [Part(name="vm", size=4096, state="claimed", whole=True)]
    update = report.update(whole)
    assert update is not None
    assert [(span.phase, span.seconds) for span in update.spans] == [("blackout", 2.5)]


def test_programs_are_told_the_same(tmp_path: Path) -> None:
    part = Part(name="vm", size=4096, state="claimed", whole=True)
    made = report.Report(verdict=Verdict.WORKS, reason="", running="a", target="b", landed="b", seconds=1.0, parts=[part])
    told = msgspec.json.decode(msgspec.json.encode(made))
    assert (told["verdict"], told["running"], told["landed"]) == ("works", "a", "b")
    assert told["parts"] == [{"name": "vm", "size": 4096, "state": "claimed", "whole": True}]
    assert msgspec.convert(told, report.Report).verdict is Verdict.WORKS
