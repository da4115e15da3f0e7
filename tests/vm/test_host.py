# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod on a host with an init: Debian sid's systemd, everything started by its units."""

from __future__ import annotations

import pytest

from tests.vm.host import Host
from tests.vm.jumps import jump

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def test_a_host_boots_with_khod_and_its_units_are_right(boot: type[Host]) -> None:
    with boot(cold=True) as host:
        host.booted()
        assert host.run("systemctl", "is-active", "khod.service", "khod-custodian.service").out == "active\nactive\n"
        assert "state        idle" in host.run("khoctl", "status").out
        units = host.run("sh", "-c", "cd /usr/lib/systemd/system && ls | grep ^khod").out.split()
        assert "khod.service" in units
        judged = host.run("systemd-analyze", "verify", "--man=no", *units)
        assert judged.out + judged.err == ""
        assert not host.run("journalctl", "-q", "-b", "-p", "warning", "-u", "khod*").out
        systemd = host.run("systemctl", "--version").out.split()[1]
        assert int(systemd) >= 261, "live updates by the init are there since 261"


@pytest.mark.full  # the measure of khod's, and no code of khod's
def test_systemds_own_store_carries_memory_through_a_jump(boot: type[Host]) -> None:
    with boot() as host:
        assert 2 < jump(host, "systemd alone").whole < 100


@pytest.mark.parametrize("way", ["direct", "systemd"])
def test_a_clients_memory_comes_through(boot: type[Host], way: str) -> None:
    with boot() as host:
        assert 2 < jump(host, f"khod {way}").whole < 100
        host.booted()
        assert "restored" in host.run("khoctl", "history").out
        status = host.run("khoctl", "status").out
        assert "state        idle" in status, status
        assert not host.run("journalctl", "-q", "-b", "-p", "warning", "-u", "khod*").out
        # The init found the device free, before us and after us.
        assert "liveupdate" not in host.run("journalctl", "-q", "-b", "-p", "warning", "_PID=1").out
