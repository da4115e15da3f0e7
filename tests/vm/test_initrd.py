# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restoring in the initrd, before the root file system and the init; and what becomes of it when something is wrong there."""

from __future__ import annotations

import json

import pytest

from khod.rehearsal.tsc import host_tsc_khz
from tests.vm import early
from tests.vm.conftest import IOMMU
from tests.vm.host import KERNEL, PROGRAMS, Host
from tests.vm.jumps import SIZE
from tests.vm.kernel import kernel_directory
from tests.vm.programs.sabotage import DRIVERS, POINTS

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


def test_a_guest_runs_before_the_init_through_two_updates(boot: type[Host]) -> None:
    with boot() as host:
        early.configured(host)
        early.guest(host, "guest", enabled=False)
        early.guest(host, "other", enabled=True)
        for _ in range(2):
            early.update(host)
            runs = host.record("runs").facts
            assert runs["equal"], runs
            assert runs["names"] == "ram"
            assert host.record("held").facts["equal"], "what was not started early is claimed as always"
            host.booted()
            blackout = (runs["held"] - runs["last"]) / host_tsc_khz() / 1000
            assert 0.5 < blackout < 30
            held = host.run("khoctl", "claim", "guest", "--", "true", status=8)
            assert f"process {runs['pid']}" in held.err
            status = host.run("khoctl", "status").out
            assert "state        restored" in status, status
            store = host.run("systemd-analyze", "fdstore", "khod-custodian.service").out
            assert "khod-early" in store, "PID 1 has what the stage had"
            # The stage's custodian has ended, both of it: what is left of it would be by this name.
            names = host.run("sh", "-c", "cat /proc/[0-9]*/comm").out.split()
            assert "khod-early" not in names
            assert names.count("vmm") == 1
            (last,) = json.loads(host.run("khoctl", "history", "--json").out)[:1]
            rows = {row["phase"]: row["seconds"] for row in last["spans"]}
            stages = [f"initrd: {name}" for name in ("interpreter", "retrieved", "verified", "resumed")]
            assert {"initrd: kernel", "blackout", *stages} <= set(rows)
            assert sum(rows[name] for name in stages) < blackout
            assert "guest runs" in host.run("sh", "-c", "dmesg | grep khod-initrd").out
        claimed_by_its_unit(host, runs["pid"])


