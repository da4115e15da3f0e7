# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a kernel says of itself, from its file alone: a bzImage, or a vmlinux."""

from __future__ import annotations

import re
from dataclasses import dataclass

from khod.abi import bzimage, compression, elf, formats, ikconfig
from khod.errors import FormatError

MAX_FILE = 512 << 20
"""Larger files are not looked at."""
MAX_KERNEL = 512 << 20
"""More than this comes out of no payload."""

_BANNER = re.compile(rb"Linux version ([\x21-\x7e]{1,64}) ")


@dataclass(frozen=True, slots=True)
class KernelImage:
    """One image."""

    kind: str
    """'bzImage' or 'vmlinux'."""
    machine: str
    """'x86-64', or what `khod.abi.elf` calls it."""
    release: str
    """``uname -r``; '' when it does not say."""
    compression: str
    """Of a bzImage's payload, '' of a vmlinux."""
    formats: tuple[formats.Format, ...]
    """All that it understands."""
    listed: bool
    """Whether it lists them itself, in the section that was proposed for that."""
    config: dict[str, str] | None
    """Its configuration where it carries one (CONFIG_IKCONFIG)."""
    header: bzimage.SetupHeader | None
    """None of a vmlinux."""


def read(data: bytes) -> KernelImage:
    """Everything there is to know of an image. Raises FormatError for a file that is none, that is damaged or cut off."""
    if data.startswith(elf.MAGIC):
        return _kernel("vmlinux", "", data, None)
    header = bzimage.parse(data[: bzimage.HEADER_SIZE])
    payload = bzimage.payload(data, header)
    name = compression.method(payload)
    # The kernel unpacks itself within init_size bytes.
    kernel = compression.decompress(payload, min(MAX_KERNEL, header.init_size))
    return _kernel("bzImage", name, kernel, header)


def _kernel(kind: str, method: str, kernel: bytes, header: bzimage.SetupHeader | None) -> KernelImage:
    parsed = elf.parse(kernel)
    listed = formats.listed(kernel, parsed.sections)
    banner = _BANNER.search(kernel)
    return KernelImage(
        kind=kind,
        machine=parsed.machine,
        release=header.version if header and header.version else banner[1].decode() if banner else "",
        compression=method,
        formats=tuple(sorted({*formats.find(kernel), *listed})),
        listed=bool(listed),
        config=ikconfig.find(kernel),
        header=header,
    )


def require(data: bytes, size: int) -> None:
    """Raises FormatError when a file of `size` bytes, of which `data` is the beginning, is not worth reading whole."""
    if size > MAX_FILE:
        raise FormatError(f"it is {size} bytes long: no kernel is longer than {MAX_FILE}")
    if not data.startswith(elf.MAGIC):
        bzimage.parse(data)
