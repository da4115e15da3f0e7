# SPDX-License-Identifier: LGPL-2.1-or-later
"""Faults, injected where they happen to real programs: at the border between a process and its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENOSPC, EROFS

ANY = "*"
"""In place of a call's name: every call counts."""
CALLER, FIRST, SECOND = "caller", "first", "second"
"""Victims: the process that makes the call, and the two of the custodian (`khod.simulated.custodian`)."""


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
    """What the call fails with; 0: `victims` die instead."""
    after: bool = False
    """Whether they die when the call has taken effect, instead of before."""
    forever: bool = False
    """Whether each later call fails as well."""
    torn: str = ""
    """For store_append: what reaches the disk all the same: 'half' of the data, or as many 'nuls'."""
    pid: int = 0
    """Only calls of this process count; 0: everybody's."""
    victims: tuple[str, ...] = (CALLER,)
    """Who dies, all at once. The call goes on if the caller is none of them."""


class Faults:
    """What will go wrong, and when. Names of calls are those of `khod.simulated.kernel.Kernel.syscall`."""

    def __init__(self, known: Callable[[], frozenset[str]]) -> None:
        self._known = known
        self._pending: list[Fault] = []
        self._records: list[tuple[int, list[str]]] = []

    def fail(self, call: str, errno: int, *, nth: int = 1, forever: bool = False, pid: int = 0) -> None:
        """The `nth` call from now fails with `errno` and has no effect but that (a retrieve_fd that fails loses its file)."""
        self.add(Fault(call, nth, errno=errno, forever=forever, pid=pid))

    def die(
        self,
        call: str,
        *,
        nth: int = 1,
        after: bool = False,
        torn: str = "",
        pid: int = 0,
        victims: tuple[str, ...] = (CALLER,),
    ) -> None:
        """At the `nth` call from now `victims` die: before it has an effect, or `after`."""
        self.add(Fault(call, nth, after=after, torn=torn, pid=pid, victims=victims))

    def full_disk(self) -> None:
        """The disk takes the first part of what is written to it, and no more."""
        self.add(Fault("store_append", 1, errno=ENOSPC, torn="half", forever=True))

    def read_only_disk(self) -> None:
        """The disk cannot be changed."""
        for call in ("store_append", "store_cut"):
            self.fail(call, EROFS, forever=True)

    def add(self, fault: Fault) -> None:
        """Raises ValueError for a call or a victim that does not exist: such a fault would never strike, and its test prove
        nothing."""
        if fault.call != ANY and fault.call not in self._known():
            raise ValueError(f"no call {fault.call!r}")
        if not fault.victims or not set(fault.victims) <= {CALLER, FIRST, SECOND}:
            raise ValueError(f"victims {fault.victims!r}: {CALLER!r}, {FIRST!r} and {SECOND!r} can die")
        self._pending.append(fault)

    @contextmanager
    def recorded(self, pid: int) -> Iterator[list[str]]:
        """The names of all calls that process `pid` makes meanwhile, in their order: each is a place to die at."""
        record: tuple[int, list[str]] = (pid, [])
        self._records.append(record)
        try:
            yield record[1]
        finally:
            self._records.remove(record)

    @property
    def pending(self) -> bool:
        """Whether something is still to go wrong."""
        return bool(self._pending)

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        self._pending.clear()

    def strike(self, call: str, pid: int) -> Fault | None:
        """Count a call; the fault that it runs into, if any."""
        for wanted, calls in self._records:
            if wanted == pid:
                calls.append(call)
        hit: Fault | None = None
        for fault in list(self._pending):
            if fault.call not in (call, ANY) or fault.pid not in (0, pid):
                continue
            fault.countdown -= 1
            if fault.countdown <= 0 and hit is None:
                hit = fault
                if not fault.forever:
                    self._pending.remove(fault)
        return hit
