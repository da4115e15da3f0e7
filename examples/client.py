# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMM as khod sees one: memory, a vCPU that counts in it, and what becomes of both in a live update.

``python examples/client.py [SOCKET]`` before the jump, and again after it.
"""

import fcntl
import mmap
import os
import sys
import threading
import time

from khod.client import Claimed, Cold, Hold, Notice, Participant, Workload


class Guest(Workload):
    """Counts, in a register of its vCPU and in its memory."""

    vcpu, stopped = threading.Lock(), False

    def load(self, ram: int, register: int) -> None:
        """Memory and vCPU, as they were or as they begin."""
        self.memory, self.register = mmap.mmap(ram, 0), register

    def run(self) -> None:
        """The vCPU's thread."""
        while True:
            with self.vcpu:
                self.register += 1
                self.memory[:8] = self.register.to_bytes(8, "little")
            time.sleep(0.001)  # what a guest would do, in its stead

    def quiesce(self, notice: Notice) -> None:
        """Stop, and write what is not in memory."""
        self.stopped = self.vcpu.acquire()
        notice.states["guest"]["vcpu"].write(self.register.to_bytes(8, "little"))

    def aborted(self, notice: Notice) -> None:
        """Go on."""
        if self.stopped:
            self.stopped = False
            self.vcpu.release()


guest = Guest()
with Participant(guest, path=sys.argv[1] if sys.argv[1:] else "/run/khod/khod.sock") as khod:
    answer = khod.claim("guest", exclusive=True)
    match answer:
        case Hold(reason):
            sys.exit(f"the guest must not be started: {reason}")
        case Claimed():
            guest.load(answer.take("ram"), int.from_bytes(answer.states["vcpu"], "little"))
        case Cold():
            ram = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(ram, 16 << 20)
            fcntl.fcntl(ram, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            guest.load(ram, 0)
            khod.register("guest", {"ram": ram}, states={"vcpu": 8}, lifetime="process")
    khod.start()
    running = f"running from {guest.register}, memory says {int.from_bytes(guest.memory[:8], 'little')}"
    vcpu = threading.Thread(target=guest.run)
    vcpu.start()
    if isinstance(answer, Claimed):
        khod.finished("guest")  # it runs meanwhile: khod still compares its memory
    print(running, flush=True)
    vcpu.join()
