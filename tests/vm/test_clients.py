# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that share no code with khod, on a host with an init, across a real kexec."""

from __future__ import annotations

import pytest

from tests.vm.host import HERE, KERNEL, Host

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

CALLS = "/usr/local/bin/varlinkctl-calls"


def test_varlinkctl_alone_does_all_that_a_client_can(boot: type[Host]) -> None:
    with boot() as host:
        host.write(CALLS, (HERE / "varlinkctl-calls").read_text(), mode="0755")
        host.jump("env", "REAL=yes", CALLS, "before", KERNEL, seconds=150)
        host.booted()
        assert host.run("env", "REAL=yes", CALLS, "after", seconds=100).out.endswith("all done\n")
