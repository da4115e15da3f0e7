# SPDX-License-Identifier: LGPL-2.1-or-later
"""``device_guest NAME BYTES``: a guest as `guest` has it, with QEMU's edu device, which it lets at the page behind its memory.
In the next kernel it is ``vmm.c`` that has them."""

from __future__ import annotations

import os
import signal
import sys

from khod.client import Participant
from tests.vm.content import fill
from tests.vm.programs.device import attach
from tests.vm.programs.guest import Guest
from tests.vm.programs.inside import notify

WORD = 1024
"""Where in that page it leaves a word for the device to read."""


def main() -> None:
    name, size = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x10)  # MFD_EXEC
    os.ftruncate(ram, size + 4096)
    fill(ram, size)
    os.pwrite(ram, b"from the old kernel", size + WORD)
    guest = Guest(ram, size)
    with Participant(guest) as khod:
        khod.register(name, {"ram": ram})
        attach(khod, name, ram, size, 4096)
        khod.start()
        notify("READY=1")
        while True:
            guest.step()
            signal.sigtimedwait([], 0.001)


if __name__ == "__main__":
    main()
