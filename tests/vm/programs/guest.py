# SPDX-License-Identifier: LGPL-2.1-or-later
"""``guest NAME BYTES``: a service whose memory comes through a jump by khod, as a VMM's would.

It writes the time stamp counter behind its memory for as long as it runs: until it is asked to stand still, and from the claim
on. It checks, whenever it goes on, that nobody wrote in between.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from khod.client import Claimed, Hold, Notice, Participant, Workload
from khod.kernel.tsc import reader
from tests.vm.content import fill, filled
from tests.vm.programs.inside import notify, tell


class Guest(Workload):
    """A guest with one processor, which does nothing but to look at the clock."""

    def __init__(self, ram: int, size: int) -> None:
        self.ram, self.size = ram, size
        read_tsc = reader()
        assert read_tsc
        self.read_tsc = read_tsc
        self.runs = threading.Lock()
        """Held by who lets it run, or keeps it still."""
        self.still = False
        self.last = 0

    def step(self) -> None:
        """One instruction."""
        with self.runs:
            if not self.still:
                assert not self.last or self.stamp == self.last, "somebody else wrote to the guest's memory"
                self.last = self.read_tsc()
                os.pwrite(self.ram, self.last.to_bytes(8, "little"), self.size)

    @property
    def stamp(self) -> int:
        return int.from_bytes(os.pread(self.ram, 8, self.size), "little")

    def quiesce(self, notice: Notice) -> None:
        with self.runs:
            self.still = True

    def aborted(self, notice: Notice) -> None:
        with self.runs:
            self.still = False


def main() -> None:
    name, size = sys.argv[1], int(sys.argv[2])
    guest = Guest(-1, size)
    began = guest.read_tsc()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with Participant(guest) as participant:
        answer = participant.claim(name)
        if isinstance(answer, Hold):
            tell("hold", reason=answer.reason)
            sys.exit(1)
        if isinstance(answer, Claimed):
            guest.ram = answer.take("ram")
            guest.last = guest.stamp
            held, last = guest.read_tsc(), guest.last
            equal = filled(guest.ram, size) and guest.stamp == last
            tell("held", last=last, began=began, held=held, compared=guest.read_tsc(), equal=equal)
            participant.finished(name)
        else:
            guest.ram = os.memfd_create("ram", 0x10)  # MFD_EXEC
            os.ftruncate(guest.ram, size + 4096)
            fill(guest.ram, size)
            participant.register(name, {"ram": guest.ram})
        participant.start()
        notify("READY=1")
        while True:
            guest.step()
            signal.sigtimedwait([], 0.001)


if __name__ == "__main__":
    main()
