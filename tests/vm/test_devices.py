# SPDX-License-Identifier: LGPL-2.1-or-later
"""A KVM guest, its IOMMU mappings and a device that does DMA, across real kexecs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vm.conftest import IOMMU, Play
from tests.vm.host import KERNEL, PROGRAMS, Host
from tests.vm.runner import Result

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def stages(result: Result, name: str) -> list[dict[str, Any]]:
    return [record.facts for record in result.records if record.name == name]


def check(result: Result, continuity: dict[str, str], jumps: int) -> None:
    """The guest lived in all kernels, and counted on from where it had stopped; it was away for as long as khod says."""
    lives, instances = stages(result, "lives"), stages(result, "instances")
    assert [one["started"]["started"] for one in lives] == ["cold", *["warm"] * jumps]
    assert instances == [{name: ["restored", how, ""] for name, how in continuity.items()}] * jumps
    for came in stages(result, "came"):
        assert all(now >= then for now, then in zip(came["now"], came["then"], strict=True)), came
    for one in lives:
        for vcpu in one["later"]["vcpus"]:
            assert (vcpu["backwards"], vcpu["broken"]) == (0, 0), vcpu
    for one, ledger in zip(lives[1:], stages(result, "ledger"), strict=True):
        assert ledger["outcome"] == "restored"
        assert not ledger["problems"]
        blackout, uncertainty = ledger["blackouts"]["tinyvmm"]
        assert uncertainty < 0.05
        for vcpu in one["later"]["vcpus"]:
            gap = vcpu["gap"] / one["later"]["khz"] / 1000
            print(f"the guest did not run for {gap:.3f} s, khod's ledger says {blackout:.3f} s")
            assert abs(gap - blackout) < max(0.05, 0.05 * gap), (gap, ledger)
    assert [end["state"] for end in stages(result, "end")] == ["idle"] * jumps


def test_a_guest_and_its_device_go_on_through_two_updates_with_the_same_iovas(vm: Play) -> None:
    """Its client maps nothing anew."""
    result = vm(
        "kvm_guest", cpu="max", cmdline=("intel_iommu=on",), qemu=IOMMU, parameters={"device": True},
        stage_deadline=200, deadline=500,
    ).require()  # fmt: skip
    check(result, {"tinyvmm": "preserved", "tinyvmm-edu": "reset", "tinyvmm-iommu": "rebuilt"}, jumps=2)
    for stage, one in enumerate(stages(result, "lives")):
        assert one["dma"] == {"equal": True}, one
        if stage:
            assert any("0x8000" in line for line in one["faults"]), "a page that was never mapped faults"
            assert one["after"] == {"equal": True}


def test_a_guest_whose_memory_is_a_guest_memfd_goes_on(vm: Play) -> None:
    parameters = {"device": False, "guest_memfd": True}
    result = vm("kvm_carried", cpu="max", parameters=parameters, stage_deadline=150, deadline=300).require()
    check(result, {"tinyvmm": "preserved"}, jumps=1)  # in a memfd by then, which the next update preserves as it is


DEVICE = f"""
[Unit]
Requires=khod-restored.target
After=khod-restored.target
[Service]
Type=notify
LimitMEMLOCK=infinity
WorkingDirectory={PROGRAMS}
ExecStart=/usr/bin/python3 -m tests.vm.programs.device
[Install]
WantedBy=multi-user.target
"""


@pytest.mark.full
def test_khods_unit_lets_it_at_devices(boot: type[Host]) -> None:
    with boot(cmdline=("intel_iommu=on",), qemu=IOMMU) as host:
        host.programs("device")
        host.unit("device.service", DEVICE)
        host.run("khoctl", "load", KERNEL)
        host.jump("khoctl", "update")
        came = host.record("came").facts
        assert (came["mapped"], came["master"]) == ([[0x100_0000, 4 << 20]], True)
        host.booted()
        assert "state        idle" in host.run("khoctl", "status").out
        assert not host.run("journalctl", "-q", "-b", "-p", "warning", "-u", "khod*").out
