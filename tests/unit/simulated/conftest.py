# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small machine, and a jump within this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from khod.simulated import Process, ProcessDied, Release, create, image, machine
from khod.simulated.kernel import Kernel

Jump = Callable[..., Kernel]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return create(tmp_path / "machine", memory=256 << 20)


@pytest.fixture
def kernel(directory: Path) -> Iterator[Kernel]:
    kernel = Kernel.boot(directory)
    yield kernel
    kernel.power_off()


@pytest.fixture
def process(kernel: Kernel) -> Process:
    return kernel.spawn("khod")


@pytest.fixture
def jump(tmp_path: Path) -> Iterator[Jump]:
    """Jump from a kernel, to the image of `release` with `cmdline`; the kernel that boots."""
    booted: list[Kernel] = []

    def jumped(kernel: Kernel, release: Release | None = None, cmdline: str | None = None) -> Kernel:
        (tmp_path / "bzImage").write_bytes(image.build(release))
        kexec = machine(kernel.spawn("kexec")).kexec
        opened = kexec.open(str(tmp_path / "bzImage"), cmdline=cmdline)
        kexec.load(opened)
        kexec.release(opened)
        with pytest.raises(ProcessDied):
            kexec.execute()
        booted.append(Kernel.boot(kernel.directory))
        return booted[-1]

    yield jumped
    for kernel in booted:
        kernel.power_off()
