# SPDX-License-Identifier: LGPL-2.1-or-later
"""``switching.py DIRECTORY``, as process 1 of namespaces of its own: starts a VMM from an initrd that is unpacked there, then
moves to another root as systemd does, and prints what the VMM saw, before and after."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

from khod.custodian.native import Long, error, function
from khod.early import record, starting, system

NR_PIVOT_ROOT = 155
"""arch/x86/entry/syscalls/syscall_64.tbl."""
SEES = "ulimit -n >&3; while sleep 0.05; do if [ -e /proc/1/root/marker ]; then echo new >&3; else echo old >&3; fi; done"
PATIENCE = 20


def pivot(new: str, old: str) -> None:
    os.chdir(new)
    if function("syscall")(Long(NR_PIVOT_ROOT), b".", os.fsencode(old)):
        raise error("pivot_root")
    os.chroot(".")
    os.chdir("/")


def told(fd: int, word: bytes) -> None:
    end = time.monotonic() + PATIENCE
    while not os.pread(fd, 1 << 20, 0).endswith(word + b"\n"):
        if time.monotonic() > end:
            sys.exit(f"the VMM does not say {word!r}: {os.pread(fd, 1 << 20, 0)[-100:]!r}")
        time.sleep(0.01)  # it has no other way to tell
    print(word.decode())


def main() -> None:
    root = sys.argv[1]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # as the custodian has it
    for below in ("old", "new"):
        Path(f"{root}/{below}").mkdir()
    pivot(root, "old")
    system.mount("proc", "/proc", "proc")
    memory, notes = os.memfd_create("ram"), record.begin()
    words = ["user:root", "vm-1", "khod.u.1"]
    record.note(notes, "start", *words, 0, 0)
    where = starting.prepare(clears=True, say=lambda text: None)
    if why := starting.start(where, ["/bin/sh", "-c", SEES], ["ram"], [memory], [], (notes, [words])):
        sys.exit(why)
    told(memory, b"old")
    if not os.pread(memory, 100, 0).startswith(b"1024\n"):
        sys.exit("the VMM has the custodian's limits")
    system.mount("tmpfs", "/new", "tmpfs")
    for below in ("proc", "old"):
        Path(f"/new/{below}").mkdir()
    system.mount("/proc", "/new/proc", "", system.MS_MOVE)
    with open("/new/marker", "w"):
        pass
    pivot("/new", "old")
    system.detach("/old")
    told(memory, b"new")


if __name__ == "__main__":
    main()
