# SPDX-License-Identifier: LGPL-2.1-or-later
"""Loading a kernel and jumping to it (kernel/kexec_file.c, kernel/kexec_core.c)."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from khod.abi import bzimage
from khod.abi.placement import place, segments
from khod.errors import FormatError
from khod.folio.units import Range
from khod.simulated import image
from khod.simulated.layout import Release
from khod.simulated.task import Task


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image in scratch."""

    kernel: Release
    cmdline: str
    carries: bool
    """Whether it was loaded in the way that hands memory over."""


@dataclass(eq=False)
class Kexec:
    """What is loaded. Methods that processes call take the process first and raise OSError."""

    running: Release
    cmdline: str
    scratch: Sequence[Range]
    carries: bool
    """Whether this kernel has KHO on: it loads into scratch then, and hands memory over."""
    image: Loaded | None = None
    disabled: bool = False
    """sysctl kernel.kexec_load_disabled."""
    lockdown: str = "none"

    def load(self, task: Task, kernel: int, initrd: int, cmdline: str) -> None:
        """kexec_file_load(2). `kernel` and `initrd` (-1: none) are the host's descriptors, consumed."""
        try:
            self._permit()
            self.image = self._read(kernel, initrd, cmdline)
        finally:
            os.close(kernel)
            if initrd >= 0:
                os.close(initrd)

    def _read(self, kernel: int, initrd: int, cmdline: str) -> Loaded:
        try:
            contents = os.pread(kernel, os.fstat(kernel).st_size, 0)
            found = image.identify(contents, self.running)
        except FormatError as error:
            raise OSError(errno.ENOEXEC, str(error))
        header = bzimage.parse(contents[: bzimage.HEADER_SIZE])
        length = len(cmdline.encode("utf-8", "surrogateescape"))
        if length > header.longest_command_line:
            raise OSError(errno.EINVAL, "command line too long")
        if self.carries:
            self._place(header, length, initrd)
        return Loaded(found, cmdline, self.carries)

    def _place(self, header: bzimage.SetupHeader, cmdline: int, initrd: int) -> None:
        """Each piece into one scratch area. Raises OSError(EADDRNOTAVAIL)."""
        size = os.fstat(initrd).st_size if initrd >= 0 else 0
        for placed in place(self.scratch, segments(header, len(self.scratch), cmdline, size)):
            if placed.at is None:
                raise OSError(
                    errno.EADDRNOTAVAIL, f"{placed.segment.name} of {placed.segment.size} bytes fits into no scratch area"
                )

    def load_old(self, task: Task, cmdline: str) -> None:
        """kexec_load(2), as ``kexec -c`` uses it: accepted, carries nothing, says nothing."""
        self._permit()
        self.image = Loaded(self.running, cmdline, carries=False)

    def unload(self, task: Task) -> None:
        """KEXEC_FILE_UNLOAD."""
        self._permit()
        self.image = None

    def loaded(self, task: Task) -> bool:
        """/sys/kernel/kexec_loaded."""
        return self.image is not None

    def command_line(self, task: Task) -> str:
        """/proc/cmdline."""
        return self.cmdline

    def facts(self, task: Task) -> dict[str, Any]:
        """What sysctl, /proc and /sys tell of this kernel: the fields of `khod.core.ports.KernelFacts` that may differ."""
        formats = (self.running.kho, self.running.luo, self.running.memfd, "memblock-v1", "reserve-mem-v1")
        return {
            "cmdline": self.cmdline,
            "config": image.config(self.running),
            "lockdown": self.lockdown,
            "load_disabled": self.disabled,
            "scratch": [(area.start, area.end) for area in self.scratch],
            "formats": [name for name in formats if name],
        }

    def lock_down(self, task: Task, level: str) -> None:
        """/sys/kernel/security/lockdown, as an administrator writes it."""
        self.lockdown = level

    def _permit(self) -> None:
        if self.disabled:
            raise OSError(errno.EPERM, "kernel.kexec_load_disabled is set")
