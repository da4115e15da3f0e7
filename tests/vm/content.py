# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contents that can be told apart from any other, page by page: made and compared by C, loops are dear under emulation.

Of the standard library alone: programs in the lab's host use it as well.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator

PAGE = 4096
CHUNK = 1 << 24


def marked(size: int) -> bytearray:
    """Bytes whose every page begins with its index: made by C, loops are dear under emulation."""
    words = array("Q", bytes(size))
    words[:: PAGE // 8] = array("Q", range(-(-size // PAGE)))
    return bytearray(words.tobytes())


def chunks(size: int) -> Iterator[tuple[int, bytearray]]:
    """What `fill` writes, and where: equal chunks but for their number at byte 8."""
    chunk = marked(min(size, CHUNK))
    for offset in range(0, size, CHUNK):
        chunk[8:16] = offset.to_bytes(8, "little")
        yield offset, chunk if size - offset >= len(chunk) else chunk[: size - offset]


def fill(fd: int, size: int) -> None:
    """Mark every page of a file."""
    for offset, chunk in chunks(size):
        os.pwrite(fd, chunk, offset)


def filled(fd: int, size: int) -> bool:
    """Whether every byte of a file is as `fill` made it."""
    return all(os.pread(fd, len(chunk), offset) == chunk for offset, chunk in chunks(size))
