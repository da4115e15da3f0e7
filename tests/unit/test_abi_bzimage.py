# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi.bzimage: made-up headers, the simulated machine's, and those of kernels that this host has."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess

import pytest

from khod.abi import bzimage
from khod.errors import FormatError
from khod.simulated import image
from tests.vm.kernel import kernel_directory

KERNEL = kernel_directory() / "bzImage"
needs_kernel = pytest.mark.skipif(
    not KERNEL.exists() or shutil.which("file") is None, reason="the lab's kernel is not built, or file(1) not installed"
)


def header(**changes: tuple[int, bytes]) -> bytes:
    """The first bytes of a bzImage, with changes as NAME=(offset, bytes)."""
    head = bytearray(0x1000)
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, 0x300)
    head[0x211] = 1
    struct.pack_into("<H", head, 0x236, 0x7F)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<I", head, 0x260, 0x12E1000)
    head[0x500:0x510] = b"7.3.4 (who) #1\0\0"
    for offset, data in changes.values():
        head[offset : offset + len(data)] = data
    return bytes(head)


def test_the_header_of_a_bzimage() -> None:
    found = bzimage.parse(header())
    assert found == bzimage.SetupHeader(0x20F, "7.3.4 (who) #1", 0x7F, 2047, 0x12E1000, setup_size=2560)
    assert found.objection == ""


def test_an_image_need_not_say_what_it_is() -> None:
    assert bzimage.parse(header(silent=(0x20E, b"\0\0"))).release == ""
    assert bzimage.parse(header(beyond=(0x20E, b"\xff\xff"))).release == ""
    assert bzimage.parse(header()[:0x264]).release == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"magic": (0x202, b"HdrX")}, "HdrX"),
        ({"flag": (0x1FE, b"\x55\0")}, "at 0x1fe"),
        ({"low": (0x211, b"\xfe")}, "zImage"),
    ],
)
def test_files_that_are_no_bzimage(changes: dict[str, tuple[int, bytes]], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        bzimage.parse(header(**changes))


@pytest.mark.parametrize("length", [0, 0x202, 0x263])
def test_files_that_end_within_the_header(length: int) -> None:
    with pytest.raises(FormatError, match=f"ends after {length} bytes"):
        bzimage.parse(header()[:length])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old": (0x206, b"\x0b\x02")}, "2.11"),
        ({"flags": (0x236, b"\x02\0")}, "64-bit"),
        ({"flags": (0x236, b"\x01\0")}, "CONFIG_RELOCATABLE"),
    ],
)
def test_bzimages_that_kexec_would_refuse(changes: dict[str, tuple[int, bytes]], words: str) -> None:
    assert words in bzimage.parse(header(**changes)).objection


def test_the_simulated_machine_s_images_are_such_that_linux_would_look_on() -> None:
    assert bzimage.parse(image.build()).objection == ""


@needs_kernel
def test_a_real_kernel() -> None:
    """file(1) reads the same header, by rules of its own (Magdir/linux)."""
    with open(KERNEL, "rb") as file:
        found = bzimage.parse(file.read(bzimage.HEADER_SIZE))
    assert found.objection == ""
    assert found.cmdline_size == 2047
    assert found.longest_command_line == 2016
    said = subprocess.run(["file", "-L", KERNEL], capture_output=True, text=True, check=True).stdout
    told = re.search(r"bzImage, version (.*?), ", said)
    assert told and told[1] == found.release
