# SPDX-License-Identifier: LGPL-2.1-or-later
"""``systemd_initrd PATH``: an initrd of this host as distributions have them, with systemd as its init, which mounts the root
file system and moves to it (bootup(7)). Without udev: the lab's kernel makes the device by itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from khod.abi import cpio
from khod.early import paths
from khod.initrd import contents, libraries

SYSTEMD = "/usr/lib/systemd"
PROGRAMS = (
    f"{SYSTEMD}/systemd", f"{SYSTEMD}/systemd-executor", "/usr/bin/systemctl", "/usr/bin/mount", "/usr/bin/umount",
)  # fmt: skip
CHECK = f"{SYSTEMD}/systemd-sysroot-fstab-check"
"""What initrd-cleanup.service waits for. It is the generator of mounts by another name; as such it would wait for udev."""
ROOT = """
[Unit]
DefaultDependencies=no
Before=initrd-root-fs.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/mount -t ext4 -o rw /dev/vda /sysroot
"""
NAME = "khod-lab-root.service"


def main() -> None:
    found: contents.Members = {}
    for program in PROGRAMS:
        for path in (program, *libraries.closure([os.path.realpath(program)]).values()):
            contents._add(found, path)
    units = Path(SYSTEMD, "system")
    for unit in sorted(units.iterdir()):
        if unit.suffix in {".target", ".slice"} or unit.name.startswith("initrd-"):
            contents._add(found, str(unit))
    below = {name.removeprefix(f"{paths.VMM.lstrip('/')}/"): member for name, member in found.items()}
    system = str(units).lstrip("/")
    below[f"{system}/{NAME}"] = cpio.file(ROOT.encode())
    below[f"{system}/initrd-root-fs.target.wants/{NAME}"] = cpio.link(f"../{NAME}")
    below[CHECK.lstrip("/")] = cpio.file(libraries.read(CHECK), 0o755)
    below["init"] = cpio.link(f"{SYSTEMD}/systemd")
    below["etc/initrd-release"] = below["etc/os-release"] = cpio.file(b"ID=khod-lab\n")
    for empty in ("sysroot", "dev", "proc", "sys", "run", "tmp", "var"):
        below[empty] = cpio.directory()
    Path(sys.argv[1]).write_bytes(cpio.archive(below))


if __name__ == "__main__":
    main()
