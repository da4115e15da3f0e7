# SPDX-License-Identifier: LGPL-2.1-or-later
"""The setup header of an x86 kernel image: ``struct setup_header`` of arch/x86/include/uapi/asm/bootparam.h.

Offsets are those of the file (Documentation/arch/x86/boot.rst).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from khod.errors import FormatError

HEADER_SIZE = 0x20000
"""Bytes of the file's beginning that `parse` wants: boot sector and as many setup sectors as there can be (u8 setup_sects).
The release text is anywhere in them."""
ELFCOREHDR_ROOM = 30
"""MAX_ELFCOREHDR_STR_LEN."""
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

_END = 0x264
_BOOT_FLAG = 0x1FE, b"\x55\xaa"
_MAGIC = 0x202, b"HdrS"
_LOADFLAGS = 0x211
_SETUP_SECTS = 0x1F1
_VERSION = Struct("<H"), 0x206
_RELEASE = Struct("<H"), 0x20E
_ALIGNMENT = Struct("<I"), 0x230
_XLOADFLAGS = Struct("<H"), 0x236
_CMDLINE_SIZE = Struct("<I"), 0x238
_PAYLOAD_OFFSET = Struct("<I"), 0x248
_PAYLOAD_LENGTH = Struct("<I"), 0x24C
_PREF_ADDRESS = Struct("<Q"), 0x258
_INIT_SIZE = Struct("<I"), 0x260
_RELEASE_BASE = 0x200
_SETUP_SECTS_DEFAULT = 4
_SECTOR = 512
_U32 = Struct("<I")


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What khod wants to know of an image before it asks the kernel to load it."""

    protocol: int
    """Version of the boot protocol, major in the high byte: 0x20f for 2.15."""
    release: str
    """What the image says it is (``uname -r`` first, then who built it), '' when it does not."""
    xloadflags: int
    cmdline_size: int
    """The longest command line in bytes, without its NUL: for any loader."""
    init_size: int
    """Bytes of contiguous memory that the kernel needs to unpack itself."""
    alignment: int = 0
    """Of the address that it is loaded at."""
    pref_address: int = 0
    """The address that it would like; kexec_file_load puts it nowhere below."""
    setup_size: int = 0
    """Bytes of the file before the part that is loaded."""
    payload_offset: int = 0
    """Of the compressed kernel, from there."""
    payload_length: int = 0

    @property
    def version(self) -> str:
        """``uname -r`` of the kernel in it; '' when it does not say."""
        return self.release.split(" ")[0]

    @property
    def longest_command_line(self) -> int:
        """Bytes of the longest command line that kexec_file_load takes with it: the kernel counts the NUL, and keeps room for
        ``elfcorehdr=`` whether it needs that or not (arch/x86/kernel/kexec-bzimage64.c, bzImage64_load)."""
        return max(0, self.cmdline_size - ELFCOREHDR_ROOM - 1)

    @property
    def objection(self) -> str:
        """Why kexec_file_load will not take it; '' when it will (arch/x86/kernel/kexec-bzimage64.c, bzImage64_probe)."""
        if self.protocol < 0x20C:
            return f"boot protocol {self.protocol >> 8}.{self.protocol & 0xFF:02} is older than 2.12"
        if not self.xloadflags & XLF_KERNEL_64:
            return "it is not a 64-bit kernel"
        if not self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G:
            return "it cannot be loaded above 4 GiB (built without CONFIG_RELOCATABLE=y)"
        return ""


def parse(head: bytes) -> SetupHeader:
    """Read the header from the first `HEADER_SIZE` bytes of a file. Raises FormatError when that is no bzImage."""
    if len(head) < _END:
        raise FormatError(f"it ends after {len(head)} bytes, before the end of a kernel's header")
    for where, mark in (_BOOT_FLAG, _MAGIC):
        if (found := head[where : where + len(mark)]) != mark:
            raise FormatError(f"it has no kernel header: {found!r} at {where:#x}, where {mark!r} belongs")
    if not head[_LOADFLAGS] & LOADED_HIGH:
        raise FormatError("it is a zImage, not a bzImage")
    release = _number(head, _RELEASE)
    text = head[release + _RELEASE_BASE :].split(b"\0", 1)[0] if release else b""
    return SetupHeader(
        protocol=_number(head, _VERSION),
        release=text.decode("ascii", "replace"),
        xloadflags=_number(head, _XLOADFLAGS),
        cmdline_size=_number(head, _CMDLINE_SIZE),
        init_size=_number(head, _INIT_SIZE),
        alignment=_number(head, _ALIGNMENT),
        pref_address=_number(head, _PREF_ADDRESS),
        setup_size=((head[_SETUP_SECTS] or _SETUP_SECTS_DEFAULT) + 1) * _SECTOR,
        payload_offset=_number(head, _PAYLOAD_OFFSET),
        payload_length=_number(head, _PAYLOAD_LENGTH),
    )


def payload(image: bytes, header: SetupHeader) -> bytes:
    """The compressed kernel in `image`, a whole file whose header was read. Raises FormatError when the file ends before it."""
    start = header.setup_size + header.payload_offset
    end = start + header.payload_length
    if header.payload_length < _U32.size or header.payload_offset == 0:
        raise FormatError("its header names no payload")
    if end > len(image):
        raise FormatError(f"it was cut off: its kernel ends at byte {end}, the file at {len(image)}")
    # The build appends the size to all but gzip, whose stream ends with it. What follows a stream is ignored.
    return image[start:end] if image.startswith(b"\x1f\x8b", start) else image[start : end - _U32.size]


def signature(image: bytes) -> bool | None:
    """Whether an image carries a signature for UEFI (the certificate table of its PE header, which is what kexec verifies);
    None when it has no PE header, and so cannot."""
    if len(image) < 0x40 or not image.startswith(b"MZ"):
        return None
    (at,) = _U32.unpack_from(image, 0x3C)
    optional = at + 24
    if image[at : at + 4] != b"PE\0\0" or image[optional : optional + 2] != b"\x0b\x02" or len(image) < optional + 152:
        return None
    directories, size = _U32.unpack_from(image, optional + 108)[0], _U32.unpack_from(image, optional + 148)[0]
    return bool(directories > 4 and size)


def _number(head: bytes, field: tuple[Struct, int]) -> int:
    layout, offset = field
    (value,) = layout.unpack_from(head, offset)
    return int(value)
