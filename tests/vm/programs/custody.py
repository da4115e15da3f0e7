# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of the host's custodian: ``keep NAME CONTENT``, ``read NAME``, ``names``, ``twins`` (who serves, who sleeps)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from khod.kernel.custody import KernelCustody


def twins() -> list[int]:
    """By the unit's control group: the one whose parent is not of it serves."""
    group = Path("/sys/fs/cgroup/system.slice/khod-custodian.service/cgroup.procs")
    pids = [int(word) for word in group.read_text().split()]
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in pids}
    return sorted(pids, key=lambda pid: parents[pid] in pids)


def main() -> None:
    """One call."""
    custody = KernelCustody()
    match sys.argv[1:]:
        case ["keep", name, content]:
            fd = os.memfd_create(name)
            os.write(fd, content.encode())
            custody.keep(name, fd)
        case ["read", name]:
            print(os.pread(custody.take(name), 100, 0).decode())
        case ["names"]:
            print(*custody.kept())
        case ["twins"]:
            print(*twins())


if __name__ == "__main__":
    main()
