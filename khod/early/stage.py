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
FAREWELL = 5.0
"""Seconds that a process which is killed may take to end."""
KILL = 9
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
    end = time.monotonic() + PATIENCE
    if not _ends([ours, os.pidfd_open(pid)], PATIENCE):
        say(f"nothing is restored after {PATIENCE:g} s: the boot goes on, and khod goes on with what there is")
        return True
    os.set_blocking(ours, False)
    try:
        said = os.read(ours, 3)
    except BlockingIOError:  # its death was heard of first
        return True
    runs = said[:1] != rootfs.NOBODY
    if said[1:2] != rootfs.MORE:
        return runs
    listener = system.taken(pid, said[2])
    # For as long as there is nobody else: the custodian must not let go of what anybody sends.
    system.pass_descriptors(listener, True)
    try:
        return drive(end - time.monotonic()) or runs
    finally:
        system.pass_descriptors(listener, False)
        os.close(listener)


def drive(seconds: float) -> bool:
    """Have khod.driven do its work, within so many seconds; whether it may have started anybody. Whatever it has not done by
    then is khod's: that must not meet it, so it does not live on. Raises OSError where it cannot be begun."""
    program = f"{__file__.rpartition('/early/')[0]}/driven.pyc"
    argv = [*paths.INTERPRETER, program]
    pid = os.posix_spawn(argv[0], argv, {"LANG": "C.UTF-8"})
    lives = os.pidfd_open(pid)
    if not _ends([lives], seconds):
        say(f"the drivers are not done after {PATIENCE:g} s: the boot goes on, and khod begins anew with what is theirs")
        os.kill(pid, KILL)
        if not _ends([lives], FAREWELL):
            return True  # in the kernel's hands, and does nothing any more
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        say(f"the drivers ended by signal {-status}: khod begins anew with what is theirs")
    return status != 0


def _ends(fds: list[int], seconds: float) -> bool:
    """Whether there is something to be heard from one of these in time."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(seconds, 0) * 1000))


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