@pytest.mark.parametrize("updates", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_guest_with_a_device_runs_before_the_init(boot: type[Host], updates: int) -> None:
    with boot(cmdline=("intel_iommu=on",), qemu=IOMMU) as host:
        early.configured(host, also=("mappings", "edu"))
        early.device_guest(host, enabled=False)
        for _ in range(updates):
            early.update(host)
            runs = host.record("runs").facts
            assert runs["equal"], runs
            assert runs["dma"], "the device reads and writes by the IOVAs of the old kernel, before there is an init"
            assert runs["names"] == "ram:mappings/table:mappings/iommufd:edu/device"
            host.booted()
            instances = json.loads(host.run("khoctl", "instances", "--json").out)
            assert {(one["name"], one["state"], one["problem"]) for one in instances} == {
                (name, "claimed", "") for name in ("guest", "mappings", "edu")
            }
            held = host.run("khoctl", "claim", "edu", "--", "true", status=8)
            assert f"process {runs['pid']}" in held.err
            (last,) = json.loads(host.run("khoctl", "history", "--json").out)[:1]
            rows = {row["phase"]: row["seconds"] for row in last["spans"]}
            assert {f"initrd: {name}" for name in ("interpreter", "drivers", "verified", "resumed")} <= set(rows)
            blackout = (runs["held"] - runs["last"]) / host_tsc_khz() / 1000
            print(f"blackout {blackout:.2f} s; khod says", rows)
            # By the real-time clock, which a kernel reads to the second: the unit keeps khod from the counter's instruction.
            # (Of a machine that went on from a snapshot the next kernel's has gone on meanwhile.)
            assert abs(rows["blackout"] - blackout) < 2
            assert not last["problems"]
            assert "guest runs, with mappings, edu" in host.run("sh", "-c", "dmesg | grep khod-initrd").out


VMM_UNIT = f"""
[Unit]
Requires=khod-restored.target
After=khod-restored.target
[Service]
Type=notify
ExecStart=khoctl claim guest -- {early.VMM} 0
"""


def claimed_by_its_unit(host: Host, pid: int) -> None:
    """The process that the initrd started becomes its unit's, and ends with it."""
    host.unit("vmm.service", VMM_UNIT)
    assert host.run("systemctl", "show", "-P", "MainPID", "vmm.service").out == f"{pid}\n"
    assert host.run("cat", f"/proc/{pid}/cgroup").out == "0::/system.slice/vmm.service\n"
    assert host.run("systemctl", "is-active", "vmm.service").out == "active\n"
    host.run("systemctl", "stop", "vmm.service")
    host.run("test", "!", "-e", f"/proc/{pid}")


SCRIBBLE = """
for fd in /proc/$(systemctl show -P MainPID khod.service)/fd/*; do
    case $(readlink $fd) in *khod-tree*) printf scribbled | dd of=$fd bs=1 seek=300 conv=notrunc status=none ;; esac
done
"""
LOOK = f"from tests.vm.content import filled; print(filled(3, {SIZE}))"


@pytest.mark.full
def test_a_tree_that_was_damaged_on_the_way_starts_nobody_and_memory_is_there(boot: type[Host]) -> None:
    """It is found in the initrd, and again by khod, which restores nothing by itself then (decision 23)."""
    with boot() as host:
        early.configured(host)
        early.guest(host, "guest", enabled=False)
        host.run("khoctl", "load", KERNEL)
        host.run("khoctl", "update", "--hold-at", "frozen")
        host.run("sh", "-ec", SCRIBBLE)
        host.jump("khoctl", "continue")
        host.booted()
        assert "restoring is left to khod: its digest is another" in host.run("sh", "-c", "dmesg | grep khod-initrd").out
        assert "vmm" not in host.run("sh", "-c", "cat /proc/[0-9]*/comm").out.split()
        assert "state        failed" in host.run("khoctl", "status").out
        host.run("khoctl", "claim", "guest", "--", "true", status=8)
        command = ("python3", "-c", LOOK)
        seen = host.run("env", "-C", PROGRAMS, "khoctl", "claim", "guest", "--unverified", "--", *command).out
        assert seen == "True\n", "every byte"


@pytest.mark.full
def test_systemds_own_jump_leads_there_as_well(boot: type[Host]) -> None:
    """PID 1 had all sessions in its store when it jumped: the stage retrieves khod's before it asks for them."""
    with boot() as host:
        early.configured(host)
        early.guest(host, "guest", enabled=False)
        early.guest(host, "other", enabled=True)
        early.update(host, jump="systemd")
        runs = host.record("runs").facts
        assert runs["equal"], runs
        assert host.record("held").facts["equal"]
        host.booted()
        held = host.run("khoctl", "claim", "guest", "--", "true", status=8)
        assert f"process {runs['pid']}" in held.err
        assert "state        restored" in host.run("khoctl", "status").out
        assert "khod-early" in host.run("systemd-analyze", "fdstore", "khod-custodian.service").out


@pytest.mark.full  # an initrd with an init of its own: a minute
def test_the_guest_and_custody_come_through_systemds_own_initrd(boot: type[Host]) -> None:
    with boot(deadline=600) as host:
        early.configured(host)
        host.programs("systemd_initrd")
        early.guest(host, "guest", enabled=False)
        early.guest(host, "other", enabled=True)
        host.program("systemd_initrd", "/root/own")
        early.update(host, "/root/own")
        runs = host.record("runs").facts
        assert runs["equal"], runs
        assert host.record("held").facts["equal"]
        host.booted()
        seen = host.run("sh", "-c", "dmesg | grep -e 'Switching root' -e khod-initrd").out
        assert "Switching root" in seen
        assert "guest runs" in seen
        assert host.run("cat", f"/proc/{runs['pid']}/comm").out == "vmm\n", "it was spared"
        assert host.run("cat", f"/proc/{runs['pid']}/cgroup").out == "0::/khod-early\n"
        # From the stage's file system, which was not cleared away.
        assert host.run("readlink", f"/proc/{runs['pid']}/exe").out.strip().endswith(early.VMM)
        held = host.run("khoctl", "claim", "guest", "--", "true", status=8)
        assert f"process {runs['pid']}" in held.err
        assert "khod-early" in host.run("systemd-analyze", "fdstore", "khod-custodian.service").out
        claimed_by_its_unit(host, runs["pid"])


@pytest.mark.full  # a cold boot, and a kernel that is built by hand: python3 tests/vm/kernel.py 7.2
def test_from_an_earlier_kernel(boot: type[Host]) -> None:
    if not (kernel_directory("7.2") / "bzImage").exists():
        pytest.skip("Linux 7.2 is not built: python3 tests/vm/kernel.py 7.2")
    with boot(kernel="7.2") as host:
        assert host.run("uname", "-r").out.startswith("7.2")
        early.configured(host)
        early.guest(host, "guest", enabled=False)
        early.update(host)
        assert host.record("runs").facts["equal"]
        host.booted()
        assert host.run("uname", "-r").out.startswith("7.3")
        assert "state        restored" in host.run("khoctl", "status").out


def sabotaged(host: Host, what: str) -> None:
    host.program("sabotage", what, "/root/initrd")
    early.update(host, "/root/initrd")


def shortened(host: Host, what: str) -> None:
    """khod refuses such an initrd. Where it is told not to look, the kernel unpacks what there is, and finds no launcher."""
    host.program("sabotage", what, "/root/initrd")
    refused = host.run("khoctl", "load", KERNEL, "--initrd", "/root/initrd", status=3)
    assert "no initrd whose contents can be seen" in refused.err
    used(host, "none")
    host.run("khoctl", "load", KERNEL, "--initrd", "/root/initrd", "--reuse-cmdline", "--append", "rdinit=/khod/init")
    host.jump("khoctl", "update")
    used(host, "host")


def used(host: Host, what: str) -> None:
    """Set initrd.use, for the next `khoctl load`."""
    host.run("sed", "-i", f"s/^  use: .*/  use: {what}/", "/etc/khod/khod.yaml")
    host.run("systemctl", "restart", "khod.service")


def prepared(host: Host) -> None:
    early.configured(host, "host")
    host.programs("sabotage")
    early.guest(host, "guest", enabled=True)


def test_the_death_of_the_stage_with_memory_in_its_hands_costs_time_alone(boot: type[Host]) -> None:
    with boot() as host:
        prepared(host)
        sabotaged(host, "memory")
        assert host.record("held").facts["equal"]
        host.booted()
        # khod's session and the tree, the record, the guest's session and its memory: all of it was in the twin's hands alone.
        assert "took over 5 descriptors" in host.run("journalctl", "-q", "-b", "-u", "khod-custodian", "-o", "cat").out


@pytest.mark.full  # a boot for each
@pytest.mark.parametrize("points", [list(POINTS)[::2], list(POINTS)[1::2]], ids=["these", "those"])
def test_whatever_is_wrong_in_the_stage_the_guest_is_restored_on_the_root_file_system(
    boot: type[Host], points: list[str]
) -> None:
    with boot(deadline=850) as host:
        prepared(host)
        for what in points:
            (shortened if what == "short" else sabotaged)(host, what)
            if what == "runs":
                assert host.record("runs").facts["equal"], what
                assert "runs already" in host.record("hold").facts["reason"]
            else:
                assert host.record("held").facts["equal"], what
                host.booted()
                status = host.run("khoctl", "status").out
                assert "state        restored" in status or "idle" in status
                if what == "short":
                    used(host, "host")


@pytest.mark.full  # a boot for each
def test_whatever_becomes_of_the_drivers_the_guest_and_its_device_come_through(boot: type[Host]) -> None:
    with boot(deadline=850, cmdline=("intel_iommu=on",), qemu=IOMMU) as host:
        early.configured(host, "host", also=("mappings", "edu"))
        host.programs("sabotage")
        early.device_guest(host, enabled=True)
        for what in DRIVERS:
            sabotaged(host, what)
            if what == "driven-runs":
                runs = host.record("runs").facts
                assert runs["equal"], what
                assert runs["dma"], what
                assert "runs already" in host.record("hold").facts["reason"]
            else:
                held = host.record("held").facts
                assert (held["equal"], held["master"]) == (True, True), what
                host.booted()
                status = host.run("khoctl", "status").out
                assert "state        restored" in status or "idle" in status
