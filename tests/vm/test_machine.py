# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab itself: its three outcomes, its state disk, and a live update by khod.kernel's ports."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from khod.rehearsal.qemu import Outcome
from tests.vm.conftest import IOMMU, Play
from tests.vm.gdbstub import FailCall

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


@pytest.mark.full  # khod's own updates go the same way
def test_a_live_update_by_the_ports_alone(vm: Play) -> None:
    result = vm("ports").require()
    jump, landed = result.facts("jump"), result.facts("landed")
    # The guest's TSC is this host's: between the two stamps lies a boot, which the host saw too, by its own clock.
    khz = jump["khz"]
    assert 1_000_000 < khz < 10_000_000
    blackout = (landed["tsc"] - jump["tsc"]) / khz / 1000
    seen = next(t for t, what in result.times if what == "record landed") - next(
        t for t, what in result.times if what == "record jump"
    )
    assert blackout == pytest.approx(seen, abs=1)


@pytest.mark.full  # most of it is in the contract
def test_each_refusal_of_the_kernel_has_its_exception(vm: Play) -> None:
    assert vm("refusals").require().facts("alive")


def test_the_contract_holds_on_the_running_kernel(vm: Play) -> None:
    # Small areas of scratch: one of the tests fills the largest. And a device behind an IOMMU.
    cmdline = ("kho_scratch=16M,16M,32M", "intel_iommu=on")
    result = vm("contract", cmdline=cmdline, qemu=IOMMU, stage_deadline=150).require()
    facts = result.facts("contract")
    assert facts["status"] == 0, "\n\n".join(facts["problems"])
    # None skipped, on the one machine where none may be, and all that was collected for the kernel ran.
    assert facts["outcomes"] == {"passed": result.facts("collected")["tests"]}
    assert facts["outcomes"]["passed"] >= 40


def test_what_the_contract_says_of_a_jump_holds_across_a_real_one(vm: Play) -> None:
    pairs = vm("pairs").require().facts("pairs")
    assert not [f"{name}: {problem}" for name, problem in pairs["outcome"].items() if problem]
    assert [*pairs["outcome"]] == pairs["all"]


def test_the_state_disk_outlives_the_jump(vm: Play) -> None:
    result = vm("disk").require()
    assert result.facts("disk") == {"synced": "on the disk", "in_run": False, "stage": 1}


def test_a_scenario_that_raises_has_failed_and_its_logs_are_kept(vm: Play) -> None:
    result = vm("fails")
    try:
        assert result.outcome is Outcome.FAILED
        assert "this scenario fails" in result.reason
        with pytest.raises(AssertionError, match=str(result.directory)):
            result.require()
        assert "Linux version" in (result.directory / "shared/dmesg-0.log").read_text()
        assert (result.directory / "serial.log").exists()
    finally:
        result.discard()


@pytest.mark.full
def test_a_machine_that_dies_is_lost_and_not_failed(vm: Play) -> None:
    result = vm("panics")
    try:
        assert result.outcome is Outcome.LOST
        assert "QEMU ended" in result.reason
        assert "Attempted to kill init" in (result.directory / "serial.log").read_text()
    finally:
        result.discard()


def test_a_machine_that_falls_silent_is_lost_at_its_deadline(vm: Play) -> None:
    began = time.monotonic()
    result = vm("hangs", stage_deadline=1)
    try:
        assert result.outcome is Outcome.LOST
        assert "deadline of stage 0" in result.reason
        assert time.monotonic() - began < 60
    finally:
        result.discard()


@pytest.mark.full  # test_khod has the same through khod
def test_a_freeze_that_fails_in_the_middle_is_undone_and_the_next_jump_succeeds(vm: Play, tmp_path: Path) -> None:
    fail = FailCall("memfd_luo_freeze", nth=2, errno=5)
    with fail:
        result = vm("freeze_fails", qemu=fail.qemu, answers={"arm": fail.arm})
    result.require()
    assert fail.hits == 2
    assert result.facts("came back") == {"error": "KexecFailed", "errno": 5}
    assert result.facts("second") == {"stage": 1, "same": True}
