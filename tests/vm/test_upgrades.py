# SPDX-License-Identifier: LGPL-2.1-or-later
"""Between kernels: of two versions that write the same formats, and of two that do not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from khod.rehearsal.qemu import Outcome
from tests.vm import patched
from tests.vm.conftest import Play

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


@pytest.mark.parametrize("path", [("7.2", "7.3"), ("7.3", "7.2", "7.3")], ids=" to ".join)
def test_memory_comes_through_an_update_to_another_version(
    vm: Play, kernel: Callable[[str], Path], path: tuple[str, ...]
) -> None:
    first, *others = map(kernel, path)
    jumps = {"path": [str(image) for image in others]}
    result = vm("upgrade", kernel=first, parameters=jumps, stage_deadline=120, deadline=400).require()
    releases = [(kernel(version).parent / "release").read_text().strip() for version in path]
    for stage, (was, becomes) in enumerate(pairwise(releases)):
        verdicts = result.facts(f"preflight {stage}")["verdicts"]
        assert {verdicts[f"format:{name}"][0] for name in ("kho", "luo", "memfd")} == {"ok"}, verdicts
        landed = result.facts(f"landed {stage + 1}")
        assert landed["release"] == becomes
        assert landed["state"] == "restored"
        assert not landed["problems"]
        assert all(landed["whole"].values()), landed
        assert landed["same_frames"]
        assert landed["report"] == ["restored", was, becomes]
        assert f"{was} -> {becomes}" in landed["history"]


def test_a_target_of_another_kho_format_loses_everything(vm: Play) -> None:
    result = vm("incompatible", parameters=target("kho", "kho-v4"), memory="2G", stage_deadline=120, deadline=300).require()
    evidence, overridable = result.facts("blocked")["blockers"]["format:kho"]
    assert "kho-v4 is written, kho-v9 is read" in evidence
    assert overridable
    landed = result.facts("landed")
    assert (landed["state"], landed["outcome"]) == ("lost", "lost")
    assert landed["claim"][0] == "cold"
    assert "format:kho" in landed["overridden"][0]
    assert landed["memory"]["MemAvailable"] > result.facts("before")["memory"]["MemAvailable"] + (96 << 20), "given to others"


def test_a_target_of_another_memfd_format_keeps_the_memory_out_of_reach(vm: Play) -> None:
    result = vm("incompatible", parameters=target("memfd", "memfd-v2"), stage_deadline=120, deadline=300).require()
    evidence, overridable = result.facts("blocked")["blockers"]["format:memfd"]
    assert "memfd-v2 is written, memfd-v9 is read" in evidence
    assert overridable
    landed = result.facts("landed")
    assert (landed["state"], landed["outcome"]) == ("unreachable", "unreachable")
    assert landed["claim"][0] == "hold"
    assert any("cold boot" in problem for problem in landed["problems"]), landed
    assert landed["memory"]["MemTotal"] < result.facts("before")["memory"]["MemTotal"] - (96 << 20), "still reserved"


@pytest.mark.full
def test_a_target_of_another_luo_format_panics_and_cannot_be_insisted_on(vm: Play) -> None:
    result = vm("incompatible", parameters=target("luo", "luo-v5"), stage_deadline=120, deadline=300)
    try:
        evidence, overridable = result.facts("blocked")["blockers"]["format:luo"]
        assert "luo-v5 is written, luo-v9 is read" in evidence
        assert not overridable
        assert "format:luo" in result.facts("not overridden")["said"]
        assert result.outcome is Outcome.LOST
        console = (result.directory / "serial.log").read_text(errors="replace")
        assert "luo: LUO state is incompatible with 'luo-v9'" in console
        assert "Kernel panic" in console
    finally:
        result.discard()


def target(name: str, was: str) -> dict[str, str]:
    """Parameters of the scenario: the lab's kernel, with version 9 of a format in the place of `was`."""
    return {"format": name, "target": str(patched.image(was, f"{name}-v9"))}
