# SPDX-License-Identifier: LGPL-2.1-or-later
"""Real custodians."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from khod.kernel.custody import KernelCustody
from tests.unit.custodian.pid1 import Pid1, kill_both

Memfd = Callable[[bytes], int]


@pytest.fixture
def memfd() -> Iterator[Memfd]:
    """``memfd(b"contents")``: a new one, closed at the end."""
    made: list[int] = []

    def make(contents: bytes) -> int:
        fd = os.memfd_create("unit")
        os.write(fd, contents)
        made.append(fd)
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "custodian.sock"


@pytest.fixture
def custody(socket_path: Path) -> Iterator[KernelCustody]:
    """A custodian without systemd, as khod starts it."""
    custody = KernelCustody(str(socket_path), start=True)
    yield custody
    with suppress(ValueError):  # the test did
        kill_both(socket_path)
    if custody._child > 0:
        os.waitpid(custody._child, 0)


@pytest.fixture
def pid1(tmp_path: Path) -> Iterator[Pid1]:
    """With a store of 512 descriptors, and nothing started yet."""
    pid1 = Pid1(tmp_path)
    yield pid1
    pid1.end()


@pytest.fixture
def stored(pid1: Pid1) -> KernelCustody:
    """The client of a custodian that `pid1` has started."""
    pid1.start()
    return KernelCustody(str(pid1.socket_path))


def contents(fd: int) -> bytes:
    """What a memfd has in it; closes it."""
    data = os.pread(fd, 100, 0)
    os.close(fd)
    return data
