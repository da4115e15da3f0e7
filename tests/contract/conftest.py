# SPDX-License-Identifier: LGPL-2.1-or-later
"""The two machines that the suite holds to one behaviour. `kernel` needs root, /dev/liveupdate, and KHOD_BZIMAGE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.core.ports import Machine
from khod.simulated import create, machine
from khod.simulated.kernel import Kernel
from tests.contract.rig import KernelRig, Rig, SimulatedRig

DEVICE = Path("/dev/liveupdate")
MEMORY = 256 << 20
needs_kernel = pytest.mark.skipif(not DEVICE.exists(), reason="no /dev/liveupdate: runs inside the lab's machine")


@pytest.fixture(params=["simulated", pytest.param("kernel", marks=needs_kernel)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """The rig of each machine in turn."""
    if request.param == "simulated":
        kernel = Kernel.boot(create(tmp_path / "machine", memory=MEMORY))
        process, other = kernel.spawn("khod"), kernel.spawn("other")
        yield SimulatedRig(machine(process), process, other, tmp_path)
        kernel.power_off()
    else:
        from khod.kernel.machine import machine as running

        before = {path.name for path in Path("/proc/self/fd").iterdir()}
        kernel_rig = KernelRig(running(tmp_path), os.environ["KHOD_BZIMAGE"])
        yield kernel_rig
        kernel_rig.machine.liveupdate.close()  # type: ignore[attr-defined]  # its helpers' sockets are not ours to close
        # A session that a failed test left open would make the next one fail for a reason that is not its own.
        for name in {path.name for path in Path("/proc/self/fd").iterdir()} - before:
            try:
                os.close(int(name))
            except OSError:
                continue


@pytest.fixture
def host(rig: Rig) -> Machine:
    """The ports of the rig's machine."""
    return rig.machine
