# SPDX-License-Identifier: LGPL-2.1-or-later
"""Other processes: the port `Processes` of the running kernel."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from khod.core.ports import Process
from khod.core.refusals import refusal
from khod.errors import InvalidRequest, KhodError

PF_KTHREAD = 0x00200000
"""include/linux/sched.h: the process is the kernel's own."""

_WORDS = {
    errno.ESRCH: "there is no such process",
    errno.EINVAL: "there is no such process",
    errno.EBADF: "it has no such descriptor",
}


class KernelProcesses:
    """The port `Processes` of the running kernel."""

    def listing(self) -> tuple[Process, ...]:
        """See the port."""
        own = os.getpid()
        pids = sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return tuple(process for pid in pids if pid != own and (process := _user_process(pid)))

    def descriptor(self, pid: int, fd: int) -> int:
        """See the port."""
        from khod.kernel.fetching import KHOD_TAKES, fetch  # for most hosts never

        fetched = fetch(pid, fd)
        if fetched.errno:
            raise _refusal(fetched.errno, pid, fd)
        if fetched.fd < 0:
            raise InvalidRequest(
                f"descriptor {fd} of process {pid} is {fetched.what!r}, which khod cannot keep", hint=f"khod takes {KHOD_TAKES}"
            )
        return fetched.fd


def _refusal(number: int, pid: int, fd: int) -> KhodError:
    what = f"number {fd} of process {pid}: {_WORDS.get(number, os.strerror(number))}"
    hint = "it takes the right to trace that process (ptrace)" if number in (errno.EPERM, errno.EACCES) else None
    return refusal("descriptor", number, what, hint=hint)


def _user_process(pid: int) -> Process | None:
    """The process; None when it is the kernel's own, or ended meanwhile."""
    try:
        # pid (comm) state ppid …, where comm may itself hold blanks and parentheses; flags is the 7th field after it.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    head, _, tail = stat.rpartition(")")
    state, flags = tail.split()[0], int(tail.split()[6])
    if flags & PF_KTHREAD or state in "ZX":
        return None
    return Process(pid, head.partition("(")[2])
