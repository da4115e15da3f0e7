# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.porter_helper: which descriptors have nobody behind them who could make others wait."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from khod.errors import KhodError
from khod.kernel import porter_helper
from khod.kernel.files import KernelFiles
from khod.kernel.porter_helper import harmless

files = KernelFiles()


def path_only(path: str) -> Callable[[], int]:
    return lambda: os.open(path, os.O_PATH)


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: files.memfd("ram", 4096), True),
        (lambda: files.memfd("[kvm-gmem]", 4096), True),
        (lambda: files.specimen("hugetlb"), True),
        (lambda: files.specimen("guest_memfd"), True),
        (lambda: files.specimen("iommufd"), True),
        (lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR), True),
        (path_only("/dev/shm"), False),
        (path_only("/dev/null"), False),
        (lambda: os.open("/dev/null", os.O_RDWR), False),
        (lambda: os.open("/proc/self/stat", os.O_RDONLY), False),
        (lambda: os.open("/", os.O_RDONLY), False),
        (lambda: os.eventfd(0), False),
        (lambda: socket.socket().detach(), False),
    ],
)
def test_what_is_passed_on_is_of_a_kind_that_khod_keeps(make: Callable[[], int], kept: bool) -> None:
    try:
        fd = make()
    except KhodError as error:
        pytest.skip(f"not to be had here: {error}")
    try:
        assert harmless(fd) == kept
        assert (files.stat(fd).kind != "other") == kept, "files are told apart in the same way when they are registered"
    finally:
        os.close(fd)


def test_a_file_that_is_called_as_a_guest_memfd_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from the namespace of its own that it was opened in, it would have that name."""
    fd = os.open(tmp_path / "[kvm-gmem] (deleted)", os.O_CREAT | os.O_RDWR)
    monkeypatch.setattr(porter_helper, "_link", lambda _: "/[kvm-gmem] (deleted)")
    assert not harmless(fd)
    os.close(fd)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/ptmx"])
def test_statx_is_read_as_the_kernel_writes_it(path: str) -> None:
    fd = os.open(path, os.O_RDWR)
    status = ctypes.create_string_buffer(256)
    assert ctypes.CDLL(None).statx(fd, b"", 0x1000, 0x7FF, status) == 0
    mode, major, minor = porter_helper._STATX.unpack(status.raw)
    assert (mode, os.makedev(major, minor)) == (os.fstat(fd).st_mode, os.fstat(fd).st_rdev)
    os.close(fd)
