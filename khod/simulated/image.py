# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images that the simulated machine can boot: real ones, and small ones with all in them that khod reads of one."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace

from khod.abi import bzimage, ikconfig, kernel_image
from khod.errors import FormatError
from khod.simulated.layout import Release

_SETUP_SIZE = 0x400
_RELEASE_AT = 0x300
_PAYLOAD_OFFSET = 0x40
_CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE of x86 less the NUL."""
_OPERATIONS = 0xFFFFFFFF81A43D40
"""Where a file handler's struct says that its operations are; anything in the kernel will do."""


def build(release: Release | None = None) -> bytes:
    """The smallest image of a kernel that the machine takes, and that Linux's own first look would."""
    kernel = release or Release()
    text = vmlinux(kernel)
    payload = gzip.compress(text, mtime=0)
    head = bytearray(_SETUP_SIZE)
    head[0x1F1] = _SETUP_SIZE // 512 - 1  # setup_sects
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, _RELEASE_AT - 0x200)
    head[0x211] = bzimage.LOADED_HIGH
    struct.pack_into("<I", head, 0x230, 1 << 21)
    struct.pack_into("<H", head, 0x236, bzimage.XLF_KERNEL_64 | bzimage.XLF_CAN_BE_LOADED_ABOVE_4G)
    struct.pack_into("<I", head, 0x238, _CMDLINE_SIZE)
    struct.pack_into("<II", head, 0x248, _PAYLOAD_OFFSET, len(payload))
    struct.pack_into("<I", head, 0x260, kernel.kernel_size)
    name = kernel.release.encode() + b"\0"
    head[_RELEASE_AT : _RELEASE_AT + len(name)] = name
    return bytes(head) + bytes(_PAYLOAD_OFFSET) + payload


def vmlinux(kernel: Release) -> bytes:
    """An uncompressed kernel with the strings, the file handler and the configuration of a real one, and nothing else."""
    strings = [
        f"Linux version {kernel.release} ",
        kernel.kho,
        kernel.luo,
        *(("memblock-v1", "reserve-mem-v1") if kernel.kho else ()),
    ]
    body = b"\0".join(text.encode() for text in strings) + b"\0"
    if kernel.memfd:
        body += struct.pack("<Q48s", _OPERATIONS, kernel.memfd.encode())
    options = "\n".join(f"{option}={value}" for option, value in config(kernel).items())
    body += ikconfig.START + gzip.compress(options.encode(), mtime=0) + ikconfig.END
    ident, loaded = b"\x7fELF\x02\x01\x01" + bytes(9), 64 + 56
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, loaded, 0, 0, len(body), len(body), 1) + body


def config(kernel: Release) -> dict[str, str]:
    """What such a kernel is built with."""
    has = {
        "CONFIG_KEXEC_FILE": True,
        "CONFIG_KEXEC_HANDOVER": bool(kernel.kho),
        "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT": bool(kernel.kho),
        "CONFIG_LIVEUPDATE": bool(kernel.luo),
        "CONFIG_LIVEUPDATE_MEMFD": bool(kernel.memfd),
    }
    return {option: "y" for option, there in has.items() if there}


def identify(contents: bytes, running: Release) -> Release:
    """Which kernel an image holds. Raises FormatError for a file that is no image, or cannot be read."""
    found = kernel_image.read(contents)
    header = found.header
    if header is None:
        raise FormatError("it is a vmlinux, which kexec_file_load does not take")
    names = {f.name: str(f) for f in found.formats}
    return replace(
        running,
        release=found.release or running.release,
        kernel_size=max(header.init_size, len(contents)),
        kho=names.get("kho", ""),
        luo=names.get("luo", ""),
        memfd=names.get("memfd", ""),
    )
