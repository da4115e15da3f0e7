# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernels that write and read other formats than the lab's: made of its image by changing one string in it, without a build.

The kernel in a bzImage is compressed. It is unpacked, changed, packed again and put where it was, with zeros up to the size
that the build appended: whatever unpacks a kernel stops where the stream ends.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from khod.abi import bzimage, compression
from tests.vm.kernel import cache, kernel_directory

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_SIZE = 4
"""Bytes of the unpacked kernel's size, at the end of the payload."""
_OPTIONS = {int(zstd.CompressionParameter.compression_level): 22, int(zstd.CompressionParameter.window_log): 27}
"""As scripts/Makefile.lib calls zstd for a kernel (-22 --ultra); its own decompressor takes windows of 128 MiB."""


def image(was: str, becomes: str) -> Path:
    """The lab's kernel with the format `becomes` in the place of `was`, which must be as long. Made once: it takes ten seconds.
    Raises ValueError when it cannot be made."""
    source = kernel_directory() / "bzImage"
    target = source.with_name(f"bzImage-{becomes}")
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as work:
            ready = Path(work) / target.name
            ready.write_bytes(_changed(source, was, becomes))
            ready.rename(target)
    return target


def _changed(source: Path, was: str, becomes: str) -> bytes:
    data = source.read_bytes()
    header = bzimage.parse(data[: bzimage.HEADER_SIZE])
    packed = bzimage.payload(data, header)
    if compression.method(packed) != "zstd":
        raise ValueError(f"{source}: not a zstd kernel")
    kernel = compression.decompress(packed, header.init_size)
    old, new = (f"{text}\0".encode() for text in (was, becomes))
    if len(old) != len(new) or kernel.count(old) != 1:
        raise ValueError(f"{source}: {was} is there {kernel.count(old)} times, and {becomes} has another length")
    again = zstd.compress(kernel.replace(old, new), options=_OPTIONS)
    room = header.payload_length - _SIZE
    if len(again) > room:
        raise ValueError(f"{source}: the changed kernel takes {len(again)} bytes, and there are {room}")
    start = header.setup_size + header.payload_offset
    return data[:start] + again.ljust(room, b"\0") + data[start + room :]
