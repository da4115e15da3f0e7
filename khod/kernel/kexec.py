# SPDX-License-Identifier: LGPL-2.1-or-later
"""kexec_file_load(2) and reboot(2): the port `Kexec` of the running kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

from khod.abi.kexec import KEXEC_FILE_NO_INITRAMFS, KEXEC_FILE_UNLOAD
from khod.core import images
from khod.core.ports import Image
from khod.core.refusals import refusal, refused
from khod.errors import KexecFailed

LOADED = Path("/sys/kernel/kexec_loaded")


class KernelKexec:
    """The port `Kexec` of the running kernel."""

    def open(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> Image:
        """See the port."""
        return images.open_image(kernel, initrd, self.running_cmdline() if cmdline is None else cmdline)

    def release(self, image: Image) -> None:
        """See the port."""
        images.close_image(image)

    def load(self, image: Image) -> None:
        """See the port."""
        from khod.kernel.libc import kexec_file_load  # ctypes

        images.check_unchanged(image)
        flags = 0 if image.initrd_fd >= 0 else KEXEC_FILE_NO_INITRAMFS
        with refused("load", image.kernel):
            kexec_file_load(image.kernel_fd, image.initrd_fd, os.fsencode(image.cmdline), flags)

    def unload(self) -> None:
        """See the port."""
        from khod.kernel.libc import kexec_file_load  # ctypes

        with refused("unload", "the loaded image"):
            kexec_file_load(-1, -1, b"", KEXEC_FILE_UNLOAD)

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
            if loaded and e.errno == errno.EINVAL:
                raise KexecFailed("execute: jump to the loaded kernel", errno=e.errno)
            raise refusal("execute", e.errno or 0, "jump to the loaded kernel")
        raise KexecFailed("execute: the jump came back without a reason", errno=0)
