# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why a device cannot be used, for people: which of the conditions of /dev/liveupdate is not met, and who holds it."""

from __future__ import annotations

import re
from pathlib import Path


def why_missing(root: Path = Path("/")) -> str:
    """Which condition of /dev/liveupdate this kernel does not meet, and what to do. `root` holds proc, sys and boot."""
    from khod.abi import cmdline  # only for an error message
    from khod.kernel.facts import kernel_config

    config = kernel_config(root)
    if config is not None and config.get("CONFIG_LIVEUPDATE") != "y":
        handover = config.get("CONFIG_KEXEC_HANDOVER") == "y"
        lacking = "CONFIG_LIVEUPDATE" if handover else "CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE"
        return f"this kernel is built without {lacking} and CONFIG_LIVEUPDATE_MEMFD: boot one that has them"
    options = cmdline.parse((root / "proc/cmdline").read_text())
    default = config is not None and config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT") == "y"
    missing = []
    if not options.flag("kho", default=default):
        missing.append("kho=on")
    if not options.flag("liveupdate", default=False):
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


def _registered(root: Path) -> bool:
    try:
        return bool(re.search(r"^\s*\d+ liveupdate$", (root / "proc/misc").read_text(), re.M))
    except OSError:
        return False
