# SPDX-License-Identifier: LGPL-2.1-or-later
"""The cpio archive that the kernel unpacks as its first file system ("newc", Documentation/driver-api/early-userspace/
buffer-format.rst). Same members, same bytes: no times, no owners, numbers in the order of the paths."""

from __future__ import annotations

import stat
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from khod.abi import compression
from khod.errors import FormatError

ALIGNMENT: Final = 4
"""Of every header and of every content; and of an archive that follows another."""
_MAGIC: Final = b"070701"
_MAGICS: Final = (_MAGIC, b"070702")
_HEAD: Final = 110
_TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Member:
    """One file. `mode` has the type and the permissions of stat(2)."""

    mode: int
    content: bytes = b""
    """Of a regular file; of a symbolic link, where it leads."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def file(content: bytes, permissions: int = 0o644) -> Member:
    """A regular file."""
    return Member(stat.S_IFREG | permissions, content)


def directory(permissions: int = 0o755) -> Member:
    """A directory."""
    return Member(stat.S_IFDIR | permissions)


def link(target: str) -> Member:
    """A symbolic link."""
    return Member(stat.S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape"))


def characters(major: int, minor: int, permissions: int) -> Member:
    """A character device."""
    return Member(stat.S_IFCHR | permissions, device=(major, minor))


def archive(members: Mapping[str, Member], last: str = "") -> bytes:
    """The archive of these, by path without a slash at its start. Directories that are not named are made (0755), before what
    is in them; the member `last` comes last: where it is, everything is. Raises ValueError for a path that leads anywhere else
    than into the archive."""
    whole = dict(members)
    for path in members:
        parts = path.split("/")
        if not path or any(part in ("", ".", "..") for part in parts) or "\0" in path:
            raise ValueError(f"{path!r} is no path in an archive")
        for depth in range(1, len(parts)):
            above = whole.setdefault("/".join(parts[:depth]), directory())
            if not stat.S_ISDIR(above.mode):
                raise ValueError(f"{path!r} lies in what is no directory")
    pieces: list[bytes] = []
    for number, path in enumerate(sorted(whole, key=lambda path: (path == last, path)), 1):
        pieces += _pieces(path, number, whole[path])
    pieces += _pieces(_TRAILER, 0, Member(0))
    return b"".join(pieces)


def names(data: bytes, limit: int = 1 << 30) -> Iterator[str]:
    """Paths of the members of an initrd: archives one after the other, the last of which may be compressed, as the kernel
    unpacks them. Raises FormatError for anything else, and for more than `limit` bytes behind the compression."""
    at = 0
    while at < len(data):
        if not data[at]:
            at += 1  # padding, up to any length
        elif data[at : at + 6] in _MAGICS:
            at = yield from _members(data, at)
        else:
            yield from names(compression.decompress(data[at:], limit), limit)
            return


def _members(data: bytes, at: int) -> Generator[str, None, int]:
    """One archive; returns where it ends."""
    while True:
        head = data[at : at + _HEAD]
        try:
            if head[:6] not in _MAGICS:
                raise ValueError
            size, length = int(head[54:62], 16), int(head[94:102], 16)
        except ValueError:
            raise FormatError(f"there is no member of an archive at {at} of it")
        name = data[at + _HEAD : at + _HEAD + length - 1].decode("utf-8", "surrogateescape")
        at = _aligned(_aligned(at + _HEAD + length) + size)
        if name == _TRAILER:
            return at
        yield name


def _aligned(at: int) -> int:
    return (at + ALIGNMENT - 1) & -ALIGNMENT


def _pieces(path: str, number: int, member: Member) -> list[bytes]:
    name = path.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(member.mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (number, member.mode, 0, 0, links, 0, len(member.content), 0, 0, *member.device, len(name), 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return [head, bytes(-len(head) % ALIGNMENT), member.content, bytes(-len(member.content) % ALIGNMENT)]
