# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a kernel's payload is compressed, and how it is had back: by its first bytes, never more than was asked for.

The kernel's own decompressors (lib/decompress_*.c) stop where the stream ends and ignore what follows, and so does this. The
decompressors are imported when they are needed: nothing of it is on the way to restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from struct import Struct
from typing import Protocol

from khod.errors import FormatError

LZ4_BLOCK = 8 << 20
"""The legacy frame's blocks hold this much each, but for the last."""
LZO_BLOCK = 256 << 10
"""The largest block that the kernel takes (LZO_BLOCK_SIZE)."""
MEMORY = 256 << 20
"""What an LZMA decoder may allocate: the kernel is compressed with dictionaries of up to 128 MiB."""

_U32 = Struct("<I")
_BE32 = Struct(">I")
_LZ4_MAGIC = b"\x02\x21\x4c\x18"
_LZOP_MAGIC = b"\x89LZO\x00\r\n\x1a\n"
_LZOP_ADLER32_D, _LZOP_ADLER32_C, _LZOP_FILTER, _LZOP_CRC32_D, _LZOP_CRC32_C = 0x1, 0x2, 0x800, 0x100, 0x200
_LZOP_NEW = 0x940
"""From this version on headers have three fields more."""


class _Stream(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def method(data: bytes) -> str:
    """What `data` is compressed with, by its first bytes; '' when that is nothing that kernels are compressed with."""
    return next((name for magic, name, _ in _METHODS if data.startswith(magic)), "")


def decompress(data: bytes, limit: int) -> bytes:
    """What `data` holds, at most `limit` bytes; what follows the stream is ignored.

    Raises FormatError for an unknown method, a stream that is damaged or ends early, and for more than `limit` bytes.
    """
    for magic, name, inner in _METHODS:
        if data.startswith(magic):
            return inner(data, limit, name)
    raise FormatError(f"it is compressed in no way that kernels are: it begins with {data[:8].hex() or 'nothing'}")


def _streamed(stream: _Stream, errors: tuple[type[Exception], ...], data: bytes, limit: int, name: str) -> bytes:
    refusals: tuple[type[Exception], ...] = (*errors, EOFError, MemoryError)
    try:
        out = stream.decompress(data, limit + 1)
    except refusals as error:
        raise FormatError(f"its {name} stream is damaged: {error}")
    if len(out) > limit:
        raise _too_much(name, limit)
    if not stream.eof:
        raise _short(name)
    return out


def _gzip(data: bytes, limit: int, name: str) -> bytes:
    import zlib

    return _streamed(zlib.decompressobj(wbits=31), (zlib.error,), data, limit, name)


def _bzip2(data: bytes, limit: int, name: str) -> bytes:
    import bz2

    return _streamed(bz2.BZ2Decompressor(), (OSError, ValueError), data, limit, name)


def _xz(data: bytes, limit: int, name: str) -> bytes:
    import lzma

    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ if name == "xz" else lzma.FORMAT_ALONE, memlimit=MEMORY)
    return _streamed(stream, (lzma.LZMAError,), data, limit, name)


def _zstd(data: bytes, limit: int, name: str) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    return _streamed(zstd.ZstdDecompressor(), (zstd.ZstdError,), data, limit, name)


def _lz4(data: bytes, limit: int, name: str) -> bytes:
    """Legacy frames: a magic, then blocks, each after its length. lib/decompress_unlz4.c."""
    import lz4.block

    parts, total, at, last = [], 0, len(_LZ4_MAGIC), False
    while len(data) - at >= _U32.size:
        (length,) = _U32.unpack_from(data, at)
        another = data.startswith(_LZ4_MAGIC, at)
        at += _U32.size
        if another:
            last = False
            continue
        if last or length == 0:
            break
        if length > len(data) - at:
            raise _short(name)
        try:
            part = lz4.block.decompress(data[at : at + length], uncompressed_size=LZ4_BLOCK)
        except (lz4.block.LZ4BlockError, ValueError, MemoryError) as error:
            raise FormatError(f"its {name} stream is damaged: {error}")
        parts.append(part)
        total += len(part)
        at += length
        last = len(part) < LZ4_BLOCK
        if total > limit:
            raise _too_much(name, limit)
    if not parts:
        raise _short(name)
    return b"".join(parts)


def _lzo(data: bytes, limit: int, name: str) -> bytes:
    """lzop's container, lib/decompress_unlzo.c: every length and checksum in it is big-endian."""
    import lzallright

    at, flags = _lzop_header(data, name)
    parts, total = [], 0
    while size := _big(data, at, name):
        length = _big(data, at + 4, name)
        at += 8 + 4 * sum(bool(flags & bit) for bit in (_LZOP_ADLER32_D, _LZOP_CRC32_D))
        if length < size:
            at += 4 * sum(bool(flags & bit) for bit in (_LZOP_ADLER32_C, _LZOP_CRC32_C))
        if size > LZO_BLOCK or length > size:
            raise FormatError(f"its {name} stream is damaged: a block of {length} bytes that holds {size}")
        block = data[at : at + length]
        if len(block) < length:
            raise _short(name)
        if length < size:
            try:
                block = lzallright.LZOCompressor.decompress(block, size)
            except (lzallright.LZOError, lzallright.InputNotConsumed, ValueError, MemoryError) as error:
                raise FormatError(f"its {name} stream is damaged: {error}")
            if len(block) != size:
                raise FormatError(f"its {name} stream is damaged: a block of {size} bytes came out as {len(block)}")
        parts.append(block)
        total += size
        at += length
        if total > limit:
            raise _too_much(name, limit)
    return b"".join(parts)


def _lzop_header(data: bytes, name: str) -> tuple[int, int]:
    """Where the first block begins, and the flags."""
    at = len(_LZOP_MAGIC)
    version = _big(data, at, name) >> 16
    new = version >= _LZOP_NEW
    at += 7 if new else 5  # version, version of the library, with `new` the version that is needed; method
    at += new  # level
    flags = _big(data, at, name)
    at += 4 + (4 if flags & _LZOP_FILTER else 0)
    at += 12 if new else 8  # mode, mtime
    _big(data, at, name)
    return at + 1 + data[at] + 4, flags  # length of the name, the name, checksum of the header


def _big(data: bytes, at: int, name: str) -> int:
    if at + 4 > len(data):
        raise _short(name)
    (value,) = _BE32.unpack_from(data, at)
    return int(value)


def _short(name: str) -> FormatError:
    return FormatError(f"its {name} stream ends before it is whole: the file was cut off")


def _too_much(name: str, limit: int) -> FormatError:
    return FormatError(f"its {name} stream holds more than the {limit} bytes that there may be")


_METHODS: tuple[tuple[bytes, str, Callable[[bytes, int, str], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x5d\0\0", "lzma", _xz),
    (_LZOP_MAGIC, "lzo", _lzo),
    (_LZ4_MAGIC, "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)
"""Their magics, as scripts/extract-vmlinux and init's decompressors know them."""
