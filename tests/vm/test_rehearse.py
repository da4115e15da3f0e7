# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl rehearse: the verdict about an update that works, and about ones that do not."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from khod.core.views import InstanceView
from khod.rehearsal.rehearse import Plan, rehearse
from khod.rehearsal.report import Report, Verdict
from tests.vm import patched, runner
from tests.vm.conftest import Play

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]
MIB = 1 << 20


def view(name: str, said: str, **more: Any) -> InstanceView:
    """An instance as the host's khod would tell of it."""
    fields: dict[str, Any] = {
        "driver": "guestmemfd", "compatible": "guestmemfd-v2", "owner": "user:root", "required": True, "requires": (),
        "state": "registered", "size": 1 << 40, "fds": ["ram"], "detail": {"ram": said}, **more,
    }  # fmt: skip
    return InstanceView(name=name, **fields)


def played(**plan: Any) -> Report:
    """A rehearsal, when no other machine of the lab runs."""
    runner.compile_checkout()
    with runner.one_machine():
        return rehearse(Plan(**plan))


def test_the_command_of_the_readme_says_that_the_update_works(vm: Play, kernel: Callable[[str], Path]) -> None:
    assert [kernel(version) for version in ("7.2", "7.3")]
    readme = (runner.ROOT / "README.md").read_text()
    (commands,) = re.findall(r"\n((?: {4}[^\n]+\n)+)", readme[readme.index("## Rehearsing") : readme.index("## Installing")])
    # The reader's shell was not started by a make, whose children say on standard output which directory they enter.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    runner.compile_checkout()
    with runner.one_machine():
        done = subprocess.run(
            ["sh", "-e"], input=commands, cwd=runner.ROOT, env=env, capture_output=True, text=True, timeout=800
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "works: the update went through" in done.stdout
    releases = [(kernel(version).parent / "release").read_text().strip() for version in ("7.2", "7.3")]
    assert " -> ".join(releases) in done.stdout
    assert re.search(r"stand-in +64 MiB +claimed +as they were", done.stdout)
    assert re.search(r"^blackout", done.stdout, re.M), "the ledger"
    assert "khod was not asked" in done.stdout


def test_a_target_of_another_format_is_blocked(vm: Play, kernel: Callable[[str], Path]) -> None:
    target = patched.image("luo-v5", "luo-v9")
    report = played(target=target, running=kernel("7.3"), instances=(), cmdline=None)
    assert (report.verdict, report.reason) == (Verdict.BLOCKED, "format:luo")
    (check,) = (check for check in report.checks if check.verdict == "blocker")
    assert "luo-v5 is written, luo-v9 is read" in check.evidence
    assert not report.landed
    assert not report.logs


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "was", "verdict"), [("kho", "kho-v4", Verdict.LOST), ("memfd", "memfd-v2", Verdict.UNREACHABLE)]
)
def test_what_is_passed_over_shows_what_becomes_of_memory(
    vm: Play, kernel: Callable[[str], Path], name: str, was: str, verdict: Verdict
) -> None:
    target = patched.image(was, f"{name}-v9")
    report = played(target=target, running=kernel("7.3"), instances=(), overrides=(f"format:{name}",))
    assert report.verdict is verdict
    assert f"format:{name}" in report.overridden[0]
    assert [part.whole for part in report.parts] == [None]
    assert (Path(report.logs) / "serial.log").exists()
    subprocess.run(["rm", "-r", report.logs], check=True)


@pytest.mark.full
def test_a_target_without_live_update_on_its_command_line_is_blocked_and_one_that_cannot_boot_is_dead(
    vm: Play, kernel: Callable[[str], Path]
) -> None:
    image = kernel("7.3")
    report = played(target=image, running=image, instances=(), cmdline="kho=on")
    assert (report.verdict, report.reason) == (Verdict.BLOCKED, "target-options")
    report = played(target=image, running=image, instances=(), cmdline="kho=on liveupdate=on init=/nowhere mem=128M rdinit=/no")
    assert report.verdict is Verdict.WORKS, "words about memory and init are the machine's own"
    report = played(target=image, running=image, instances=(), cmdline="kho=on liveupdate=on maxcpus=1 acpi=off pci=off")
    assert report.verdict is Verdict.DEAD
    assert "panic" in report.reason
    subprocess.run(["rm", "-r", report.logs], check=True)


@pytest.mark.full
def test_memory_of_every_shape_is_stood_in_for(vm: Play, kernel: Callable[[str], Path]) -> None:
    gib, image = 1 << 30, kernel("7.3")
    report = played(
        target=image,
        running=image,
        instances=[
            view("vm-1", f"memfd, {64 * gib} bytes, {48 * gib} allocated"),
            view("vm-2", f"memfd, {16 * gib} bytes, 0 allocated", required=False, requires=("vm-1",)),
            view("huge", f"hugetlb, {32 * gib} bytes, in pages of 2097152, copied in freeze", strategy="carried"),
            view("gpu", "", driver="vfio"),
        ],
    )
    assert report.verdict is Verdict.WORKS, (report.reason, report.problems)
    assert {part.name: part.whole for part in report.parts} == {"vm-1": True, "vm-2": True, "huge": True}
    sizes = {part.name: part.size for part in report.parts}
    assert sizes["vm-1"] == pytest.approx(4 * sizes["vm-2"], rel=0.01)
    assert sum(sizes.values()) + sizes["huge"] <= 512 * MIB
    assert list(report.left_out) == ["user:root/gpu"]
    assert any("smaller by a factor of" in sentence for sentence in report.differs)
