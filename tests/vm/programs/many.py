# SPDX-License-Identifier: LGPL-2.1-or-later
"""``many INSTANCES EACH``: register so many instances of so many descriptors, all different, which stay registered."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from khod.api.client import connect

if __name__ == "__main__":
    instances, each = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (each + 100, each + 100))
    with connect(Path("/run/khod/khod.sock")) as client:
        for number in range(instances):
            fds = [(f"f{index}", os.memfd_create(f"{number}-{index}", 0x10)) for index in range(each)]
            for _, fd in fds:
                os.ftruncate(fd, 4096)
            client.register(f"i{number}", "guestmemfd", fds, lifetime="persistent")
            for _, fd in fds:
                os.close(fd)
