# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first process of the next kernel.

It must not end, and must not hang: all that can fail is done in a child, which becomes the custodian. This one waits until
the child says that the boot may go on, or is dead, or takes too long, and goes on with the boot in any case.
"""

from __future__ import annotations

import os
import select
import sys
import time

from khod.early import paths, rootfs, system

PATIENCE = 120.0
"""Seconds that everything may take before the boot goes on without it."""
MOUNTS = (("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"))
TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from typing import NoReturn


def main(arguments: list[str]) -> NoReturn:
    """`arguments`: the launcher's time, then what the kernel gave to the init."""
    marks = {"interpreter": time.clock_gettime_ns(time.CLOCK_MONOTONIC)}
    try:
        for kind, target in MOUNTS:
            os.makedirs(target, exist_ok=True)
            system.mount(kind, target, kind)
    except OSError as error:
        say(str(error))
    runs = True
    try:
        marks["launched"] = _time(arguments[0])
        runs = restore(marks)
    except BaseException as error:
        say(f"the stage: {error!r}")
    try:
        rootfs.go_on(arguments[1:], runs, say)
    except BaseException as error:
        say(f"the boot cannot go on: {error}")
        raise


def restore(marks: dict[str, int]) -> bool:
    """Have the child do its work; return when the boot may go on: whether anybody may have been started. Raises OSError where
    there can be no child."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ours)
            from khod.early import custodian

            custodian.main(marks, theirs, say)
        except BaseException as error:
            say(f"the stage's custodian: {error!r}")
        finally:
            os._exit(1)
    os.close(theirs)
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    poll.register(os.pidfd_open(pid), select.POLLIN)
    if not poll.poll(PATIENCE * 1000):
        say(f"nothing is restored after {PATIENCE:g} s: the boot goes on, and khod goes on with what there is")
        return True
    os.set_blocking(ours, False)
    try:
        return os.read(ours, 1) != rootfs.NOBODY
    except BlockingIOError:  # its death was heard of first
        return True


def say(text: str) -> None:
    """A line to the kernel's log, which the journal takes over."""
    try:
        fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, f"<6>khod-initrd: {text}\n".encode("utf-8", "replace"))
        finally:
            os.close(fd)
    except OSError:
        pass  # nobody can be told, and nothing depends on it


def _time(digits: str) -> int:
    """The launcher's time, seconds and nanoseconds in letters from 'a' for each four bits: it has no room for more."""
    words = [int("".join(f"{ord(c) - ord('a'):x}" for c in digits[at : at + 16]), 16) for at in (0, 16)]
    return words[0] * 1_000_000_000 + words[1]


if __name__ == "__main__":
    if len(sys.argv) < 2 or os.getpid() != 1:
        sys.exit(f"{paths.LAUNCHER} is the first process of a kernel, and nobody else's")
    main(sys.argv[1:])
