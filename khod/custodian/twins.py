# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two processes with one table of descriptors (clone(2) with CLONE_FILES and without CLONE_VM).

A descriptor is closed when the last process of the table is gone: a SIGKILL, even in the middle of a system call that makes a
descriptor, leaves it open in the other process. One twin serves; the other sleeps on a pidfd until the first is dead and then
takes its place. Both do so before anything else: make a new twin, so that there is one process alone for as short as can be.

What follows from sharing the table and not the memory: a Python object that closes its descriptor when it is collected closes
it for both, and in the twin's copy of the memory there are such objects, of numbers that are long another file's. So no object
here owns a descriptor; they are numbers, and are closed by `os.close` alone.
"""

from __future__ import annotations

import select

from khod.custodian.native import Long, error, function

SIGKILL, SIGCHLD = 9, 17
CLONE_FILES = 0x400
"""include/uapi/linux/sched.h."""
NR_CLONE = 56
"""arch/x86/entry/syscalls/syscall_64.tbl."""


def clone() -> int:
    """fork(2), but for the table of descriptors, which parent and child share: the child's pid, 0 in the child.

    The process has one thread. Raises OSError.
    """
    # With the interpreter's lock held, as os.fork() does; the three calls around are what it does before and after, too.
    flags, zero = Long(CLONE_FILES | SIGCHLD), Long(0)
    syscall = function("syscall", held=True)
    before, child, parent = (
        function(f"PyOS_{name}", held=True) for name in ("BeforeFork", "AfterFork_Child", "AfterFork_Parent")
    )
    before()
    pid = syscall(Long(NR_CLONE), flags, zero, zero, zero, zero)
    if pid == 0:
        child()
        return 0
    failed = error("clone") if pid < 0 else None
    parent()
    if failed is not None:
        raise failed
    return pid


def outlive(pidfd: int) -> None:
    """Sleep until the process is dead."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll()
