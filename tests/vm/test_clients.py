# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that share no code with khod, on a host with an init, across a real kexec."""

from __future__ import annotations

import pytest

from tests.vm.host import HERE, KERNEL, PROGRAMS, Host

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

CALLS = "/usr/local/bin/varlinkctl-calls"


def test_varlinkctl_alone_does_all_that_a_client_can(boot: type[Host]) -> None:
    with boot() as host:
        host.write(CALLS, (HERE / "varlinkctl-calls").read_text(), mode="0755")
        host.jump("env", "REAL=yes", CALLS, "before", KERNEL, seconds=150)
        host.booted()
        assert host.run("env", "REAL=yes", CALLS, "after", seconds=100).out.endswith("all done\n")


def test_a_plain_socket_is_a_client_of_luo_agents_protocol(boot: type[Host]) -> None:
    with boot() as host:
        host.write("/etc/khod/khod.yaml", host.run("cat", "/etc/khod/khod.yaml").out + "luo_agent: {enabled: true}\n")
        host.run("systemctl", "restart", "khod.service")
        host.programs("luo_client")
        client = ("python3", "-m", "tests.vm.programs.luo_client")
        host.run("systemd-run", "--quiet", "--unit=client", f"--working-directory={PROGRAMS}", *client, "before", "vm-1")
        host.record("subscribed")
        host.run("khoctl", "load", KERNEL)
        # One that is undone, and one that goes through.
        host.run("khoctl", "update", "--hold-at", "frozen")
        host.run("khoctl", "abort")
        assert host.record("heard").facts["event"] == "ABORT_PRESERVATION"
        host.jump("khoctl", "update")
        host.booted()
        host.program("luo_client", "after", "vm-1")
        assert host.record("claimed").facts == {"said": {"event": "CLAIMED", "id": "vm-1"}, "intact": True}
