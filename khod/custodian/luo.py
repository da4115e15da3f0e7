# SPDX-License-Identifier: LGPL-2.1-or-later
"""The requests of /dev/liveupdate that the custodian makes. Errors are OSError, with the kernel's errno."""

from __future__ import annotations

import fcntl
import os

from khod.abi import liveupdate as abi

DEVICE = "/dev/liveupdate"
FDS = "/proc/self/fd"
"""Where our descriptors are listed."""
F_DUPFD_QUERY = 1024 + 3
"""include/uapi/linux/fcntl.h; Linux 6.10."""
_PREFIX = abi.SESSION_LINK_PREFIX.rstrip()


def is_session(fd: int) -> bool:
    """Whether it is a session, incoming or outgoing; a number that is closed is none."""
    try:
        return os.readlink(f"{FDS}/{fd}").startswith(_PREFIX)
    except OSError:
        return False


def name(session: int) -> bytes:
    """The session's own name."""
    argument = abi.named()
    fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_GET_NAME, argument)
    return abi.name_of(argument)


def retrieve_session(device: int, name: bytes) -> int:
    """The incoming session of that name, in our table from the moment that the kernel has made it."""
    argument = abi.named(name)
    fcntl.ioctl(device, abi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, argument)
    return abi.fd_of(argument)


def retrieve_fd(session: int, token: int) -> int:
    """What was preserved under the token."""
    argument = abi.file(-1, token)
    fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_RETRIEVE_FD, argument)
    return abi.fd_of(argument)


def same(one: int, other: int) -> bool:
    """Whether both are the same open file (not only the same inode)."""
    try:
        return fcntl.fcntl(one, F_DUPFD_QUERY, other) == 1
    except OSError:
        # Before 6.10. There is no live update there either; what is kept twice is then kept twice.
        return False
