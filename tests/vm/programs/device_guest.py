# SPDX-License-Identifier: LGPL-2.1-or-later
"""``device_guest NAME BYTES``: a guest as `guest` has it, with QEMU's edu device, which it lets at the page behind its memory.

In the next kernel ``vmm.c`` has them, if the initrd started that; else it claims them itself.
"""

from __future__ import annotations

import os
import signal
import sys

from khod.abi.vfio import PCI_COMMAND_MASTER
from khod.client import Claimed, Hold, Participant
from tests.vm.content import fill, filled
from tests.vm.programs.device import attach, command
from tests.vm.programs.guest import Guest
from tests.vm.programs.inside import notify, tell

WORD = 1024
"""Where in that page it leaves a word for the device to read."""


def cold(khod: Participant, name: str, size: int) -> int:
    """Everything is new; its memory."""
    ram = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x10)  # MFD_EXEC
    os.ftruncate(ram, size + 4096)
    fill(ram, size)
    os.pwrite(ram, b"from the old kernel", size + WORD)
    khod.register(name, {"ram": ram})
    attach(khod, name, ram, size, 4096)
    return ram


def main() -> None:
    name, size = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    guest = Guest(-1, size)
    with Participant(guest) as khod:
        claims = {one: khod.claim(one) for one in (name, "mappings", "edu")}
        if reasons := [claim.reason for claim in claims.values() if isinstance(claim, Hold)]:
            tell("hold", reason=reasons[0])
            sys.exit(1)
        came = {one: claim for one, claim in claims.items() if isinstance(claim, Claimed)}
        if came:
            guest.ram = came[name].take("ram")
            guest.last = guest.stamp
            master = bool(command(came["edu"].take("device")) & PCI_COMMAND_MASTER)
            tell("held", equal=filled(guest.ram, size), master=master)
        else:
            guest.ram = cold(khod, name, size)
        khod.start()
        for one in came:
            khod.finished(one)
        notify("READY=1")
        while True:
            guest.step()
            signal.sigtimedwait([], 0.001)


if __name__ == "__main__":
    main()
