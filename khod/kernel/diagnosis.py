# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a device cannot be used, for people: which of the conditions of /dev/liveupdate is not met, and who holds it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TRUE = frozenset({"", "1", "y", "Y", "on", "t", "T"})
"""What kstrtobool() takes for true; a bare word counts too."""


def why_missing(root: Path = Path("/")) -> str:
    """Which condition of /dev/liveupdate this kernel does not meet, and what to do. `root` holds proc, sys and boot."""
    options = _kernel_config(root)
    if options is not None and "CONFIG_LIVEUPDATE" not in options:
        lacking = "CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE" if "CONFIG_KEXEC_HANDOVER" not in options else "CONFIG_LIVEUPDATE"
        return f"this kernel is built without {lacking} and CONFIG_LIVEUPDATE_MEMFD: boot one that has them"
    words = _parameters(root)
    default = options is not None and "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT" in options
    missing = []
    if not _enabled(words, "kho", default=default):
        missing.append("kho=on")
    if not _enabled(words, "liveupdate", default=False):
        missing.append("liveupdate=on")
    if missing:
        return f"add {' and '.join(missing)} to the kernel command line and boot again"
    if _registered(root):
        return "the kernel has the device: make its node (mount devtmpfs on /dev, or pass it into the container)"
    return (
        "kho=on and liveupdate=on are given: see the kernel log for 'KHO:' and 'luo:' (scratch memory that could not be "
        "reserved disables both; so does a kernel built without them)"
    )


def holders(path: str, proc: Path = Path("/proc")) -> list[str]:
    """Who has `path` open, as "NAME (pid N)"; only processes that we may look at."""
    found = []
    for process in proc.iterdir():
        if process.name.isdigit() and _holds(process, path):
            try:
                name = (process / "comm").read_text().strip()
            except OSError:
                name = "a process that just ended"
            found.append(f"{name} (pid {process.name})")
    return sorted(found)


def _holds(process: Path, path: str) -> bool:
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:  # ended, or not ours to look at
        return False
    for descriptor in descriptors:
        try:
            if str(descriptor.readlink()) == path:
                return True
        except OSError:
            continue
    return False


def _parameters(root: Path) -> dict[str, str]:
    words = (root / "proc/cmdline").read_text().split()
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _enabled(words: dict[str, str], name: str, *, default: bool) -> bool:
    return words[name] in _TRUE if name in words else default


def _registered(root: Path) -> bool:
    try:
        return bool(re.search(r"^\s*\d+ liveupdate$", (root / "proc/misc").read_text(), re.M))
    except OSError:
        return False


def _kernel_config(root: Path) -> frozenset[str] | None:
    """The options that are =y in the running kernel; None when nobody kept its configuration."""
    import gzip  # only for an error message

    try:
        text = gzip.decompress((root / "proc/config.gz").read_bytes()).decode()
    except OSError:
        try:
            text = (root / "boot" / f"config-{os.uname().release}").read_text()
        except OSError:
            return None
    return frozenset(re.findall(r"^(CONFIG_\w+)=y$", text, re.M))
