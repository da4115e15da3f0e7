# SPDX-License-Identifier: LGPL-2.1-or-later
"""kexec_file_load(2) and reboot(2): the port `Kexec` of the running kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from khod.abi import bootparam
from khod.abi.kexec import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.core.ports import Image
from khod.errors import (
    ImageInvalid,
    ImageTooLarge,
    InvalidRequest,
    KexecBusy,
    KexecFailed,
    KexecForbidden,
    MachineError,
    NotAKernel,
    NothingLoaded,
    OutOfMemory,
    Refused,
)

MAX_CMDLINE = 2047
"""COMMAND_LINE_SIZE of x86 less its NUL; a kernel's header may name less."""
LOADED = Path("/sys/kernel/kexec_loaded")
_PIECE = 1 << 20

_LOAD: Mapping[int, type[MachineError]] = {
    errno.ENOEXEC: NotAKernel,
    errno.EADDRNOTAVAIL: ImageTooLarge,
    errno.EINVAL: ImageInvalid,
    errno.EBADF: ImageInvalid,
    errno.EPERM: KexecForbidden,
    errno.EBUSY: KexecBusy,
    errno.ENOMEM: OutOfMemory,
}
_EXECUTE: Mapping[int, type[MachineError]] = {
    errno.EINVAL: NothingLoaded,
    errno.EBUSY: KexecBusy,
    errno.EPERM: KexecForbidden,
}


class KernelKexec:
    """The port `Kexec` of the running kernel."""

    def open(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> Image:
        """See the port."""
        line = self.running_cmdline() if cmdline is None else cmdline
        kernel_fd = _open_file(kernel, "kernel")
        initrd_fd = -1
        try:
            _check(kernel, kernel_fd, line)
            if initrd:
                initrd_fd = _open_file(initrd, "initrd")
            digest, size = _digest(kernel_fd, initrd_fd)
        except BaseException:
            _close(kernel_fd, initrd_fd)
            raise
        return Image(kernel, initrd, line, kernel_fd, initrd_fd, digest, size)

    def release(self, image: Image) -> None:
        """See the port."""
        _close(image.kernel_fd, image.initrd_fd)

    def load(self, image: Image) -> None:
        """See the port."""
        from khod.kernel.libc import kexec_file_load  # ctypes

        if _digest(image.kernel_fd, image.initrd_fd) != (image.sha256, image.size):
            files = " or ".join(filter(None, (image.kernel, image.initrd)))
            raise Refused(
                f"{files} changed since it was checked", hint="load it again, so that what is booted is what was meant"
            )
        flags = 0 if image.initrd_fd >= 0 else KEXEC_FILE_NO_INITRAMFS
        try:
            kexec_file_load(image.kernel_fd, image.initrd_fd, os.fsencode(image.cmdline), flags)
        except OSError as e:
            raise _LOAD.get(e.errno or 0, MachineError)(f"load {image.kernel}", errno=e.errno)

    def unload(self) -> None:
        """See the port."""
        from khod.kernel.libc import kexec_file_load  # ctypes

        try:
            kexec_file_load(-1, -1, b"", KEXEC_FILE_UNLOAD)
        except OSError as e:
            raise _LOAD.get(e.errno or 0, MachineError)("unload the image", errno=e.errno)

    def loaded(self) -> bool:
        """See the port."""
        try:
            return LOADED.read_text().strip() == "1"
        except FileNotFoundError:  # a kernel without kexec has none loaded
            return False

    def running_cmdline(self) -> str:
        """See the port."""
        return os.fsdecode(Path("/proc/cmdline").read_bytes()).strip()

    def execute(self) -> NoReturn:
        """See the port."""
        from khod.kernel.libc import reboot_kexec  # ctypes

        # The kernel says EINVAL both when nothing is loaded and when a freeze failed with it: look first.
        loaded = self.loaded()
        try:
            reboot_kexec()
        except OSError as e:
            kind = _EXECUTE.get(e.errno or 0, KexecFailed)
            if loaded and kind is NothingLoaded:
                kind = KexecFailed
            raise kind("jump to the loaded kernel", errno=e.errno)
        raise KexecFailed("the jump came back without a reason", errno=0)


def _open_file(path: str, what: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise InvalidRequest(f"cannot read the {what} {path!r}: {reason}")
    if not os.path.isfile(f"/proc/self/fd/{fd}"):  # noqa: PTH113
        os.close(fd)
        raise InvalidRequest(f"the {what} {path!r} is not a regular file")
    return fd


def _check(path: str, fd: int, cmdline: str) -> None:
    """Refuse now what kexec_file_load would refuse after everybody was frozen."""
    try:
        header = bootparam.decode(os.pread(fd, bootparam.HEADER_BYTES, 0))
    except ValueError as e:
        raise NotAKernel(f"{path}: {e}")
    if header.objection:
        raise NotAKernel(f"{path}: {header.objection}")
    length = len(os.fsencode(cmdline))
    longest = min(MAX_CMDLINE, header.cmdline_size)
    if length > longest:
        raise ImageInvalid(f"a command line of {length} bytes, where {path} takes {longest}")
    if "\0" in cmdline:
        raise ImageInvalid("a command line with a NUL in it")


def _digest(*fds: int) -> tuple[str, int]:
    """SHA-256 and size of the bytes of all files, one after the other; -1 is no file."""
    import hashlib  # dear to import, and not needed on the way back up

    digest, size = hashlib.sha256(), 0
    for fd in fds:
        offset = 0
        while fd >= 0 and (piece := os.pread(fd, _PIECE, offset)):
            digest.update(piece)
            offset += len(piece)
        size += offset
    return digest.hexdigest(), size


def _close(*fds: int) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)
