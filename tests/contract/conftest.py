# SPDX-License-Identifier: LGPL-2.1-or-later
"""The machines that the suite holds to one behaviour: the simulated one everywhere, the running kernel where it can be.

`kernel` needs root, /dev/liveupdate, and KHOD_BZIMAGE. tests/vm runs it in the lab's machine, and sees to it that it ran.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.ports import Machine
from khod.kernel.custody import KernelCustody
from khod.kernel.liveupdate import KernelLiveUpdate
from khod.kernel.machine import machine as kernel_machine
from khod.simulated import create
from khod.simulated.cards import Card, plug
from khod.simulated.kernel import Kernel
from tests.contract.rig import CARD, KernelRig, Rig, SimulatedRig

MACHINES = ["simulated", "kernel"] if Path("/dev/liveupdate").exists() else ["simulated"]
MEMORY = 256 << 20


@pytest.fixture(params=MACHINES)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    """The rig of each machine in turn."""
    if request.param == "simulated":
        yield from simulated(tmp_path)
    else:
        yield from running(tmp_path, request.getfixturevalue("device"))


def simulated(directory: Path) -> Iterator[Rig]:
    """A simulated machine, booted for one test."""
    place = create(directory / "machine", memory=MEMORY)
    plug(place, Card(CARD))
    kernel = Kernel.boot(place)
    yield SimulatedRig(kernel.spawn("khod"), kernel.spawn, directory)
    kernel.power_off()


@pytest.fixture(scope="session")
def device() -> Iterator[KernelLiveUpdate]:
    """/dev/liveupdate, with helpers that all tests share: to start one is dear under emulation."""
    liveupdate = KernelLiveUpdate(patience=0.1, custody=KernelCustody(start=True))
    yield liveupdate
    liveupdate.close()


def running(directory: Path, device: KernelLiveUpdate) -> Iterator[Rig]:
    """The running kernel. What a failed test left open is closed: the next would fail for a reason that is not its own."""
    before = descriptors()
    host = replace(kernel_machine(directory), liveupdate=device)
    yield KernelRig(host, KernelLiveUpdate(patience=0.1), os.environ["KHOD_BZIMAGE"], directory)
    for fd, link in descriptors().items() - before.items():
        if not link.startswith("socket:"):  # those are the helpers'
            os.close(fd)


def descriptors() -> dict[int, str]:
    """What this process has open, and what it is."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except FileNotFoundError:  # the one that this directory is read by
            continue
    return found


@pytest.fixture
def host(rig: Rig) -> Machine:
    """The ports of the rig's machine."""
    return rig.machine
