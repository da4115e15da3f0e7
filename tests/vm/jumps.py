# SPDX-License-Identifier: LGPL-2.1-or-later
"""One jump of the lab's host with a service's memory: by systemd alone, or by khod in either of its ways.

The same for the tests, which look at whether it came through, and for `bench.jumps`, which looks at how long it took.
"""

from __future__ import annotations

from dataclasses import dataclass

from khod.rehearsal.tsc import host_tsc_khz
from tests.vm.host import KERNEL, PROGRAMS, Host

SIZE = 256 << 20
WAYS = ("systemd alone", "khod systemd", "khod direct")

KEEPER = f"""
[Unit]
DefaultDependencies=no
After=khod-lab.socket
Before=shutdown.target
Conflicts=shutdown.target
[Service]
Type=notify
WorkingDirectory={PROGRAMS}
ExecStart=/usr/bin/python3 -m tests.vm.programs.keeper {SIZE}
FileDescriptorStoreMax=8
FileDescriptorStorePreserve=yes
[Install]
WantedBy=sysinit.target
"""
GUEST = f"""
[Unit]
DefaultDependencies=no
Requires=khod-restored.target
After=khod-restored.target khod-lab.socket
Before=shutdown.target
Conflicts=shutdown.target
[Service]
Type=notify
WorkingDirectory={PROGRAMS}
ExecStart=/usr/bin/python3 -m tests.vm.programs.guest guest {SIZE}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Blackout:
    """One jump, in seconds."""

    boot: float
    """From the last write to the memory until the service's program begins in the new kernel."""
    held: float
    """From there until it has its memory, and has read from it."""

    @property
    def whole(self) -> float:
        return self.boot + self.held


def jump(host: Host, way: str) -> Blackout:
    """Carry the memory through one jump. Raises AssertionError unless each of its bytes came through."""
    if way == "systemd alone":
        host.programs("keeper", "load")
        host.unit("keeper.service", KEEPER)
        host.program("load", KERNEL)
        host.jump("systemctl", "kexec")
    else:
        host.programs("guest")
        host.unit("guest.service", GUEST)
        host.run("khoctl", "load", KERNEL)
        host.jump("khoctl", "update", "--jump", way.removeprefix("khod "))
    told = host.record("held").facts
    assert told["equal"], told
    last, began, held = (told[name] / host_tsc_khz() / 1000 for name in ("last", "began", "held"))
    return Blackout(began - last, held - began)
