# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl rehearse, as far as it goes without a machine: what it refuses, by status and words, and how a report looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from khod.cli import show_rehearsal
from khod.core.views import CheckView, SpanView
from khod.rehearsal import machine
from khod.rehearsal.report import Part, Report, Verdict
from tests import images
from tests.integration.api.served import Served
from tests.integration.api.test_khoctl import khoctl

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root alone gets beyond the first refusal")
needs_qemu = pytest.mark.skipif(bool(machine.absent()), reason=f"not installed: {', '.join(machine.absent())}")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(images.bzimage(images.vmlinux(config=None)))
    return path


def test_what_makes_no_sense_is_said_before_anything_is_looked_at(khod: Served) -> None:
    ran = khoctl(khod, "rehearse", "--memory", "lots")
    assert (ran.status, "'lots' is not a size" in ran.err) == (2, True)
    ran = khoctl(khod, "rehearse")
    assert (ran.status, "khoctl load KERNEL" in ran.err) == (2, True)


@needs_root
@needs_qemu
def test_refusals_have_a_reason_and_start_nothing(khod: Served, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "run", None)  # whoever started one would stumble
    ran = khoctl(khod, "rehearse", "--kernel", str(image), "--json")
    assert ran.status == 3
    assert "no image of the running kernel" in ran.json["error"]["message"]
    assert "--running" in ran.json["error"]["hint"]
    ran = khoctl(khod, "rehearse", "--kernel", str(image), "--running", f"{image}.gone")
    assert (ran.status, "cannot read the kernel" in ran.err) == (2, True)
    ran = khoctl(khod, "rehearse", "--kernel", str(image), "--memory", "100T")
    assert (ran.status, "not enough memory" in ran.err) == (3, True)
    config = image.with_name("khod.yaml")
    config.write_text("reserved: 1\n")
    ran = khoctl(khod, "rehearse", "--kernel", str(image), "--running", str(image), "--config", str(config))
    assert (ran.status, "did you mean reserve" in ran.err) == (2, True)


@needs_qemu
def test_not_for_everybody(khod: Served, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ran = khoctl(khod, "rehearse", "--kernel", str(image))
    assert (ran.status, "only root" in ran.err) == (3, True)


def test_a_report_names_both_kernels_and_what_was_not_as_it_will_be(capsys: pytest.CaptureFixture[str]) -> None:
    show_rehearsal.rehearsal(
        Report(
            verdict=Verdict.DAMAGED,
            reason="not whole: vm-2",
            running="7.2.12",
            target="7.3.4",
            landed="7.3.4",
            seconds=61.5,
            parts=[
                Part(name="vm-1", size=1 << 30, state="claimed", whole=True),
                Part(name="vm-2", size=4096, state="hold", whole=None),
            ],
            left_out={"user:root/gpu": "there is no stand-in"},
            differs=["memory is smaller by a factor of 16"],
            checks=[CheckView(name="scratch", verdict="warning", evidence="little", remedy="more", overridable=True)],
            ledger=[SpanView(phase="blackout", instance="", seconds=2.5, uncertainty=0.01)],
            problems=["a frame moved"],
            logs="/tmp/khod-vm-x",
        )
    )  # fmt: skip
    said = capsys.readouterr().out
    for words in (
        "damaged: the jump was made, and not everything came through it whole\n  not whole: vm-2",
        "kernels  7.2.12 -> 7.3.4", "problem: a frame moved", "logs     /tmp/khod-vm-x",
        "gpu", "factor of 16", "scratch", "2.50 s ±10.0 ms",
    ):  # fmt: skip
        assert words in said, words
    rows = [line.split() for line in said.splitlines() if line.startswith("vm-")]
    assert [row[0] for row in rows] == ["vm-1", "vm-2"]
    assert rows[0][-3:] == ["as", "they", "were"]
    assert rows[1][-2:] == ["not", "seen"]
