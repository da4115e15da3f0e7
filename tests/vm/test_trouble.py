# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host on which something is wrong: khod says what, and what can be done; and who runs goes on."""

from __future__ import annotations

import pytest

from tests.vm.host import KERNEL, Host
from tests.vm.jumps import GUEST, SIZE

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]

STATE = "/var/lib/khod"
SLICE = """
[Slice]
MemoryMax=96M
"""


def refused(host: Host) -> str:
    """What khoctl says of an update that does not happen; nothing may have been begun but its journal."""
    ran = host.run("khoctl", "update", status=None)
    assert ran.status in (3, 6), ran
    assert "preserve" not in ran.out
    return ran.out + ran.err


@pytest.mark.full
def test_trouble_before_an_update_is_told_and_refuses_it(boot: type[Host]) -> None:
    with boot() as host:
        second = host.run("khod", status=3).err
        assert f"another khod uses {STATE}" in second
        host.run("khoctl", "load", KERNEL)

        host.run("systemctl", "stop", "khod.socket", "khod.service")
        squatter = ("systemd-socket-activate", "--accept", "-l", "/run/khod/khod.sock", "cat")
        host.run("systemd-run", "--quiet", "--unit=squatter", *squatter)
        host.run("sh", "-c", "until test -S /run/khod/khod.sock; do :; done")
        squatted = host.run("khod", status=None)
        assert squatted.status
        assert "/run/khod/khod.sock" in squatted.err
        host.run("systemctl", "stop", "squatter.service")
        host.run("rm", "-f", "/run/khod/khod.sock")

        host.run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", STATE)
        host.run("systemctl", "start", "khod.socket", "khod.service")
        host.run("khoctl", "load", KERNEL)
        host.run("sh", "-c", f"dd if=/dev/zero of={STATE}/filler bs=4k 2>/dev/null || true")
        assert f"append to {STATE}/journal: No space left on device" in refused(host)
        host.run("systemctl", "stop", "khod.service")
        host.run("umount", STATE)

        host.run("mount", "--bind", STATE, STATE)
        host.run("mount", "-o", "remount,bind,ro", STATE)
        host.run("systemctl", "start", "khod.service")
        assert f"the state directory {STATE} cannot be written to" in host.run("khoctl", "status").out
        host.run("khoctl", "load", KERNEL)
        assert STATE in refused(host)
        host.run("systemctl", "stop", "khod.service")
        host.run("umount", STATE)
        host.run("systemctl", "start", "khod.service")
        assert STATE not in host.run("khoctl", "status").out


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


@pytest.mark.full
@pytest.mark.timeout(900)
def test_khod_starts_with_ten_thousand_descriptors_in_the_inits_store(boot: type[Host]) -> None:
    with boot(deadline=800) as host:
        host.programs("many")
        host.program("many", "40", "250", seconds=600)
        stored = host.run("systemctl", "show", "-P", "NFileDescriptorStore", "khod-custodian.service").out
        assert int(stored) > 10_000
        host.run("systemctl", "kill", "--signal=KILL", "khod.service", "khod-custodian.service")
        host.run("systemctl", "start", "khod.service", seconds=120)
        assert "instances    40" in host.run("khoctl", "status").out
        host.run("khoctl", "unregister", "i7")
