# SPDX-License-Identifier: LGPL-2.1-or-later
"""The power supply: starts a kernel, and after a jump the next one, each as a new process.

What the next one is given is what a kernel would be given: the memory file and its boot parameters, in the machine's
directory. Nothing is inherited from the process before it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from khod.simulated.layout import JUMPED


def run(directory: Path, command: Sequence[str]) -> int:
    """Switch the machine in `directory` on and run `command` as init in each boot, until init exits; returns its status.

    A panic ends it as well, with status 86.
    """
    while True:
        status = boot(directory, command)
        if status != JUMPED:
            return status


def boot(directory: Path, command: Sequence[str]) -> int:
    """One boot: the exit status of the kernel's process, 85 when it jumped and the next one waits to be started."""
    inside, ours = os.pipe()
    try:
        argv = [sys.executable, "-m", "khod.simulated", "--kernel", str(inside), str(directory), "--init", *command]
        with subprocess.Popen(argv, pass_fds=(inside,)) as kernel:
            os.close(inside)
            inside = -1
            try:
                return kernel.wait()
            finally:
                os.close(ours)  # on the way out by an exception: the kernel notices, and ends what runs on it
                ours = -1
    finally:
        for fd in (inside, ours):
            if fd >= 0:
                os.close(fd)
