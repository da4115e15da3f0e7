# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixtures `vm`, which plays a scenario in the lab's virtual machine, and `boot`, the lab's host with its init."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm import host, runner
from tests.vm.kernel import kernel_directory

SCENARIOS = Path(__file__).with_name("scenarios")
Play = Callable[..., runner.Result]
IOMMU = ("-device", "intel-iommu,intremap=on,caching-mode=on", "-device", "edu")
"""QEMU's arguments for a device that does DMA, behind an IOMMU; the kernel needs intel_iommu=on."""


def _need(reason: str) -> None:
    if reason and "vm" in os.environ.get("KHOD_REQUIRE", "").split(","):
        pytest.fail(f"KHOD_REQUIRE=vm, and {reason}")
    if reason:
        pytest.skip(reason)


@pytest.fixture
def vm() -> Play:
    """``vm("NAME", **fields of runner.Machine)`` plays scenarios/NAME.py and gives the `Result`, whatever the outcome.

    Skips where no machine can be run, and fails there instead when KHOD_REQUIRE names "vm"."""
    _need(runner.missing())

    def play(name: str, **fields: Any) -> runner.Result:
        return runner.run(runner.Machine(SCENARIOS / f"{name}.py", **fields))

    return play


@pytest.fixture
def kernel() -> Callable[[str], Path]:
    """The bzImage of one of the versions that the lab has, 7.2 and 7.3. Skips like `vm`."""

    def find(version: str) -> Path:
        image = kernel_directory(version) / "bzImage"
        _need("" if image.exists() else f"the lab's kernel {version} is not built: make lab-kernel")
        return image

    return find


@pytest.fixture
def boot() -> type[host.Host]:
    """``with boot(**fields of host.Host) as host:`` is the lab's host with its init. Skips like `vm`."""
    _need(host.missing())
    return host.Host
