# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/uapi/linux/liveupdate.h: the requests of /dev/liveupdate and of session descriptors, and their structs.

Every struct begins with its own size as u32. A kernel that knows a longer struct takes a shorter one, and one that knows
a shorter struct takes a longer one whose tail is zero (E2BIG otherwise), so the sizes of today stay valid.
"""

from __future__ import annotations

from struct import Struct

LIVEUPDATE_IOCTL_TYPE = 0xBA


def _io(nr: int) -> int:
    # _IO(): no size and no direction in the number; the structs carry their size themselves.
    return LIVEUPDATE_IOCTL_TYPE << 8 | nr


LIVEUPDATE_IOCTL_CREATE_SESSION = _io(0x00)
LIVEUPDATE_IOCTL_RETRIEVE_SESSION = _io(0x01)
LIVEUPDATE_SESSION_PRESERVE_FD = _io(0x40)
LIVEUPDATE_SESSION_RETRIEVE_FD = _io(0x41)
LIVEUPDATE_SESSION_FINISH = _io(0x42)
LIVEUPDATE_SESSION_GET_NAME = _io(0x43)

LIVEUPDATE_SESSION_NAME_LENGTH = 64
"""With the terminating NUL, so a name is 1 to 63 bytes."""

SESSION_LINK_PREFIX = "anon_inode:[luo_session] "
"""What /proc/self/fd/N of a session reads, followed by its name."""

_NAMED = Struct(f"=Ii{LIVEUPDATE_SESSION_NAME_LENGTH}s")  # u32 size, s32 fd (or u32 reserved), char name[64]
_FILE = Struct("=IiQ")  # u32 size, s32 fd, u64 token
_FINISH = Struct("=II")  # u32 size, u32 reserved


def named(name: bytes = b"") -> bytearray:
    """``struct liveupdate_ioctl_create_session``, and that of retrieve_session; with an empty name also
    ``struct liveupdate_session_get_name``. Raises ValueError for a name that the struct cannot carry whole."""
    if len(name) >= LIVEUPDATE_SESSION_NAME_LENGTH or b"\0" in name:
        raise ValueError("a session name is at most 63 bytes without NUL")
    return bytearray(_NAMED.pack(_NAMED.size, 0, name))


def name_of(answer: bytes | bytearray) -> bytes:
    """The name in an answer to GET_NAME."""
    name: bytes = _NAMED.unpack_from(answer)[2]
    return name.split(b"\0", 1)[0]


def file(fd: int, token: int) -> bytearray:
    """``struct liveupdate_session_preserve_fd`` and ``…_retrieve_fd`` (whose fd is an answer: give -1).

    Raises ValueError for a token that is no u64."""
    if not 0 <= token < 1 << 64:
        raise ValueError(f"a token is an unsigned 64-bit number, not {token}")
    return bytearray(_FILE.pack(_FILE.size, fd, token))


def fd_of(answer: bytes | bytearray) -> int:
    """The descriptor that the kernel put into an answer: all these structs have it in the same place."""
    fd: int = Struct("=i").unpack_from(answer, 4)[0]
    return fd


def finish() -> bytearray:
    """``struct liveupdate_session_finish``."""
    return bytearray(_FINISH.pack(_FINISH.size, 0))
