# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.kexec: what can be refused before anything is loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from khod.core.ports import Image
from khod.errors import ImageInvalid, InvalidRequest, NotAKernel, Refused
from khod.kernel.kexec import KernelKexec
from tests.unit.test_abi_bzimage import header


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "bzImage"
    path.write_bytes(header() + b"code" * 1000)
    return path


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_open_names_what_was_checked(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio")
    kexec = KernelKexec()
    image = kexec.open(str(kernel), str(initrd), "quiet")
    data = kernel.read_bytes() + b"cpio"
    assert image == Image(
        str(kernel), str(initrd), "quiet", image.kernel_fd, image.initrd_fd, hashlib.sha256(data).hexdigest(), len(data)
    )
    assert not os.get_inheritable(image.kernel_fd)
    kexec.release(image)
    for fd in (image.kernel_fd, image.initrd_fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_the_command_line_is_the_running_one_unless_given(kernel: Path) -> None:
    kexec = KernelKexec()
    kernel.write_bytes(header(longer=(0x238, b"\xff\xff\0\0")))
    expected = Path("/proc/cmdline").read_text().strip()
    assert kexec.running_cmdline() == expected
    image = kexec.open(str(kernel), cmdline=None)
    assert image.cmdline == expected
    assert image.initrd_fd == -1
    kexec.release(image)


def test_refusals_leak_nothing(kernel: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("not a kernel\n" * 100)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    kexec, before = KernelKexec(), descriptors()
    for arguments, kind, words in [
        ((str(tmp_path / "absent"),), InvalidRequest, "No such file"),
        ((str(tmp_path),), InvalidRequest, "regular file"),
        ((str(fifo),), InvalidRequest, "regular file"),
        (("a\0b",), InvalidRequest, "null"),
        ((str(text),), NotAKernel, "no kernel header"),
        ((str(kernel), str(tmp_path / "absent")), InvalidRequest, "initrd"),
        ((str(kernel), "", "x" * 2017), ImageInvalid, "2017 bytes"),
        ((str(kernel), "", "a\0b"), ImageInvalid, "NUL"),
    ]:
        with pytest.raises(kind, match=words):
            kexec.open(*arguments)
        assert descriptors() == before


def test_the_longest_command_line_is_the_image_s_own(kernel: Path) -> None:
    kernel.write_bytes(header(shorter=(0x238, b"\x29\0\0\0")))  # of which the loader keeps 30 and the NUL
    kexec = KernelKexec()
    kexec.release(kexec.open(str(kernel), "", "x" * 10))
    with pytest.raises(ImageInvalid, match="takes 10"):
        kexec.open(str(kernel), "", "x" * 11)


def test_files_that_changed_since_are_not_loaded(kernel: Path) -> None:
    kexec = KernelKexec()
    image = kexec.open(str(kernel), "", "")
    with open(kernel, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"!")
    with pytest.raises(Refused, match="changed"):
        kexec.load(image)
    kexec.release(image)
