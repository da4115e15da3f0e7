# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod on a host with an init: Debian sid's systemd, everything started by its units."""

from __future__ import annotations

import pytest

from tests.vm.host import KERNEL, PROGRAMS, Host
from tests.vm.tsc import host_tsc_khz

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

KEEPER = f"""
[Unit]
DefaultDependencies=no
After=khod-lab.socket
Before=shutdown.target
Conflicts=shutdown.target
[Service]
Type=notify
WorkingDirectory={PROGRAMS}
ExecStart=/usr/bin/python3 -m tests.vm.programs.keeper {{size}}
FileDescriptorStoreMax=8
FileDescriptorStorePreserve=yes
[Install]
WantedBy=sysinit.target
"""


def test_a_host_boots_with_khod_and_its_units_are_right(boot: type[Host]) -> None:
    with boot(cold=True) as host:
        host.booted()
        assert host.run("systemctl", "is-active", "khod.service").out == "active\n"
        assert "state        idle" in host.run("khoctl", "status").out
        units = host.run("sh", "-c", "cd /usr/lib/systemd/system && ls | grep ^khod").out.split()
        assert "khod.service" in units
        judged = host.run("systemd-analyze", "verify", "--man=no", *units)
        assert judged.out + judged.err == ""
        assert not host.run("journalctl", "-q", "-b", "-p", "warning", "-u", "khod*").out
        systemd = host.run("systemctl", "--version").out.split()[1]
        assert int(systemd) >= 261, "live updates by the init are there since 261"


def test_systemds_own_store_carries_memory_through_a_jump(boot: type[Host]) -> None:
    with boot() as host:
        host.programs("keeper", "load")
        host.unit("keeper.service", KEEPER.format(size=256 << 20))
        host.program("load", KERNEL)
        host.jump("systemctl", "kexec")
        held = host.record("held").facts
        host.booted()
    assert held["equal"]
    blackout = (held["held"] - held["last"]) / host_tsc_khz() / 1000
    assert 2 < blackout < 100
