# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults, injected where they happen to real programs: at the border between a process and its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class ProcessDied(BaseException):
    """The calling process is dead: killed, or gone with its kernel.

    No Exception, so that no handler of the dying program stops it; whatever its ``finally:`` blocks still call raises this
    again and has no effect, as if they had never run.
    """


class OpenFailed(OSError):
    """open("/dev/liveupdate") failed: what the errno of a call that begins with it cannot tell from its own."""


class KernelPanic(Exception):
    """The kernel gave up while booting; the machine stands still until it is reset."""


@dataclass(slots=True)
class Fault:
    """One thing that will go wrong: at the `countdown`-th call of `call` from now."""

    call: str
    countdown: int
    errno: int = 0
    """What the call fails with; 0: the process dies instead."""
    after: bool = False
    """Whether the process dies when the call has taken effect, instead of before."""
    forever: bool = False
    """Whether each later call fails as well."""
    torn: str = ""
    """For store_append: what reaches the disk before the process dies: 'half' of the data, or as many 'nuls'."""
    pid: int = 0
    """Only calls of this process count; 0: everybody's."""


class Faults:
    """What will go wrong, and when. Names of calls are those of `khod.simulated.kernel.Kernel.syscall`."""

    def __init__(self, known: Callable[[], frozenset[str]]) -> None:
        self._known = known
        self._pending: list[Fault] = []

    def fail(self, call: str, errno: int, *, nth: int = 1, forever: bool = False, pid: int = 0) -> None:
        """The `nth` call from now fails with `errno` and has no effect but that (a retrieve_fd that fails loses its file)."""
        self.add(Fault(call, nth, errno=errno, forever=forever, pid=pid))

    def die(self, call: str, *, nth: int = 1, after: bool = False, torn: str = "", pid: int = 0) -> None:
        """The process that makes the `nth` call from now dies there: before it has an effect, or `after`."""
        self.add(Fault(call, nth, after=after, torn=torn, pid=pid))

    def add(self, fault: Fault) -> None:
        """Raises ValueError for a call that does not exist: such a fault would never strike, and its test prove nothing."""
        if fault.call not in self._known():
            raise ValueError(f"no call {fault.call!r}")
        self._pending.append(fault)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self._pending.clear()

    def strike(self, call: str, pid: int) -> Fault | None:
        """Count a call; the fault that it runs into, if any."""
        hit: Fault | None = None
        for fault in list(self._pending):
            if fault.call != call or fault.pid not in (0, pid):
                continue
            fault.countdown -= 1
            if fault.countdown <= 0 and hit is None:
                hit = fault
                if not fault.forever:
                    self._pending.remove(fault)
        return hit
