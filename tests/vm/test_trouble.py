# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host on which something is wrong: khod says what, and what can be done; and who runs goes on."""

from __future__ import annotations

import pytest

from tests.vm.host import KERNEL, Host
from tests.vm.jumps import GUEST, SIZE

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

SLICE = """
[Slice]
MemoryMax=96M
"""


def test_a_cold_boot_after_the_jump_is_told_as_lost(boot: type[Host]) -> None:
    with boot() as host:
        host.programs("guest")
        host.unit("guest.service", GUEST.replace(str(SIZE), str(1 << 20)))
        # The next kernel's khod is kept from its work until the machine has lost its power.
        host.write("/etc/systemd/system/khod.service.d/wait.conf", "[Unit]\nConditionPathExists=!/var/wait\n")
        host.run("systemctl", "daemon-reload")
        host.run("sh", "-c", ">/var/wait")
        host.run("khoctl", "load", KERNEL)
        host.jump("khoctl", "update")
        host.pull_the_plug()
        assert host.stage == 0
        host.run("rm", "/var/wait")
        host.run("systemctl", "start", "khod.service")
        assert "state        lost" in host.run("khoctl", "status").out
        assert "lost" in host.run("khoctl", "history").out
        # Whoever waited starts from disk.
        host.run("systemctl", "start", "guest.service")
        host.run("khoctl", "claim", "nobody", "--", "true", status=9)
        assert not host.records


def test_a_limit_below_a_guests_memory_is_told_and_loses_nothing(boot: type[Host]) -> None:
    with boot() as host:
        host.programs("guest")
        host.unit("guest.service", GUEST)
        host.unit("small.slice", SLICE, start=False)
        for name in ("khod", "khod-custodian"):
            host.write(f"/etc/systemd/system/{name}.service.d/slice.conf", "[Service]\nSlice=small.slice\n")
        host.run("khoctl", "load", KERNEL)
        host.jump("khoctl", "update")
        status = host.run("khoctl", "status").out
        assert "memory" in status, status
        assert "small.slice" in host.run("khoctl", "instances").out + status
        host.run("systemctl", "set-property", "--runtime", "small.slice", "MemoryMax=infinity")
        host.run("systemctl", "restart", "khod.service")
        host.run("systemctl", "start", "guest.service")
        assert host.record("held").facts["equal"]
