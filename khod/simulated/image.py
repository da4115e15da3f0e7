# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images that the simulated machine can boot: real ones, and small ones that say which formats they speak."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

from khod.abi import bzimage
from khod.core.refusals import MAX_CMDLINE
from khod.simulated.layout import Release

_TEXT = 0x400
_STRINGS = {"kho": rb"\0(kho-v[0-9]+)\0", "luo": rb"\0(luo-v[0-9]+)\0", "memfd": rb"\0(memfd-v[0-9]+)\0"}


def build(release: Release | None = None) -> bytes:
    """The smallest image of a kernel that the machine takes, and that Linux's own first look would."""
    kernel = release or Release()
    head = bytearray(_TEXT)
    head[0x1F1] = 1  # setup_sects
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, _TEXT - 0x200)
    head[0x211] = bzimage.LOADED_HIGH
    struct.pack_into("<I", head, 0x230, 1 << 21)
    struct.pack_into("<H", head, 0x236, bzimage.XLF_KERNEL_64 | bzimage.XLF_CAN_BE_LOADED_ABOVE_4G)
    struct.pack_into("<I", head, 0x238, MAX_CMDLINE)
    struct.pack_into("<I", head, 0x260, kernel.kernel_size)
    strings = (kernel.release, f"{kernel.kho}", kernel.luo, kernel.memfd)
    return bytes(head) + b"\0".join(text.encode() for text in strings) + b"\0"


def identify(contents: bytes, running: Release) -> Release:
    """Which kernel an image holds. What it does not tell (a real one is compressed) is taken from the running kernel.

    Raises FormatError for a file that is no image.
    """
    header = bzimage.parse(contents[: bzimage.HEADER_SIZE])
    found = {name: re.search(pattern, contents) for name, pattern in _STRINGS.items()}
    told = {name: match[1].decode() for name, match in found.items() if match}
    release = header.release.split(" ")[0]
    return replace(running, release=release or running.release, kernel_size=max(header.init_size, len(contents)), **told)
