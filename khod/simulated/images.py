# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images of kernels in files of the host, checked and held open (decision 11)."""

from __future__ import annotations

import hashlib
import os

from khod.abi import bzimage
from khod.core.ports import Image
from khod.core.refusals import command_line
from khod.errors import FormatError, InvalidRequest, NotAKernel, Refused

_CHUNK = 1 << 20


def open_image(kernel: str, initrd: str, cmdline: str) -> Image:
    """See `khod.core.ports.Kexec.open`; `release` it with `close_image`."""
    command_line(cmdline)
    opened: list[int] = []
    try:
        for path in (kernel, initrd) if initrd else (kernel,):
            opened.append(_open(path))
        try:
            bzimage.parse(os.pread(opened[0], bzimage.HEADER_SIZE, 0))
        except FormatError as error:
            raise NotAKernel(f"{kernel}: {error}")
        size = sum(os.fstat(fd).st_size for fd in opened)
        return Image(kernel, initrd, cmdline, opened[0], opened[1] if initrd else -1, _digest(opened), size)
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise


def close_image(image: Image) -> None:
    """Close its files."""
    os.close(image.kernel_fd)
    if image.initrd_fd >= 0:
        os.close(image.initrd_fd)


def check_unchanged(image: Image) -> None:
    """Raises Refused when the open files hold other bytes than when they were opened."""
    if _digest([fd for fd in (image.kernel_fd, image.initrd_fd) if fd >= 0]) != image.sha256:
        names = f"{image.kernel} or {image.initrd}" if image.initrd else image.kernel
        raise Refused(f"{names} changed since it was loaded into khod", hint="load it again")


def _open(path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}")
    try:
        os.pread(fd, 1, 0)
    except OSError as error:
        os.close(fd)
        raise InvalidRequest(f"{path}: {error.strerror}")
    return fd


def _digest(fds: list[int]) -> str:
    digest = hashlib.sha256()
    for fd in fds:
        offset = 0
        while chunk := os.pread(fd, _CHUNK, offset):
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()
