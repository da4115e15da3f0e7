# SPDX-License-Identifier: LGPL-2.1-or-later
"""The setup header of an x86 kernel image (Documentation/arch/x86/boot.rst, arch/x86/kernel/kexec-bzimage64.c)."""

from __future__ import annotations

from dataclasses import dataclass

from khod.errors import FormatError

HEADER_SIZE = 0x1000
"""Bytes of the file's beginning that `parse` wants; the header itself ends before 0x280, the release text is beyond."""
_BOOT_FLAG = 0x1FE, b"\x55\xaa"
_MAGIC = 0x202, b"HdrS"
_PROTOCOL = 0x206
_RELEASE = 0x20E
_RELEASE_BASE = 0x200
_INIT_SIZE = 0x260


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What khod wants to know of an image before it asks the kernel to load it."""

    protocol: int
    """Boot protocol version, major in the high byte."""
    release: str
    """What the image says it is (``uname -r`` first, then who built it), '' when it does not."""
    init_size: int
    """Bytes of contiguous memory that the kernel needs to start; 0 when the header is too old or too short to say."""


def parse(head: bytes) -> SetupHeader:
    """Read the header from the first bytes of a file (`HEADER_SIZE` of them, fewer if it is shorter).

    Raises FormatError when the two marks that kexec_file_load looks for first are not there.
    """
    for where, mark in (_BOOT_FLAG, _MAGIC):
        if head[where : where + len(mark)] != mark:
            raise FormatError(f"no kernel image: {mark!r} expected at {where:#x}, found {head[where : where + len(mark)]!r}")
    release = int.from_bytes(head[_RELEASE : _RELEASE + 2], "little")
    text = head[release + _RELEASE_BASE :].split(b"\0", 1)[0] if release else b""
    return SetupHeader(
        protocol=int.from_bytes(head[_PROTOCOL : _PROTOCOL + 2], "little"),
        release=text.decode("ascii", "replace"),
        init_size=int.from_bytes(head[_INIT_SIZE : _INIT_SIZE + 4], "little"),
    )
