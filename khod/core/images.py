# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of kernels in files of the host, checked and held open (decision 11).

The one module of the core that opens files itself, with open(2) and pread(2) alone: an image is a plain file of the host for
both machines, and both must refuse the same ones before anything is frozen.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from khod.abi import bzimage
from khod.core.ports import Image
from khod.core.refusals import command_line
from khod.errors import FormatError, InvalidRequest, NotAKernel, Refused

if TYPE_CHECKING:
    from khod.abi.fleet import Fleet

_CHUNK = 1 << 20
_CONFIG = 1 << 20
"""Bytes of a configuration: today's have a quarter of it."""


def open_image(kernel: str, initrd: str, cmdline: str) -> Image:
    """Open and check what `khod.core.ports.Kexec.open` is asked for. The caller owns it, and ends it with `close_image`.

    Raises InvalidRequest, NotAKernel, ImageInvalid, and leaves nothing open then.
    """
    opened: list[int] = []
    try:
        opened.append(_open(kernel, "kernel"))
        _check(kernel, opened[0], cmdline)
        if initrd:
            opened.append(_open(initrd, "initrd"))
        digest, size = _digest(opened)
    except BaseException:
        _close(opened)
        raise
    return Image(kernel, initrd, cmdline, opened[0], opened[1] if initrd else -1, digest, size)


def close_image(image: Image) -> None:
    """Close its files."""
    _close(_files(image))


def check_unchanged(image: Image) -> None:
    """Raises Refused when the open files hold other bytes than when they were opened."""
    if _digest(_files(image)) != (image.sha256, image.size):
        names = " or ".join(filter(None, (image.kernel, image.initrd)))
        raise Refused(f"{names} changed since it was checked", hint="load it again, so that what is booted is what was meant")


def profile(path: str) -> Fleet | None:
    """A fleet's profile; None where there is no such file. Raises InvalidRequest for one that will not do."""
    from khod.abi import fleet  # YAML is behind it

    if not os.path.lexists(path):
        return None
    fd = _open(path, "profile")
    try:
        return fleet.parse(os.pread(fd, fleet.MAX_SIZE + 1, 0), path)
    finally:
        os.close(fd)


def kernel_bytes(image: Image, limit: int) -> bytes:
    """The bytes of its kernel, `limit` at most."""
    return b"".join(_chunks(image.kernel_fd, limit))


def config_beside(image: Image, release: str) -> str:
    """The text of ``config-RELEASE`` in the directory of its kernel, where distributions put it; '' where there is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,127}", release):  # it is the image's word
        return ""
    try:
        fd = _open(os.path.join(os.path.dirname(image.kernel), f"config-{release}"), "configuration")  # noqa: PTH118, PTH120
    except InvalidRequest:
        return ""
    try:
        return os.pread(fd, _CONFIG, 0).decode("utf-8", "replace")
    finally:
        os.close(fd)


def initrd_size_and_head(image: Image, length: int) -> tuple[int, bytes]:
    """Bytes of its initrd, and the first `length` of them; (0, b'') for none."""
    if image.initrd_fd < 0:
        return 0, b""
    return os.fstat(image.initrd_fd).st_size, os.pread(image.initrd_fd, length, 0)


def _chunks(fd: int, limit: int) -> Iterator[bytes]:
    offset = 0
    while offset < limit and (chunk := os.pread(fd, min(_CHUNK, limit - offset), offset)):
        yield chunk
        offset += len(chunk)


def _files(image: Image) -> list[int]:
    return [fd for fd in (image.kernel_fd, image.initrd_fd) if fd >= 0]


def _open(path: str, what: str) -> int:
    try:
        # O_NONBLOCK: it may be a FIFO, which nobody writes to.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidRequest(f"cannot read the {what} {path!r}: {reason}")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidRequest(f"the {what} {path!r} is not a regular file")
    return fd


def _check(path: str, fd: int, cmdline: str) -> None:
    """Refuse now what kexec_file_load would refuse after everybody was frozen."""
    try:
        header = bzimage.parse(os.pread(fd, bzimage.HEADER_SIZE, 0))
    except FormatError as error:
        raise NotAKernel(f"{path}: {error}")
    if header.objection:
        raise NotAKernel(f"{path}: {header.objection}")
    command_line(cmdline, header.longest_command_line)


def _digest(fds: list[int]) -> tuple[str, int]:
    """SHA-256 and size of the bytes of all files, one after the other."""
    import hashlib  # dear to import, and not needed on the way back up

    digest, size = hashlib.sha256(), 0
    for fd in fds:
        offset = 0
        while chunk := os.pread(fd, _CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
        size += offset
    return digest.hexdigest(), size


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
