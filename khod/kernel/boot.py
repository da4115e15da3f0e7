# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which boot this is: the port `BootInfo` of the running kernel."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from khod.abi import kexec_metadata
from khod.abi.bootparam import SETUP_KEXEC_KHO
from khod.core.ports import Boot

DEBUGFS = Path("/sys/kernel/debug/kho")
SETUP_DATA = Path("/sys/kernel/boot_params/setup_data")


class KernelBootInfo:
    """The port `BootInfo` of the running kernel. The directories are arguments for tests."""

    def __init__(self, debugfs: Path = DEBUGFS, setup_data: Path = SETUP_DATA) -> None:
        self._debugfs = debugfs
        self._setup_data = setup_data

    def boot(self) -> Boot:
        """See the port."""
        return self._boot

    @functools.cached_property
    def _boot(self) -> Boot:
        metadata = self._metadata()
        return Boot(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            release=os.uname().release,
            handover=(self._debugfs / "in").is_dir() or kho_setup_data(self._setup_data) is not None,
            kexec_count=metadata.kexec_count if metadata else 0,
            previous_release=metadata.previous_release if metadata else "",
        )

    def _metadata(self) -> kexec_metadata.KexecMetadata | None:
        try:
            return kexec_metadata.decode((self._debugfs / "in/sub_fdts/kexec-metadata").read_bytes())
        except OSError:  # a cold boot, a kernel before 7.1, or no debugfs
            return None


def kho_setup_data(directory: Path = SETUP_DATA) -> bytes | None:
    """``struct kho_data`` as the previous kernel left it for this one; None when this was no such boot.

    Readable by everybody and without debugfs, unlike all else that tells of a handover."""
    try:
        entries = sorted(directory.iterdir())
    except OSError:  # not x86, or no setup_data at all
        return None
    for entry in entries:
        try:
            if int((entry / "type").read_text(), 16) == SETUP_KEXEC_KHO:
                return (entry / "data").read_bytes()
        except (OSError, ValueError):
            continue
    return None
